"""What a model knows of facts, and whether it is as often right as it is sure, beside the same with objects exchanged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from analyzers.numbers.confidence import means
from analyzers.numbers.embed import Floats, Ints
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

BINS = 10


@dataclass(frozen=True, eq=False)
class Knowledge(Stored):
    """How a model ranks true completions among false ones.

    >>> known = analyzers.KnowledgeProbe(model, tokenizer).run(world.facts()[:96:3], progress=False)
    >>> known.accuracy > 0.9, known.accuracy_null < 0.4
    (True, True)

    By fact: gap, the log-probability of the true completion less that of the likeliest false one, in nats; p_true, its
    probability among all that were given; sure, the largest of these; right, 1 where that is the true one's; distance, the
    squared distance of these probabilities from the truth (Brier). `..._null`: the same with the completions of another
    fact, which are false here.
    """

    model: str
    prompts: tuple[str, ...] = field(repr=False)
    answers: tuple[str, ...] = field(repr=False)
    said: tuple[str, ...] = field(repr=False)
    relations: tuple[str, ...] = field(repr=False)
    options: Ints = field(repr=False)
    gap: Floats
    p_true: Floats
    sure: Floats
    right: Floats
    distance: Floats
    gap_null: Floats
    sure_null: Floats
    right_null: Floats
    distance_null: Floats
    seed: int

    @property
    def accuracy(self) -> float:
        """How often the true completion is the likeliest."""
        return float(self.right.mean())

    @property
    def accuracy_null(self) -> float:
        """The same of the completions of another fact."""
        return float(self.right_null.mean())

    @property
    def chance(self) -> float:
        """How often guesses would be right."""
        return float((1 / self.options).mean())

    @property
    def brier(self) -> float:
        """The mean squared distance of the probabilities from the truth, 0 to 2.

        Source: G. Brier, "Verification of forecasts expressed in terms of probability", 1950.
        """
        return float(self.distance.mean())

    @property
    def ece(self) -> float:
        """The expected calibration error: how far sureness and accuracy lie apart in ten bins, weighed by their facts.

        Source: C. Guo et al., "On calibration of modern neural networks", 2017.
        """
        return self._ece(self.bins())

    @property
    def ece_null(self) -> float:
        """The same of the completions of another fact."""
        return self._ece(self.bins(null=True))

    def _ece(self, bins: Floats) -> float:
        return float((np.abs(bins[:, 0] - bins[:, 1]) * bins[:, 2]).sum() / len(self.right))

    def bins(self, null: bool = False) -> Floats:
        """How sure, how often right, and how many facts, by tenths of sureness; zeros where there are none."""
        sure, right = (self.sure_null, self.right_null) if null else (self.sure, self.right)
        place = np.minimum((sure * BINS).astype(int), BINS - 1)
        count = np.bincount(place, minlength=BINS)
        several = [np.bincount(place, some, BINS) / np.maximum(count, 1) for some in (sure, right)]
        return np.stack([*several, count.astype(float)], 1)

    def table(self) -> DataFrame:
        """One row a fact.

        >>> analyzers.KnowledgeProbe(model, tokenizer).run(world.facts()[:24:3], progress=False).table()[["answer", "said"]]
        """
        import pandas as pd

        told = {"prompt": self.prompts, "answer": self.answers, "said": self.said, "relation": self.relations}
        names = ("gap", "p_true", "sure", "right", "gap_null", "right_null")
        return pd.DataFrame({**told, "options": self.options, **{name: getattr(self, name) for name in names}})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw how often answers are right by how sure the model is of them (a reliability diagram); returns the figure.

        >>> analyzers.KnowledgeProbe(model, tokenizer).run(world.facts()[:24:3], progress=False).plot().savefig("known.png")
        """
        from analyzers.sparsity.pictures import draw_knowledge
        from fmr.pictures.heatmap import returned

        return returned(draw_knowledge(self, ax)) if ax is None else draw_knowledge(self, ax)

    def __repr__(self) -> str:
        _, low, high = means(self.right[None], self.seed)
        return (
            f"Knowledge of {self.model}: {number_of(len(self.right), 'fact')}, {self.options.mean():.0f} completions each\n"
            f"  accuracy {self.accuracy:.3f} ({low[0]:.3f} to {high[0]:.3f}), with another fact's completions "
            f"{self.accuracy_null:.3f}, by chance {self.chance:.3f}\n"
            f"  log p(true) - log p(false) {self.gap.mean():.2f} nats, null {self.gap_null.mean():.2f}\n"
            f"  calibration error {self.ece:.3f}, null {self.ece_null:.3f}; Brier {self.brier:.3f}, null "
            f"{self.distance_null.mean():.3f}; seed {self.seed}"
        )
