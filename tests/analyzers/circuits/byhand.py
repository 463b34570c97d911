"""Circuits run by plain hooks on two shapes of models whose modules are known by name: what the tests compare with."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.models import TOKENS


class Projection(NamedTuple):
    """Where queries, keys or values come out: of which module, from which column on, and how many heads of them."""

    module: nn.Module
    start: int
    heads: int


class Layer(NamedTuple):
    """One layer: the norms before attention and memory, these two, and what makes the output of the heads."""

    norm: nn.Module
    projections: dict[str, Projection]
    output: nn.Module
    weight: Tensor
    second: nn.Module
    mlp: nn.Module


class Shape(NamedTuple):
    """A model in parts: heads are `heads` of `size`."""

    model: nn.Module
    embedding: nn.Module
    layers: list[Layer]
    final: nn.Module
    heads: int
    size: int


def joint() -> Shape:
    """One projection for queries, keys and values, absolute positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, initializer_range=0.4, **TOKENS)
    model = GPT2LMHeadModel(config).eval().double()
    layers = []
    for block in model.transformer.h:
        roles = {role: Projection(block.attn.c_attn, 16 * place, 2) for place, role in enumerate("qkv")}
        layers.append(Layer(block.ln_1, roles, block.attn.c_proj, block.attn.c_proj.weight.detach(), block.ln_2, block.mlp))
    return Shape(model, model.transformer.drop, layers, model.transformer.ln_f, 2, 8)


def grouped(**more: Any) -> Shape:
    """Four query heads that share two key-value heads, rotated positions, gated memories."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4, **sizes, **TOKENS, **more)
    model = LlamaForCausalLM(config).eval().double()
    layers = []
    for block in model.model.layers:
        made = block.self_attn
        roles = {"q": Projection(made.q_proj, 0, 4), "k": Projection(made.k_proj, 0, 2), "v": Projection(made.v_proj, 0, 2)}
        weight = made.o_proj.weight.detach().T
        norms = block.input_layernorm, block.post_attention_layernorm
        layers.append(Layer(norms[0], roles, made.o_proj, weight, norms[1], block.mlp))
    return Shape(model, model.model.embed_tokens, layers, model.model.norm, 4, 4)


Listen = Callable[[str, Tensor], Tensor]
"""What a reader hears instead of the stream: `(name of the reader, stream) -> stream`."""


class ByHand:
    """Runs of a model in which each reader hears what it is told; `written` are the writes of the last run by name."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.written = shape, dict[str, Tensor]()

    def run(self, tokens: Tensor, listen: Listen, embedding: Tensor | None = None) -> Tensor:
        """The logits."""
        with self._hooks(listen, embedding):
            logits: Tensor = self.shape.model(input_ids=tokens).logits
        return logits

    @contextmanager
    def _hooks(self, listen: Listen, embedding: Tensor | None) -> Iterator[None]:
        with ExitStack() as stack:
            hook = self.shape.embedding.register_forward_hook(lambda m, a, out: self._embed(out, embedding))
            stack.callback(hook.remove)
            for place, layer in enumerate(self.shape.layers):
                for one in self._of_layer(place, layer, listen):
                    stack.callback(one.remove)
            stack.callback(self.shape.final.register_forward_pre_hook(lambda m, a: (listen("logits", a[0]),)).remove)
            yield

    def _embed(self, out: Tensor, given: Tensor | None) -> Tensor:
        self.written["embedding"] = out if given is None else given
        return self.written["embedding"]

    def _of_layer(self, place: int, layer: Layer, listen: Listen) -> Iterator[Any]:
        streams: list[Tensor] = []
        yield layer.norm.register_forward_pre_hook(lambda m, a: streams.append(a[0]))
        for module in dict.fromkeys(one.module for one in layer.projections.values()):

            def project(m: nn.Module, args: Any, out: Tensor) -> Tensor:
                return self._project(place, layer, m, out, streams[-1], listen)

            yield module.register_forward_hook(project)

        def mix(m: nn.Module, args: Any) -> None:
            for head in range(self.shape.heads):
                rows = slice(head * self.shape.size, (head + 1) * self.shape.size)
                self.written[f"head {place}.{head}"] = args[0][..., rows] @ layer.weight[rows]

        yield layer.output.register_forward_pre_hook(mix)
        seconds: list[Tensor] = []
        yield layer.second.register_forward_pre_hook(lambda m, a: seconds.append(a[0]))

        def remember(m: nn.Module, args: Any, out: Tensor) -> Tensor:
            heard = layer.second.forward(listen(f"mlp {place}", seconds[-1]))
            self.written[f"mlp {place}"] = m.forward(heard)
            return self.written[f"mlp {place}"]

        yield layer.mlp.register_forward_hook(remember)

    def _project(self, place: int, layer: Layer, module: nn.Module, out: Tensor, stream: Tensor, listen: Listen) -> Tensor:
        columns = list(out.split(self.shape.size, -1))
        for role, one in layer.projections.items():
            if one.module is module:
                shared = self.shape.heads // one.heads
                for head in range(one.heads):
                    name = (
                        f"head {place}.{head}"
                        if shared == 1
                        else f"heads {place}.{shared * head}-{shared * head + shared - 1}"
                    )
                    heard = module.forward(layer.norm.forward(listen(f"{name} {role}", stream)))
                    column = one.start // self.shape.size + head
                    columns[column] = heard.split(self.shape.size, -1)[column]
        return torch.cat(columns, -1)


def as_is(name: str, stream: Tensor) -> Tensor:
    """A reader hears the stream."""
    return stream


def circuit(hand: ByHand, clean: Tensor, corrupted: Tensor, edges: set[tuple[str, str]]) -> Tensor:
    """The logits if every edge but these carries what it carried in the corrupted run."""
    hand.run(clean, as_is)
    whole = dict(hand.written)
    streams: dict[str, Tensor] = {}

    def note(name: str, stream: Tensor) -> Tensor:
        streams[name] = stream
        return stream

    hand.run(corrupted, note)
    noised = dict(hand.written)

    def listen(name: str, stream: Tensor) -> Tensor:
        told = [hand.written[writer] - noised[writer] for writer, reader in sorted(edges) if reader == name]
        return streams[name] + sum(told, torch.zeros_like(stream))

    return hand.run(corrupted, listen, whole["embedding"])


def slopes(
    hand: ByHand, clean: Tensor, corrupted: Tensor, metric: Callable[[Tensor], Tensor], alpha: float
) -> dict[tuple[str, str], float]:
    """What the metric gains to first order where a reader hears the difference that a writer makes between the runs, in a
    run whose embedding lies between clean (0) and corrupted (1)."""
    hand.run(clean, as_is)
    whole = dict(hand.written)
    hand.run(corrupted, as_is)
    noised, shares = dict(hand.written), dict[tuple[str, str], Tensor]()

    def listen(name: str, stream: Tensor) -> Tensor:
        for writer in noised:
            shares[writer, name] = torch.zeros((), dtype=stream.dtype, requires_grad=True)
            stream = stream + shares[writer, name] * (whole[writer] - noised[writer])
        return stream

    hand.run(clean, listen, torch.lerp(whole["embedding"], noised["embedding"], alpha))
    shares.clear()
    logits = hand.run(clean, listen, torch.lerp(whole["embedding"], noised["embedding"], alpha))
    metric(logits).sum().backward()
    return {edge: float(share.grad) for edge, share in shares.items() if share.grad is not None}
