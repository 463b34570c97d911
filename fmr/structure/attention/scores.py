"""The scores of an attention: the product of queries and keys above a softmax, and its way into it."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.attention.softmax import Softmax
from fmr.structure.normal.einsum import Subscripts, subscripts_of
from fmr.structure.normal.indices import dim_map, iota, rows_of, trace
from fmr.structure.normal.match import (
    CONVOLUTIONS,
    MASKING,
    MOVES,
    NORMS,
    Contraction,
    Path,
    Through,
    above,
    contraction,
    paths,
    product,
    projection,
    strip_views,
    weighed_sum,
    weights,
)

BEFORE = MOVES | MASKING | NORMS | frozenset("neg pow square sqrt topk sort".split())
"""What may lie between the product of queries and keys and its softmax: scale, bias, mask, cap, sink, norm, choice of the
best; of a distance its square."""


class Scores(NamedTuple):
    """The product of queries and keys, its subscripts (those of the queries on the left), and its way to the softmax."""

    node: Node
    subscripts: Subscripts
    q: TensorId
    k: TensorId
    way: Path

    @property
    def swapped(self) -> "Scores":
        """The same product with queries and keys exchanged."""
        return self._replace(subscripts=self.subscripts.swapped, q=self.k, k=self.q)


def find_scores(graph: Graph, softmax: Softmax) -> Scores | None:
    """The nearest product of queries and keys above a softmax; heads may have been mixed on the way."""

    def mixed(node: Node) -> bool:
        return node.op in BEFORE or projection(graph, node) is not None

    kinds: tuple[tuple[Callable[[Graph, Node], Contraction | None], Through], ...]
    kinds = (product, BEFORE), (weighed_sum, BEFORE), (_distance, BEFORE), (_learned, BEFORE), (product, mixed)
    for product_of, through in kinds:
        for node in above(graph, softmax.scores, through):
            found = product_of(graph, node)
            scores = _scores(graph, found, graph[softmax.scores]) if found is not None else None
            if scores is not None and (product_of is not _learned or _is_over_keys(graph, softmax, scores)):
                return scores
    return None


def _scores(graph: Graph, found: Contraction, end: Node) -> Scores | None:
    """The scores that a product makes; None where more than heads is mixed on the way to a softmax."""
    subscripts = subscripts_of(graph, found)
    way = _way(graph, found.node, end, subscripts)
    scores = Scores(found.node, subscripts, found.left, found.right, way)
    return (scores.swapped if weights(graph, found.right) else scores) if way else None


def _way(graph: Graph, start: Node, end: Node, subscripts: Subscripts) -> Path:
    """The nodes from a product of queries and keys to its softmax; empty where more than heads is mixed between them."""

    def through(node: Node, way: Path) -> bool:
        return node.op in BEFORE or mixes_heads(graph, subscripts, way, node)

    ends = (way for node, way in paths(graph, start, through) if node is end)
    way = next(ends, None)
    if way is None or (way and contraction(end) is not None and not mixes_heads(graph, subscripts, way, end)):
        return ()
    return (*way, end)


def _distance(graph: Graph, node: Node) -> Contraction | None:
    """The distances of queries from keys."""
    left, right = node.parent("x1", 0), node.parent("x2", 1)
    if node.op != "cdist" or left is None or right is None or weights(graph, left.id) or weights(graph, right.id):
        return None
    return Contraction(node, left.id, right.id)


def _learned(graph: Graph, node: Node) -> Contraction | None:
    """The contraction of queries that are weights with keys that were projected themselves."""
    found = projection(graph, node)
    if found is None or node.op in CONVOLUTIONS:
        return None
    keys = graph[strip_views(graph, found.data, MOVES)]
    return contraction(node) if projection(graph, keys) is not None else None


def _is_over_keys(graph: Graph, softmax: Softmax, scores: Scores) -> bool:
    """Whether a softmax is over what is projected: over what a weight makes of it, a softmax chooses among experts."""
    place = dim_map(graph, scores.way)[softmax.dim]
    return place is not None and scores.subscripts.result[place] in scores.subscripts.free(scores.subscripts.right)


def mixes_heads(graph: Graph, subscripts: Subscripts, way: Path, node: Node) -> bool:
    """Whether a node is a projection that leaves queries and keys where they are; the way to it begins at their product."""
    found = projection(graph, node)
    if found is None or found.data != way[-1].id or len(way[-1].shape) < 3:
        return False
    places = subscripts.free(subscripts.left) + subscripts.free(subscripts.right)
    shape = [size if letter in places else 1 for letter, size in zip(subscripts.result, way[0].shape, strict=True)]
    value = trace(graph, iota(*shape).expand(way[0].shape), way)
    if value is None or not value.numel():
        return False
    rows = rows_of(graph, found, value)
    return bool((rows == rows[:, :1]).all())


def orient_scores(graph: Graph, scores: Scores) -> Scores:
    """The scores with queries and keys as (..., positions, units), where the product reads them transposed."""
    q, left = _upright(graph, scores.q, scores.subscripts.left, scores.subscripts)
    k, right = _upright(graph, scores.k, scores.subscripts.right, scores.subscripts)
    return scores._replace(q=q, k=k, subscripts=Subscripts(left, right, scores.subscripts.result))


def _upright(graph: Graph, name: TensorId, word: str, subscripts: Subscripts) -> tuple[TensorId, str]:
    node = graph[name]
    if (
        word[-2:-1] in subscripts.contracted
        and node.op in ("transpose", "permute", "mT", "t", "T", "movedim")
        and len(word) > 1
    ):
        before = graph[node.parents[0].id]
        places = iota(*before.shape)
        value = trace(graph, places, (before, node))
        if value is not None and torch.equal(value, places.mT):
            return before.id, word[:-2] + word[-1] + word[-2]
    return name, word
