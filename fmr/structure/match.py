"""The vocabulary of the matchers: contractions, and ops that only reshape, rescale or mask what passes through them."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node

SAME = frozenset({"to", "dropout", "contiguous", "clone", "detach", "alias", "data", "alpha_dropout", "nan_to_num"})
"""Ops that hand on the same numbers, up to a cast, a copy or dropout."""

SHAPE = frozenset(
    {"view", "reshape", "transpose", "permute", "t", "T", "mT", "unsqueeze", "squeeze", "flatten", "unflatten", "movedim",
     "expand", "expand_as", "view_as", "reshape_as", "repeat_interleave", "repeat", "split", "chunk", "unbind", "getitem",
     "select", "narrow", "stack", "cat", "split_with_sizes", "tensor_split", "pad", "roll", "flip", "index_select"}
)  # fmt: skip
"""Ops that only move numbers about."""

MASKING = frozenset({"add", "sub", "mul", "div", "masked_fill", "where", "tanh", "clamp", "maximum", "max", "minimum", "min", "setitem"})
"""Elementwise ops that scale, cap, bias or mask attention scores."""


class Contraction(NamedTuple):
    """A product that sums over one dimension of two operands."""

    node: Node
    left: TensorId
    right: TensorId


def contraction(graph: Graph, node: Node) -> Contraction | None:
    """The product that a node computes, if it is one of two tensors."""
    match node.op:
        case "matmul" | "bmm" | "mm":
            left, right = node.parent("input", 0), node.parent("mat2", 1) or node.parent("other", 1)
        case "baddbmm" | "addmm" | "addbmm":
            left, right = node.parent("batch1", 1) or node.parent("mat1", 1), node.parent("batch2", 2) or node.parent("mat2", 2)
        case "einsum":
            operands = list(node.parents)
            left, right = (operands[0], operands[1]) if len(operands) == 2 else (None, None)
        case "linear":
            left, right = node.parent("input", 0), node.parent("weight", 1)
        case _:
            return None
    return Contraction(node, left.id, right.id) if left is not None and right is not None else None


def is_weight(graph: Graph, name: TensorId) -> bool:
    """Whether a value is made of parameters alone: no input flows into it."""
    waiting, seen = [name], set()
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        node = graph[here]
        if node.op == "input" or (not node.parents and not here.is_source) or len(seen) > 12:
            return False
        waiting.extend(parent.id for parent in node.parents)
    return True


def is_random(node: Node) -> bool:
    """Whether a node is dropout that drops."""
    return node.op.endswith("dropout") and node.argument("training", 2, True) and node.argument("p", 1, 0.5) > 0


def climb(graph: Graph, start: TensorId, through: Callable[[Node], bool]) -> Iterator[Node]:
    """The ancestors of a value, nearest first, not going above a node that `through` refuses."""
    waiting, seen = [start], {start}
    while waiting:
        node = graph[waiting.pop(0)]
        yield node
        if through(node):
            for parent in node.parents:
                if parent.id not in seen:
                    seen.add(parent.id)
                    waiting.append(parent.id)


def descend(graph: Graph, start: Node, readers: Callable[[Node], Iterable[Node]], through: Callable[[Node], bool]) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """The descendants of a node, nearest first, each with the nodes on the way, not going below one that `through` refuses."""
    waiting: list[tuple[Node, tuple[Node, ...]]] = [(start, ())]
    seen = {start.id}
    while waiting:
        node, way = waiting.pop(0)
        yield node, way
        if node is start or through(node):
            for reader in readers(node):
                if reader.id not in seen:
                    seen.add(reader.id)
                    waiting.append((reader, (*way, node)))
