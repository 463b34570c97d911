"""The dimensions of a product by letter, and which dimension of a value became which further down.

Every product is an einsum: a letter of both operands that the result lacks is summed over.
"""

import math
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph import Graph
from fmr.nodes import Node
from fmr.structure.evaluate import execute
from fmr.structure.match import LINEAR, SHAPE, Contraction, climb, contraction

_BATCH, _SPACE = "ABCDEFGH", "STUVW"


class Letters(NamedTuple):
    """A letter for each dimension of the two operands and of the result."""

    left: str
    right: str
    result: str

    @property
    def summed(self) -> str:
        """What the product sums over."""
        return "".join(letter for letter in self.left if letter in self.right and letter not in self.result)

    @property
    def shared(self) -> str:
        """What both operands and the result have: the dimensions of a batch of products."""
        return "".join(letter for letter in self.left if letter in self.right and letter in self.result)

    def of(self, first: bool) -> tuple[str, str]:
        """The letters of one operand, the left one if it is the first, and those of the other."""
        return (self.left, self.right) if first else (self.right, self.left)

    def alone(self, operand: str) -> str:
        """What the result has of one operand alone."""
        return "".join(letter for letter in operand if letter in self.result and letter not in self.shared)


def letters_of(graph: Graph, found: Contraction) -> Letters:
    """The letters of a product."""
    left, right = len(graph[found.left].shape), len(graph[found.right].shape)
    match found.node.op:
        case "einsum":
            return _einsum(found.node, left, right)
        case "linear":
            return Letters(_BATCH[: left - 1] + "k", "nk"[-right:], _BATCH[: left - 1] + "n"[: right - 1])
        case op if op in LINEAR:
            space = _SPACE[: right - 2]
            batch = "A"[: left - right + 1]
            return Letters(batch + "k" + space, "nk" + space.lower(), batch + "n" + space)
        case "sum":
            return _summed(graph, found)
        case "tensordot":
            return _tensordot(found.node, left, right)
        case "inner":
            a, b = _BATCH[: left - 1], _SPACE[: right - 1]
            return Letters(a + "k", b + "k", a + b)
    a = _BATCH[: max(0, left - 2)][::-1] + "mk"[-left:]
    b = _BATCH[: max(0, right - 2)][::-1] + ("nk" if found.node.op == "cdist" else "kn"[:right])
    batch = max(a[:-2], b[:-2], key=len)
    return Letters(a, b, batch + "m"[: left - 1] + "n"[: right - 1])


def _einsum(node: Node, *ranks: int) -> Letters:
    """The subscripts of an einsum; the dimensions that its dots stand for are digits, counted from the right."""
    equation = str(node.args.get("0", node.args.get("equation", ""))).replace(" ", "").replace("...", ".")
    before, arrow, after = equation.partition("->")
    dots = {
        word: "9876543210"[10 - (rank - len(word) + 1) :]
        for word, rank in zip(before.split(","), ranks, strict=True)
        if "." in word
    }
    widest = max(dots.values(), key=len, default="")
    left, right = (word.replace(".", dots.get(word, "")) for word in before.split(","))
    once = "".join(sorted(letter for letter in set(left + right) - set(widest) if (left + right).count(letter) == 1))
    return Letters(left, right, after.replace(".", widest) if arrow else widest + once)


def _tensordot(node: Node, left: int, right: int) -> Letters:
    """The letters of a product that sums over pairs of dimensions, the last with the first where only told how many."""
    dims = node.argument("dims", 2)
    pairs = ([*range(left - dims, left)], [*range(dims)]) if isinstance(dims, int) else dims
    a, b = list(_BATCH[:left]), list(_SPACE[:right])
    for one, other in zip(*pairs, strict=True):
        b[other] = a[one] = a[one].lower()
    return Letters("".join(a), "".join(b), "".join(letter for letter in (*a, *b) if letter.isupper()))


def _summed(graph: Graph, found: Contraction) -> Letters:
    """The letters of a multiplication and a sum: an operand lacks those along which it is repeated."""
    factors = graph[found.node.parents[0].id]
    every = (_BATCH + _SPACE)[: len(factors.shape)]
    dim = found.node.argument("dim", 1)
    gone = {n % len(every) for n in (dim if isinstance(dim, (list, tuple)) else [dim])}
    kept = len(found.node.shape) == len(every)
    result = "".join(letter.lower() if n in gone else letter for n, letter in enumerate(every) if kept or n not in gone)
    left, right = (
        _letters_kept(every[len(every) - len(graph[parent].shape) :], graph[parent].shape, graph[name].shape)
        for parent, name in zip(factors.parents, (found.left, found.right), strict=True)
    )
    return Letters(left, right, result)


def _letters_kept(word: str, wide: tuple[int, ...], narrow: tuple[int, ...]) -> str:
    """The letters of the dimensions that are left when some of size one were taken out."""
    ones = [n for n, size in enumerate(wide) if size == 1]
    for out in combinations(ones, len(wide) - len(narrow)):
        kept = [n for n in range(len(wide)) if n not in out]
        if tuple(wide[n] for n in kept) == narrow:
            return "".join(word[n] for n in kept)
    return word


def numbers(*shape: int) -> Tensor:
    """A value of this shape in which each place has its own number, to be sent along a way."""
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def carried(graph: Graph, value: Tensor, way: tuple[Node, ...]) -> Tensor | None:
    """What becomes of a value between the ends of a way, where only what moves numbers counts; None where that fails.

    What comes from elsewhere is -1.
    """
    known = {way[0].id: value.contiguous()}
    try:
        for node in _between(graph, way):
            met = [parent.id for parent in node.parents if parent in known]
            if node.op in SHAPE and met:
                tensors = {p.id: known[p.id] if p.id in known else _foreign(graph[p.id]) for p in node.parents}
                known[node.id] = execute(node, tensors)[node.id].contiguous()
            elif met and node.op in ("sum", "mean"):
                known[node.id] = _reduced(known[met[0]], node)
            elif met:
                known[node.id] = known[met[0]].expand(node.shape)
    except (StructureError, RuntimeError, TypeError, KeyError, IndexError, ValueError):
        return None
    return known.get(way[-1].id)


def _reduced(value: Tensor, node: Node) -> Tensor:
    """What is left of numbers that are summed up: those that are the same all along."""
    dim, keep = node.argument("dim", 1), len(node.shape) == value.dim()
    most, least = (function(value, dim=dim, keepdim=keep) for function in (torch.amax, torch.amin))
    return torch.where(most == least, most, -1.0)


def _between(graph: Graph, way: tuple[Node, ...]) -> list[Node]:
    """What lies above the end of a way and not before its start, up to other contractions, in order."""
    first, own = graph.place(way[0].id), {node.id for node in way}
    above = climb(
        graph, way[-1].id, lambda node: node.id in own or (graph.place(node.id) > first and contraction(node) is None)
    )
    between = {node.id for node in above if graph.place(node.id) > first}
    return [graph[name] for name in sorted(between, key=graph.place)]


def _foreign(node: Node) -> Tensor:
    """A value of a node's shape that comes from elsewhere."""
    if node.dtype.is_floating_point:
        return torch.full(node.shape, -1.0, dtype=torch.float64)
    return torch.zeros(node.shape, dtype=node.dtype)


def sources(graph: Graph, way: tuple[Node, ...]) -> tuple[int | None, ...]:
    """For each dimension of the last value of a way the dimension of the first that it is; None where it is none alone."""
    start, end = way[0].shape, way[-1].shape
    if not any(node.op in SHAPE for node in way[1:]):
        return tuple(range(len(end))) if len(start) == len(end) else (None,) * len(end)
    value = carried(graph, numbers(*start), way) if math.prod(start) else None
    if value is None or value.shape != end:
        return (None,) * len(end)
    return tuple(_source(value, dim, start, len(end)) for dim in range(len(end)))


def _source(value: Tensor, dim: int, start: tuple[int, ...], rank: int) -> int | None:
    """The one dimension of the start along which a line of numbers goes; of the same place where the line is a point."""
    line = value[tuple(slice(None) if n == dim else 0 for n in range(rank))].long()
    line = line[line >= 0]
    places = torch.unravel_index(line, start)
    moving = [
        n for n, place in enumerate(places) if len(place) == start[n] > 1 and torch.equal(place, torch.arange(start[n]))
    ]
    if len(line) == 1 and len(start) == rank and start[dim] == 1:
        return dim
    return moving[0] if len(moving) == 1 else None
