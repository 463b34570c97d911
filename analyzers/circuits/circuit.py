"""A circuit: the edges that carry an answer, how much of it they carry, and what random ones of their number do."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from analyzers.circuits.choice import Bools, strongest
from analyzers.numbers.confidence import ratios
from analyzers.numbers.embed import Floats, Ints
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    import networkx
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


class ScoredEdge(NamedTuple):
    """An edge of a circuit: who writes, who reads (with q, k or v for heads), and the share of the answer it carries."""

    writer: str
    reader: str
    score: float


@dataclass(frozen=True, eq=False)
class Circuit(Stored):
    """The edges of a model that carry an answer, tested with all others patched.

    >>> circuit.faithfulness() > 0.8, len(circuit.edges)
    (True, 96)

    ends: (edges of the model, 2), the numbers of writer and reader; scores and kept: for each of these. feeds: pairs of the
    numbers of a reader and of a writer that hears it. asked: of how many edges at most circuits were tested; sizes: how many
    these have, this one's among them; measured, without, random: the metric by pair with these circuits alone (sizes,
    pairs), with all edges but theirs (sizes, pairs), and with random circuits of their size (sizes, circuits, pairs). clean
    and corrupted: the metric of the two runs by pair. signed: whether the scores themselves were ranked, not their sizes.
    forwards: runs of the model on all pairs, with a backward for each gradient; tests: circuits that were run.
    """

    method: str
    model: str
    writers: tuple[str, ...] = field(repr=False)
    readers: tuple[str, ...] = field(repr=False)
    ends: Ints
    scores: Floats
    kept: Bools
    feeds: Ints
    asked: Ints
    sizes: Ints
    measured: Tensor
    without: Tensor
    random: Tensor
    clean: Tensor
    corrupted: Tensor
    threshold: float
    signed: bool
    seed: int
    forwards: int
    tests: int

    @property
    def edges(self) -> list[ScoredEdge]:
        """The edges, strongest first."""
        order = [n for n in np.argsort(-np.abs(self.scores), kind="stable").tolist() if self.kept[n]]
        return [self._edge(n) for n in order]

    @property
    def nodes(self) -> list[str]:
        """The nodes that the edges lead through, in execution order."""
        used = {self.writers[writer] for writer in self.ends[self.kept, 0]}
        return [name for name in self.writers if name in used] + ["logits"]

    def faithfulness(self, n: int | None = None) -> float:
        """The share of the answer that is left with this circuit alone: 0 is the corrupted run's, 1 the clean one's.

        n: for the circuit of the n strongest edges, one of `asked`; None is this one.
        """
        return float(self._shares(self.measured)[0][self._row(n)])

    def completeness(self, n: int | None = None) -> float:
        """The share of the answer that is gone when the edges of the circuit alone are patched: 1 where nothing outside
        does the same work.

        n: as for `faithfulness`.
        """
        return 1 - float(self._shares(self.without)[0][self._row(n)])

    def curve(self) -> DataFrame:
        """One row a size: the share of the answer with the circuit alone and its interval, without it, and with random
        circuits of that size, mean and largest.

        >>> circuit.curve().query("faithfulness > 0.8").edges.min()
        """
        import pandas as pd

        kept, low, high = self._shares(self.measured)
        null = self._shares(self.random.flatten(0, 1))[0].reshape(*self.random.shape[:2])
        return pd.DataFrame(
            {
                "edges": self.sizes,
                "share": self.sizes / len(self.ends),
                "faithfulness": kept,
                "low": low,
                "high": high,
                "without": self._shares(self.without)[0],
                "random": null.mean(1) if null.size else np.nan,
                "random_most": null.max(1) if null.size else np.nan,
            }
        )

    def table(self) -> DataFrame:
        """One row an edge of the circuit, strongest first: writer, reader, score.

        >>> circuit.table().query("reader == 'logits'")
        """
        import pandas as pd

        return pd.DataFrame(self.edges, columns=list(ScoredEdge._fields))

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the share of the answer by number of edges: with the circuit alone, without it, and with random ones.

        >>> circuit.plot().savefig("curve.png")
        """
        from analyzers.circuits.pictures import draw
        from fmr.pictures.heatmap import returned

        return returned(draw(self, ax)) if ax is None else draw(self, ax)

    def graph(self, most: int | None = None) -> networkx.MultiDiGraph[str]:
        """The circuit as a networkx graph of nodes, with `role` (q, k, v or empty) and `score` on each edge.

        most: leave out the weakest, so that no more edges of the model than these are left. An edge to keys or values that
        several heads share leads to each of these heads.
        """
        import networkx

        found = networkx.MultiDiGraph()
        kept = self._strongest(most)
        used = {int(writer) for writer in self.ends[kept, 0]}
        for number in np.flatnonzero(kept).tolist():
            writer, reader, score = self._edge(number)
            _, role = _split(reader)
            for head in self._hearing(int(self.ends[number, 1]), used):
                found.add_edge(writer, head, key=role, role=role, score=score)
        return found

    def save_svg(self, path: str | os.PathLike[str], most: int = 60) -> None:
        """Write the circuit as an SVG picture: from the embedding to the logits, edges as thick as they are strong.

        >>> circuit.save_svg("circuit.svg")

        most: how many edges at most; the weakest are left out.
        """
        from analyzers.circuits.pictures import sheet, write_svg

        write_svg(
            sheet(self, most), path, "circuit.plot().savefig(path) writes other kinds; circuit.graph() needs no program."
        )

    def __repr__(self) -> str:
        row, total = self._row(None), len(self.ends)
        (kept, low, high), many = (part[row] for part in self._shares(self.measured)), int(self.kept.sum())
        null = self._shares(self.random[row])[0]
        most = f"{_short(null.mean())}, at most {_short(null.max())} of {len(null)}" if len(null) else ""
        beside = f"; random circuits of its size {most}" if most else ""
        interval = f" [{_short(low)}, {_short(high)}]" if low == low else ""
        best = ", ".join(f"{edge.writer} -> {edge.reader} {edge.score:.2f}" for edge in self.edges[:4])
        return (
            f"Circuit of {self.model} ({self.method}): {many} of {number_of(total, 'edge')} ({100 * many / total:.1f} %), "
            f"{len(self.nodes)} of {number_of(len(self.writers) + 1, 'node')}; {number_of(self.tests, 'circuit')} "
            f"tested on {number_of(len(self.clean), 'pair')}\n"
            f"  answer: {float(self.clean.mean()):.3g} in the clean run, {float(self.corrupted.mean()):.3g} corrupted\n"
            f"  faithfulness {_short(kept)}{interval}, completeness {_short(self.completeness())}{beside}\n"
            f"  strongest: {best}"
        )

    def _edge(self, number: int) -> ScoredEdge:
        writer, reader = self.ends[number]
        return ScoredEdge(self.writers[writer], self.readers[reader], float(self.scores[number]))

    def _row(self, n: int | None) -> int:
        many = int(self.kept.sum()) if n is None else n
        places = [*np.flatnonzero(self.asked == many), *np.flatnonzero(self.sizes == many)]
        if not places:
            known = ", ".join(map(str, self.asked))
            raise AnalyzerError(
                f"No circuit of {n!r} edges was tested. Expected one of {known}, or run(..., sizes=[{n!r}])."
            )
        return int(places[0])

    def _shares(self, values: Tensor) -> tuple[Floats, Floats, Floats]:
        """Shares of the answer, with the ends of their 95 % intervals over pairs."""
        if not len(values):
            return np.zeros(0), np.zeros(0), np.zeros(0)
        return ratios((values - self.corrupted).numpy(), (self.clean - self.corrupted).numpy(), self.seed)

    def _hearing(self, reader: int, used: set[int]) -> list[str]:
        """The nodes that hear a reader and go on in the circuit."""
        if reader == len(self.readers) - 1:
            return [self.readers[-1]]
        return [self.writers[writer] for one, writer in self.feeds if one == reader and int(writer) in used]

    def _strongest(self, most: int | None) -> Bools:
        """Which edges are left of the circuit if no more than so many may be."""
        if most is None or most >= self.kept.sum():
            return self.kept
        allowed = np.zeros((len(self.writers), len(self.readers)), bool)
        strengths, feeds = np.zeros(allowed.shape), np.zeros(allowed.T.shape, bool)
        allowed[tuple(self.ends[self.kept].T)] = True
        strengths[tuple(self.ends.T)] = np.abs(self.scores)
        feeds[tuple(self.feeds.T)] = True
        found: Bools = strongest(strengths, allowed, feeds, most)[tuple(self.ends.T)]
        return found


def _short(share: float) -> str:
    """A share with two digits, and no sign before nothing."""
    return f"{round(share, 2) + 0.0:.2f}"


def _split(reader: str) -> tuple[str, str]:
    """A reader as node and role: "head 3.5 q" is "head 3.5" and "q"."""
    node, _, role = reader.rpartition(" ")
    return (node, role) if role in ("q", "k", "v") else (reader, "")
