"""Replays of what torch did otherwise by its state: autocast, random numbers, kernels; and sizes that an edit changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr import edits
from fmr.errors import ReplayError
from tests.models import build
from tests.promises.test_edits import alike, editable


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "encoder", "vit"])
def test_a_replay_of_a_pass_under_autocast_is_the_model_under_it(name: str, inside: bool) -> None:
    model, args, kwargs = build(name)
    cast = torch.autocast("cpu", torch.bfloat16)
    with cast:
        run = fmr.run(model, *args, **kwargs)
    verdict = run.verify()
    assert not verdict.differ
    assert not verdict.refused
    for value in editable(run.graph, most=8):
        if not run.graph[value].dtype.is_floating_point:
            continue
        with cast:
            expected = fmr.run(model, *args, keep=(), edits={value: edits.Scale(0.75)}, **kwargs)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            try:
                again = fmr.replay(run, {value: edits.Scale(0.75)})
            except ReplayError as error:
                if "is the very tensor" in str(error):
                    continue
                raise
        assert alike(again.output, expected.output), value
        assert torch.is_autocast_enabled("cpu") is False


def test_a_replay_inside_autocast_of_a_pass_without_is_that_of_the_pass() -> None:
    model, args, kwargs = build("gpt2")
    run = fmr.run(model, *args, **kwargs)
    asked = {"transformer.h.0": edits.Scale(0.5)}
    expected = fmr.run(model, *args, keep=(), edits=asked, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        assert alike(fmr.replay(run, asked).output, expected.output)
        assert not run.verify().differ


def test_a_sweep_under_autocast_is_the_loop_under_it() -> None:
    model, _, kwargs = build("gpt2")
    sites = [fmr.Site(f"transformer.h.{layer}", positions=t) for layer in range(2) for t in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        grid = fmr.sweep(model, kwargs, sites, edits.Scale(2.0), lambda out: out.logits[:, -1, 3], progress=False)
        loop = [fmr.run(model, keep=(), edits={site: edits.Scale(2.0)}, **kwargs).output.logits[:, -1, 3] for site in sites]
    assert grid.how.startswith("rows")
    torch.testing.assert_close(grid.values, torch.stack(loop), rtol=0.02, atol=0.01)


class Inner(nn.Module):
    """A part of the forward that turns autocast on or off by itself."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.first, self.last, self.enabled = nn.Linear(4, 4), nn.Linear(4, 4), enabled

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.last(h.float())


def test_autocast_turned_off_inside_a_pass_is_found_out_by_types_and_turned_on_inside_is_refused() -> None:
    model, x = Inner(enabled=False), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        run = fmr.run(model, x)
        expected = fmr.run(model, x, keep=(), edits={"first": edits.Scale(2.0)})
    assert run["last"].dtype == torch.float32
    assert torch.equal(fmr.replay(run, {"first": edits.Scale(2.0)}).output, expected.output)
    run = fmr.run(Inner(enabled=True), x)
    with pytest.raises(ReplayError, match="last/linear#0 is bfloat16 in the recording and float32 when it runs again"):
        fmr.replay(run, {"first": edits.Scale(2.0)})


# ---- random numbers

RANDOM: dict[str, Callable[[Tensor], Any]] = {
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "dropout1d": lambda x: F.dropout1d(x[None], 0.5, True)[0],
    "dropout2d": lambda x: F.dropout2d(x[None, None], 0.5, True)[0, 0],
    "dropout3d": lambda x: F.dropout3d(x[None, None, None], 0.5, True)[0, 0, 0],
    "dropout_": lambda x: F.dropout(x.clone(), 0.5, True, inplace=True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x[None], 0.5, True)[0],
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.5) + x,
    "normal": lambda x: torch.normal(x, 1.0),
    "normal_": lambda x: x.clone().normal_() + x,
    "uniform_": lambda x: x.clone().uniform_() * x,
    "exponential_": lambda x: x.clone().exponential_() * x,
    "cauchy_": lambda x: x.clone().cauchy_() * x,
    "rand_like": lambda x: x + torch.rand_like(x),
    "randn_like": lambda x: x + torch.randn_like(x),
    "poisson": lambda x: torch.poisson(x.exp()),
    "multinomial": lambda x: torch.multinomial(x.softmax(1), 2).float(),
    "binomial": lambda x: torch.binomial(x.exp().round() + 9, x.sigmoid()),
    "gamma": lambda x: torch._standard_gamma(x.exp()),
    "dirichlet": lambda x: torch._sample_dirichlet(x.exp()),
    "fractional pool": lambda x: F.fractional_max_pool2d(x.repeat(3, 3)[None], 2, output_ratio=(0.5, 0.5))[0],
    "sdpa": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], dropout_p=0.5)[0, 0],
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_refused_by_name(name: str) -> None:
    class Draws(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return RANDOM[name](x * 2) + 1

    x = torch.randn(4, 4)
    run = fmr.run(Draws(), x)
    verdict = run.verify()
    assert not verdict.differ
    state = torch.get_rng_state()
    with pytest.raises(ReplayError, match="drew random numbers"):
        fmr.replay(run, {"/mul#0": edits.Scale(0.5)})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["attention", "encoder", "lstm", "transformer"])
def test_dropout_inside_a_kernel_is_refused_by_name(kind: str) -> None:
    layers = {
        "attention": lambda: nn.MultiheadAttention(16, 2, dropout=0.5, batch_first=True),
        "encoder": lambda: nn.TransformerEncoderLayer(16, 2, 24, 0.5, batch_first=True),
        "lstm": lambda: nn.LSTM(16, 8, 2, dropout=0.5),
        "transformer": lambda: nn.Transformer(16, 2, 1, 1, 24, 0.5, batch_first=True),
    }

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(16, 16), layers[kind]()

        def forward(self, x: Tensor) -> Any:
            h = self.first(x)
            return (
                self.inner(h, h, h) if kind == "attention" else self.inner(h, h) if kind == "transformer" else self.inner(h)
            )

    run = fmr.run(Whole().train(), torch.randn(2, 5, 16))
    assert not run.verify().differ
    with pytest.raises(ReplayError, match="drew random numbers"):
        fmr.replay(run, {"first": edits.Scale(0.5)})


# ---- kernels and sizes


class Kernel(nn.Module):
    """Attention by a kernel that the model chooses."""

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(h, h, h) + 1


def test_a_kernel_that_the_model_chose_is_taken_again() -> None:
    model, x = Kernel(), torch.randn(2, 2, 9, 16)
    run = fmr.run(model, x)
    assert not run.verify().differ
    expected = fmr.run(model, x, keep=(), edits={"/mul#0": edits.Scale(0.5)})
    assert torch.equal(fmr.replay(run, {"/mul#0": edits.Scale(0.5)}).output, expected.output)


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.gt(0).nonzero() * 2,
    "unbind": lambda x: sum(x.gt(0).nonzero().unbind(0), torch.zeros(2)),
    "view": lambda x: x[x > 0].view(-1, 1).expand(-1, 3),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_an_edit_changes_is_refused_by_name(name: str) -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return SIZES[name](x * 2)

    run = fmr.run(Sizes(), torch.tensor([[1.0, -1.0], [2.0, 3.0]]))
    with pytest.raises(ReplayError, match=r"has shape .* under these edits, expected .*: its size depends on values"):
        fmr.replay(run, {fmr.Site("/mul#0", units=0): edits.Scale(-1.0)})


def test_positions_of_a_pass_that_goes_on_from_a_cache_are_the_models() -> None:
    model, _, kwargs = build("gpt2")
    ids = kwargs["input_ids"]
    with torch.no_grad():
        cache = [model(ids[:, :3], use_cache=True).past_key_values for _ in range(2)]
    site = fmr.Site("transformer.h.0", positions=4)
    run = fmr.run(model, ids[:, 3:], past_key_values=cache[0])
    expected = fmr.run(model, ids[:, 3:], past_key_values=cache[1], keep=(), edits={site: edits.Scale(3.0)})
    assert torch.equal(fmr.replay(run, {site: edits.Scale(3.0)}).output.logits, expected.output.logits)
    assert expected.receipts[site].fired == 1


# ---- how edits, edges and rows go together


def test_all_edges_of_a_writer_are_the_writer_and_a_row_is_a_replay() -> None:
    model, args, kwargs = build("gpt2")
    run = fmr.run(model, *args, **kwargs)
    for layer in range(2):
        writer = run.graph.module(f"transformer.h.{layer}.mlp").output.id
        add = run.graph.readers(writer)[0]
        readers = [node.id for node in run.graph.readers(writer)]
        every = fmr.replay(run, {fmr.Edge(writer, reader): edits.Scale(0.5) for reader in readers})
        node = fmr.replay(run, {writer: edits.Scale(0.5)})
        assert torch.equal(every.output.logits, node.output.logits)
        assert add.op == "add"
        alone = fmr.run(model, *args, keep=(), edits={writer: edits.Scale(0.5)}, **kwargs)
        assert torch.equal(node.output.logits, alone.output.logits)
        grid = fmr.sweep(model, kwargs, [writer], edits.Scale(0.5), lambda out: out.logits[:, -1, 3], progress=False)
        torch.testing.assert_close(grid.values[0], node.output.logits[:, -1, 3], rtol=1e-6, atol=1e-7)
