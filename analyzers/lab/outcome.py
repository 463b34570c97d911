"""What a test of a hypothesis came to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from analyzers.lab.comparisons import CORRECTIONS, check_spread, compared, corrected, effect_size, interval
from analyzers.lab.errors import LabError
from analyzers.lab.flame import canvas
from analyzers.numbers.embed import Floats
from analyzers.results import Stored
from fmr.pictures.heatmap import returned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class Outcome(Stored):
    """Whether numbers differ from those under a null, by the same seeds or inputs.

    >>> outcome.p < 0.05, outcome.rejected()
    (array([ True]), ['longer'])

    names: of what was compared. values and nulls: (comparisons, pairs). statistic and p: of the test; corrected: p for this
    many comparisons. effect: the mean difference in standard deviations of the differences (Cohen's d of pairs). low and
    high: 95 % interval of the mean difference by Student's t, on two sides whatever the test. least: the least p that so
    many pairs can give. versions: those of the runs, in which more is kept.
    """

    name: str
    null: str
    test: str
    alternative: str
    correction: str
    names: tuple[str, ...]
    values: Floats = field(repr=False)
    nulls: Floats = field(repr=False)
    labels: tuple[str, ...] = field(repr=False)
    statistic: Floats
    p: Floats
    corrected: Floats
    effect: Floats
    low: Floats
    high: Floats
    least: float
    versions: tuple[str, ...] = field(repr=False)
    seed: int

    @property
    def differences(self) -> Floats:
        """By comparison, how much larger values are than those under the null: (comparisons, pairs)."""
        return self.values - self.nulls

    def rejected(self, alpha: float = ALPHA) -> list[str]:
        """The comparisons of which the null is rejected, after correction."""
        return [name for name, p in zip(self.names, self.corrected, strict=True) if p <= alpha]

    @staticmethod
    def together(outcomes: Iterable[Outcome], correction: str = "holm") -> Outcome:
        """Several outcomes as one family: their p values are corrected for all comparisons of all of them.

        >>> analyzers.Outcome.together([outcome, outcome]).corrected == 2 * outcome.p
        array([ True,  True])
        """
        every = list(outcomes)
        if not every or correction not in CORRECTIONS:
            raise LabError(f"Outcome.together got {len(every)} outcomes and {correction!r}, expected one of {CORRECTIONS}.")
        pairs = {one.values.shape[1] for one in every}
        if len(pairs) > 1:
            raise LabError(
                f"The outcomes have {sorted(pairs)} pairs, expected the same number. Give the same seeds to each."
            )
        names = tuple(f"{one.name}: {name}" if name != one.name else name for one in every for name in one.names)
        p = _joined(every, "p")
        return replace(
            every[0],
            name=", ".join(dict.fromkeys(one.name for one in every)),
            null=", ".join(dict.fromkeys(one.null for one in every)),
            test=", ".join(dict.fromkeys(one.test for one in every)),
            correction=correction,
            names=names,
            values=_joined(every, "values"),
            nulls=_joined(every, "nulls"),
            statistic=_joined(every, "statistic"),
            p=p,
            corrected=corrected(p, correction),
            effect=_joined(every, "effect"),
            low=_joined(every, "low"),
            high=_joined(every, "high"),
            least=max(one.least for one in every),
            versions=tuple(version for one in every for version in one.versions),
        )

    def table(self) -> DataFrame:
        """One row a comparison."""
        import pandas as pd

        columns = {"mean": self.values.mean(1), "null": self.nulls.mean(1), "difference": self.differences.mean(1)}
        rest = ("low", "high", "effect", "statistic", "p", "corrected")
        return pd.DataFrame({"name": self.names} | columns | {name: getattr(self, name) for name in rest})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw each difference, its mean with its interval, and zero; returns the figure."""
        figure, axes = canvas(ax, 7.0, 1.2 + 0.4 * len(self.names))
        places = np.arange(len(self.names))[::-1]
        for place, row, low, high, p in zip(places, self.differences, self.low, self.high, self.corrected, strict=True):
            axes.plot(row, np.full(len(row), place + 0.15), "|", color="#B8B8B8")
            axes.plot([low, high], [place, place], color="#08519C", linewidth=2)
            axes.plot(row.mean(), place, "o", color="#08519C")
            axes.annotate(f"p {p:.2g}", (high, place), (6, -3), textcoords="offset points", fontsize=8)
        axes.axvline(0, color="#333333", linewidth=0.8)
        axes.set_yticks(places, self.names)
        axes.set_ylim(-0.6, len(self.names) - 0.4)
        axes.set_xlabel(f"{self.name} - {self.null}")
        axes.margins(x=0.12)
        return returned(figure) if ax is None else figure

    def __repr__(self) -> str:
        n = self.values.shape[1]
        more = f", corrected by {self.correction} for {len(self.names)}" if len(self.names) > 1 else ""
        head = f"Outcome of {self.name} beside {self.null}: {self.test}, {self.alternative}, {n} pairs{more}"
        means = self.values.mean(1), self.nulls.mean(1)
        rows = zip(self.names, *means, self.low, self.high, self.effect, self.corrected, strict=True)
        lines = [
            f"  {name}: {mean:.4g} beside {null:.4g}, difference 95 % in [{low:.4g}, {high:.4g}], d {d:.2f}, p {p:.3g}"
            for name, mean, null, low, high, d, p in rows
        ]
        short = self.least * (len(self.names) if self.correction in ("holm", "bonferroni") else 1)
        if short > ALPHA:
            lines.append(f"  {n} pairs cannot give a p below {short:.3g}: give more seeds or inputs")
        return "\n".join([head, *lines])


def _joined(every: list[Outcome], name: str) -> Floats:
    return np.concatenate([getattr(one, name) for one in every])


def judged(
    values: Floats,
    nulls: Floats,
    names: list[str],
    test: Any,
    alternative: str,
    correction: str,
    seed: int,
    name: str,
    null: str,
    labels: tuple[str, ...],
    versions: tuple[str, ...],
) -> Outcome:
    """The outcome of paired numbers, (comparisons, pairs) each."""
    differences = values - nulls
    check_spread(names, differences)
    each = [compared(a, b, test, alternative, seed) for a, b in zip(values, nulls, strict=True)]
    p = np.array([one.p for one in each])
    low, high = interval(differences)
    return Outcome(
        name=name,
        null=null,
        labels=labels,
        versions=versions,
        test=test if isinstance(test, str) else getattr(test, "__name__", type(test).__name__),
        alternative=alternative,
        correction=correction,
        names=tuple(names),
        values=values,
        nulls=nulls,
        statistic=np.array([one.statistic for one in each]),
        p=p,
        corrected=corrected(p, correction),
        effect=np.array([effect_size(row) for row in differences]),
        low=low,
        high=high,
        least=max(one.least for one in each),
        seed=seed,
    )
