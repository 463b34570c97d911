"""The loss as fewer coefficients or weights are kept, in three orders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analyzers.numbers.embed import Floats
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class PruningCurves(Stored):
    """What pruning costs: `loss` (orders, shares), at each share of what is kept.

    >>> analyzers.Pruning(model, tokenizer).run(texts[:2], keep=[1.0, 0.5]).orders
    ('magnitude', 'effect', 'random')

    keep: the shares. base: the loss of the model as it is. The random order is the null of the two others.
    """

    model: str
    what: str
    orders: tuple[str, ...]
    keep: Floats
    loss: Floats
    base: float
    examples: int
    seed: int

    def least(self, more: float = 0.1) -> dict[str, float]:
        """By order the smallest share that was kept with a loss of no more than so much above that of the whole model.

        >>> analyzers.Pruning(model, tokenizer).run(texts[:2], keep=[1.0, 0.5]).least(more=1000.0)["random"]
        0.5

        NaN where there is none.
        """
        fits = self.loss <= self.base + more
        return {
            order: float(self.keep[row].min()) if row.any() else float("nan")
            for order, row in zip(self.orders, fits, strict=True)
        }

    def table(self) -> DataFrame:
        """One row a share, with the loss in each order.

        >>> analyzers.Pruning(model, tokenizer).run(texts[:2], keep=[1.0, 0.5]).table()
        """
        import pandas as pd

        return pd.DataFrame({"keep": self.keep, **dict(zip(self.orders, self.loss, strict=True))})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the loss by the share that is kept, an order a line; returns the figure.

        >>> analyzers.Pruning(model, tokenizer).run(texts[:2], keep=[1.0, 0.5]).plot().savefig("pruning.png")
        """
        from analyzers.sparsity.pictures import draw_curves
        from fmr.pictures.heatmap import returned

        return returned(draw_curves(self, ax)) if ax is None else draw_curves(self, ax)

    def __repr__(self) -> str:
        shown = np.argsort(-self.keep, kind="stable")
        rows = [
            f"  {order}: " + ", ".join(f"{row[n]:.3f} at {self.keep[n]:g}" for n in shown)
            for order, row in zip(self.orders, self.loss, strict=True)
        ]
        head = f"PruningCurves of {self.model}: {self.what}, loss {self.base:.3f} over {number_of(self.examples, 'example')}"
        return "\n".join([f"{head}, seed {self.seed}", *rows])
