"""Positions are left out only where no edit reaches them, whatever other edits do."""

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from tests.sweeps.looped import checked


class Tower(nn.Module):
    """Attention of one head, causal or not."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.causal = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), causal

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        if self.causal:
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -1e9)
        return scores.softmax(-1) @ self.v(x)


class Towers(nn.Module):
    """Two towers over the same tokens, whose sum is read at every position by a causal one."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gate = nn.Embedding(32, 8), gate
        self.one, self.first = nn.Linear(8, 8), Tower(causal=True)
        self.two, self.second = nn.Linear(8, 8), Tower(causal=False)
        self.last, self.head = Tower(causal=True), nn.Linear(8, 32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        one = self.first(self.one(x))
        two = self.second(self.two(x + self.gate * one))
        return self.head(self.last(one + two))


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize("at", [2, 5])
def test_what_one_edit_reaches_is_not_what_another_reaches(gate: float, at: int) -> None:
    """With a gate of zero the first tower's edits do not move the second, whose own reach all positions."""
    model, ids = Towers(gate).eval(), torch.randint(0, 32, (2, 6))
    sites = [fmr.Site(path, positions=t) for path in ("one", "two") for t in range(1, 6)]
    grid = checked(model, {"input_ids": ids}, sites, edits.Scale(3.0), lambda out: out[:, at, 3], at=at)
    assert grid.how == "rows, cut"
    assert (grid.values[5:] != grid.base).all()  # edits at late positions of the second tower reach early ones


def test_edits_that_mix_positions_see_all_of_them() -> None:
    model, ids = Towers(1.0).eval(), torch.randint(0, 32, (2, 6))

    def turned(value: Tensor, context: object) -> Tensor:
        return value.flip(1)

    sites = [fmr.Site("one", units=slice(2)), fmr.Site("two", positions=slice(2, None)), "last", "first"]
    assert checked(model, {"input_ids": ids}, sites, turned, lambda out: out[:, 3, 3], at=3).how == "rows, cut"
