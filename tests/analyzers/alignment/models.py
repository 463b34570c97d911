"""Causal models for tests, and what they say by going through them one setting at a time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from analyzers import CausalModel


def equality(values: Any = range(5), **settings: Any) -> CausalModel:
    """Whether the first two of four agree as the last two do."""
    functions = {"wx": lambda a, b: a == b, "yz": lambda c, d: c == d, "out": lambda wx, yz: wx == yz}
    return CausalModel(dict.fromkeys("abcd", values), functions, **settings)


def sums() -> CausalModel:
    """Sums of three digits, of which two are added first; an input leads to the output along two ways."""
    functions = {"left": lambda a, b: a + b, "right": lambda b, c: b * c, "out": lambda left, right: (left + right) % 7}
    return CausalModel(dict.fromkeys("abc", range(6)), functions)


def by_hand(model: CausalModel, inputs: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all variables, from the functions alone."""
    found: dict[str, Any] = {}
    for name, one in model.variables.items():
        given = [found[parent] for parent in one.parents]
        found[name] = fixed[name] if name in fixed else one.function(*given) if one.function else inputs[name]
    return found


class ByHand(nn.Module):
    """Equality of two pairs of numbers, by hand: units 0 to 3 of `first` tell whether a and b agree, 4 to 7 of c and d.

    Two units are a - b and b - a, two half of these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.third, self.last = nn.Linear(2, 2), nn.Linear(2, 2)
        pair = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.5, -0.5], [-0.5, 0.5]])
        with torch.no_grad():
            self.first.weight.copy_(torch.block_diag(pair, pair))
            self.second.weight.copy_(torch.block_diag(-torch.ones(1, 4), -torch.ones(1, 4)))
            self.second.bias.fill_(1.0)
            self.third.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
            self.last.weight.copy_(torch.tensor([[8.0, 8.0], [-8.0, -8.0]]))
            self.last.bias.copy_(torch.tensor([-4.0, 4.0]))
            self.first.bias.zero_()
            self.third.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        agree = self.second(self.first(x).relu()).relu()
        return self.last(self.third(agree).relu())


class Planted(nn.Module):
    """Two variables in directions of a hidden layer, x of 3 values in the first two of `turn`, y of 4 in the next three."""

    def __init__(self, turn: Tensor) -> None:
        super().__init__()
        self.turn = turn
        x, y = _corners(3) @ turn[:, :2].T, _corners(4) @ turn[:, 2:5].T
        self.hidden, self.out = nn.Linear(7, len(turn), bias=False), nn.Linear(len(turn), 12, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.cat([x, y]).T)
            self.out.weight.copy_(2 * (x[:, None] + y[None]).flatten(0, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.hidden(inputs))


def rotated(width: int = 8, seed: int = 0) -> Tensor:
    """A random rotation."""
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]


def _corners(many: int) -> Tensor:
    """So many points as far from each other as they can be on a sphere, in one dimension fewer."""
    points = torch.eye(many) - 1 / many
    directions = torch.linalg.svd(points)[2][: many - 1]
    return nn.functional.normalize(points @ directions.T, dim=1)


def planted() -> CausalModel:
    """What a `Planted` network computes."""
    functions = {"x": lambda a: a, "y": lambda b: b, "out": lambda x, y: 4 * x + y}
    return CausalModel({"a": range(3), "b": range(4)}, functions)


def one_hot(inputs: dict[str, int]) -> Tensor:
    """The inputs of a `Planted` network."""
    return torch.cat([torch.eye(3)[inputs["a"]], torch.eye(4)[inputs["b"]]])
