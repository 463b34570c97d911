"""What composition found: who reads whom, beside parts that are turned at random, as tables and maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Compositions(Stored):
    """How much of what each earlier part writes each later part reads.

    >>> reads.scores.shape, len(reads.writers)
    ((52, 19), 19)
    >>> reads.into("1.2", "k")[0]  # an induction head, and the head that looks at the token before
    ('0.1', 0.2...)

    scores: (readings, writers), from 0 to 1, NaN where the writer is no earlier one; `readers` and `roles` ("q", "k", "v" of
    a head, "in" of a memory) name the rows, `writers` the columns, as "layer.head" and "mlp layer". z: the same for the
    squared score in standard deviations over all rotations of one part against the other, of which `expected` is the root
    mean square. refused: what was left out, by scope, and why.
    """

    scores: Floats = field(repr=False)
    z: Floats = field(repr=False)
    readers: tuple[str, ...]
    roles: tuple[str, ...]
    writers: tuple[str, ...]
    width: int
    model: str
    refused: dict[str, str]

    @property
    def expected(self) -> float:
        """The root mean square of a score where one of the two parts is turned at random: 1 / sqrt(width), exactly."""
        return float(self.width**-0.5)

    def into(self, reader: str, role: str) -> list[tuple[str, float]]:
        """The writers that a part reads by one role, strongest first, with their scores.

        >>> reads.into("2.1", "v")[0]
        ('1.1', 0.1...)
        """
        row = self.scores[self._row(reader, role)]
        order = [int(n) for n in np.argsort(-row, kind="stable") if row[n] == row[n]]
        return [(self.writers[n], float(row[n])) for n in order]

    def rank(self, writer: str, reader: str, role: str) -> tuple[int, int]:
        """The place of a writer among those of its kind, heads or memories, that a part reads by one role, and how many.

        >>> reads.rank("0.1", "1.2", "k")
        (1, 4)
        """
        alike = [name for name, _ in self.into(reader, role) if _is_memory(name) == _is_memory(writer)]
        if writer not in alike:
            raise AnalyzerError(
                f"{writer!r} writes nothing that {reader!r} reads: expected one of {', '.join(alike[:5])} ..."
            )
        return alike.index(writer) + 1, len(alike)

    def strongest(self, n: int = 10, role: str | None = None) -> list[tuple[str, str, str, float]]:
        """The pairs of heads that compose most: (reader, writer, role, score).

        >>> reads.strongest(1, role="q")
        [('2.2', '0.0', 'q', 0.1...)]
        """
        rows = [i for i, (name, one) in enumerate(zip(self.readers, self.roles, strict=True))
                if not _is_memory(name) and role in (None, one)]  # fmt: skip
        columns = [j for j, name in enumerate(self.writers) if not _is_memory(name)]
        if not rows or not columns:
            raise AnalyzerError(f"role={role!r}: no head reads a head by that. Expected 'q', 'k', 'v' or None.")
        part = np.nan_to_num(self.scores[np.ix_(rows, columns)], nan=-1.0)
        order = np.argsort(-part, axis=None, kind="stable")[: min(n, int((part >= 0).sum()))]
        pairs = [(rows[i], columns[j]) for i, j in zip(*np.unravel_index(order, part.shape), strict=True)]
        return [(self.readers[i], self.writers[j], self.roles[i], float(self.scores[i, j])) for i, j in pairs]

    def table(self) -> DataFrame:
        """One row a pair and role: reader, writer, score, z and the writer's rank among those of its kind.

        >>> reads.table().query("role == 'k' and rank == 1")
        """
        import pandas as pd

        i, j = np.nonzero(self.scores == self.scores)
        kinds = np.array([_is_memory(name) for name in self.writers])
        frame = pd.DataFrame(
            {
                "reader": np.array(self.readers)[i],
                "role": np.array(self.roles)[i],
                "writer": np.array(self.writers)[j],
                "score": self.scores[i, j],
                "z": self.z[i, j],
                "memory": kinds[j],
            }
        )
        ranks = frame.groupby(["reader", "role", "memory"])["score"].rank(ascending=False, method="min")
        return frame.drop(columns="memory").assign(rank=ranks.astype(int))

    def plot(self, ax: Axes | None = None, role: str = "k", reader: str | None = None) -> Figure:
        """Draw the scores of one role as a map of writers by readers, or of one reader as bars of its first writers.

        >>> reads.plot(role="k").savefig("k-composition.png")
        """
        from analyzers.heads.pictures import compositions
        from fmr.pictures.heatmap import returned

        drawn = compositions(self, ax, role, reader)
        return returned(drawn) if ax is None else drawn

    def _row(self, reader: str, role: str) -> int:
        known = list(zip(self.readers, self.roles, strict=True))
        if (reader, role) not in known:
            roles = sorted({one for name, one in known if name == reader})
            names = ", ".join(map(repr, list(dict.fromkeys(self.readers))[:6]))
            hint = f"by {', '.join(map(repr, roles))}" if roles else f"one of {names} ..., as 'layer.head'"
            raise AnalyzerError(f"{reader!r} does not read by {role!r} here. Expected {hint}.")
        return known.index((reader, role))

    def __repr__(self) -> str:
        lines = [
            f"Compositions of {self.model}: {number_of(len(dict.fromkeys(self.readers)), 'reader')}, "
            f"{number_of(len(self.writers), 'writer')}, "
            f"{self.expected:.3f} expected of parts turned at random"
        ]
        for role in dict.fromkeys(one for one in self.roles if one != "in"):
            if any(np.isfinite(self.scores[[one == role for one in self.roles]]).ravel()):
                best = "   ".join(f"{a} <- {b} {score:.3f}" for a, b, _, score in self.strongest(4, role))
                lines.append(f"  {role}  mean {np.nanmean(self.scores[[one == role for one in self.roles]]):.3f}   {best}")
        lines += [f"  left out {scope or 'root'}: {reason}" for scope, reason in list(self.refused.items())[:4]]
        return "\n".join(lines)


def _is_memory(name: str) -> bool:
    return name.startswith("mlp")
