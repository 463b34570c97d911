"""What changes when in a training: scores of the passes that were seen of it, and the dates at which these have risen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of
from fmr.runs.passes import Pass
from fmr.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

Score = Callable[[Pass], float | tuple[float, float]]
"""A number for a pass, by itself or with its null: what it is where there is nothing to find."""


@dataclass(frozen=True, eq=False)
class Timeline(Stored):
    """Scores over the steps of a training, beside their nulls, with the date of each.

    >>> with fmr.track(net, keep=["out"], every=2) as run:
    ...     train(net)
    >>> analyzers.Timeline.of(run, {"loss": lambda one: one["out"].square().mean()}).dates
    {'loss': ...}

    steps: the number of each pass. values, nulls: by name, (steps,). dates: of each score the first step from which on it is
    on the other side of half its way, from the mean of its first tenth to that of its last; None where this way is not
    longer than what it swings by at its end, four times the deviation of its last tenth: then nothing is told.
    """

    steps: tuple[int, ...] = field(repr=False)
    values: dict[str, Floats] = field(repr=False)
    nulls: dict[str, Floats] = field(repr=False)
    dates: dict[str, int | None]

    @staticmethod
    def of(run: Run, scores: Mapping[str, Score]) -> Timeline:
        """Score each pass of a run that saw a training.

        run: of a block with `every=`. scores: by name, a function of a pass that gives a number, or a number and its null.
        """
        if not isinstance(run, Run):
            raise AnalyzerError(
                f"Timeline.of got a {type(run).__name__}, expected the run of a block: with fmr.track(net, every=2) as run."
            )
        if len(run.passes) < LEAST:
            raise AnalyzerError(f"The run has {number_of(len(run.passes), 'pass', 'passes')}, expected {LEAST} or more.")
        if not isinstance(scores, Mapping) or not scores or not all(map(callable, scores.values())):
            raise AnalyzerError(f"scores={scores!r}: expected functions of a pass by name, as {{'loss': lambda one: ...}}.")
        steps = tuple(one.number for one in run.passes)
        told = {name: np.array([_pair(score(one), name) for one in run.passes]) for name, score in scores.items()}
        values = {name: both[:, 0] for name, both in told.items()}
        nulls = {name: both[:, 1] for name, both in told.items() if not np.isnan(both[:, 1]).all()}
        return Timeline(steps, values, nulls, {name: date(steps, curve) for name, curve in values.items()})

    def table(self) -> DataFrame:
        """One row a step.

        >>> timeline.table().loc[0]
        """
        import pandas as pd

        nulls = {f"{name} null": values for name, values in self.nulls.items()}
        return pd.DataFrame(self.values | nulls, index=pd.Index(self.steps, name="step"))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw each score over the steps, its null dotted, its date as a line.

        >>> timeline.plot().savefig("training.png")
        """
        from analyzers.compare.pictures import timeline

        return timeline(self, ax)

    def __repr__(self) -> str:
        lines = [f"Timeline of {number_of(len(self.steps), 'pass', 'passes')}, steps {self.steps[0]} to {self.steps[-1]}"]
        for name, values in self.values.items():
            odd = np.flatnonzero(~np.isfinite(values))
            when = f"from step {self.dates[name]:,} on" if self.dates[name] is not None else "no change beyond its swings"
            when = f"not finite at step {self.steps[odd[0]]:,}, and no date" if len(odd) else when
            null = f", null {self.nulls[name][-1]:.3g}" if name in self.nulls else ""
            lines.append(f"  {name}  {values[0]:.3g} to {values[-1]:.3g}{null}: {when}")
        return "\n".join(lines)


LEAST = 4
"""How many passes show a change."""


def _pair(told: float | tuple[float, float], name: str) -> tuple[float, float]:
    try:
        value, null = told if isinstance(told, tuple) else (told, np.nan)
        return float(value), float(null)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AnalyzerError(
            f"The score {name!r} gave a {type(told).__name__} ({error}). Expected a number, or a number and its null."
        ) from error


def date(steps: tuple[int, ...], curve: Floats) -> int | None:
    """The first step from which on a curve is on the further side of half its way, if that is longer than its swings.

    >>> date((0, 10, 20, 30, 40), np.array([0.0, 0.1, 0.9, 1.0, 1.0]))
    20
    >>> date((0, 10, 20, 30, 40), np.array([0.0, 0.1, 0.0, 0.1, 0.0])) is None
    True
    """
    few = max(1, len(curve) // 10)
    start, end = curve[:few].mean(), curve[-few:].mean()
    swing = np.diff(curve[-max(3, few) :]).std() / np.sqrt(2)
    if not np.isfinite(curve).all() or abs(end - start) <= 4 * swing or end == start:
        return None
    beyond = (curve - (start + end) / 2) * np.sign(end - start) > 0
    last = int(np.flatnonzero(~beyond)[-1]) + 1
    return steps[last] if last < len(steps) else None
