"""Attention by dataflow: two contractions around a softmax, and what is shared by all that weigh values by a softmax."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fmr.fused import EXPLAINED
from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.heads import Layout, head_size, heads_in_queries, heads_in_rows, key_heads, layouts
from fmr.structure.match import (
    NONLINEAR,
    NORM_PARTS,
    NORMS,
    SAME,
    SHAPE,
    Projection,
    climb,
    contraction,
    depends,
    descend,
    is_constant,
    product,
    projection,
    settled,
    unshaped,
    weights,
)
from fmr.structure.operands import BEFORE, Scores, Use, find_scores, mix, oriented
from fmr.structure.softmax import Softmax

_LAID_OUT = frozenset("pad as_strided unfold chunk split cat stack diagonal new_zeros setitem".split())
"""Ops that lay a pattern out for a banded product; the pattern is what they are given."""


class Attention(NamedTuple):
    """The IDs of one attention and the shape of its heads, as read off the graph.

    `layouts` says of q, k, v, scores, pattern and z what each dimension counts: "heads" is not there where heads lie in the
    batch, and of scores and pattern "positions" are the queries and "units" the keys. `dim` is normalised by the softmax.
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
    dim: int = -1
    layouts: tuple[Layout | None, ...] = (None,) * 6


@dataclass(frozen=True)
class Rejected:
    """A candidate that is not claimed, and why."""

    id: TensorId
    what: str
    reason: str

    def __repr__(self) -> str:
        return f"{self.id} is no {self.what}: {self.reason}"


def dot_product(graph: Graph, softmax: Softmax) -> Attention | str:
    """The attention around a softmax of products of queries with keys, or the reason why it is none."""
    scores = find_scores(graph, softmax)
    if scores is None:
        return "no product of two activations lies above the softmax"
    use = mix(graph, softmax, scores)
    if use is None:
        return "nothing below the softmax multiplies values by it"
    scores = oriented(graph, scores, use)
    if is_constant(graph, scores.k) and not is_constant(graph, use.v):
        return "its keys are weights and its values are not: it chooses among experts"
    z, pattern = handed_on(graph, use.node), acting(graph, use.way)
    z, pattern = _whole(graph, use, z) or (z, pattern)
    out, way, end = projected(graph, z, (unshaped(graph, use.v, SAME | SHAPE), softmax.node.id))
    heads = (heads_in_rows(graph, use, z, way, end) if end is not None else None) or heads_in_queries(graph, scores, use)
    if heads is None:
        return "how many heads it has can be read neither off the way of its values into a projection nor off its queries"
    return Attention(
        softmax=softmax.node.id,
        q=scores.q,
        k=scores.k,
        v=use.v,
        scores=softmax.scores,
        pattern=pattern,
        z=z.id,
        out=out,
        n_heads=heads.number,
        n_kv_heads=key_heads(graph, use, heads, _repeated(graph, scores.k)),
        head_dim=head_size(graph, scores),
        kind=_kind(graph, softmax, scores),
        scope=softmax.node.scope.partition("/")[0],
        dim=softmax.dim,
        layouts=layouts(graph, scores, use, heads),
    )


def _kind(graph: Graph, softmax: Softmax, scores: Scores) -> str:
    """Self-attention where queries and keys, or some of the keys, were projected from the same."""
    above = climb(graph, softmax.scores, lambda node: node.op in BEFORE and contraction(node) is None)
    pairs = [(scores.q, scores.k), *((one.left, one.right) for node in above if (one := product(graph, node)) is not None)]
    return "self" if any(_roots(graph, q) & _roots(graph, k) for q, k in pairs) else "cross"


def _is_cut(before: Node, node: Node) -> bool:
    """Whether a node takes some of the keys of a pattern."""
    return node.op == "getitem" and len(node.shape) == len(before.shape) and node.shape[:-1] == before.shape[:-1]


def _whole(graph: Graph, use: Use, z: Node) -> tuple[Node, TensorId] | None:
    """The sum of values and the pattern where its keys are cut in two and each part weighs values of its own."""
    place = next((n for n, (before, node) in enumerate(pairwise(use.way)) if _is_cut(before, node)), None)
    if place is None:
        return None
    whole = use.way[place]
    for total in graph.readers(z.id):
        for parent in total.parents if total.op == "add" else ():
            made = graph[unshaped(graph, parent.id, SAME | SHAPE)]
            found = product(graph, made) if parent != z.id else None
            read = [graph[unshaped(graph, one)] for one in (found.left, found.right)] if found is not None else []
            if any(_is_cut(whole, one) and one.parents[0] == whole.id for one in read):
                return total, acting(graph, use.way[: place + 1])
    return None


def acting(graph: Graph, way: tuple[Node, ...]) -> TensorId:
    """The last node on the way to the product that changes the numbers; dropout and the layout of a band do not count."""
    last = way[0]
    for before, node in pairwise(way):
        if node.op in _LAID_OUT or contraction(node) is not None:
            break
        if _is_cut(before, node) or node.op == "to" or node.op not in SHAPE | SAME:
            last = node
    return last.id


def _repeated(graph: Graph, k: TensorId) -> float:
    """How many query heads share one key head: how often the keys were repeated before the product."""
    ratio, node = 1.0, graph[k]
    while node.op in SHAPE | SAME and len(node.parents) == 1 and node.op not in ("split", "chunk", "unbind", "cat", "stack"):
        above = graph[node.parents[0].id]
        if node.op in ("expand", "repeat_interleave", "repeat", "expand_as"):
            ratio *= math.prod(node.shape) / max(1, math.prod(above.shape))
        node = above
    return ratio


def _roots(graph: Graph, name: TensorId) -> set[object]:
    """What queries or keys were projected from, and what that was made of by norms and further projections alone."""
    above = climb(graph, name, lambda node: contraction(node) is None and not node.id.is_source)
    data = [found.data for node in above if (found := projection(graph, node)) is not None]
    return {unshaped(graph, one) for one in data}.union(*(_linear(graph, one) for one in (name, *data)))


def _linear(graph: Graph, name: TensorId) -> set[object]:
    """The activations that a value is a normalised linear function of, up to a sum; one that is computed twice is one."""
    found: set[object] = set()

    def through(node: Node) -> bool:
        if node.op == "add" and sum(not weights(graph, parent.id) for parent in node.parents) > 1:
            found.add((node.op, *sorted(node.parents)))
            return False
        moved = node.op in SAME | SHAPE and len({parent.id for parent in node.parents}) == 1  # `cat` adds keys of others
        return moved or node.op in NORMS | NORM_PARTS or projection(graph, node) is not None

    found.update(node.id for node in climb(graph, name, through) if not is_constant(graph, node.id))
    return found


def handed_on(graph: Graph, node: Node) -> Node:
    """The output of the fused op that a node is the result of, else the node."""
    while True:
        outer = [r for r in graph.readers(node.id) if r.op in EXPLAINED and r.parents[0].id == node.id]
        if not outer:
            return node
        node = outer[0]


def projected(
    graph: Graph, z: Node, own: tuple[TensorId, ...] = ()
) -> tuple[TensorId | None, tuple[Node, ...], Projection | None]:
    """The output projection with what reshapes its result, the way of z into it, and the projection itself.

    It is the first contraction with a weight below the heads, and their sum where each head is projected alone; all None
    where z is used as it is. What is made of its `own` values or pattern in another way may be added to z.
    """

    def through(node: Node) -> bool:
        if node.op == "add":
            return bool(own) and all(any(depends(graph, parent.id, one) for one in own) for parent in node.parents)
        return node.op in SAME | SHAPE | NORMS | {"mul", "sub", "div"} or (node.op in NONLINEAR and len(node.parents) == 1)

    for node, way in descend(graph, z, through):
        found = projection(graph, node) if way else None
        if found is not None and found.data == way[-1].id:
            last = settled(graph, node)
            readers = graph.readers(last.id)
            alone = len(readers) == 1 and readers[0].op == "sum" and len(node.shape) > 3
            return (settled(graph, readers[0]) if alone else last).id, way, found
    return None, (), None


def output_projection(graph: Graph, z: Node) -> TensorId | None:
    """The output of the projection that reads z; None where it is used as it is."""
    return projected(graph, z)[0]
