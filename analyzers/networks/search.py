"""The search for communities, the same one in a network and in those that it is compared with."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analyzers.networks.net import Net
from analyzers.networks.nulls import NULLS
from analyzers.networks.partition import Division, Sparse, gap, louvain, spectral
from analyzers.numbers.embed import Floats, Ints


class Search(NamedTuple):
    """How communities are looked for.

    method: "spectral" or "louvain"; rows: of spectral clustering, "shi-malik" or "ng-jordan"; ks: numbers of communities to
    try; choose: among them by "q", the best Q, or "gap", the widest of the eigenvalues'.
    """

    method: str
    rows: str
    ks: tuple[int, ...]
    choose: str
    seed: int

    def of(self, graph: Sparse) -> tuple[Division, dict[int, Division]]:
        """The division that is chosen, and that into each number of communities."""
        if self.method == "louvain":
            found = louvain(graph, self.seed)
            return found, {found.k: found}
        ks = [k for k in self.ks if k < graph.shape[0]] or [1]
        divisions, values = spectral(graph, ks, self.seed, self.rows)
        k = max(ks, key=lambda k: divisions[k].q) if self.choose == "q" else gap(values, ks)
        return divisions[k], divisions


class Found(NamedTuple):
    """The communities of one network: labels of all its units, -1 without an edge, and the division of the others."""

    labels: Ints
    division: Division
    by_k: dict[int, Division]

    def ncut(self, k: int) -> float:
        """The n-cut of the division into so many communities; into those that were found, where there is none."""
        return self.by_k.get(k, self.division).ncut


def searched(net: Net, search: Search) -> Found:
    """Look for communities among the units that have edges."""
    graph = net.adjacency()
    joined = np.flatnonzero(np.asarray(graph.sum(1)) > 0)
    division, by_k = search.of(graph[joined][:, joined] if len(joined) < len(net) else graph)
    labels = np.full(len(net), -1)
    labels[joined] = division.labels
    return Found(labels, division, by_k)


class Compared(NamedTuple):
    """What the networks of one null came to, network by network, and how far strengths were off at most.

    q and k: of the division that the same search chose; ncut: of that into as many communities as the network itself has.
    """

    q: Floats
    k: Ints
    ncut: Floats
    drift: float


def compared(net: Net, found: Found, search: Search, kind: str, draws: int) -> Compared:
    """The same search in networks of one null."""
    strengths = np.asarray(net.adjacency().sum(1))
    divisions, ncuts, drift = [], [], 0.0
    for draw in range(draws):
        other = NULLS[kind](net, np.random.default_rng([search.seed, draw, list(NULLS).index(kind)]))
        new = searched(other, search)
        off = np.abs(np.asarray(other.adjacency().sum(1)) - strengths).max(initial=0) / strengths.max(initial=1e-300)
        divisions.append(new.division)
        ncuts.append(new.ncut(found.division.k))
        drift = max(drift, float(off))
    qs, ks = np.array([one.q for one in divisions]), np.array([one.k for one in divisions], dtype=np.int64)
    return Compared(qs, ks, np.array(ncuts), drift)


def strongest(net: Net, count: int) -> tuple[Ints, Floats]:
    """The ends of the strongest edges of a network, (edges, 2), and their sizes."""
    from scipy.sparse import triu

    half = triu(net.adjacency()).tocoo()
    order = np.argsort(-half.data, kind="stable")[:count]
    return np.stack([half.row[order], half.col[order]], 1).astype(np.int64), half.data[order]


def ratio(value: float, null: Sequence[float] | Floats, *, larger: bool) -> tuple[float, float]:
    """How many standard deviations a value is above those of a null, and p = (1 + as extreme) / (1 + all of them)."""
    drawn = np.asarray(null, dtype=np.float64)
    if not len(drawn):
        return float("nan"), float("nan")
    spread = float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0
    extreme = int(np.sum(drawn >= value - 1e-12 if larger else drawn <= value + 1e-12))
    return (value - float(drawn.mean())) / spread if spread > 0 else float("nan"), (1 + extreme) / (1 + len(drawn))
