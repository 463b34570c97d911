"""Sweeps over many architectures: whichever way they go, they are the loop, and the way is the one that the model allows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fmr
from fmr import edits
from tests.models import Built, _decoder, build, tokens
from tests.promises.test_edits import padded
from tests.sweeps.looped import checked


def decoders(kind: str, **more: Any) -> Callable[[], Built]:
    """A small decoder of a class of transformers."""

    def make() -> Built:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**_decoder(head_dim=8, **more))
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        return model, (), {"input_ids": tokens(2, 6), "use_cache": False}

    return make


def left_padded() -> Built:
    model, inputs, _ = padded("left")
    return model, (), inputs


def window(attention: str) -> Callable[[], Built]:
    return decoders("Mistral", sliding_window=3, attn_implementation=attention)


class Recurrent(nn.Module):
    """A recurrent layer between two linear ones, with examples in its first axis or, inside, in the second."""

    def __init__(self, kind: type[nn.Module], batch_first: bool) -> None:
        super().__init__()
        self.first, self.rnn = nn.Linear(4, 4), kind(4, 8, batch_first=batch_first)
        self.out, self.batch_first = nn.Linear(8, 3), batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.out(self.rnn(h if self.batch_first else h.transpose(0, 1).exp())[0].tanh()).exp()


def recurrent(kind: type[nn.Module], batch_first: bool) -> Callable[[], Built]:
    return lambda: (Recurrent(kind, batch_first), (torch.randn(2, 5, 4),), {})


MODELS: dict[str, tuple[Callable[[], Built] | str, str]] = {
    "gpt2": ("gpt2", "rows, cut"),
    "gpt2, padded on the right, with a cache": ("gpt2_eager", "rows, cut"),
    "llama, grouped": ("llama", "rows, cut"),
    "llama, padded on the left": (left_padded, "rows, cut"),
    "qwen3": (decoders("Qwen3"), "rows, cut"),
    "gemma": (decoders("Gemma"), "rows, cut"),
    "gemma2, a window in every other layer": (decoders("Gemma2", sliding_window=3), "rows, cut"),
    "mistral, a window, eager": (window("eager"), "rows, cut"),
    "mistral, a window, sdpa": (window("sdpa"), "rows, cut"),
    "gpt-neox": (decoders("GPTNeoX"), "rows, cut"),
    "mixtral": ("mixtral", "rows, cut"),
    "mamba": ("mamba", "rows, cut"),
    "bert, padded": ("bert", "rows, cut"),
    "t5": ("t5", "rows"),
    "whisper": ("whisper", "rows, cut"),
    "vit": ("vit", "rows"),
    "nn.Transformer": ("transformer", "rows"),
    "nn.TransformerEncoder": ("encoder", "rows"),
    "gru": (recurrent(nn.GRU, batch_first=True), "rows"),
    "gru, time first": (recurrent(nn.GRU, batch_first=False), "rows"),
    "lstm": (recurrent(nn.LSTM, batch_first=True), "rows"),
    "cnn": ("cnn", "rows"),
    "functional_call": ("functional", "rows"),
    "in place, with a mean over the examples": ("in_place", "loop"),
}
"""Each with the way that it goes; positions are those of tokens."""


@pytest.mark.parametrize("name", MODELS)
def test_a_sweep_is_the_loop_and_goes_the_way_that_the_model_allows(name: str) -> None:
    make, how = MODELS[name]
    if isinstance(make, str):
        model, args, kwargs = build(make)
    else:
        torch.manual_seed(0)
        model, args, kwargs = make()
    inputs: Any = {**dict(zip(names(model), args, strict=False)), **kwargs}
    run = fmr.run(model.eval(), **inputs)
    sites = sites_of(run)
    grid = checked(model, inputs, sites, edits.Scale(0.5))
    assert grid.how == how, grid.why
    assert float((grid.values - grid.base).abs().max()) > 0


def names(model: nn.Module) -> list[str]:
    """The names of a model's arguments."""
    import inspect

    return list(inspect.signature(model.forward).parameters)


def sites_of(run: fmr.Run) -> list[Any]:
    """A few values that the model's ops made, evenly over its graph: whole, at one position, or two at once."""
    hidden = ("alias", "opaque", "getitem", "view", "chunk", "t", "detach")
    read = [node for node in run.graph.nodes if node.dtype.is_floating_point and run.graph.readers(node.id)]
    made = [n for n in read if n.parents and n.op not in hidden and len(n.shape) > 1 and not handed_on(run, n)]
    made = [node for node in made if made[-1].shape[0] in node.shape[:2]]
    some = made[len(made) // 3 :: max(1, len(made) // 6)]
    sites: list[Any] = [fmr.Site(node.id, positions=1 if len(node.shape) == 3 else None) for node in some]
    return [*sites, sites[0].id, tuple(dict.fromkeys((sites[0], sites[-1])))]


def handed_on(run: fmr.Run, node: fmr.Node) -> bool:
    return any(run.last.values.get(parent.id) is run.last.values.get(node.id) for parent in node.parents)
