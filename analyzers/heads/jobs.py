"""The jobs of heads: scores beside their nulls, as a table and as pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

COPYING, NAMING, RECEIVER = "copying", "name mover", "to receiver"
NINE_OF_TEN = 0.9


@dataclass(frozen=True, eq=False)
class HeadJobs(Stored):
    """What each head does, by score and null.

    >>> jobs.of("1.1")
    ['induction', 'copying', 'positional']
    >>> jobs.table().query("induction > 0.4")[["induction", "induction null", "jobs"]]

    scores, nulls: by job, (heads, examples), shares of the attention; of copying one number from -1 to 1, of name movers
    logits by prompt. heads: (layer, head) of each row; scopes: the module call of each. entropy: bits of each head's rows on
    random tokens, of which `uniform` would be those of an even spread. losses: of the next random token in the first half
    and where it comes again; NaN of a model that sees what comes. absent: jobs that could not be scored, and why.
    """

    heads: tuple[tuple[int, int], ...]
    scopes: tuple[str, ...]
    scores: dict[str, Floats] = field(repr=False)
    nulls: dict[str, Floats] = field(repr=False)
    entropy: Floats = field(repr=False)
    uniform: float
    losses: tuple[float, float]
    absent: dict[str, str]
    model: str
    examples: int
    length: int
    least: float
    seed: int

    @property
    def names(self) -> list[str]:
        """Each head as "layer.head"."""
        return [f"{layer}.{head}" for layer, head in self.heads]

    def score(self, job: str) -> Floats:
        """The score of each head, the mean over examples.

        >>> jobs.score("induction").shape
        (16,)
        """
        return _means(self.scores[self._job(job)])

    def null(self, job: str) -> Floats:
        """The null of each head, the mean over examples."""
        return _means(self.nulls[self._job(job)])

    def has(self, job: str) -> NDArray[np.bool_]:
        """Which heads have a job: `least` above their null in the mean, and above it in nine of ten examples.

        >>> int(jobs.has("induction").sum())
        4
        """
        above = self.scores[self._job(job)] - self.nulls[job]
        found = (_means(above) >= self.least) & ((above > 0).mean(1) >= NINE_OF_TEN)
        if job == NAMING:
            found &= _means(self.scores[RECEIVER]) >= self.least
        return np.asarray(found)

    def best(self, job: str, n: int = 10) -> list[tuple[str, float]]:
        """The heads that have a job, highest score first; fewer than `n` where fewer clear their null.

        >>> jobs.best("previous token", 1)
        [('0.1', 0.5...)]
        """
        score, has = self.score(job), self.has(job)
        return [(self.names[i], float(score[i])) for i in np.argsort(-score, kind="stable") if has[i]][:n]

    def of(self, head: str) -> list[str]:
        """The jobs of a head, highest score first."""
        if head not in self.names:
            raise AnalyzerError(f"{head!r} is no head of {self.model}: expected one of {', '.join(self.names[:4])} ...")
        place = self.names.index(head)
        return sorted((job for job in self.nulls if self.has(job)[place]), key=lambda job: -float(self.score(job)[place]))

    def table(self) -> DataFrame:
        """One row a head: each score and its null, the entropy, and the jobs that it has.

        >>> jobs.table().sort_values("induction").tail(3)["jobs"]
        """
        import pandas as pd

        columns: dict[str, object] = {"layer": [layer for layer, _ in self.heads], "head": [head for _, head in self.heads]}
        for job in self.nulls:
            columns |= {job: self.score(job), f"{job} null": self.null(job)}
        has = {job: self.has(job) for job in self.nulls}
        order = {job: self.score(job) for job in self.nulls}
        jobs = [
            ", ".join(sorted((job for job in has if has[job][i]), key=lambda job: -float(order[job][i])))
            for i in range(len(self.heads))
        ]
        return pd.DataFrame(columns | {"entropy": self.entropy, "jobs": jobs}, index=pd.Index(self.names, name="layer.head"))

    def plot(self, ax: Axes | None = None, job: str | None = None) -> Figure:
        """Draw every head by score beside its null, job by job; of one job, a map of layers by heads.

        >>> jobs.plot().savefig("jobs.png")
        >>> jobs.plot(job="induction").savefig("induction.png")
        """
        from analyzers.heads.pictures import jobs
        from fmr.pictures.heatmap import returned

        drawn = jobs(self, ax, None if job is None else self._job(job))
        return returned(drawn) if ax is None else drawn

    def _job(self, job: str) -> str:
        if job in self.absent:
            raise AnalyzerError(f"{job!r} was not scored: {self.absent[job]}.")
        if job not in self.nulls:
            raise AnalyzerError(f"{job!r} is no job. Expected one of {', '.join(map(repr, self.nulls))}.")
        return job

    def __repr__(self) -> str:
        first, second = self.losses
        loss = f"; loss {first:.2f}, said again {second:.2f}" if first == first else ""
        lines = [
            f"HeadJobs of {self.model}: {number_of(len(self.heads), 'head')}, "
            f"{number_of(self.examples, 'sequence')} of {self.length} random tokens "
            f"twice{loss}"
        ]
        for job in self.nulls:
            best = self.best(job, len(self.heads))
            null = float(np.nanmean(self.null(job)))
            shown = "  ".join(f"{name} {score:.2f}" for name, score in best[:5])
            lines.append(f"  {job:<16}{len(best):>4} heads, null {null:.2f}   {shown}")
        lines += [f"  {job:<16} not scored: {reason}" for job, reason in self.absent.items()]
        return "\n".join(lines)


def _means(values: Floats) -> Floats:
    found: Floats = values.mean(1)
    return found
