"""The scores of an attention: the product of queries and keys above a softmax, and its way into it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import Subscripts, read_dims, window
from fmr.structure.normal.form import form_of
from fmr.structure.normal.indices import dim_map, iota, trace
from fmr.structure.normal.match import Path, contraction, is_constant, paths, projection, strip_views, value_number
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import CONVOLUTIONS, LAID_OUT, MASKING, MOVES, NORMS

BEFORE = MOVES | MASKING | NORMS | frozenset("neg pow square sqrt topk sort relu leaky_relu".split())
"""What may lie between the product of queries and keys and its softmax: scale, bias, mask, cap, sink, norm, choice of the
best, a bend; of a distance its square."""


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


def find_scores(graph: Graph, softmax: Value) -> Iterator[Scores]:
    """The products of queries and keys above a softmax, the likeliest first: of two values that data flows into, with a
    constant, of learned queries, and those whose heads are mixed on the way; of each kind the nearest first."""
    start = form_of(graph)[softmax.operands[0]]
    near = list(start.above(scores_go_on))
    far = start.above(lambda one: scores_go_on(one) or one.kind == "projection")
    products = [one for one in near if one.kind == "product" and _compares(one)]
    learned = [one for one in near if _is_learned(one)]
    mixed = [one for one in far if one.kind == "product" and one not in near and _compares(one)]
    for one in (*sorted(products, key=lambda one: len(one.inputs) < 2), *learned, *mixed):
        scores = _scores(graph, one, graph[softmax.operands[0]])
        if scores is not None and (one.kind == "product" or _is_over_keys(graph, softmax, scores)):
            yield scores


def scores_go_on(value: Value) -> bool:
    """Whether scores may go through a value on their way to the softmax."""
    before = value.kind != "product" and all(node.op in BEFORE for node in value.folded or (value.node,))
    return before or value.kind in ("norm", "sum")


def products_beside(graph: Graph, end: TensorId, q: TensorId, k: TensorId) -> Iterator[Value]:
    """The products of further queries and keys that are added to the scores that end in a value; a bias that the same
    queries or keys make with something else is none."""
    known = {_laid(graph, q), _laid(graph, k)}
    for one in form_of(graph)[end].above(lambda value: scores_go_on(value) and value.kind != "join"):
        names = {_laid(graph, name) for name in one.operands}
        data = len(names) == 2 and not any(is_constant(graph, name) for name in names)
        if one.kind == "product" and _compares(one) and data and not names & known:
            yield one


def _laid(graph: Graph, name: TensorId) -> TensorId:
    """What a value was laid out of."""
    return value_number(graph, strip_views(graph, name, LAID_OUT))


def _compares(product: Value) -> bool:
    """Whether a product may compare queries with keys: it does not weigh by a softmax, as what makes mixed values, and is
    no multiplication number by number."""
    words = product.subscripts
    pairs = bool(words.contracted) or (words.free(words.left) and words.free(words.right))
    return bool(pairs) and not any(one.unmoved.kind == "softmax" for one in product.inputs)


def _is_learned(value: Value) -> bool:
    """Whether a value is the product of queries that are weights with keys that were projected themselves."""
    keys = value.inputs[0] if value.kind == "projection" and value.node.op not in CONVOLUTIONS and value.inputs else None
    return keys is not None and keys.unmoved.kind == "projection"


def _scores(graph: Graph, product: Value, end: Node) -> Scores | None:
    """The scores that a product makes; None where more than heads is mixed on the way to a softmax."""
    way = _way(graph, product.node, end, product.subscripts)
    q, k = product.operands
    scores = Scores(product.node, product.subscripts, q, k, way)
    return (scores.swapped if product.kind == "projection" else scores) if way else None


def _way(graph: Graph, start: Node, end: Node, subscripts: Subscripts) -> Path:
    """The nodes from a product of queries and keys to its softmax; empty where more than heads is mixed between them."""

    def through(node: Node, way: Path) -> bool:
        return node.op in BEFORE or form_of(graph)[node.id].kind == "sum" or mixes_heads(graph, subscripts, way, node)

    ends = (way for node, way in paths(graph, start, through) if node is end)
    way = next(ends, None)
    if way is None or (way and contraction(end) is not None and not mixes_heads(graph, subscripts, way, end)):
        return ()
    return (*way, end)


def _is_over_keys(graph: Graph, softmax: Value, scores: Scores) -> bool:
    """Whether a softmax is over what is projected: over what a weight makes of it, a softmax chooses among experts."""
    place = dim_map(graph, scores.way)[softmax.dim]
    return place is not None and scores.subscripts.result[place] in scores.subscripts.free(scores.subscripts.right)


def mixes_heads(graph: Graph, subscripts: Subscripts, way: Path, node: Node) -> bool:
    """Whether a node is a projection that leaves queries and keys where they are; the way to it begins at their product."""
    found = projection(graph, node)
    if found is None or found.data != way[-1].id or len(way[-1].shape) < 3:
        return False
    if window(graph, node):
        return False  # it goes along queries and keys
    places, known = subscripts.free(subscripts.left) + subscripts.free(subscripts.right), dim_map(graph, way)
    read = [known[n] for n in read_dims(graph, found)]
    return all(place is not None and subscripts.result[place] not in places for place in read)


def orient_scores(graph: Graph, scores: Scores) -> Scores:
    """The scores with queries and keys as (..., positions, units), where the product reads them transposed."""
    q, left = _upright(graph, scores.q, scores.subscripts.left, scores.subscripts)
    k, right = _upright(graph, scores.k, scores.subscripts.right, scores.subscripts)
    return scores._replace(q=q, k=k, subscripts=Subscripts(left, right, scores.subscripts.result))


def _upright(graph: Graph, name: TensorId, word: str, subscripts: Subscripts) -> tuple[TensorId, str]:
    node = graph[name]
    if len(word) > 1 and word[-2] in subscripts.contracted and node.op in LAID_OUT and node.parents:
        before = graph[node.parents[0].id]
        places = iota(*before.shape)
        value = trace(graph, places, (before, node))
        if value is not None and torch.equal(value, places.mT):
            return before.id, word[:-2] + word[-1] + word[-2]
    return name, word
