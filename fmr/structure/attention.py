"""Attention by dataflow: two contractions around a softmax, and what is shared by all that weigh values by a softmax."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fmr.fused import EXPLAINED
from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.heads import Heads, axes_of, heads_in_rows, shared_heads
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


_GATHERED = SAME | SHAPE | NORMS | {"mul", "sub", "div"}
"""What may lie between the values of the heads and their projection: a gate, or a norm, as one op or written out."""


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
    z = handed_on(graph, use.node)
    out, way, end = projected(graph, z)
    heads = (heads_in_rows(graph, z, way, end) if end is not None else None) or _unprojected(graph, z, q)
    if heads is None:
        return "how many heads it has cannot be read off the way of its values into a projection"
    roles = (q, k, v, softmax.parents[0].id, pattern, z.id)
    return Attention(
        softmax=softmax.id,
        q=q,
        k=k,
        v=v,
        scores=softmax.parents[0].id,
        pattern=pattern,
        z=z.id,
        out=out,
        n_heads=heads.number,
        n_kv_heads=shared_heads(graph, scored, k, z, heads, _repeated(graph, k)),
        head_dim=graph[q].shape[-1],
        kind="self" if _roots(graph, q) & _roots(graph, k) else "cross",
        scope=softmax.scope.partition("/")[0],
        axes=axes_of(graph, scored, use, roles, heads),
    )


def _unprojected(graph: Graph, z: Node, q: TensorId) -> Heads | None:
    """The heads of values that no projection reads row by row: where the width of the queries was split into them."""
    size = graph[q].shape[-1]
    split = _split(graph, q, size)
    if split is None:
        return Heads(1, (), False) if len(z.shape) == 3 else None
    dims = [n for n in range(len(z.shape) - 2, 0, -1) if z.shape[n] == split]
    return Heads(split, (dims[-1],), False) if dims else Heads(split, (0,), True)


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


def _split(graph: Graph, q: TensorId, size: int) -> int | None:
    """The number of heads in the view that split the width of a projection into heads of `size` units."""
    through = SHAPE | SAME | MASKING | NORMS | {"neg", "rsqrt", "pow", "mean", "sigmoid"}
    for node in climb(graph, q, lambda node: node.op in through and contraction(node) is None):
        if node.op in ("view", "reshape", "unflatten", "rearrange") and len(node.shape) >= 3 and node.parents:
            above = graph[node.parents[0].id].shape
            if above and node.shape[-1] % size == 0 and above[-1] > node.shape[-1] and above[-1] % node.shape[-1] == 0:
                if above[-2:] and math.prod(above[-2:]) == math.prod(node.shape[-2:]) != above[-1]:
                    return node.shape[-2]
                whole = above[-1] % (node.shape[-1] * node.shape[-2]) == 0
                return node.shape[-2] if whole and len(node.shape) > len(above) else above[-1] // node.shape[-1]
    return None


def _repeated(graph: Graph, k: TensorId) -> float:
    """How many query heads share one key head: how often the keys were repeated before the product."""
    ratio, node = 1.0, graph[k]
    while node.op in SHAPE | SAME and len(node.parents) == 1 and node.op not in ("split", "chunk", "unbind", "cat", "stack"):
        above = graph[node.parents[0].id]
        if node.op in ("expand", "repeat_interleave", "repeat", "expand_as"):
            ratio *= math.prod(node.shape) / max(1, math.prod(above.shape))
        node = above
    return ratio


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


def projected(graph: Graph, z: Node) -> tuple[TensorId | None, tuple[Node, ...], Node | None]:
    """The output projection with what reshapes its result, the way of z into it, and the projection itself.

    It is the first contraction with a weight below the heads; all None where z is used as it is.
    """
    for node, way in descend(graph, z, lambda node: node.op in _GATHERED):
        found = projection(graph, node) if way else None
        if found is not None and found.data == way[-1].id:
            return settled(graph, node).id, way, node
    return None, (), None


def output_projection(graph: Graph, z: Node) -> TensorId | None:
    """The output of the projection that reads z; None where it is used as it is."""
    return projected(graph, z)[0]
