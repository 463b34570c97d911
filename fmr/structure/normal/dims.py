"""Which dimensions of values are the same one: what goes along a dimension here goes along another there.

The dimensions of all values fall into classes. Ops that work number by number, that turn and cut, and products join them;
what lays several out as one makes another, which falls apart again where the same sizes are laid out.
"""

from collections.abc import Container, Iterable, Iterator
from itertools import takewhile
from math import prod

import torch

from fmr.errors import FmrError
from fmr.graph.execute import execute
from fmr.graph.graph import Graph
from fmr.nodes import Node
from fmr.structure.normal.einsum import Subscripts, of_projection, subscripts_of
from fmr.structure.normal.match import above, contraction, data_inputs, dims_told, projection
from fmr.structure.normal.vocabulary import CONVOLUTIONS, ELEMENTWISE, MOVES, NORMS, RESHAPES, SAME
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

_OF_ALL = ((_BY_NUMBER | MOVES) - NORMS - _VIEWS) | {"stack"}
"""Ops of whose operands all go on in what they make; of others the first does."""

_ALONG = {"cumsum": 1, "cumprod": 1, "flip": 1, "roll": 2, "softmax": 1, "log_softmax": 1, "sum": 1, "mean": 1}
"""Ops in which one place of a dimension reaches others, with the place of the argument that names it."""

_IN_ORDER = frozenset("cumsum cumprod flip roll".split())
"""Those to which it matters which place is the next."""

_PRIMES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)


class Dims:
    """The classes of the dimensions of a graph's values, with what is known of each; without a graph nothing is known."""

    def __init__(self, graph: Graph | None = None) -> None:
        self._joined: dict[Dim, Dim] = {}
        self._parts: dict[Dim, list[tuple[int, Dim]]] = {}
        self._mixed, self._units, self._along, self._ordered = set[Dim](), set[Dim](), set[Dim](), set[Dim]()
        if graph is not None:
            for node in graph.nodes:
                self._read(graph, node)
        self._mixed, self._units, self._along, self._ordered = (
            {self._root(one) for one in known} for known in (self._mixed, self._units, self._along, self._ordered)
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
        return one in self._along or one in self._ordered

    def is_ordered(self, one: Dim) -> bool:
        """Whether an op goes along a class in the order of its places, or weighs each otherwise."""
        return one in self._ordered or one in self._units

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
        if contraction(node) is not None:
            self._multiplied(graph, node)
        elif node.op in RESHAPES and read:
            self._reshaped(read[0], node, _repeated(graph, read[0]))
        elif read and not (node.op in _CELLS and node.id.parts.output):
            for one in read if node.op in _OF_ALL else read[:1]:
                for there, here in _kept(graph, one, node):
                    if one.shape[there] == node.shape[here] or node.op in _POOLS | _VIEWS:
                        self._join((one.id, there), (node.id, here))
            self._tell(graph, read[0], node)

    def _tell(self, graph: Graph, read: Node, node: Node) -> None:
        """What an op says of dimensions: that they count units, that it goes along them, that it chooses among them."""
        last, rank = len(node.shape) - 1, len(read.shape)
        if node.op in _ALONG:
            known = self._ordered if node.op in _IN_ORDER else self._along
            known.update((read.id, n) for n in dims_told(node, rank, _ALONG[node.op]))
        if node.op in _POOLS:
            self._ordered.update((node.id, last - n) for n in range(int(node.op[-2])))
        if node.op == "embedding":
            self._units.add((node.id, last))
        if node.op in _CELLS:
            self._units.update([(read.id, last), (node.id, last)])
            self._ordered.add((node.id, 1 if node.args.get("8") is True and rank > 2 else 0))
        if node.op in ("getitem", "index_select") and len(node.parents) > 1 and node.shape:
            index = graph[node.parents[1].id]
            by_value = index.dtype == torch.bool or any(one.op in _CHOICES for one in above(graph, index.id, MOVES))
            if by_value or (read.shape and self._root((read.id, 0)) in {self._root(one) for one in self._mixed}):
                self._mixed.add((node.id, 0))

    def _multiplied(self, graph: Graph, node: Node) -> None:
        """Dimensions of one letter are the same."""
        found, used = contraction(node), projection(graph, node)
        assert found is not None
        words = of_projection(graph, used) if used is not None else subscripts_of(graph, found)
        left, right = (used.data, used.weight) if used is not None else (found.left, found.right)
        if len(words.result) != len(node.shape):
            words = Subscripts(words.left, "", words.left)
        for name, word in [(left, words.left)] if used is not None else [(left, words.left), (right, words.right)]:
            for n, (letter, size) in enumerate(zip(word, graph[name].shape, strict=False)):
                place = words.result.find(letter)
                if 0 <= place < len(node.shape) and (node.shape[place] == size or node.op in CONVOLUTIONS):
                    self._join((name, n), (node.id, place))
        summed = [(left, words.left.index(letter)) for letter in words.contracted]
        if used is None:
            self._along.update(summed)
            return
        self._units.update(summed, ((node.id, words.result.index(letter)) for letter in words.free(words.right)))
        if node.op in CONVOLUTIONS:
            self._ordered.update((node.id, len(node.shape) - 1 - n) for n in range(len(graph[right].shape) - 2))

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


def _kept(graph: Graph, read: Node, node: Node) -> Iterable[tuple[int, int]]:
    """The dimensions of what an op reads that go on in what it makes, where sizes agree: which there, which here."""
    rank, made = len(read.shape), len(node.shape)
    if node.op == "stack":
        new = node.argument("dim", 1, 0) % made
        return ((n, n + (n >= new)) for n in range(rank))
    if node.op in ("sum", "mean"):
        gone = dims_told(node, rank)
        kept = [n for n in range(rank) if n not in gone or made == rank]
        return ((there, here) for there, here in zip(kept, range(made), strict=False) if there not in gone)
    if node.op == "embedding" or node.op in _CELLS:
        return ((n, n) for n in range(min(rank, made) - (node.op in _CELLS)))
    if node.op in ("getitem", "index_select") and len(node.parents) > 1:
        sizes = zip(reversed([*enumerate(read.shape)]), reversed([*enumerate(node.shape)]), strict=False)
        same = takewhile(lambda pair: pair[0][1] == pair[1][1], sizes)  # those on the right of what is chosen
        return ((there, here) for (there, _), (here, _) in same if here and there)
    if node.op in _VIEWS:
        return _by_strides(graph, read, node)
    aligned = made == rank if node.op in _POOLS or node.op in MOVES - SAME else node.op in _BY_NUMBER and made >= rank
    return ((n, n + made - rank) for n in range(rank if aligned else 0))


def _by_strides(graph: Graph, read: Node, node: Node) -> Iterable[tuple[int, int]]:
    """The dimensions of a view by their strides, once the op runs again on a value without numbers."""
    strides = _PRIMES[: len(read.shape)]
    tensors = {p.id: torch.empty(graph[p.id].shape, dtype=graph[p.id].dtype, device="meta") for p in node.parents}
    if len(strides) < len(read.shape):
        return ()
    tensors[read.id] = torch.empty_strided(read.shape, strides, device="meta")
    try:
        made = execute(node, tensors)
    except (FmrError, RuntimeError, TypeError, KeyError, IndexError, ValueError):
        return ()
    here = {stride: n for n, stride in enumerate(made.stride())} if made.shape == node.shape else {}
    return ((n, here[stride]) for n, stride in enumerate(strides) if stride in here)


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
        a, b = i + 1, j + 1
        while (left := prod(before[i:a])) != (right := prod(after[j:b])):
            a, b = (a + 1, b) if left < right else (a, b + 1)
            if a > len(before) or b > len(after):
                return
        while before[a : a + 1] == (1,) != after[b : b + 1] and a + 1 not in repeated:
            a += 1
        while a - i == 1 and after[b : b + 1] == (1,) != before[a : a + 1]:
            b += 1
        yield [*range(i, a)], [*range(j, b)]
        i, j = a, b
