"""Attention by dataflow: two contractions around a softmax."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fmr.fused import EXPLAINED
from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.match import (
    MASKING,
    SAME,
    SHAPE,
    Contraction,
    climb,
    contraction,
    descend,
    product,
    projection,
    settled,
    unshaped,
    weights,
)

AFTER = SAME | SHAPE | {"masked_fill", "mul", "where", "div"}
"""What may lie between a softmax and the product with the values: casts, masks, a cut sink."""

BEFORE = SAME | SHAPE | MASKING
"""What may lie between the product of queries and keys and its softmax: scale, bias, mask, cap, sink."""


class Attention(NamedTuple):
    """The IDs of one attention and the shape of its heads, as read off the graph."""

    softmax: TensorId
    q: TensorId
    k: TensorId
    v: TensorId
    scores: TensorId
    pattern: TensorId
    z: TensorId
    out: TensorId | None
    n_heads: int
    n_kv_heads: int
    head_dim: int
    kind: str
    scope: str


@dataclass(frozen=True)
class Rejected:
    """A candidate that is not claimed, and why."""

    id: TensorId
    what: str
    reason: str

    def __repr__(self) -> str:
        return f"{self.id} is no {self.what}: {self.reason}"


def find_attention(graph: Graph) -> Iterator[Attention | Rejected]:
    """Each softmax of an unfused graph as an attention, or with the reason why it is none."""
    for node in graph.nodes:
        if node.op == "softmax":
            yield _attention(graph, node)


def _attention(graph: Graph, softmax: Node) -> Attention | Rejected:
    scored = _scored(graph, softmax)
    if scored is None:
        return Rejected(softmax.id, "attention", "no product of two activations lies above the softmax")
    mixed = _mix(graph, softmax)
    if mixed is None:
        return Rejected(softmax.id, "attention", "nothing below the softmax multiplies values by it")
    use, pattern, v = mixed
    q, k = scored.left, _untransposed(graph, scored.right)
    heads = _heads(graph, q, k)
    if heads is None:
        return Rejected(
            softmax.id, "attention", f"the heads cannot be read off the shape {list(graph[q].shape)} of its queries"
        )
    z = _handed_on(graph, use.node)
    kind = "self" if _roots(graph, q) & _roots(graph, k) else "cross"
    scores = softmax.parents[0].id
    out = _projection(graph, z)
    return Attention(softmax.id, q, k, v, scores, pattern, z.id, out, *heads, kind, _module_scope(softmax.scope))


def _scored(graph: Graph, softmax: Node) -> Contraction | None:
    """The nearest product of two activations above a softmax."""
    above = climb(graph, softmax.parents[0].id, lambda node: node.op in BEFORE and contraction(node) is None)
    return next((found for node in above if (found := product(graph, node)) is not None), None)


def _mix(graph: Graph, softmax: Node) -> tuple[Contraction, TensorId, TensorId] | None:
    """The product with the values below a softmax, the pattern as it acts in it, and the values."""
    for node, way in descend(graph, softmax, lambda node: node.op in AFTER):
        found = contraction(node)
        if found is not None and node is not softmax:
            values = found.right if found.left == way[-1].id else found.left
            if not weights(graph, values):
                return found, _acting(way), values
    return None


def _acting(way: tuple[Node, ...]) -> TensorId:
    """The last node on the way to the product that changes the numbers, dropout and reshaping aside."""
    changing = [
        n
        for n in way
        if n.op not in ("dropout", "alpha_dropout") and (n.op not in SHAPE | SAME or n.op in ("getitem", "to"))
    ]
    return (changing or [way[0]])[-1].id


def _untransposed(graph: Graph, k: TensorId) -> TensorId:
    """The keys as (..., positions, units), where the product reads them transposed."""
    node = graph[k]
    if node.op in ("transpose", "permute", "mT", "t", "T", "movedim") and len(node.parents) == 1:
        before = graph[node.parents[0].id]
        if before.shape == (*node.shape[:-2], node.shape[-1], node.shape[-2]):
            return before.id
    return k


def _heads(graph: Graph, q: TensorId, k: TensorId) -> tuple[int, int, int] | None:
    """Query heads, key-value heads and head size."""
    shape = graph[q].shape
    if len(shape) < 3:
        return None
    n_heads = shape[1] if len(shape) == 4 else _folded_heads(graph, q)
    return (n_heads, max(1, round(n_heads / _repeated(graph, k))), shape[-1]) if n_heads else None


def _folded_heads(graph: Graph, q: TensorId) -> int:
    """The heads of queries that were folded into the batch, from the four-dimensional view above them."""
    folded = graph[q]
    for node in climb(graph, q, lambda n: n.op in SHAPE | SAME):
        if len(node.shape) == 4 and node.shape[-1] == folded.shape[-1] and folded.shape[0] == node.shape[0] * node.shape[1]:
            return node.shape[1]
    return 1


def _repeated(graph: Graph, k: TensorId) -> float:
    """How many query heads share one key head: how often the keys were repeated before the product."""
    ratio, node = 1.0, graph[k]
    while node.op in SHAPE | SAME and len(node.parents) == 1 and node.op not in ("split", "chunk", "unbind", "cat", "stack"):
        above = graph[node.parents[0].id]
        if node.op in ("expand", "repeat_interleave", "repeat", "expand_as"):
            ratio *= _count(node) / max(1, _count(above))
        node = above
    return ratio


def _count(node: Node) -> int:
    total = 1
    for length in node.shape:
        total *= length
    return total


def _roots(graph: Graph, name: TensorId) -> set[TensorId]:
    """The activations that the projection of queries or keys reads."""
    for node in climb(graph, name, lambda node: contraction(node) is None and not node.id.is_source):
        found = projection(graph, node)
        if found is not None:
            return {unshaped(graph, found.data)}
    return set()


def _handed_on(graph: Graph, node: Node) -> Node:
    """The output of the fused op that a node is the result of, else the node."""
    while True:
        outer = [r for r in graph.readers(node.id) if r.op in EXPLAINED and r.parents[0].id == node.id]
        if not outer:
            return node
        node = outer[0]


def _projection(graph: Graph, z: Node) -> TensorId | None:
    """The output projection: the first contraction with a weight below the heads, with what reshapes its result."""
    for node, way in descend(graph, z, lambda node: node.op in SAME | SHAPE | {"mul"}):
        found = projection(graph, node) if way else None
        if found is not None and found.data == way[-1].id:
            return settled(graph, node).id
    return None


def _module_scope(scope: str) -> str:
    return scope.partition("/")[0]
