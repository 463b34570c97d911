"""Heads that are read off the queries, where the mixed values are used as they are and no projection tells them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.errors import StructureError
from tests.structure.idioms import HEADS, SIZE, WIDTH, split


class Unmixed(nn.Module):
    """Heads whose values leave as they are; `each` makes something of the queries of every head alone."""

    def __init__(self, each: nn.Module) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.each(split(self.q(x))), split(self.k(x)), split(self.v(x))
        return (q @ k.mT / SIZE**0.5).softmax(-1) @ v


@pytest.mark.parametrize("each", [nn.Identity(), nn.RMSNorm(SIZE)])
def test_heads_are_the_parts_that_the_units_of_a_projection_were_split_into(each: nn.Module) -> None:
    (block,) = fmr.locate(fmr.run(Unmixed(each), torch.randn(2, 5, WIDTH))).attention
    assert (block.n_heads, block.head_dim) == (HEADS, SIZE)


def test_heads_that_were_split_before_the_last_projection_are_not_told_by_its_units() -> None:
    found = fmr.locate(fmr.run(Unmixed(nn.Linear(SIZE, SIZE)), torch.randn(2, 5, WIDTH)))
    assert found.attention == ()
    assert [one.reason for one in found.rejected if one.what == "attention"] == [
        "how many heads it has can be read neither off the way of its values into a projection nor off its queries"
    ]


class Agents(nn.Module):
    """Agents, queries pooled over positions, look at all; then each position looks at them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        agents = split(torch.nn.functional.adaptive_avg_pool1d(q.mT, 2).mT)
        q, k, v = split(q), split(k), split(v)
        z = (agents @ k.mT).softmax(-1) @ v
        return self.out(((q @ agents.mT).softmax(-1) @ z).transpose(1, 2).flatten(2))


def test_heads_of_agents_are_those_of_the_queries_that_they_are_pooled_of() -> None:
    found = fmr.locate(fmr.run(Agents(), torch.randn(2, 6, WIDTH)))
    assert [(one.n_heads, one.head_dim, one.kind) for one in found.attention] == [(HEADS, SIZE, "self")] * 2
    assert all(one.certified for one in found.attention)


class Learned(Agents):
    """Agents that are weights, of every head its own; or `turned` queries, each by a matrix that comes with it."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.agents, self.turned = nn.Parameter(torch.randn(HEADS, 2, SIZE)), turned

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        if self.turned:
            turns = torch.einsum("bni,bnj->bnij", x[..., :SIZE], x[..., :SIZE])
            q, k = (torch.einsum("bnij,bhnj->bhni", turns, one) for one in (q, k))
            return (q @ k.mT).softmax(-1) @ v
        agents = self.agents.expand(len(x), -1, -1, -1)
        return (agents @ k.mT).softmax(-1) @ v


def test_heads_of_agents_that_are_weights_are_those_of_their_keys() -> None:
    (block,) = fmr.locate(fmr.run(Learned(), torch.randn(2, 6, WIDTH))).attention
    assert (block.n_heads, block.head_dim, block.kind) == (HEADS, SIZE, "cross")
    assert block.pattern.layout == ("examples", "heads", "positions", "units")
    assert block.certified


def test_one_head_is_not_certified_where_the_units_of_keys_were_split_into_more() -> None:
    run = fmr.run(Learned(), torch.randn(2, 6, WIDTH))
    (block,) = fmr.locate(run).attention
    sites = {name: getattr(block, name) for name in ("q", "k", "v", "scores", "pattern", "z")}
    layouts = {name: ["axis 1" if one == "heads" else one for one in site.layout or ()] for name, site in sites.items()}
    told = {name: fmr.Site(site.id, layout=tuple(layouts[name])) for name, site in sites.items()}
    with pytest.raises(StructureError, match="has other units of a projection for each of its axis 1, as heads do"):
        replace(block, n_heads=1, n_kv_heads=1, **told).check(run)


class Single(nn.Module):
    """One head over keys that stand in windows of three, or that are sums over positions by weights."""

    def __init__(self, windows: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.sums = None if windows else nn.Parameter(torch.randn(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unsqueeze(1) for one in (self.q, self.k, self.v))
        if self.sums is not None:
            return self.out(((q @ (self.sums @ k).mT).softmax(-1) @ (self.sums @ v)).squeeze(1))
        k, v = (nn.functional.pad(one, (0, 0, 2, 0)).unfold(2, 3, 1) for one in (k, v))
        pattern = torch.einsum("bhqd,bhqdk->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bhqdk->bhqd", pattern, v).squeeze(1))


@pytest.mark.parametrize("windows", [False, True])
def test_keys_of_one_head_in_windows_or_summed_over_positions_are_no_heads(windows: bool) -> None:
    (block,) = fmr.locate(fmr.run(Single(windows), torch.randn(2, 6, WIDTH))).attention
    assert block.certified
    assert (block.n_heads, block.n_kv_heads) == (1, 1)


def test_queries_and_keys_that_are_products_themselves_do_not_tell_heads() -> None:
    found = fmr.locate(fmr.run(Learned(turned=True), torch.randn(2, 6, WIDTH)))
    assert found.attention == ()
    reasons = [one.reason for one in found.rejected if "how many heads" in one.reason]
    assert reasons == [
        "how many heads it has can be read neither off the way of its values into a projection nor off its queries"
    ]


class Chosen(nn.Module):
    """Each position asks by the projection that a router chooses for it; nothing projects what is mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.kv = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2 * WIDTH)
        self.q = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows, chosen = x.flatten(0, 1), self.router(x).flatten(0, 1).argmax(-1)
        order = chosen.argsort()
        parts = rows[order].split(chosen.bincount(minlength=2).tolist())
        made = torch.cat([q(part) for q, part in zip(self.q, parts, strict=True)])
        q = torch.zeros_like(rows).index_add(0, order, made).view_as(x)
        q, k, v = (split(one) for one in (q, *self.kv(x).chunk(2, -1)))
        return ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("positions", [6, HEADS])
def test_heads_of_queries_that_experts_make_are_those_of_their_view(positions: int) -> None:
    torch.manual_seed(0)
    (found,) = fmr.locate(fmr.run(Chosen(), torch.randn(2, positions, WIDTH))).attention
    assert (found.n_heads, found.head_dim, found.kind) == (HEADS, SIZE, "self")
    assert found.certified


class Padded(nn.Module):
    """Heads of 32 units, whose keys are masked for each example."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (made(x).unflatten(-1, (2, 32)).transpose(1, 2) for made in (self.q, self.k, self.v))
        if self.fused:
            z = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        else:
            z = (q @ k.mT).masked_fill(~seen[:, None, None], float("-inf")).softmax(-1) @ v
        return self.out(z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fused", [False, True])
def test_rows_of_padded_examples_are_told_whatever_rounds_otherwise(fused: bool, side: str) -> None:
    torch.manual_seed(0)
    seen = torch.arange(14) < torch.tensor([11, 9, 14, 12])[:, None]
    run = fmr.run(Padded(fused).eval(), torch.randn(4, 14, 64), seen if side == "right" else seen.flip(1))
    (found,) = fmr.locate(run).attention
    assert found.n_heads == 2
    assert found.certified
    assert found.certified.errors["rows"] < 1e-6


class Folded(Unmixed):
    """Groups of heads share keys, and lie in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x))[:, ::2], split(self.v(x))[:, ::2]
        q, k, v = q.unflatten(1, (-1, 2)).flatten(0, 1), k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None]
        z = ((q @ k.mT / SIZE**0.5).softmax(-1) @ v).unflatten(0, (len(x), -1)).flatten(1, 2)
        return self.each(z.transpose(1, 2).flatten(2))


def test_groups_in_the_batch_are_not_taken_for_as_many_heads() -> None:
    found = fmr.locate(fmr.run(Folded(nn.Linear(WIDTH, WIDTH)), torch.randn(2, 5, WIDTH)))
    assert all(block.n_kv_heads == 2 for block in found.attention)
