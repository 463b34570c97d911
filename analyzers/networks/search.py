"""The search for communities, the same one in a network and in those that it is compared with."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analyzers.networks.net import Net, pruned
from analyzers.networks.nulls import NULLS
from analyzers.networks.partition import Division, Sparse, by_size, divided, gap, louvain, spectral
from analyzers.numbers.embed import Floats, Ints


class Search(NamedTuple):
    """How communities are looked for.

    method: "spectral" or "louvain"; rows: of spectral clustering, "shi-malik" or "ng-jordan"; ks: numbers of communities to
    try; choose: among them by "q", the best Q, or "gap", the widest of the eigenvalues'. raised: for graphs of few edges.
    """

    method: str
    rows: str
    ks: tuple[int, ...]
    choose: str
    seed: int
    raised: bool = False

    def of(self, graph: Sparse) -> tuple[Division, dict[int, Division]]:
        """The division that is chosen, and that into each number of communities."""
        if self.method == "louvain":
            found = louvain(graph, self.seed)
            return found, {found.k: found}
        ks = [k for k in self.ks if k < graph.shape[0]] or [1]
        divisions, values = spectral(graph, ks, self.seed, self.rows, self.raised)
        if self.choose == "gap":
            return divisions[gap(values, ks)], divisions
        if len(self.ks) > 1:
            for k, found in self._by_parts(graph).items():
                if k not in divisions or found.q > divisions[k].q:
                    divisions[k] = found
        return max(divisions.values(), key=lambda found: found.q), divisions

    def at(self, graph: Sparse, k: int) -> Division | None:
        """The division into so many communities; None where the method chooses their number."""
        if self.method == "louvain" or k >= graph.shape[0]:
            return None
        return spectral(graph, [k], self.seed, self.rows, self.raised)[0][k]

    def _by_parts(self, graph: Sparse) -> dict[int, Division]:
        """Where the graph falls apart, the divisions in which each part is a community and the largest is divided.

        Eigenvectors tell parts apart first, so that small ones would use up all communities that are tried.
        """
        from scipy.sparse.csgraph import connected_components

        count, part = connected_components(graph, directed=False)
        if count == 1:
            return {}
        part = by_size(part.astype(np.int64))
        largest = np.flatnonzero(part == 0)
        ks = [k for k in self.ks if k < len(largest)]
        inner = spectral(graph[largest][:, largest], ks, self.seed, self.rows, self.raised)[0] if ks else {}
        labels = [part, *(_replaced(part, largest, found.labels) for found in inner.values())]
        return {found.k: found for found in (divided(graph, one) for one in labels)}


def _replaced(labels: Ints, at: Ints, new: Ints) -> Ints:
    """The labels with others at some places, which no place had before."""
    found = labels + int(new.max()) + 1
    found[at] = new
    return found


class Found(NamedTuple):
    """The communities of one network: labels of all its units, -1 without an edge, and the division of the others."""

    labels: Ints
    graph: Sparse
    division: Division
    by_k: dict[int, Division]

    def ncut(self, k: int, search: Search) -> float:
        """The n-cut of the division into so many communities; NaN where there is none."""
        found = self.by_k.get(k) or search.at(self.graph, k)
        return found.ncut if found is not None else float("nan")


def searched(graph: Sparse, search: Search) -> Found:
    """Look for communities among the units that have edges."""
    joined = np.flatnonzero(np.asarray(graph.sum(1)) > 0)
    labels = np.full(graph.shape[0], -1)
    graph = graph[joined][:, joined] if len(joined) < len(labels) else graph
    division, by_k = search.of(graph)
    labels[joined] = division.labels
    return Found(labels, graph, division, by_k)


class Compared(NamedTuple):
    """What the networks of one null came to, network by network, and how far strengths were off at most.

    q and k: of the division that the same search chose; ncut: of that into as many communities as the network itself has.
    """

    q: Floats
    k: Ints
    ncut: Floats
    drift: float


def compared(net: Net, share: float, found: Found, search: Search, kind: str, draws: int) -> Compared:
    """The same search in networks of one null; share: of the edges, as they were kept in the network itself."""
    graph, make = pruned(net.adjacency(), share), NULLS[kind]
    strengths, given = np.asarray(graph.sum(1)), make.given(net, graph)
    divisions, ncuts, drift = [], [], 0.0
    for draw in range(draws):
        other = make.draw(given, share, np.random.default_rng([search.seed, draw, list(NULLS).index(kind)]))
        new = searched(other, search)
        off = np.abs(np.asarray(other.sum(1)) - strengths).max(initial=0) / strengths.max(initial=1e-300)
        divisions.append(new.division)
        ncuts.append(new.ncut(found.division.k, search))
        drift = max(drift, float(off))
    qs, ks = np.array([one.q for one in divisions]), np.array([one.k for one in divisions], dtype=np.int64)
    return Compared(qs, ks, np.array(ncuts), drift)


def strongest(graph: Sparse, count: int) -> tuple[Ints, Floats]:
    """The ends of the strongest edges of a graph, (edges, 2), and their sizes."""
    from scipy.sparse import triu

    half = triu(graph).tocoo()
    order = np.argsort(-half.data, kind="stable")[:count]
    return np.stack([half.row[order], half.col[order]], 1).astype(np.int64), half.data[order]


def ratio(value: float, null: Sequence[float] | Floats, *, larger: bool) -> tuple[float, float]:
    """How many standard deviations a value is above those of a null, and p = (1 + as extreme) / (1 + all of them)."""
    drawn = np.asarray(null, dtype=np.float64)
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn) or np.isnan(value):
        return float("nan"), float("nan")
    spread = float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0
    extreme = int(np.sum(drawn >= value - 1e-12 if larger else drawn <= value + 1e-12))
    return (value - float(drawn.mean())) / spread if spread > 0 else float("nan"), (1 + extreme) / (1 + len(drawn))
