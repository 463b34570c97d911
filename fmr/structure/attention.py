"""Attention by dataflow: two contractions around a softmax, and what is shared by all that weigh values by a softmax."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fmr.fused import EXPLAINED
from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.match import (
    MASKING,
    NORMS,
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

_LAID_OUT = frozenset("pad as_strided unfold chunk split cat stack diagonal new_zeros setitem".split())
"""Ops that lay a pattern out for a banded product; the pattern is what they are given."""


class Attention(NamedTuple):
    """The IDs of one attention and the shape of its heads, as read off the graph.

    `axes` is the dimension that counts the heads in q, k, v, scores, pattern and z; None where heads lie in the batch.
    """

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
    axes: tuple[int | None, ...]


@dataclass(frozen=True)
class Rejected:
    """A candidate that is not claimed, and why."""

    id: TensorId
    what: str
    reason: str

    def __repr__(self) -> str:
        return f"{self.id} is no {self.what}: {self.reason}"


def dot_product(graph: Graph, softmax: Node) -> Attention | str:
    """The attention around a softmax of products of queries with keys, or the reason why it is none."""
    scored = _scored(graph, softmax)
    if scored is None:
        return "no product of two activations lies above the softmax"
    mixed = mix(graph, softmax)
    if mixed is None:
        return "nothing below the softmax multiplies values by it"
    use, pattern, v = mixed
    q, k = scored.left, _untransposed(graph, scored.right)
    if len(graph[q].shape) < 3:
        return f"the heads cannot be read off the shape {list(graph[q].shape)} of its queries"
    n_heads = _count_heads(graph, q, scored)
    kind = "self" if _roots(graph, q) & _roots(graph, k) else "cross"
    z = handed_on(graph, use.node)
    return Attention(
        softmax=softmax.id,
        q=q,
        k=k,
        v=v,
        scores=softmax.parents[0].id,
        pattern=pattern,
        z=z.id,
        out=output_projection(graph, z),
        n_heads=n_heads,
        n_kv_heads=_count_shared(graph, q, k, n_heads),
        head_dim=graph[q].shape[-1],
        kind=kind,
        scope=softmax.scope.partition("/")[0],
        axes=_axes(graph, scored, use, (q, k, v, softmax.parents[0].id, pattern, z.id), n_heads),
    )


def _scored(graph: Graph, softmax: Node) -> Contraction | None:
    """The nearest product of two activations above a softmax."""
    above = climb(graph, softmax.parents[0].id, lambda node: node.op in BEFORE and contraction(node) is None)
    return next((found for node in above if (found := product(graph, node)) is not None), None)


def mix(graph: Graph, softmax: Node) -> tuple[Contraction, TensorId, TensorId] | None:
    """The product with the values below a softmax, the pattern as it acts in it, and the values."""
    for node, way in descend(graph, softmax, lambda node: node.op in AFTER):
        found = contraction(node)
        if found is not None and node is not softmax:
            values = found.right if found.left == way[-1].id else found.left
            if not weights(graph, values):
                return found, _acting(graph, way), values
    return None


def _acting(graph: Graph, way: tuple[Node, ...]) -> TensorId:
    """The last node on the way to the product that changes the numbers; dropout and the layout of a band do not count."""
    acting = way[0]
    for before, node in pairwise(way):
        if node.op in _LAID_OUT:
            break
        cut = node.op == "getitem" and len(node.shape) == len(before.shape) and node.shape[:-1] == before.shape[:-1]
        if cut or node.op == "to" or node.op not in SHAPE | SAME:
            acting = node
    return acting.id


def _untransposed(graph: Graph, k: TensorId) -> TensorId:
    """The keys as (..., positions, units), where the product reads them transposed."""
    node = graph[k]
    if node.op in ("transpose", "permute", "mT", "t", "T", "movedim") and len(node.parents) == 1:
        before = graph[node.parents[0].id]
        if before.shape == (*node.shape[:-2], node.shape[-1], node.shape[-2]):
            return before.id
    return k


def _count_heads(graph: Graph, q: TensorId, scored: Contraction) -> int:
    """How many heads the queries have: where their width was split into heads of their size, else a batch dimension."""
    shape = graph[q].shape
    split = _split(graph, q, shape[-1])
    inner = shape[1:-1] if scored.node.op == "einsum" else shape[1:-2] or shape[:1]
    if split is not None and (split in inner or (len(shape) == 3 and inner[0] % split == 0)):
        return split
    return shape[1] if len(shape) == 4 else _folded(graph, q)


def _folded(graph: Graph, q: TensorId) -> int:
    """The heads of queries that were folded into the batch, from the four-dimensional value above them."""
    folded = graph[q]
    for node in climb(graph, q, lambda node: node.op in SHAPE | SAME):
        if len(node.shape) == 4 and node.shape[-1] == folded.shape[-1] and folded.shape[0] == node.shape[0] * node.shape[1]:
            return node.shape[1]
    return 1


def _split(graph: Graph, q: TensorId, size: int) -> int | None:
    """The number of heads in the view that split the width of a projection into heads of `size` units."""
    through = SHAPE | SAME | MASKING | NORMS | {"neg", "rsqrt", "pow", "mean", "sigmoid"}
    for node in climb(graph, q, lambda node: node.op in through and contraction(node) is None):
        if node.op in ("view", "reshape", "unflatten", "rearrange") and len(node.shape) >= 3 and node.parents:
            above = graph[node.parents[0].id].shape
            if above and node.shape[-1] % size == 0 and above[-1] > node.shape[-1] and above[-1] % node.shape[-1] == 0:
                whole = above[-1] % (node.shape[-1] * node.shape[-2]) == 0
                return node.shape[-2] if whole and len(node.shape) > len(above) else above[-1] // node.shape[-1]
    return None


def _axes(
    graph: Graph, scored: Contraction, use: Contraction, roles: tuple[TensorId, ...], n_heads: int
) -> tuple[int | None, ...]:
    """The dimension of the heads in each role's value."""
    dims = [len(graph[name].shape) for name in roles]
    if scored.node.op == use.node.op == "einsum":
        (left, right), scores = subscripts(scored.node)
        (a, b), z = subscripts(use.node)
        pattern, v = (a, b) if use.right == roles[2] else (b, a)
        sizes = dict(zip(reversed(left), reversed(graph[scored.left].shape), strict=False))
        heads = [letter for letter in reversed(left) if letter in scores and sizes[letter] == n_heads]
        head = next((letter for letter in heads if letter in right), heads[0] if heads else None)
        if head is not None and len(pattern) == len(scores):
            same = pattern[scores.index(head)]
            words = ((left, head), (right, head), (v, same), (scores, head), (pattern, same), (z, same))
            return tuple(
                size - len(word) + word.index(letter) if letter in word else None
                for (word, letter), size in zip(words, dims, strict=True)
            )
    return tuple(_axis(graph[name].shape, n_heads) for name in roles)


def _axis(shape: tuple[int, ...], n_heads: int) -> int | None:
    """The batch dimension with as many entries as there are heads, the last one first; the batch itself is none."""
    return next((axis for axis in range(len(shape) - 3, 0, -1) if shape[axis] == n_heads), None)


def subscripts(node: Node) -> tuple[list[str], str]:
    """The subscripts of the operands and of the result of an einsum, without spaces and dots."""
    equation = str(node.args.get("0", node.args.get("equation", ""))).replace(" ", "").replace("...", "")
    operands, _, result = equation.partition("->")
    return operands.split(","), result


def _count_shared(graph: Graph, q: TensorId, k: TensorId, n_heads: int) -> int:
    """Key-value heads: fewer than queries where keys were repeated, or are broadcast, over several of them."""
    queries, keys = graph[q].shape, graph[k].shape
    if len(keys) < len(queries):
        return 1
    if len(keys) == len(queries) == 4 and n_heads not in keys[1:3] and keys[1] == 1:
        return 1
    return max(1, round(n_heads / _repeated(graph, k)))


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


def handed_on(graph: Graph, node: Node) -> Node:
    """The output of the fused op that a node is the result of, else the node."""
    while True:
        outer = [r for r in graph.readers(node.id) if r.op in EXPLAINED and r.parents[0].id == node.id]
        if not outer:
            return node
        node = outer[0]


def output_projection(graph: Graph, z: Node) -> TensorId | None:
    """The output projection: the first contraction with a weight below the heads, with what reshapes its result."""
    for node, way in descend(graph, z, lambda node: node.op in SAME | SHAPE | {"mul"}):
        found = projection(graph, node) if way else None
        if found is not None and found.data == way[-1].id:
            return settled(graph, node).id
    return None
