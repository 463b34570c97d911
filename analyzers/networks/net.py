"""A network as a weighted graph: its units in groups, and a matrix of sizes of weights for each pair that a layer joins."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyzers.networks.follow import Following
from analyzers.numbers.embed import Floats, Ints

Sparse = Any
"""A matrix of scipy, in compressed rows."""


@dataclass(frozen=True, eq=False)
class Block:
    """The edges of one layer: `weights` (rows, columns), between the units that number its rows and its columns.

    open: where an edge may be; None where it may be everywhere. It is false where the same pair has its place elsewhere.
    """

    layer: str
    rows: Ints
    columns: Ints
    weights: Floats
    open: NDArray[np.bool_] | None = None

    @property
    def places(self) -> NDArray[np.bool_]:
        """Where an edge may be."""
        return np.ones(self.weights.shape, bool) if self.open is None else self.open

    def renumbered(self, number: Ints) -> "Block":
        """The same edges between units of other numbers, in the order of these; a pair has its place where the lower comes
        first."""
        rows, columns = number[self.rows], number[self.columns]
        i, j = np.argsort(rows), np.argsort(columns)
        weights, opened = self.weights[i][:, j], None if self.open is None else self.open[i][:, j]
        if opened is not None and np.array_equal(rows, columns):
            weights, opened = np.triu(weights + weights.T, 1), np.triu(opened | opened.T, 1)
        return Block(self.layer, rows[i], columns[j], weights, opened)


@dataclass(frozen=True, eq=False)
class Net:
    """Units and edges. groups: what made them; group and place: of each unit; blocks: the edges, layer by layer."""

    groups: tuple[str, ...]
    group: Ints
    place: Ints
    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.group)

    def names(self, units: Iterable[int]) -> list[str]:
        """Each unit as "group:place"."""
        return [f"{self.groups[self.group[unit]]}:{self.place[unit]}" for unit in units]

    def in_order(self) -> tuple["Net", Ints]:
        """The same network with the units of each group by their strength, which hangs on no order that they came in, and
        the number that each unit has there; of units with the same strength the first comes first."""
        strengths = np.asarray(self.adjacency().sum(1))
        by_strength = np.lexsort((np.round(strengths / (strengths.max(initial=0) or 1.0), 12), self.group))
        number = np.argsort(by_strength)
        blocks = tuple(block.renumbered(number) for block in self.blocks)
        return Net(self.groups, self.group[by_strength], self.place[by_strength], blocks), number

    def adjacency(self) -> Sparse:
        """The matrix of the undirected graph: the sum of all edges between two units, in both directions."""
        return adjacency(len(self), self.blocks)

    def room(self) -> int:
        """How many edges there may be."""
        return count_edges(self._places())

    def _places(self) -> Sparse:
        return adjacency(len(self), [replace(block, weights=block.places.astype(float)) for block in self.blocks])

    def with_edges(self, graph: Sparse) -> "Net":
        """The same units with the edges of a graph among them; a layer of edges is a pair of groups that edges may join."""
        members = [np.flatnonzero(self.group == n) for n in range(len(self.groups))]
        blocks, places = [], self._places()
        for a, b in sorted({(self.group[i], self.group[j]) for i, j in self._joined(places)}):
            mine, theirs = members[a], members[b]
            weights, open_to = (part[mine][:, theirs].toarray() for part in (graph, places))
            if a == b:
                weights, open_to = (np.triu(part) - np.diag(part.diagonal()) / 2 for part in (weights, open_to))
            layer = f"{self.groups[a]} - {self.groups[b]}"
            blocks.append(Block(layer, mine, theirs, weights, None if open_to.all() else open_to > 0))
        return replace(self, blocks=tuple(blocks))

    def _joined(self, places: Sparse) -> list[tuple[int, int]]:
        """For each pair of groups that edges may join two units of them, the first group not before the second."""
        half = places.tocoo()
        pairs = self.group[half.row] * len(self.groups) + self.group[half.col]
        _, first = np.unique(pairs, return_index=True)
        ends = zip(half.row[first].tolist(), half.col[first].tolist(), strict=True)
        return [(i, j) for i, j in ends if self.group[i] >= self.group[j]]


def count_edges(graph: Sparse) -> int:
    """How many edges a graph has, one between two units."""
    return int(graph.nnz + (graph.diagonal() != 0).sum()) // 2


def pruned(graph: Sparse, share: float) -> Sparse:
    """A graph with its strongest edges alone, this share of those that are there; equal ones stay or go together."""
    if share >= 1:
        return graph
    from scipy.sparse import triu

    sizes = triu(graph).data
    out = len(sizes) - max(1, round(share * len(sizes)))
    least = np.partition(sizes, out)[out]
    kept = graph.copy()
    kept.data[kept.data < least] = 0.0
    kept.eliminate_zeros()
    return kept


def adjacency(units: int, blocks: Sequence[Block]) -> Sparse:
    """The symmetric matrix of the edges of several layers."""
    from scipy.sparse import coo_array

    found = []
    for block in blocks:
        at = np.nonzero(block.weights)
        found.append((block.rows[at[0]], block.columns[at[1]], block.weights[at]))
    rows, columns, sizes = (np.concatenate(part) if found else np.zeros(0, int) for part in zip(*found, strict=True))
    ends = np.concatenate([rows, columns]), np.concatenate([columns, rows])
    return coo_array((np.concatenate([sizes, sizes]), ends), shape=(units, units)).tocsr()


def net_of(found: Following, order: int, gains: Sequence[Floats] | None = None) -> tuple[Net, Ints]:
    """The graph of what was followed: units that some edge joins, in the order in which they were made, and their roots.

    gains: for each of the edges, what to scale what is read of each source by; None for the scales that were met.
    """
    units, sized = found.units, gains or [edges.gain for edges in found.edges]
    ends = [(units.roots(edges.targets), units.roots(edges.sources)) for edges in found.edges]
    every = np.unique(np.concatenate([part for pair in ends for part in pair] or [np.zeros(0, np.int64)]))
    every = every[every > 0]
    number = np.zeros(int(every.max(initial=0)) + 1, np.int64)
    number[every] = np.arange(len(every))
    blocks = []
    for edges, gain, (targets, sources) in zip(found.edges, sized, ends, strict=True):
        read = sources > 0
        rows, columns = number[targets], number[sources[read]]
        blocks.append(_merged(edges.scope, rows, columns, (edges.weights * gain)[:, read], order))
    groups, group = np.unique(units.group(every), return_inverse=True)
    starts = np.searchsorted(group, np.arange(len(groups)))
    named = _apart([units.groups[n] for n in groups])
    return Net(named, group, np.arange(len(every)) - starts[group], tuple(blocks)), every


def correlated(net: Net, sizes: Floats) -> Net:
    """The same units with an edge between any two, of these sizes; a layer of edges is a pair of groups.

    sizes: (units, units), symmetric.
    """
    members = [np.flatnonzero(net.group == n) for n in range(len(net.groups))]
    blocks = []
    for a, mine in enumerate(members):
        for b, theirs in enumerate(members[: a + 1]):
            places = None if a != b else np.triu(np.ones((len(mine), len(mine)), bool), 1)
            weights = sizes[np.ix_(mine, theirs)]
            layer = f"{net.groups[a]} - {net.groups[b]}"
            blocks.append(Block(layer, mine, theirs, weights if places is None else np.where(places, weights, 0.0), places))
    return replace(net, blocks=tuple(blocks))


def _merged(layer: str, rows: Ints, columns: Ints, weights: Floats, order: int) -> Block:
    """Several weights between the same two units are one edge: their norm, as over a kernel."""
    for turn in range(2):
        ends, where = np.unique(columns if turn == 0 else rows, return_inverse=True)
        if len(ends) < len(where):
            powers = np.zeros((len(ends), weights.shape[turn]))
            np.add.at(powers, where, (weights.T if turn == 0 else weights) ** order)
            weights = powers ** (1 / order)
            weights = weights.T if turn == 0 else weights
            rows, columns = (rows, ends) if turn == 0 else (ends, columns)
    return Block(layer, rows, columns, weights)


def _apart(names: Sequence[str]) -> tuple[str, ...]:
    """Names of which the second of a kind has a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)
