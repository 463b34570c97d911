"""A differential attention is one finding, in each of its spellings, by hand and in kernels; and its proof can fail."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import IdError, StructureError
from fmr.ids import Site
from fmr.runs.run import Run
from fmr.structure.attention.halves import Half
from fmr.structure.parts import Attention, Structure
from tests.structure.idioms import HEADS, SIZE, WIDTH, Plain, Stack, joined, split

TOLD: list[tuple[Tensor, Tensor, Tensor | float]] = []
"""The queries and keys of a model, and how much of its second map it takes away."""


class Differential(nn.Module):
    """Two queries and two keys for each head; a way to mix, and how much of the second map is taken."""

    def __init__(self, mix: Callable[..., Tensor], share: str = "one", norm: bool = False) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.v, self.out, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, HEADS)
        self.rates, self.one = nn.Parameter(torch.randn(4, SIZE) / 3), nn.Parameter(torch.tensor(0.4))
        self.mix, self.share, self.norm = mix, share, norm

    def rate(self, x: Tensor) -> Tensor | float:
        if self.share == "two products":
            a, b, c, d = self.rates
            return torch.exp(a @ b) - torch.exp(c @ d) + 0.2
        if self.share == "each head":
            return torch.arange(1, HEADS + 1)[:, None, None] / 8
        if self.share == "each query":
            return torch.sigmoid(self.gate(x)).transpose(1, 2)[..., None]
        return self.one if self.share == "one" else 0.25

    def forward(self, x: Tensor) -> Tensor:
        rate = self.rate(x)
        q, k, v = split(self.q(x), 2 * HEADS), split(self.k(x), 2 * HEADS), split(self.v(x))
        TOLD.append((q.detach(), k.detach(), rate.detach() if isinstance(rate, Tensor) else rate))
        z = self.mix(q, k, v, rate)
        return self.out(joined(F.rms_norm(z, (SIZE,)) * 0.8 if self.norm else z))


def pattern(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * SIZE**-0.5).softmax(-1)


def patterns(q: Tensor, k: Tensor, v: Tensor, rate: Tensor | float) -> Tensor:
    return (pattern(q[:, ::2], k[:, ::2]) - rate * pattern(q[:, 1::2], k[:, 1::2])) @ v


def products(q: Tensor, k: Tensor, v: Tensor, rate: Tensor | float) -> Tensor:
    return pattern(q[:, ::2], k[:, ::2]) @ v - pattern(q[:, 1::2], k[:, 1::2]) @ v * rate


def kernels(q: Tensor, k: Tensor, v: Tensor, rate: Tensor | float) -> Tensor:
    first, second = (F.scaled_dot_product_attention(q[:, n::2], k[:, n::2], v) for n in range(2))
    return first - rate * second


def pairs(q: Tensor, k: Tensor, v: Tensor, rate: Tensor | float) -> Tensor:
    p = pattern(q, k).unflatten(1, (HEADS, 2))
    return (p[:, :, 0] - rate * p[:, :, 1]) @ v


class Case(NamedTuple):
    """A model, its input, the run, what was located and the maps that are true."""

    model: nn.Module
    ids: Tensor
    run: Run
    found: Structure
    maps: list[Tensor]


@cache
def located(mix: Callable[..., Tensor], share: str = "one", norm: bool = False) -> Case:
    torch.manual_seed(0)
    TOLD.clear()
    model, ids = Stack(lambda: Differential(mix, share, norm), Plain).eval(), torch.randint(11, (2, 5))
    run = fmr.run(model, ids)
    each = [(pattern(q, k), rate) for q, k, rate in TOLD]
    return Case(model, ids, run, fmr.locate(run), [p[:, ::2] - rate * p[:, 1::2] for p, rate in each])


SHARES = ("one", "a number", "each head", "each query", "two products")
CASES = [(mix, share) for mix in (patterns, products, kernels, pairs) for share in SHARES]


@pytest.mark.parametrize(("mix", "share"), CASES)
def test_a_difference_of_two_softmaxes_is_one_attention(mix: Callable[..., Tensor], share: str) -> None:
    one = located(mix, share)
    assert len(one.found.attention) == len(one.found.layers) == 2
    assert [no for no in one.found.rejected if no.what == "attention"] == []
    for block, maps in zip(one.found.attention, one.maps, strict=True):
        assert (block.n_heads, block.n_kv_heads, block.head_dim, block.kind) == (HEADS, HEADS, SIZE, "self")
        assert block.minus is not None
        assert block.certified is not None
        torch.testing.assert_close(block.maps(one.run), maps)
        torch.testing.assert_close(block.maps(fmr.run(one.model, one.ids, keep=list(block.map_sites))), maps)
    assert "each a softmax less another" in repr(one.found)


def test_maps_need_both_patterns_and_their_rows_are_no_distribution() -> None:
    one = located(kernels)
    block = one.found.attention[0]
    with pytest.raises(IdError, match=r"keep=block\.map_sites"):
        block.maps(fmr.run(one.model, one.ids, keep=[block.pattern]))
    torch.testing.assert_close(block.maps(one.run).sum(-1), torch.full((2, HEADS, 5), 0.6))
    with pytest.raises(StructureError, match="takes one pattern from another"):
        block.factors(one.run)


def test_a_norm_may_follow() -> None:
    assert all(one.minus is not None for one in located(pairs, "two products", norm=True).found.attention)


def lies(found: Attention, other: Attention) -> Iterator[tuple[str, Attention]]:
    """False claims, each with one wrong field."""
    minus, theirs = found.minus, other.minus
    assert minus is not None
    assert theirs is not None
    yield "the halves exchanged", replace(found, **{n: getattr(minus, n) for n in NAMES}, minus=half(found, minus.share))
    yield "no half is taken away", replace(found, minus=None)
    yield "another share", replace(found, minus=minus._replace(share=0.37))
    yield "the share of another layer", replace(found, minus=minus._replace(share=theirs.share))
    yield "the half of another layer", replace(found, minus=theirs)
    yield "the first half twice", replace(found, minus=half(found, minus.share))
    yield "other queries", replace(found, minus=minus._replace(q=found.q))
    yield "other values", replace(found, v=other.v)
    yield "half as many heads", replace(found, n_heads=HEADS // 2, n_kv_heads=HEADS // 2, head_dim=2 * SIZE)
    yield "twice as many heads", replace(found, n_heads=2 * HEADS, n_kv_heads=2 * HEADS, head_dim=SIZE // 2)
    yield "cross", replace(found, kind="cross")
    for role in ("q", "k", "pattern"):
        site: Site = getattr(minus, role)
        turned = replace(site, layout=("heads", "examples", "positions", "units"))
        yield f"{role}: heads and examples exchanged", replace(found, minus=minus._replace(**{role: turned}))


NAMES = ("softmax", "q", "k", "scores", "pattern", "dim")


def half(found: Attention, share: Site | float) -> Half:
    return Half(found.softmax, found.q, found.k, found.scores, found.pattern, found.dim, share)


@pytest.mark.parametrize("mix", [patterns, products, kernels, pairs])
def test_a_false_difference_is_refused(mix: Callable[..., Tensor]) -> None:
    _, _, run, found, _ = located(mix, "two products")
    first, second = found.attention
    assert first.check(run)
    told = []
    for what, claim in lies(first, second):
        with suppress(StructureError):
            told += [what] if claim.check(run) else []
    assert told == []


def summed(q: Tensor, k: Tensor, v: Tensor, rate: Tensor | float) -> Tensor:
    first, second = (F.scaled_dot_product_attention(q[:, n::2], k[:, n::2], v) for n in range(2))
    return first + rate * second


def apart(q: Tensor, k: Tensor, v: Tensor, rate: Tensor | float) -> Tensor:
    first, second = (F.scaled_dot_product_attention(q[:, n::2], k[:, n::2], torch.roll(v, n, 1)) for n in range(2))
    return first - rate * second


@pytest.mark.parametrize(("mix", "told"), [(summed, 0), (apart, 2)])
def test_a_sum_of_two_attentions_and_a_difference_of_other_values_are_none(mix: Callable[..., Tensor], told: int) -> None:
    found = located(mix).found
    assert [one.minus for one in found.attention] == [None] * 4
    assert len([one for one in found.rejected if one.reason.endswith("as in differential attention")]) == told


def test_a_value_of_the_second_half_is_explained() -> None:
    one = located(products)
    minus = one.found.attention[0].minus
    assert minus is not None
    said = one.found.explain(minus.softmax)
    assert said.roles == ("the second pattern and second softmax of structure.attention[0]",)
