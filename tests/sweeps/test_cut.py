"""Positions are left out only where no edit reaches them, whatever other edits do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Program(nn.Module):
    """Tokens as vectors, and what a function makes of them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.one, self.two, self.function = nn.Embedding(16, 4), nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.two(self.function(self.one(self.embed(input_ids)))).tanh()


def pairs_see_each_other(x: Tensor) -> Tensor:
    block = torch.arange(x.shape[1]) // 2
    return x + (x @ x.mT).masked_fill(block[:, None] < block, -1e9).softmax(-1) @ x


def shuffled(x: Tensor) -> Tensor:
    """Position 2 is seen at 0, too, and 3 by nobody."""
    return torch.cat([x[:, 2:3], x[:, 1:3], x[:, 4:5], x[:, 4:]], 1)


PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "pairs of tokens see each other": pairs_see_each_other,
    "one position looks ahead": lambda x: x + F.pad(x[:, 3:4], (0, 0, 1, x.shape[1] - 2)),
    "shuffled": shuffled,
    "sums of what is dead at first": lambda x: x + (x - 5).relu().cumsum(1),
    "sums of roundings": lambda x: x + (x / 4).round().cumsum(1),
    "counts of loud ones": lambda x: x * (1 + (x.abs() > 6).float().cumsum(1)),
    "counts of loud ones, as truth values": lambda x: x * (1 + (x.abs() > 6).cumsum(1)),
    "sums of what is saturated": lambda x: x + (1 - F.hardtanh(x + 9)).cumsum(1),
    "dead, then turned round": lambda x: x + (x - 5).relu().flip(1),
    "dead, then the largest so far": lambda x: x + (x - 5).relu().cummax(1).values,
    "dead, then a convolution": lambda x: x + F.avg_pool1d((x - 5).relu().mT, 3, 1, 1).mT,
}


@pytest.mark.parametrize("edit", [edits.Scale(-200.0), edits.Scale(2.0), edits.Zero()], ids=repr)
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_mixes_positions_only_under_an_edit_is_the_loop(name: str, edit: edits.Edit) -> None:
    model, ids = Program(PROGRAMS[name]).eval(), torch.arange(8)[None]
    sites = [fmr.Site(path, positions=t) for path in ("one", "two") for t in range(8)]
    checked(model, {"input_ids": ids}, sites, edit)
    checked(model, {"input_ids": ids}, sites, edit, lambda out: out[:, 3].double().sum(1), at=3)


class Tap(nn.Module):
    """A causal convolution that hardly hears the token before, the first of which is loud, as attention sinks are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv, self.head = nn.Embedding(32, 4), nn.Conv1d(4, 4, 3, padding=1, groups=4), nn.Linear(4, 32)
        with torch.no_grad():
            self.embed.weight[0] *= 3000
            self.conv.weight.copy_(torch.tensor([2e-6, 1.0, 0.0]).expand(4, 1, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


def test_what_a_position_hardly_hears_is_not_left_out() -> None:
    """What is left out of a trial by rounding is not little everywhere."""
    ids = torch.tensor([[0, 5, 7, 3, 9, 4, 8, 2]])
    sites = [fmr.Site("embed", positions=t) for t in range(1, 8)]
    grid = checked(Tap().eval(), {"input_ids": ids}, sites, edits.Scale(0.5), lambda out: out[:, 1, 3], at=1)
    assert grid.how == "rows, cut"
    assert (grid.values[0] - grid.base).abs() > 1e-3


class Normed(nn.Module):
    """Blocks whose norm bounds what comes in; what is loud after it is heard at every position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(7))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for norm in self.norms:
            y = norm(x)
            x = x + y + (y.abs() - 20).relu().sum((1, 2), keepdim=True)
        return self.head(x)


def test_what_only_a_later_edit_reaches_is_seen() -> None:
    ids = torch.tensor([[1, 5, 7, 3, 9, 4, 8, 2]])
    sites = [fmr.Site(f"norms.{n}", positions=t) for n in range(7) for t in range(3, 8)]
    checked(
        Normed().eval(),
        {"input_ids": ids},
        [fmr.Site("embed", positions=3), *sites],
        edits.Scale(100.0),
        lambda out: out[:, 4, 3],
        at=4,
    )


class Layers(nn.Module):
    """Tokens as vectors, and functions of them with a projection after each."""

    def __init__(self, seed: int, width: int, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.first, self.functions = nn.Embedding(20, width), nn.Linear(width, width), functions
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in functions)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.first(self.embed(input_ids))
        for function, layer in zip(self.functions, self.layers, strict=True):
            x = layer(function(x))
        return x


def gated(x: Tensor) -> Tensor:
    return x * (x[..., :1] > 0).float()


def test_what_one_noise_leaves_shut_is_tried_with_others() -> None:
    """A comparison that one noise does not tip says nothing of what lies behind it."""
    model = Layers(5905, 6, lambda x: x + x.roll(-1, 1) * 0.5, gated, lambda x: x + (x.abs() > 4).float().flip(1)).eval()
    sites = [fmr.Site(path, positions=t) for path in ("layers.1", "first") for t in (0, 3)]
    checked(model, {"input_ids": torch.randint(0, 20, (1, 4))}, sites, edits.Zero())
