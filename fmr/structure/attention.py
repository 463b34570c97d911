"""Attention by dataflow: two contractions around a softmax, and what is shared by all that weigh values by a softmax."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fmr.graph import HANDED_ON, Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.heads import Layout, compares_units, head_size, heads_in_queries, heads_in_rows, key_heads, layouts
from fmr.structure.match import (
    MEANS,
    NONLINEAR,
    NORM_PARTS,
    NORMS,
    REPEATS,
    SAME,
    SHAPE,
    Projection,
    climb,
    contraction,
    depends,
    descend,
    first,
    is_constant,
    product,
    projection,
    settled,
    unshaped,
    weights,
)
from fmr.structure.operands import BEFORE, Parts, Scores, find_scores, hands_out, mix, oriented, parts_of, unused
from fmr.structure.softmax import Softmax

_LAID_OUT = frozenset("pad as_strided unfold chunk split cat stack diagonal new_zeros setitem".split())
"""Ops that lay a pattern out for a banded product; the pattern is what they are given."""

_GATHERED = SAME | SHAPE | NORMS | {"mul", "sub", "div"}
"""What may lie between the values of the heads and their projection: a gate, or a norm, as one op or written out."""

_TOTAL = SAME | SHAPE | {"add", "clamp", "clamp_min", "reciprocal"}
"""What may lie between a sum of weights and the division by it."""


class Attention(NamedTuple):
    """The IDs of one attention and the shape of its heads, as read off the graph.

    `layouts` says of q, k, v, scores, pattern and z what each dimension counts: "heads" is not there where heads lie in the
    batch, and of scores and pattern "positions" are the queries and "units" the keys. `dim` is normalised by the softmax.
    Where one softmax is over keys of several kinds, `k` and `v` are those of one of them.
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
        hidden = (node for node in climb(graph, softmax.scores, lambda node: node.op in BEFORE) if node.op == "opaque")
        return next(
            (f"its scores come from code that is hidden from torch: {node.id}" for node in hidden),
            "no product of two activations lies above the softmax",
        )
    use = mix(graph, softmax, scores)
    if use is None:
        return unused(graph, softmax)
    parts = parts_of(graph, softmax, use)
    use = parts.first(graph, scores)
    scores = oriented(graph, scores, use, softmax.dim)
    if is_constant(graph, scores.k) and not is_constant(graph, use.v):
        return "its keys are weights and its values are not: it chooses among experts"
    if hands_out(graph, use, softmax.dim):
        return "it chooses where a single value goes, and weighs none against another"
    if _of_patterns(graph, use.v):
        return "its values are themselves made of patterns"
    z = handed_on(graph, parts.total)
    out, way, end = projected(graph, z, own_parts(graph, scores.q, use.v, softmax.node.id))
    heads = (heads_in_rows(graph, use, z, way, end) if end is not None else None) or heads_in_queries(graph, scores, use)
    if heads is None and compares_units(graph, scores):
        return "its scores sum over positions: it weighs units by units, not positions"
    if heads is None:
        return "how many heads it has can be read neither off the way of its values into a projection nor off its queries"
    return Attention(
        softmax=softmax.node.id,
        q=scores.q,
        k=scores.k,
        v=use.v,
        scores=softmax.scores,
        pattern=acting(graph, parts.whole(use)),
        z=z.id,
        out=out,
        n_heads=heads.number,
        n_kv_heads=key_heads(graph, use, heads, _repeated(graph, scores.k)),
        head_dim=head_size(graph, scores),
        kind=_kind(graph, scores, parts),
        scope=softmax.node.module,
        dim=softmax.dim,
        layouts=layouts(graph, scores, use, heads),
    )


def _kind(graph: Graph, scores: Scores, parts: Parts) -> str:
    """Self-attention where queries and some of the keys come from the same values, else cross-attention."""
    asked = _roots(graph, scores.q)
    return "self" if any(asked & _roots(graph, k) for k in _keys(graph, scores, parts)) else "cross"


def undivided(graph: Graph) -> Iterator[Rejected]:
    """Each product with values whose weights are divided by their sum only afterwards: a softmax that is nowhere."""
    for node in graph.nodes:
        if node.op not in ("div", "mul") or len(node.parents) != 2:
            continue
        above = climb(graph, node.parents[0].id, lambda one: one.op in SAME | SHAPE)
        mixed = next((found for one in above if (found := product(graph, one)) is not None), None)
        sums = [one for one in climb(graph, node.parents[1].id, lambda one: one.op in _TOTAL) if one.op == "sum"]
        totals = {unshaped(graph, one.parents[0].id, SAME) for one in sums if one.parents}
        for name in {unshaped(graph, one, SAME) for one in (mixed.left, mixed.right)} & totals if mixed else ():
            bent = graph[name]
            if bent.op == "exp" and find_scores(graph, Softmax(bent, bent.parents[0].id, -1)) is not None:
                yield Rejected(bent.id, "attention", "its pattern is never computed: the division comes after the values")


def _of_patterns(graph: Graph, name: TensorId) -> bool:
    """Whether a value is made of the results of softmaxes alone: a step of an approximation, and no values yet."""
    above = list(climb(graph, name, lambda node: node.op != "softmax" and projection(graph, node) is None))
    made = any(node.op in ("input", "opaque") or projection(graph, node) is not None for node in above)
    return not made and any(node.op == "softmax" for node in above)


def _keys(graph: Graph, scores: Scores, parts: Parts) -> set[TensorId]:
    """The keys of an attention: of each part those that its queries are multiplied with."""
    above = climb(graph, scores.way[-1].id, lambda node: node.op in BEFORE and contraction(node) is None)
    found = [one for node in above if (one := product(graph, node)) is not None] if len(parts.uses) > 1 else []
    return {scores.k} | {one.left if one.right == scores.q else one.right for one in found}


def acting(graph: Graph, way: tuple[Node, ...]) -> TensorId:
    """The last node on the way to the product that changes the numbers; dropout and the layout of a band do not count."""
    last = way[0]
    for before, node in pairwise(way):
        if node.op in _LAID_OUT or contraction(node) is not None:
            break
        cut = node.op == "getitem" and len(node.shape) == len(before.shape) and node.shape[:-1] == before.shape[:-1]
        if cut or node.op in ("to", "scatter") or node.op not in SHAPE | SAME:
            last = node
    return last.id


def _repeated(graph: Graph, k: TensorId) -> float:
    """How many query heads share one key head: how often the keys were repeated before the product."""
    ratio, node = 1.0, graph[k]
    while node.op in SHAPE | SAME and len(node.parents) == 1 and node.op not in ("split", "chunk", "unbind", "cat", "stack"):
        above = graph[node.parents[0].id]
        if node.op in REPEATS:
            ratio *= math.prod(node.shape) / max(1, math.prod(above.shape))
        node = above
    return ratio


def _roots(graph: Graph, name: TensorId) -> set[object]:
    """What queries or keys were projected from, and what that was made of by norms and further projections alone."""
    above = climb(graph, name, lambda node: contraction(node) is None and not node.id.is_source)
    data = [found.data for node in above if (found := projection(graph, node)) is not None]
    return {first(graph, unshaped(graph, one)) for one in data}.union(*(_linear(graph, one) for one in (name, *data)))


def _linear(graph: Graph, name: TensorId) -> set[object]:
    """The activations that a value is a normalised linear function of, up to a sum; one that is computed twice is one."""
    found: set[object] = set()

    def through(node: Node) -> bool:
        if node.op == "add" and sum(not weights(graph, parent.id) for parent in node.parents) > 1:
            found.add(first(graph, node.id))
            return False
        moved = node.op in SAME | SHAPE and len({parent.id for parent in node.parents}) == 1  # `cat` adds keys of others
        return moved or node.op in NORMS | NORM_PARTS | MEANS or projection(graph, node) is not None

    found.update(first(graph, node.id) for node in climb(graph, name, through) if not is_constant(graph, node.id))
    return found


def own_parts(graph: Graph, q: TensorId, v: TensorId, softmax: TensorId) -> tuple[TensorId, ...]:
    """What may be added to mixed values before their projection: more of the values, the pattern, the split queries."""
    queries = unshaped(graph, q, SAME | {"mul", "div"})
    split = (queries,) if len(graph[queries].shape) > 3 else ()
    return (unshaped(graph, v, SAME | SHAPE), softmax, *split)


def handed_on(graph: Graph, node: Node) -> Node:
    """The output of the fused op that a node is the result of, else the node."""
    while True:
        outer = [r for r in graph.readers(node.id) if r.op == HANDED_ON]
        if not outer:
            return node
        node = outer[0]


def projected(
    graph: Graph, z: Node, own: tuple[TensorId, ...] = ()
) -> tuple[TensorId | None, tuple[Node, ...], Projection | None]:
    """The output projection with what reshapes its result, the way of z into it, and the projection itself.

    It is the first contraction with a weight below the heads, and their sum where each head is projected alone; all None
    where z is used as it is. What is made of its `own` parts in another way may be added to z.
    """

    def through(node: Node) -> bool:
        if node.op == "add":
            return bool(own) and all(any(depends(graph, parent.id, one) for one in own) for parent in node.parents)
        alone = sum(not weights(graph, parent.id) for parent in node.parents) == 1
        return node.op in _GATHERED or (node.op in NONLINEAR and alone)

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
