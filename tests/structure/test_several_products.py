"""Scores that are sums of several products, and queries that each have keys of their own: how many units and heads."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.errors import StructureError
from fmr.ids import Site
from fmr.runs.run import Run
from fmr.structure.parts import Attention, Structure
from tests.structure.idioms import HEADS, SIZE, TOKENS, WIDTH, Plain, Stack, joined, split, weight

LATENT, TURNED = 12, 4


class Latent(nn.Module):
    """Queries meet a latent, the up-projection of which is in them, and a turned part that all heads share."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.beside, self.q = beside, nn.Linear(WIDTH, HEADS * (SIZE + TURNED))
        self.down, self.out = nn.Linear(WIDTH, LATENT + TURNED), nn.Linear(WIDTH, WIDTH)
        self.keys, self.values = weight(HEADS, SIZE, LATENT), weight(HEADS, LATENT, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, turned = split(self.q(x)).split([SIZE, TURNED], -1)
        latent, shared = (one[:, None] for one in self.down(x).split([LATENT, TURNED], -1))
        q = q @ self.keys
        if self.beside:
            scores = torch.cat([q, turned], -1) @ torch.cat([latent, shared], -1).mT
        else:
            scores = q @ latent.mT + turned @ shared.mT
        return self.out(joined((scores / 4).softmax(-1) @ latent @ self.values))


class Two(nn.Module):
    """Two queries and two keys for each head, whose scores are summed up over a stack."""

    def __init__(self, total: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.other, self.key = (nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, other, key = (split(one(x)) for one in (self.q, self.k, self.v, self.other, self.key))
        return self.out(joined((self.total(torch.stack([q @ k.mT, other @ key.mT])) / 4).softmax(-1) @ v))


class Branches(nn.Module):
    """Means of blocks, the keys of chosen blocks, and a window, each with a gate (Yuan et al. 2025)."""

    def __init__(self, gathered: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gates, self.gathered = nn.Linear(WIDTH, 3 * HEADS), gathered

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        length, blocks = x.shape[1], x.shape[1] // 2
        parts = [one.unflatten(2, (blocks, 2)) for one in (k, v)]
        coarse = (q @ parts[0].mean(3).mT).softmax(-1)
        best = coarse.topk(2, -1).indices
        if self.gathered:
            at = best[..., None, None].expand(-1, -1, -1, -1, 2, SIZE)
            keys, values = (one[:, :, None].expand(-1, -1, length, -1, -1, -1).gather(3, at).flatten(3, 4) for one in parts)
            some = ((q[..., None, :] @ keys.mT).softmax(-1) @ values).squeeze(-2)
        else:
            seen = torch.zeros_like(coarse, dtype=torch.bool).scatter(-1, best, True).repeat_interleave(2, -1)
            some = (q @ k.mT).masked_fill(~seen, float("-inf")).softmax(-1) @ v
        near = (torch.arange(length)[:, None] - torch.arange(length)).abs() < 3
        last = (q @ k.mT).masked_fill(~near, float("-inf")).softmax(-1) @ v
        gates = torch.sigmoid(self.gates(x)).unflatten(-1, (3, HEADS)).permute(2, 0, 3, 1)[..., None]
        return self.out(joined(gates[0] * (coarse @ parts[1].mean(3)) + gates[1] * some + gates[2] * last))


class Biased(nn.Module):
    """Two streams, the second one narrower, whose attentions add up what queries and keys of both say."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.narrow = nn.Embedding(TOKENS, WIDTH), nn.Embedding(TOKENS, LATENT), LATENT // HEADS
        self.wide = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.small = nn.ModuleList(nn.Linear(LATENT, LATENT) for _ in range(8))

    def forward(self, ids: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.tokens(ids), self.places(places)
        for n in (0, 4):
            q, k, v, a, b, c = (split(one(z)) for ways, z in ((self.wide, x), (self.small, y)) for one in ways[n : n + 3])
            wide, small = q @ k.mT / SIZE**0.5, a @ b.mT / self.narrow**0.5
            x = x + self.wide[n + 3](joined((wide + small).softmax(-1) @ v))
            y = y + self.small[n + 3](joined((small + wide).softmax(-1) @ c))
        return x, y


def located(kind: Callable[[], nn.Module]) -> tuple[Run, Structure]:
    torch.manual_seed(0)
    run = fmr.run(Stack(kind, Plain, 1).eval(), torch.randint(TOKENS, (2, 6)))
    return run, fmr.locate(run)


def holds(claim: Attention, run: Run) -> bool:
    try:
        return bool(claim.check(run))
    except StructureError:
        return False


SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda scores: scores.sum(0),
    "einsum": lambda scores: torch.einsum("nbhqk->bhqk", scores),
    "einsum with dots": lambda scores: torch.einsum("n...->...", scores),
    "weighed": lambda scores: torch.einsum("nbhqk,n->bhqk", scores, torch.tensor([0.7, 0.3])),
}
SIZES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "a latent and a turned part": (lambda: Latent(False), LATENT + TURNED, 1),
    "both side by side": (lambda: Latent(True), LATENT + TURNED, 1),
    **{f"two, {name}": (lambda total=total: Two(total), 2 * SIZE, HEADS) for name, total in SUMS.items()},
}


@pytest.mark.parametrize("name", SIZES)
def test_a_head_has_the_units_of_all_products_that_are_summed_up(name: str) -> None:
    kind, size, shared = SIZES[name]
    run, found = located(kind)
    (block,) = found.attention
    assert (block.n_heads, block.n_kv_heads, block.head_dim, block.kind) == (HEADS, shared, size, "self")
    assert not any(holds(replace(block, head_dim=wrong), run) for wrong in (SIZE, LATENT, TURNED, 3 * SIZE) if wrong != size)
    constants = [node.id for node in run.graph.nodes if node.op == "tensor"]
    assert not any(holds(replace(block, q=Site(one, layout=("units",))), run) for one in constants)
    if run.graph[block.q.id].shape[-1] < size:
        with pytest.raises(StructureError, match="adds up products of several queries and keys"):
            block.factors(run)


def test_what_another_stream_says_of_scores_is_a_bias() -> None:
    torch.manual_seed(0)
    run = fmr.run(Biased().eval(), torch.randint(TOKENS, (2, 6)), torch.randint(TOKENS, (2, 6)))
    found = fmr.locate(run)
    narrow = LATENT // HEADS
    assert sorted((block.head_dim, block.kind) for block in found.attention) == [(narrow, "self")] * 2 + [(SIZE, "self")] * 2
    for block in found.attention:
        assert not holds(replace(block, head_dim=SIZE + narrow), run)
        with pytest.raises(StructureError, match="adds up products of several queries and keys"):
            block.factors(run)


@pytest.mark.parametrize("gathered", [True, False])
def test_each_branch_of_a_sparse_attention_is_one(gathered: bool) -> None:
    run, found = located(lambda: Branches(gathered))
    assert [(one.n_heads, one.n_kv_heads, one.head_dim, one.kind) for one in found.attention] == [(4, 4, 8, "self")] * 3
    assert [one for one in found.rejected if one.what == "attention"] == []
    for block in found.attention:
        assert not any(holds(replace(block, n_kv_heads=number), run) for number in (1, 2))
        assert not holds(replace(block, kind="cross"), run)
