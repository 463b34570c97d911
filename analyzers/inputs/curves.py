"""Deletion and insertion: what becomes of a target as cells are taken away or put back, beside random orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from analyzers.inputs.question import Question
from analyzers.numbers.embed import Floats
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Curves(Stored):
    """The target as the cells with the largest scores are replaced, or are all that is there, beside random orders.

    >>> curves.table().columns.tolist()
    ['example', 'deletion', 'random deletion', 'insertion', 'random insertion', 'better']
    >>> curves.plot()

    shares: of all cells, by step. deletion, insertion: (examples, steps), the target as a share of the way from the
    baseline, 0, to the input, 1. random_deletion, random_insertion: the same of random orders, (examples, draws, steps).

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


def curve(question: Question, base: Tensor, cells: Tensor, order: Sequence[int], counts: Sequence[int], rows: int) -> Floats:
    """The target with the first cells of an order replaced by the baseline, and with these alone: (2, steps)."""
    rank = torch.empty(len(order), dtype=torch.long, device=cells.device)
    rank[torch.tensor(order, device=cells.device)] = torch.arange(len(order), device=cells.device)
    early, found = rank[cells], []
    for at in range(0, len(counts), max(1, rows // 2)):
        some = counts[at : at + max(1, rows // 2)]
        taken = torch.cat([early < many for many in some])
        value, other = question.value.expand_as(taken), base.expand_as(taken)
        with torch.no_grad():
            both = question(torch.cat([torch.where(taken, other, value), torch.where(taken, value, other)]))
        found.append(both.double().cpu().view(2, len(some)).numpy())
    return np.concatenate(found, 1)
