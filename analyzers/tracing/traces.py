"""What tracing found: what each restored cell brings back of an answer, as tables and heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from analyzers.numbers.confidence import ratios
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from analyzers.tracing.cells import ALL, ROLES, Column
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Trace:
    """One traced fact: p(answer) clean and corrupted (by sample), and what cells restore, (layers, columns, samples); other:
    the model's first choice, where that is no part of the answer."""

    prompt: str
    answer: str
    columns: tuple[Column, ...]
    subject: tuple[int, ...]
    clean: float
    corrupted: Tensor
    effects: dict[str, Tensor]
    control: dict[str, float]
    elsewhere: float
    noise: float
    window: int
    how: str
    forwards: int
    error: float
    other: str = ""


@dataclass(frozen=True, eq=False)
class Traces(Stored):
    """Where a fact, or many, are recalled: what each cell brings back of p(answer).

    >>> traces.effects["state"].shape, traces.strongest("state", traces.subject)
    ((4, 7), (0, 'Dunoth*'))
    >>> traces.table().sort_values("effect").tail()

    effects: by kind, (layers, columns), the probability of the answer with the cell restored less that of the corrupted run,
    with the ends of 95 % intervals over facts; of one fact, over samples of the noise. columns: the tokens of one fact,
    those of the subject with a star; of many facts, the roles of tokens, where a fact has its mean over such tokens;
    subject: those of single tokens of the subject.
    clean, corrupted: p(answer) by fact. control: by kind, the effect of each fact's strongest cell in the subject or of that
    beside it, whichever is larger, with values from a run that is corrupted too. elsewhere: p(answer) by fact with the same
    noise at as many other tokens. noise: its standard deviation, by fact; NaN where subjects were swapped. skipped: facts
    whose answer the model did not know. others: what the model says first, by fact; empty where that is the answer.
    """

    facts: tuple[str, ...]
    columns: tuple[str, ...]
    subject: tuple[str, ...]
    effects: dict[str, Floats] = field(repr=False)
    low: dict[str, Floats] = field(repr=False)
    high: dict[str, Floats] = field(repr=False)
    clean: Floats
    corrupted: Floats
    control: dict[str, float]
    elsewhere: Floats
    noise: Floats
    samples: int
    window: int
    skipped: int
    how: str
    forwards: int
    error: float
    seed: int
    others: tuple[str, ...] = ()

    @property
    def total_effect(self) -> float:
        """p(answer) clean less p(answer) corrupted, the mean over facts."""
        return float((self.clean - self.corrupted).mean())

    def strongest(self, kind: str = "state", columns: Sequence[str] | None = None) -> tuple[int, str]:
        """The layer and the column of the largest effect of a kind, among these columns; by default those of single tokens.

        >>> traces.strongest("attention")
        (1, 'in')
        """
        if kind not in self.effects:
            raise AnalyzerError(f"kind={kind!r} was not traced. Expected one of {', '.join(map(repr, self.effects))}.")
        known = [column for column in self.columns if column != ALL] if columns is None else list(columns)
        if not known or not set(known) <= set(self.columns):
            raise AnalyzerError(f"columns={columns!r}: expected some of {', '.join(map(repr, self.columns))}.")
        values = np.nan_to_num(self.effects[kind][:, [self.columns.index(one) for one in known]], nan=-np.inf)
        layer, place = np.unravel_index(values.argmax(), values.shape)
        return int(layer), known[place]

    def table(self) -> DataFrame:
        """One row a cell: kind, layer and column, the effect with its interval, and its share of the total effect.

        >>> traces.table().query("kind == 'mlp'")
        """
        import pandas as pd

        layers, columns = next(iter(self.effects.values())).shape
        frames = [
            pd.DataFrame(
                {
                    "kind": kind,
                    "layer": np.repeat(np.arange(layers), columns),
                    "column": self.columns * layers,
                    "effect": effects.ravel(),
                    "low": self.low[kind].ravel(),
                    "high": self.high[kind].ravel(),
                    "share": effects.ravel() / (self.total_effect or float("nan")),
                }
            )
            for kind, effects in self.effects.items()
        ]
        return pd.concat(frames, ignore_index=True)

    def plot(self, ax: Axes | None = None, kind: str | None = None) -> Figure:
        """Draw heat maps, one a kind, with tokens down and layers across; returns the figure.

        >>> traces.plot(kind="state").savefig("tracing.png")

        ax: where to draw one kind; None makes a figure of all of them.
        """
        from analyzers.tracing.maps import draw
        from fmr.pictures.heatmap import returned

        return returned(draw(self, ax, kind)) if ax is None else draw(self, ax, kind)

    def __repr__(self) -> str:
        what = self.facts[0] if len(self.facts) == 1 else f"{len(self.facts)} facts"
        noise = float(self.noise.mean())
        how = f"noise {noise:.3g}" if noise == noise else "other subjects"
        elsewhere = f"; the same noise elsewhere {self.elsewhere.mean():.3f}" if noise == noise else ""
        lines = [
            f"Traces of {what}: p(answer) {self.clean.mean():.3f} clean, {self.corrupted.mean():.3f} corrupted{elsewhere}",
            f"  total effect {self.total_effect:.3f}; {number_of(self.samples, 'sample')} of {how}, seed "
            f"{self.seed}; windows of "
            f"{number_of(self.window, 'layer')}; {number_of(self.forwards, 'forward')} ({self.how})"
            + f"; {self.skipped} skipped"
            * (self.skipped > 0),
        ]
        if self.others and self.others[0]:
            lines.append(
                f"  the model says {self.others[0]!r} first, not this answer: expected answer=None or "
                f"{self.others[0].strip()!r} to trace what it knows"
            )
        for kind in self.effects:
            others = [column for column in self.columns if column not in (*self.subject, ALL)]
            sites = [self._site(kind, columns) for columns in (self.subject, [ALL], others) if columns]
            lines.append(f"  {kind}: {'; '.join(sites)}; from another corrupted run {self.control[kind]:+.3f}")
        return "\n".join(lines)

    def _site(self, kind: str, columns: Sequence[str]) -> str:
        """The strongest cell of some columns, in words."""
        layer, column = self.strongest(kind, columns)
        return f"{column!r} {self.effects[kind][layer, self.columns.index(column)]:+.3f} at layer {layer}"


def by_token(trace: Trace, seed: int) -> Traces:
    """The result of one fact, token by token; intervals are over its samples."""
    labels = [column.label + "*" * (place in trace.subject) for place, column in enumerate(trace.columns[:-1])]
    names = _distinct([*labels, ALL])
    return _result([trace], names, [names[place] for place in trace.subject], trace.effects, 0, seed)


def by_role(traces: Sequence[Trace], skipped: int, seed: int) -> Traces:
    """The result of many facts, role by role; intervals are over facts, of those that have such a token."""
    effects: dict[str, Floats] = {}
    for kind in traces[0].effects:
        layers = len(traces[0].effects[kind])
        effects[kind] = np.full((layers, len(ROLES), len(traces)), np.nan)
        for number, trace in enumerate(traces):
            for place, role in enumerate(ROLES):
                own = [n for n, column in enumerate(trace.columns) if column.role == role]
                if own:
                    effects[kind][:, place, number] = trace.effects[kind][:, own].mean((1, 2)).numpy()
    return _result(
        traces, ROLES, [role for role in ROLES if role.endswith(("subject token", "subject tokens"))], effects, skipped, seed
    )


def _distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels with a number behind those that were there before."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return tuple(found)


def _result(
    traces: Sequence[Trace],
    columns: Sequence[str],
    subject: Sequence[str],
    values: dict[str, Tensor] | dict[str, Floats],
    skipped: int,
    seed: int,
) -> Traces:
    effects, low, high = {}, {}, {}
    for kind, value in values.items():
        effects[kind], low[kind], high[kind] = _means(np.asarray(value), seed)
    controls = {kind: float(np.mean([trace.control[kind] for trace in traces])) for kind in traces[0].control}
    return Traces(
        facts=tuple(f"{trace.prompt!r} -> {trace.answer!r}" for trace in traces),
        columns=tuple(columns),
        subject=tuple(subject),
        effects=effects,
        low=low,
        high=high,
        clean=np.array([trace.clean for trace in traces]),
        corrupted=np.array([float(trace.corrupted.mean()) for trace in traces]),
        control=controls,
        elsewhere=np.array([trace.elsewhere for trace in traces]),
        noise=np.array([trace.noise for trace in traces]),
        samples=len(traces[0].corrupted),
        window=traces[0].window,
        skipped=skipped,
        how=", ".join(dict.fromkeys(trace.how for trace in traces)),
        forwards=sum(trace.forwards for trace in traces),
        error=max(trace.error for trace in traces),
        seed=seed,
        others=tuple(trace.other for trace in traces),
    )


def _means(values: Floats, seed: int) -> tuple[Floats, Floats, Floats]:
    """Means over the last axis with the ends of their intervals; of those that are numbers, the same in a whole column."""
    found = np.full((3, *values.shape[:2]), np.nan)
    for column in range(values.shape[1]):
        rows = ~np.isnan(values[:, column]).all(1)
        have = ~np.isnan(values[rows, column]).any(0) if rows.any() else np.zeros(0, dtype=bool)
        if have.any():
            found[:, rows, column] = ratios(values[rows, column][:, have], np.ones(int(have.sum())), seed)
    mean, low, high = found
    return mean, low, high
