"""Communities of a weighted graph: spectral or by Louvain's moves, and how good a division is.

Graphs are symmetric sparse matrices of sizes; a division is a label for each unit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from analyzers.networks.means import k_means
from analyzers.numbers.embed import Floats, Ints

Sparse = Any
"""A symmetric matrix of scipy, in compressed rows."""

DENSE = 400
"""Up to so many units all eigenvectors are computed at once, which is exact and as fast."""


def newman(graph: Sparse, labels: Ints) -> float:
    """Newman's Q, weighted: the share of edges within communities, less that which the strengths of units alone make.

    >>> newman(club, np.zeros(34, int))  # one community
    0.0

    Q = sum over communities c of L_c / m - (k_c / 2m)^2, where m is the sum of all edges, L_c of those within c, k_c of the
    strengths of its units. It is below 1, and at least -1/2.

    Source: M. Newman, "Analysis of weighted networks", 2004.
    """
    return _q(*_sums(graph, labels))


def n_cut(graph: Sparse, labels: Ints) -> float:
    """The normalised cut: for each community the share of its edges' ends that leads out of it, summed; 0 where none does.

    Source: J. Shi, J. Malik, "Normalized cuts and image segmentation", 2000.
    """
    return _cut(*_sums(graph, labels))


def _q(within: Floats, volume: Floats) -> float:
    total = volume.sum()
    return float((within / total - (volume / total) ** 2).sum()) if total else 0.0


def _cut(within: Floats, volume: Floats) -> float:
    return float(((volume - within)[volume > 0] / volume[volume > 0]).sum())


def _sums(graph: Sparse, labels: Ints) -> tuple[Floats, Floats]:
    """For each community the weights of edges within, counted from both ends, and the strengths of its units."""
    count = int(labels.max(initial=-1)) + 1
    mine = np.repeat(labels, np.diff(graph.indptr))
    within = np.bincount(mine, np.where(mine == labels[graph.indices], graph.data, 0.0), count)
    return within.astype(np.float64), np.bincount(labels, graph.sum(1), count).astype(np.float64)


class Division(NamedTuple):
    """One way to divide a graph: its labels, with its Q and its n-cut."""

    labels: Ints
    q: float
    ncut: float

    @property
    def k(self) -> int:
        """How many communities there are."""
        return int(self.labels.max(initial=-1)) + 1


def divided(graph: Sparse, labels: Ints) -> Division:
    """A division with what it is worth; labels are made 0, 1, ... by size."""
    named = by_size(labels)
    sums = _sums(graph, named)
    return Division(named, _q(*sums), _cut(*sums))


def by_size(labels: Ints) -> Ints:
    """The labels renamed 0, 1, ...: larger communities first, equal ones by their first unit."""
    found, first, where, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -counts))
    names = np.empty(len(found), np.int64)
    names[order] = np.arange(len(found))
    renamed: Ints = names[where]
    return renamed


def leading(graph: Sparse, strengths: Floats, count: int, seed: int) -> tuple[Floats, Floats]:
    """The largest eigenvalues of D^-1/2 A D^-1/2, from the top down, and their vectors; D is the diagonal of strengths."""
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import eigsh

    units = graph.shape[0]
    root = 1 / np.sqrt(strengths)
    if units <= max(DENSE, count + 1):
        values, vectors = np.linalg.eigh(root[:, None] * graph.toarray() * root)
        return values[::-1][:count], vectors[:, ::-1][:, :count]
    sizes = graph.data * np.repeat(root, np.diff(graph.indptr)) * root[graph.indices]
    scaled = csr_array((sizes, graph.indices, graph.indptr), shape=graph.shape)
    start, held = np.random.default_rng(seed).standard_normal(units), min(units, max(2 * count + 1, 40))
    values, vectors = eigsh(scaled, k=count, which="LA", v0=start, ncv=held, tol=1e-5)
    order = np.argsort(-values)
    return values[order], vectors[:, order]


def spectral(
    graph: Sparse, ks: Sequence[int], seed: int = 0, rows: str = "shi-malik", raised: bool = False
) -> tuple[dict[int, Division], Floats]:
    """The division into each of these numbers of communities by normalised spectral clustering, and the eigenvalues.

    >>> round(spectral(club, [2])[0][2].q, 2)  # Zachary's karate club
    0.36

    graph: every unit has an edge. rows: "shi-malik" clusters the rows of the eigenvectors of the random walk, D^-1 A;
    "ng-jordan" those of D^-1/2 A D^-1/2 brought to length one. Both by k-means, ten starts. raised: strengths
    are raised by their mean, for graphs of few edges, where units that hang by a thread would each be a community.

    Source: J. Shi, J. Malik, 2000; A. Ng, M. Jordan, Y. Weiss, "On spectral clustering", 2001; U. von Luxburg, "A tutorial
    on spectral clustering", 2007; T. Qin, K. Rohe, "Regularized spectral clustering", 2013.
    """
    strengths = np.asarray(graph.sum(1))
    strengths = strengths + strengths.mean() if raised else strengths
    values, vectors = leading(graph, strengths, min(max(ks) + 1, graph.shape[0]), seed)
    found = {}
    for k in ks:
        points = vectors[:, :k]
        if rows == "shi-malik":
            points = points / np.sqrt(strengths)[:, None]
        else:
            points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
        found[k] = divided(graph, k_means(points / points.std(), k, seed))
    return found, values


def louvain(graph: Sparse, seed: int = 0) -> Division:
    """The division that Louvain's moves end at, which choose the number of communities themselves.

    Source: V. Blondel, J. Guillaume, R. Lambiotte, E. Lefebvre, "Fast unfolding of communities in large networks", 2008.
    """
    import networkx

    found = networkx.community.louvain_communities(networkx.from_scipy_sparse_array(graph), seed=seed)
    labels = np.zeros(graph.shape[0], np.int64)
    for number, members in enumerate(found):
        labels[list(members)] = number
    return divided(graph, labels)


def gap(values: Floats, ks: Sequence[int]) -> int:
    """The number of communities after which the eigenvalues fall farthest."""
    return max(ks, key=lambda k: (values[k - 1] - values[k]) if k < len(values) else -np.inf)
