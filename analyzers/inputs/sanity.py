"""Whether attributions depend on what a model has learned: their rank correlation with those of randomised weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from analyzers.numbers.embed import Floats, Ints
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

DEPENDS = 0.5
"""With a correlation above this when all weights are random, attributions are said to depend little on them."""


def ranks(values: Floats) -> Floats:
    """The rank of each number; equal ones share theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: Floats = ((ends - counts + ends - 1) / 2)[place.reshape(-1)]
    return found


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's correlation of two lists of numbers; 0 where one of them is the same everywhere.

    >>> rank_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))
    1.0
    """
    a, b = (ranks(each.flatten().double().numpy()) for each in (one, other))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return round(float((a * b).sum() / size), 12) if size else 0.0


@dataclass(frozen=True, eq=False)
class Sanity(Stored):
    """How attributions change as weights are made random, from the last layer to the first.

    >>> sanity.table().columns.tolist()
    ['layer', 'randomised', 'correlation', 'of sizes']
    >>> sanity.plot()

    layers: the module that was made random last, by step, the first being none; randomised: how many were by then.
    signed, sizes: rank correlation of the scores with those of the trained model, and of their absolute values, the mean
    over examples. outputs: the target by step, of the first example. chance: how far a correlation of nothing may be from
    zero, one standard deviation.

    Source: J. Adebayo et al., "Sanity checks for saliency maps", 2018.
    """

    method: str
    target: tuple[str, ...]
    layers: tuple[str, ...] = field(repr=False)
    randomised: Ints
    signed: Floats
    sizes: Floats
    outputs: Floats
    chance: float

    @property
    def passed(self) -> bool:
        """Whether attributions of a model that has learned nothing are others: half of the correlation is gone at least."""
        return bool(abs(self.signed[-1]) < DEPENDS)

    def table(self) -> DataFrame:
        """One row a step: the layer that was made random, how many were, and both correlations.

        >>> sanity.table().query("correlation < 0.5")
        """
        import pandas as pd

        return pd.DataFrame(
            {"layer": self.layers, "randomised": self.randomised, "correlation": self.signed, "of sizes": self.sizes}
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw both correlations over the number of randomised layers; returns the figure.

        >>> sanity.plot().savefig("sanity.png")
        """
        from analyzers.inputs.lines import draw_sanity
        from fmr.pictures.heatmap import returned

        return returned(draw_sanity(self, ax)) if ax is None else draw_sanity(self, ax)

    def __repr__(self) -> str:
        head = (
            f"Sanity of {self.method} for {', '.join(dict.fromkeys(self.target))}: rank correlation with the trained model"
        )
        steps = ", ".join(f"{many} {one:.2f}" for many, one in zip(self.randomised, self.signed, strict=True))
        alike = " (they follow the input itself)" if self.sizes[-1] >= DEPENDS else ""
        sizes = f"{self.sizes[-1]:.2f}{alike}"
        verdict = (
            "depends on the weights"
            if self.passed
            else "depends LITTLE on the weights: much of it is there without learning"
        )
        return (
            f"{head}\n  by randomised layers from the top: {steps}\n  all {number_of(int(self.randomised[-1]), 'layer')} "
            f"random: {self.signed[-1]:.2f}, of absolute values {sizes}, chance ±{self.chance:.2f}: {verdict}"
        )
