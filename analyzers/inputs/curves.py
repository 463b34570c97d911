"""Deletion and insertion: what becomes of a target as cells are taken away or put back, beside random orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.inputs.opening import Asked
from analyzers.inputs.perturbed import NONE
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

FINER = 14
"""Cells along a side of a picture that are taken away and put back."""


@dataclass(frozen=True, eq=False)
class Curves(Stored):
    """The target as the cells with the largest scores are replaced, or are all that is there, beside random orders.

    >>> curves.table().columns.tolist()
    ['example', 'deletion', 'random deletion', 'insertion', 'random insertion', 'better']
    >>> curves.plot()

    The order is by what raises the target, or where it is lower at the input than at the baseline, by what lowers it.
    cells: how many, of the example with most. shares: of all cells of an example, by step. deletion, insertion: (examples,
    steps), the target as a share of the way from the baseline, 0, to the input, 1. random_deletion, random_insertion: the
    same of random orders, (examples, draws, steps).

    Source: V. Petsiuk, A. Das, K. Saenko, "RISE", 2018.
    """

    method: str
    target: tuple[str, ...]
    cells: int
    shares: Floats = field(repr=False)
    deletion: Floats = field(repr=False)
    insertion: Floats = field(repr=False)
    random_deletion: Floats = field(repr=False)
    random_insertion: Floats = field(repr=False)

    def areas(self) -> dict[str, Floats]:
        """The area under each curve by example: small is good for deletion, large for insertion."""
        every = {
            "deletion": self.deletion,
            "random deletion": self.random_deletion.mean(1),
            "insertion": self.insertion,
            "random insertion": self.random_insertion.mean(1),
        }
        return {name: _area(curve, self.shares) for name, curve in every.items()}

    @property
    def better(self) -> Floats:
        """The share of random orders that are worse in both curves together, by example: 1 for all of them."""
        own = _area(self.insertion - self.deletion, self.shares)
        others = _area(self.random_insertion - self.random_deletion, self.shares)
        found: Floats = (own[:, None] > others).mean(1)
        return found

    def table(self) -> DataFrame:
        """One row an example: the areas, and the share of random orders that are worse.

        >>> curves.table()["better"].min()
        """
        import pandas as pd

        return pd.DataFrame({"example": range(len(self.deletion)), **self.areas(), "better": self.better})

    def plot(self, ax: Axes | None = None, example: int = 0) -> Figure:
        """Draw both curves of an example over the spread of random ones; returns the figure.

        >>> curves.plot().savefig("curves.png")
        """
        from analyzers.inputs.lines import draw_curves
        from fmr.pictures.heatmap import returned

        return returned(draw_curves(self, ax, example)) if ax is None else draw_curves(self, ax, example)

    def __repr__(self) -> str:
        areas = {name: float(one.mean()) for name, one in self.areas().items()}
        return (
            f"Curves of {self.method} for {', '.join(dict.fromkeys(self.target))}: {number_of(self.cells, 'cell')}, "
            f"{number_of(len(self.deletion), 'example')}\n"
            f"  area under deletion {areas['deletion']:.2f} (random {areas['random deletion']:.2f}), insertion "
            f"{areas['insertion']:.2f} (random {areas['random insertion']:.2f}); better than {self.better.mean():.0%} of "
            f"{number_of(self.random_deletion.shape[1], 'random order')}"
        )


def _area(curve: Floats, shares: Floats) -> Floats:
    """The area under curves (..., steps), by trapezoids."""
    found: Floats = ((curve[..., 1:] + curve[..., :-1]) / 2 * np.diff(shares)).sum(-1)
    return found


def shares_of(cells: int, points: int) -> Any:
    """At how many cells of an example a target is taken."""
    return np.unique(np.linspace(0, cells, points + 1).round().astype(int))


def curves_of(asked: Asked, given: Tensor, signed: bool, points: int, draws: int) -> tuple[Floats, Floats]:
    """The shares of the cells of one example, and the target at these: of its own order and of random ones.

    The second is (1 + draws, 2, steps), 0 at the baseline and 1 at the input; of the two the first is deletion. signed:
    whether scores say what raises the target, so that a lower target than that of the baseline rests on the lowest ones.
    """
    cells = asked.cells(FINER)
    many, here = int(cells.max()) + 1, cells.cpu() != NONE
    with torch.no_grad():
        at, start = (float(asked.question(one)[0]) for one in (asked.question.value, asked.bases[:1]))
    if at == start:
        raise AnalyzerError(
            f"{asked.question.target.words} is {at:.4g} at the input and at the baseline, so that nothing is lost or gained "
            "on the way. Expected another target, or another baseline."
        )
    scores = given.double() * (-1 if signed and at < start else 1)
    by_cell = torch.zeros(many, dtype=torch.double).index_add(0, cells.cpu()[here], scores[here[0]])
    generator = torch.Generator().manual_seed(asked.own.seed)
    orders = [
        by_cell.argsort(descending=True, stable=True),
        *(torch.randperm(many, generator=generator) for _ in range(draws)),
    ]
    counts = shares_of(many, points)
    found = np.stack([_curve(asked, cells, order.tolist(), counts.tolist()) for order in orders])
    at, start = found[0, 0, 0], found[0, 0, -1]
    return counts / many, (found - start) / (at - start)


def together(several: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Curves of examples with different numbers of cells at all shares of any of them; between two, they are straight."""
    shares: Floats = np.unique(np.concatenate([own for own, _ in several]).round(12))
    return shares, np.stack([np.apply_along_axis(partial(_between, shares, own), -1, one) for own, one in several])


def _between(shares: Floats, own: Floats, one: Floats) -> Floats:
    found: Floats = np.interp(shares, own, one)
    return found


def as_value(given: Tensor, value: Tensor) -> Tensor | None:
    """The numbers of one example as they lie on its value (1, ...): also those of tokens or of patches of a picture."""
    if given.shape == value.shape[1:]:
        return given
    if given.dim() == 1 and value.dim() == 3 and len(given) == value.shape[1]:
        return (given[:, None] / value.shape[2]).expand(value.shape[1:])
    if given.dim() == 2 and value.dim() == 4:
        return nn.functional.interpolate(given[None, None], size=value.shape[2:])[0].expand(value.shape[1:])
    return None


def _curve(asked: Asked, cells: Tensor, order: Sequence[int], counts: Sequence[int]) -> Floats:
    """The target with the first cells of an order replaced by the baseline, and with these alone: (2, steps)."""
    question, rows = asked.question, asked.own.rows
    rank = torch.empty(len(order), dtype=torch.long, device=cells.device)
    rank[torch.tensor(order, device=cells.device)] = torch.arange(len(order), device=cells.device)
    early, found = rank[cells.clamp(min=0)], []
    for at in range(0, len(counts), max(1, rows // 2)):
        some = counts[at : at + max(1, rows // 2)]
        taken = torch.cat([early < many for many in some])
        value, other = question.value.expand_as(taken), asked.bases[:1].expand_as(taken)
        with torch.no_grad():
            both = question(torch.cat([torch.where(taken, other, value), torch.where(taken, value, other)]))
        found.append(both.double().cpu().view(2, len(some)).numpy())
    return np.concatenate(found, 1)
