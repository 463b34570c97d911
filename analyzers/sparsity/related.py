"""Scores between subjects and objects at every head and memory: as edges of a graph, and held against facts."""

from __future__ import annotations

from collections.abc import Mapping
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
    from networkx import DiGraph
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Relations(Stored):
    """For each head and memory how much it speaks for each object where it is given each subject.

    >>> found = analyzers.TokenRelations(model, tokenizer).run(world.subjects()[:8], ["Brigost", "Oranby", "Quelm"])
    >>> found.scores.shape, found.parts[0], found.parts[-1]
    ((20, 8, 3), 'head 0.0', 'memory 3')

    scores: (parts, subjects, objects), cosines in a stream of `width` units. p: how often a random direction has as large a
    one.
    """

    model: str
    source: str
    parts: tuple[str, ...]
    subjects: tuple[str, ...] = field(repr=False)
    objects: tuple[str, ...] = field(repr=False)
    scores: Floats
    p: Floats
    width: int

    @property
    def q(self) -> Floats:
        """The p-values as shares of false discoveries among all parts and pairs (Benjamini and Hochberg 1995)."""
        from scipy.stats import false_discovery_control

        return np.asarray(false_discovery_control(self.p.ravel())).reshape(self.p.shape)

    def graph(self, fdr: float = 0.05) -> DiGraph:
        """Subjects and objects as nodes, with an edge where a part speaks for the object: that with the smallest p-value.

        >>> found = analyzers.TokenRelations(model, tokenizer).run(world.subjects()[:8], ["Brigost", "Oranby", "Quelm"])
        >>> list(found.graph().nodes(data="kind"))[0]
        ('Junel Dunoth', 'subject')

        fdr: the share of false discoveries among the edges. Edges have `part`, `score`, `p` and `q`.
        """
        import networkx as nx

        if not 0 < fdr < 1:
            raise AnalyzerError(f"fdr={fdr!r}: expected a share of false discoveries between 0 and 1, such as 0.05.")
        made, q = nx.DiGraph(), self.q
        made.add_nodes_from(self.subjects, kind="subject")
        made.add_nodes_from((name for name in self.objects if name not in made), kind="object")
        best = self.p.argmin(0)
        for row, column in np.argwhere(q.min(0) <= fdr):
            part = int(best[row, column])
            at = part, row, column
            told = {"score": float(self.scores[at]), "p": float(self.p[at]), "q": float(q[at])}
            made.add_edge(self.subjects[row], self.objects[column], part=self.parts[part], **told)
        return made

    def against(self, truth: Mapping[str, str], *, draws: int = 999, seed: int = 0) -> DataFrame:
        """Whether parts speak for the true object: one row a part, those that tell most first.

        >>> truth = {fact.subject: fact.answer for fact in world.facts() if fact.relation == "city"}
        >>> found = analyzers.TokenRelations(model, tokenizer).run(world.subjects()[:24], sorted(set(truth.values())))
        >>> found.against(truth, draws=99).columns.tolist()
        ['part', 'score', 'first', 'null', 'p', 'q']

        truth: by subject its object; subjects without one do not count. score: the mean score of true pairs. first: how
        often the true object has the largest one. null: the mean of `first` with the objects of subjects exchanged,
        `draws` times, and p how often the mean score is as large then; q is p as a share of false discoveries among the
        parts.
        """
        import pandas as pd
        from scipy.stats import false_discovery_control

        pairs = [(n, truth[name]) for n, name in enumerate(self.subjects) if truth.get(name) in self.objects]
        if len(pairs) < 2:
            raise AnalyzerError(f"The truth has {len(pairs)} of the pairs that were scored. Expected two or more.")
        rows, true = np.array([n for n, _ in pairs]), np.array([self.objects.index(name) for _, name in pairs])
        scores = self.scores[:, rows]
        first = scores.argmax(2)
        draw = np.random.default_rng(seed)
        others = np.stack([draw.permutation(true) for _ in range(draws)])
        mean = scores[:, np.arange(len(rows)), true].mean(1)
        null = np.stack([scores[:, np.arange(len(rows)), one].mean(1) for one in others])
        p = (1 + (null >= mean - 1e-12).sum(0)) / (1 + draws)
        right, by_chance = (first == true).mean(1), np.stack([(first == one).mean(1) for one in others]).mean(0)
        found = pd.DataFrame({"part": self.parts, "score": mean, "first": right, "null": by_chance, "p": p})
        found["q"] = false_discovery_control(p)
        return found.sort_values(["first", "score"], ascending=False, kind="stable").reset_index(drop=True)

    def table(self, fdr: float = 0.05) -> DataFrame:
        """One row an edge of the graph, the smallest p-value first.

        >>> found = analyzers.TokenRelations(model, tokenizer).run(world.subjects()[:8], ["Brigost", "Oranby", "Quelm"])
        >>> found.table().columns.tolist()
        ['subject', 'object', 'part', 'score', 'p', 'q']
        """
        import pandas as pd

        names = ["subject", "object", "part", "score", "p", "q"]
        rows = [(one, other, *(data[name] for name in names[2:])) for one, other, data in self.graph(fdr).edges(data=True)]
        return pd.DataFrame(rows, columns=names).sort_values("p", kind="stable").reset_index(drop=True)

    def plot(self, ax: Axes | None = None, part: str | None = None) -> Figure:
        """Draw the scores of one part, subjects down and objects across; returns the figure.

        >>> found = analyzers.TokenRelations(model, tokenizer).run(world.subjects()[:8], ["Brigost", "Oranby", "Quelm"])
        >>> found.plot(part="memory 2").savefig("relations.png")

        part: one of `parts`; None takes that with the smallest p-value.
        """
        from analyzers.sparsity.pictures import draw_relations
        from fmr.pictures.heatmap import returned

        chosen = self.parts[int(self.p.min((1, 2)).argmin())] if part is None else part
        if chosen not in self.parts:
            raise AnalyzerError(f"part={part!r}: expected one of {', '.join(self.parts[:4])}, ..., {self.parts[-1]}.")
        return returned(draw_relations(self, chosen, ax)) if ax is None else draw_relations(self, chosen, ax)

    def __repr__(self) -> str:
        edges = self.graph().number_of_edges()
        pairs = len(self.subjects) * len(self.objects)
        best = np.unravel_index(int(self.p.argmin()), self.p.shape)
        return (
            f"Relations of {self.model}, read from the {self.source}: {len(self.parts)} parts, "
            f"{number_of(len(self.subjects), 'subject')}, {number_of(len(self.objects), 'object')}\n"
            f"  {edges} of {pairs} pairs at a false discovery rate of 0.05; strongest {self.subjects[best[1]]!r} -> "
            f"{self.objects[best[2]]!r} by {self.parts[best[0]]}, cosine {self.scores[best]:.2f}, p {self.p[best]:.1e}"
        )
