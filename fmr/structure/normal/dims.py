"""Which dimensions of values are the same one: what goes along a dimension here goes along another there.

The dimensions of all values fall into classes. Ops that work number by number, that turn and cut, and products join them;
what lays several out as one makes another, which falls apart again where the same sizes are laid out.
"""

from collections.abc import Container, Iterator

import torch

from fmr.errors import FmrError
from fmr.graph.execute import execute
from fmr.graph.graph import Graph
from fmr.nodes import Node
from fmr.structure.normal.einsum import of_projection, subscripts_of
from fmr.structure.normal.match import (
    CONVOLUTIONS,
    ELEMENTWISE,
    MOVES,
    NORMS,
    RESHAPES,
    SAME,
    above,
    contraction,
    data_inputs,
    dims_told,
    projection,
)
from fmr.structure.normal.walks import cached_per_graph

Dim = tuple[str, int]
"""A dimension of a value."""

_VIEWS = frozenset(
    """T broadcast_to chunk diagonal expand expand_as getitem mT movedim narrow permute select split split_with_sizes squeeze
    t tensor_split transpose unbind unsqueeze""".split()
)
"""Ops that turn, cut or repeat, and copy nothing."""

_CHOICES = frozenset("argmax argsort argwhere nonzero sort topk where".split())
"""Ops that say which rows are taken by what they hold."""

_BY_NUMBER = ELEMENTWISE | NORMS | SAME | frozenset("softmax log_softmax cumsum".split())

_CELLS = frozenset("gru lstm rnn_relu rnn_tanh".split())
"""Recurrent layers that are one op."""

_POOLS = frozenset(f"{kind}_pool{n}d" for kind in ("avg", "max", "lp") for n in (1, 2, 3))

_ALONG = {"cumsum": 1, "cumprod": 1, "flip": 1, "roll": 2, "softmax": 1, "log_softmax": 1, "sum": 1, "mean": 1}
"""Ops in which one place of a dimension reaches others, with the place of the argument that names it."""

_PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)


class Dims:
    """The classes of the dimensions of a graph's values, with what is known of each."""

    def __init__(self, graph: Graph) -> None:
        self._joined: dict[Dim, Dim] = {}
        self._parts: dict[Dim, list[tuple[int, Dim]]] = {}
        self._mixed: set[Dim] = set()
        self._units: set[Dim] = set()
        self._along: set[Dim] = set()
        for node in graph.nodes:
            self._read(graph, node)
        self._mixed, self._units, self._along = (
            {self._root(one) for one in known} for known in (self._mixed, self._units, self._along)
        )

    def of(self, name: str, rank: int) -> tuple[Dim, ...]:
        """The class of each dimension of a value."""
        return tuple(self._root((name, n)) for n in range(rank))

    def is_mixed(self, one: Dim) -> bool:
        """Whether a class counts several things at once, or rows that were chosen among others."""
        return one in self._mixed

    def is_units(self, one: Dim) -> bool:
        """Whether a projection sums over a class, or makes it."""
        return one in self._units

    def goes_along(self, one: Dim) -> bool:
        """Whether an op, other than a projection, makes places along a class of others: it counts no examples."""
        return one in self._along

    def _root(self, one: Dim) -> Dim:
        while one in self._joined:
            one = self._joined[one]
        return one

    def _join(self, one: Dim, other: Dim) -> None:
        a, b = self._root(one), self._root(other)
        if a != b:
            self._joined[b] = a
            if b in self._parts:
                self._parts.setdefault(a, self._parts.pop(b))

    def _read(self, graph: Graph, node: Node) -> None:
        """Take in what an op makes of the dimensions of what it reads."""
        read = [graph[name] for name in data_inputs(graph, node)]
        if node.op in _ALONG and read:
            self._along.update((read[0].id, n) for n in dims_told(node, len(read[0].shape), _ALONG[node.op]))
        if contraction(node) is not None:
            self._multiplied(graph, node)
        elif node.op in RESHAPES and read:
            self._reshaped(read[0], node, _repeated(graph, read[0]))
        elif node.op == "embedding" and len(node.parents) > 1:
            self._in_order(graph[node.parents[0].id], node)
            self._units.add((node.id, len(node.shape) - 1))
        elif node.op in ("getitem", "index_select") and len(node.parents) > 1:
            self._chosen(graph, node)
        elif node.op in _VIEWS and read:
            self._viewed(graph, node)
        elif node.op in ("sum", "mean") and read:
            self._summed(read[0], node)
        elif node.op in _CELLS and read:
            self._recurred(read[0], node)
        elif node.op in _POOLS and read:
            self._pooled(read[0], node)
        elif node.op == "stack" and read:
            self._stacked(read, node)
        elif node.op in _BY_NUMBER or node.op in MOVES:
            for one in read[:1] if node.op in NORMS else read:
                self._aligned(one, node)

    def _aligned(self, read: Node, node: Node) -> None:
        """Dimensions of one size are the same, counted from the right; moved numbers in one rank alone."""
        apart = len(node.shape) - len(read.shape)
        if apart < 0 or (apart and node.op not in _BY_NUMBER):
            return
        for n, size in enumerate(read.shape):
            if size == node.shape[n + apart]:
                self._join((read.id, n), (node.id, n + apart))

    def _in_order(self, read: Node, node: Node) -> None:
        """The first dimensions are those of what is read."""
        for n, (size, made) in enumerate(zip(read.shape, node.shape, strict=False)):
            if size == made:
                self._join((read.id, n), (node.id, n))

    def _summed(self, read: Node, node: Node) -> None:
        """The dimensions that are not summed up stay."""
        rank, gone = len(read.shape), dims_told(node, len(read.shape))
        kept = [n for n in range(rank) if n not in gone or len(node.shape) == rank]
        for n, source in enumerate(kept) if len(kept) == len(node.shape) else ():
            if source not in gone:
                self._join((read.id, source), (node.id, n))

    def _recurred(self, read: Node, node: Node) -> None:
        """A recurrent layer goes along the steps of its input, which its last argument tells from the examples."""
        first, rank = node.args.get("8"), len(read.shape)
        if node.id.parts.output != 0 or not isinstance(first, bool) or len(node.shape) != rank:
            return
        for n in range(rank - 1):
            self._join((read.id, n), (node.id, n))
        self._units.update([(read.id, rank - 1), (node.id, rank - 1)])
        self._along.add((node.id, 1 if first and rank > 2 else 0))

    def _pooled(self, read: Node, node: Node) -> None:
        """A window goes along the last dimensions, as many as the name says."""
        if len(read.shape) != len(node.shape):
            return
        for n in range(len(node.shape)):
            self._join((read.id, n), (node.id, n))
        self._along.update((node.id, len(node.shape) - 1 - n) for n in range(int(node.op[-2])))

    def _stacked(self, read: list[Node], node: Node) -> None:
        """There is one dimension more, and the others go on."""
        new = node.argument("dim", 1, 0) % len(node.shape)
        for one in read:
            for n in range(len(one.shape)):
                self._join((one.id, n), (node.id, n + (n >= new)))

    def _multiplied(self, graph: Graph, node: Node) -> None:
        """Dimensions of one letter are the same."""
        found, used = contraction(node), projection(graph, node)
        assert found is not None
        subscripts = of_projection(graph, used) if used is not None else subscripts_of(graph, found)
        left, right = (used.data, used.weight) if used is not None else (found.left, found.right)
        if len(subscripts.result) != len(node.shape):
            self._in_order(graph[left], node)
            return
        for name, word in ((left, subscripts.left), (right, subscripts.right))[: 1 if used is not None else 2]:
            for n, (letter, size) in enumerate(zip(word, graph[name].shape, strict=False)):
                place = subscripts.result.find(letter)
                if place >= 0 and (node.shape[place] == size or node.op in CONVOLUTIONS):
                    self._join((name, n), (node.id, place))
        if used is None:
            self._along.update((left, subscripts.left.index(letter)) for letter in subscripts.contracted)
        elif node.op in CONVOLUTIONS:
            self._along.update((node.id, len(node.shape) - 1 - n) for n in range(len(graph[right].shape) - 2))
        if used is not None:
            self._units.update((left, subscripts.left.index(letter)) for letter in subscripts.contracted)
            self._units.update((node.id, subscripts.result.index(letter)) for letter in subscripts.free(subscripts.right))

    def _viewed(self, graph: Graph, node: Node) -> None:
        """The dimensions are told by their strides, once the op runs again on a value without numbers."""
        read = graph[node.parents[0].id]
        strides = _PRIMES[: len(read.shape)]
        tensors = {p.id: torch.empty(graph[p.id].shape, dtype=graph[p.id].dtype, device="meta") for p in node.parents}
        if len(strides) < len(read.shape):
            return
        tensors[read.id] = torch.empty_strided(read.shape, strides, device="meta")
        try:
            made = execute(node, tensors)
        except (FmrError, RuntimeError, TypeError, KeyError, IndexError, ValueError):
            return
        if made.shape == node.shape:
            for n, stride in {stride: n for n, stride in enumerate(made.stride())}.items():
                if n in strides:
                    self._join((read.id, strides.index(n)), (node.id, stride))

    def _chosen(self, graph: Graph, node: Node) -> None:
        """What is chosen by an index keeps the dimensions on its right."""
        read, index = (graph[parent.id] for parent in node.parents[:2])
        for n in range(1, min(len(node.shape), len(read.shape))):
            if node.shape[-n] != read.shape[-n]:
                break
            self._join((read.id, len(read.shape) - n), (node.id, len(node.shape) - n))
        by_value = index.dtype == torch.bool or any(one.op in _CHOICES for one in above(graph, index.id, MOVES))
        many = read.shape and self._root((read.id, 0)) in {self._root(one) for one in self._mixed}
        if node.shape and (by_value or many):
            self._mixed.add((node.id, 0))

    def _reshaped(self, read: Node, node: Node, repeated: Container[int]) -> None:
        """Dimensions that stay are the same; several that are laid out as one are known by it."""
        for before, after in _groups(read.shape, node.shape, repeated):
            sources: list[tuple[int, Dim]] = [(read.shape[n], (read.id, n)) for n in before]
            made: list[tuple[int, Dim]] = [(node.shape[n], (node.id, n)) for n in after]
            if len(sources) == 1:
                self._parted(sources[0], made)
            elif made and sources and sources[0][0] and made[0][0] % sources[0][0] == 0:
                known: list[tuple[int, Dim]] = [sources[0], (made[0][0] // sources[0][0], (f"{node.id} rest", 0))]
                self._parts.setdefault(self._root(made[0][1]), sources if len(made) == 1 else known)
                self._mixed.add(made[0][1])

    def _parted(self, source: tuple[int, Dim], made: list[tuple[int, Dim]]) -> None:
        """One dimension laid out as several: those that it was made of, where the sizes are theirs."""
        parts = self._parts.get(self._root(source[1]), [])
        wide = [one for size, one in made if size != 1] if source[0] != 1 else [made[0][1]]
        if [size for size, _ in parts] == [size for size, _ in made]:
            for (_, one), (_, other) in zip(parts, made, strict=True):
                self._join(one, other)
        elif len(wide) == 1:
            self._join(source[1], wide[0])


@cached_per_graph
def dims_of(graph: Graph) -> Dims:
    """The classes of the dimensions of a graph's values."""
    return Dims(graph)


def _repeated(graph: Graph, node: Node) -> list[int]:
    """The dimensions along which a value says one thing several times."""
    if node.op != "expand" or not node.parents:
        return []
    before = graph[node.parents[0].id].shape
    pairs = zip(reversed(range(len(node.shape))), reversed(before), strict=False)
    return [n for n, size in pairs if size == 1 != node.shape[n]]


def _groups(
    before: tuple[int, ...], after: tuple[int, ...], repeated: Container[int] = ()
) -> Iterator[tuple[list[int], list[int]]]:
    """The dimensions of a value and those that they are laid out as, in as many groups as there are.

    A dimension of size one that goes is laid out with the one before it, and one that comes is made of that: with another
    input it may be longer. But where the next one is repeated, as one key for several heads, it is laid out with that.

    >>> list(_groups((2, 5, 8), (10, 8)))
    [([0, 1], [0]), ([2], [1])]
    >>> list(_groups((2, 8), (2, 1, 8)))
    [([0], [0, 1]), ([1], [2])]
    """
    i = j = 0
    while i < len(before) and j < len(after):
        read, made = [i], [j]
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right and i <= len(before) and j <= len(after):
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
                read.append(i - 1)
            elif left > right and j < len(after):
                right, j = right * after[j], j + 1
                made.append(j - 1)
            else:
                return
        while i < len(before) and before[i] == 1 and (j == len(after) or after[j] != 1) and i + 1 not in repeated:
            read.append(i)
            i += 1
        while len(read) == 1 and j < len(after) and after[j] == 1 and (i == len(before) or before[i] != 1):
            made.append(j)
            j += 1
        yield read, made
