"""The two products of an attention: queries with keys above a softmax, the pattern with values below it."""

import math
from itertools import pairwise
from typing import NamedTuple

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.letters import Letters, carried, letters_of, numbers, sources
from fmr.structure.match import (
    LINEAR,
    MASKING,
    NORMS,
    SAME,
    SHAPE,
    Contraction,
    Projection,
    climb,
    contraction,
    depends,
    descend,
    is_constant,
    once,
    product,
    projection,
    unshaped,
    weighed_sum,
    weights,
)
from fmr.structure.softmax import Softmax

AFTER = SAME | SHAPE | frozenset("masked_fill mul where div tril triu pow square".split())
"""What may lie between a softmax and the product with the values: casts, masks, a cut sink, a power that sharpens it."""

BEFORE = SAME | SHAPE | MASKING | NORMS | frozenset("neg pow square sqrt topk sort".split())
"""What may lie between the product of queries and keys and its softmax: scale, bias, mask, cap, sink, norm, choice of the
best; of a distance its square."""


class Scores(NamedTuple):
    """The product of queries and keys, its letters, and its way to the softmax."""

    node: Node
    letters: Letters
    q: TensorId
    k: TensorId
    in_q: str
    in_k: str
    way: tuple[Node, ...]


class Use(NamedTuple):
    """The product of a pattern with values, its letters, and the way of the pattern into it."""

    node: Node
    letters: Letters
    weighs: str
    values: str
    v: TensorId
    way: tuple[Node, ...]

    @property
    def units(self) -> tuple[int, ...]:
        """The dimensions of the result that count the units of a value."""
        return tuple(self.letters.result.index(letter) for letter in self.letters.alone(self.values))


def find_scores(graph: Graph, softmax: Softmax) -> Scores | None:
    """The nearest product of queries and keys above a softmax; heads may have been mixed on the way."""
    end = graph[softmax.scores]
    for product_of in (product, weighed_sum, _distance, _learned):
        for node in climb(graph, end.id, lambda node: node.op in BEFORE and contraction(node) is None):
            found = product_of(graph, node)
            way = _way(graph, node, end, found) if found is not None else ()
            if found is not None and way and (product_of is not _learned or _over_keys(graph, softmax, found, way)):
                return _scores(graph, found, way)
    for node in climb(graph, end.id, lambda node: node.op in BEFORE or projection(graph, node) is not None):
        found = product(graph, node)
        if found is not None and (way := _way(graph, node, end, found)):
            return _scores(graph, found, way)
    return None


def _scores(graph: Graph, found: Contraction, way: tuple[Node, ...]) -> Scores:
    letters = letters_of(graph, found)
    q, k = (found.right, found.left) if weights(graph, found.right) else (found.left, found.right)
    in_q, in_k = letters.of(q == found.left)
    return Scores(found.node, letters, q, k, in_q, in_k, way)


def _distance(graph: Graph, node: Node) -> Contraction | None:
    """The distances of queries from keys."""
    left, right = node.parent("x1", 0), node.parent("x2", 1)
    if node.op != "cdist" or left is None or right is None or weights(graph, left.id) or weights(graph, right.id):
        return None
    return Contraction(node, left.id, right.id)


def _learned(graph: Graph, node: Node) -> Contraction | None:
    """The contraction of queries that are weights with keys that were projected themselves."""
    found = projection(graph, node)
    if found is None or node.op in LINEAR:
        return None
    keys = graph[unshaped(graph, found.data, SAME | SHAPE)]
    return contraction(node) if projection(graph, keys) is not None else None


def _over_keys(graph: Graph, softmax: Softmax, found: Contraction, way: tuple[Node, ...]) -> bool:
    """Whether a softmax is over what is projected: over what a weight makes of it, a softmax chooses among experts."""
    scores = _scores(graph, found, way)
    place = sources(graph, way)[softmax.dim]
    return place is not None and scores.letters.result[place] in scores.letters.alone(scores.in_k)


def oriented(graph: Graph, scores: Scores, use: Use, dim: int) -> Scores:
    """The scores with queries and keys told apart: keys are what the product with the values sums over.

    dim: what the softmax is over, which tells where only a part of the keys reaches the product.
    """
    place: int | None = use.weighs.index(use.letters.summed[-1]) if use.letters.summed else None
    place = sources(graph, use.way)[place] if place is not None else None
    place = sources(graph, scores.way)[dim if place is None else place]
    if place is not None and scores.letters.result[place] in scores.letters.alone(scores.in_q):
        scores = scores._replace(q=scores.k, k=scores.q, in_q=scores.in_k, in_k=scores.in_q)
    q, in_q = _upright(graph, scores.q, scores.in_q, scores.letters)
    k, in_k = _upright(graph, scores.k, scores.in_k, scores.letters)
    return scores._replace(q=q, k=k, in_q=in_q, in_k=in_k)


def _upright(graph: Graph, name: TensorId, word: str, letters: Letters) -> tuple[TensorId, str]:
    """Queries or keys as (..., positions, units), where the product reads them transposed."""
    node = graph[name]
    if word[-2:-1] in letters.summed and node.op in ("transpose", "permute", "mT", "t", "T", "movedim") and len(word) > 1:
        before = graph[node.parents[0].id]
        if before.shape == (*node.shape[:-2], node.shape[-1], node.shape[-2]):
            return before.id, word[:-2] + word[-1] + word[-2]
    return name, word


def _way(graph: Graph, start: Node, end: Node, scored: Contraction) -> tuple[Node, ...]:
    """The nodes from a product of queries and keys to its softmax; empty where more than heads is mixed between them."""
    before: tuple[Node, ...] = ()
    while True:
        for node, way in descend(graph, start, lambda node: node.op in BEFORE and contraction(node) is None):
            mixed = bool(way) and mixes_heads(graph, letters_of(graph, scored), (*before, *way), node)
            if node is end and (mixed or not way or contraction(node) is None):
                return (*before, *way, node)
            if mixed and depends(graph, end.id, node.id):
                before, start = (*before, *way), node
                break
        else:
            return ()


def mixes_heads(graph: Graph, letters: Letters, way: tuple[Node, ...], node: Node) -> bool:
    """Whether a node is a projection that leaves queries and keys where they are; the way to it begins at their product."""
    found = projection(graph, node)
    if found is None or found.data != way[-1].id or len(way[-1].shape) < 3:
        return False
    places = letters.alone(letters.left) + letters.alone(letters.right)
    shape = [size if letter in places else 1 for letter, size in zip(letters.result, way[0].shape, strict=True)]
    value = carried(graph, numbers(*shape).expand(way[0].shape), way)
    if value is None or not value.numel():
        return False
    dims = read_dims(graph, found)
    rows = value.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
    return bool((rows == rows[..., :1]).all())


def mix(graph: Graph, softmax: Softmax, scores: Scores | None = None) -> Use | None:
    """The product with the values below a softmax, which takes what the scores are made of to see where heads are mixed."""
    before: tuple[Node, ...] = ()
    start = softmax.node
    while True:
        for node, way in descend(graph, start, lambda node: _hands_on(node) or _mixture(graph, node, softmax)):
            if node is softmax.node or node is start:
                continue
            found = contraction(node) or weighed_sum(graph, node)
            if found is not None and not weights(graph, _values(found, way)):
                use = use_of(graph, found, (*before, *way))
                if use.units and not _multiplied(graph, softmax, use.way):
                    return use
            if scores is not None and mixes_heads(graph, scores.letters, (*scores.way, *before, *way), node):
                before, start = (*before, *way), node
                break
        else:
            return None


class Parts(NamedTuple):
    """The products of the parts of a pattern with values of their own, and the sum of all."""

    uses: tuple[Use, ...]
    total: Node

    def first(self, graph: Graph, scores: Scores) -> Use:
        """The product with the values that belong to these keys: with as many."""
        keys = math.prod(_size(graph[scores.k], scores.in_k, scores.letters.alone(scores.in_k)[-1:]))
        alike = (u for u in self.uses if math.prod(_size(graph[u.v], u.values, u.letters.summed)) == keys)
        return next(alike, self.uses[0])

    def whole(self, use: Use) -> tuple[Node, ...]:
        """The way of the pattern to where it is cut."""
        others = [{node.id for node in one.way} for one in self.uses]
        return tuple(node for node in use.way if all(node.id in names for names in others))


def parts_of(graph: Graph, softmax: Softmax, use: Use) -> Parts:
    """The product with the values alone, or all whose sum it is part of, where each weighs by a cut of the pattern."""
    if not _cut(use.way, softmax.dim):
        return Parts((use,), use.node)
    uses = [use]
    for node, way in descend(graph, softmax.node, _hands_on):
        found = contraction(node) if way and node is not use.node else None
        if found is not None and not weights(graph, _values(found, way)) and node.shape == use.node.shape:
            other = use_of(graph, found, way)
            if _cut(other.way, softmax.dim):
                uses.append(other)
    own = {one.node.id for one in uses}
    for node, _ in descend(graph, use.node, lambda node: node.op in SAME | {"add"}):
        above = climb(graph, node.id, lambda one: one.op in SAME | {"add"} and one.id not in own)
        if node.op == "add" and len(uses) > 1 and own <= {one.id for one in above}:
            return Parts(tuple(uses), node)
    return Parts((use,), use.node)


def _cut(way: tuple[Node, ...], dim: int) -> bool:
    """Whether a part is taken of the dimension that a softmax is over."""
    return any(len(a.shape) == len(b.shape) and b.shape[dim] < a.shape[dim] and b.op in SHAPE for a, b in pairwise(way))


def _size(node: Node, word: str, letters: str) -> list[int]:
    return [size for letter, size in zip(word, node.shape, strict=True) if letter in letters]


def _hands_on(node: Node) -> bool:
    """Whether what a node makes of a pattern may still weigh values: masked, cast, divided by its sum, normalised."""
    return node.op in AFTER | NORMS or (node.op == "add" and len(node.parents) == 1)


def _mixture(graph: Graph, node: Node, softmax: Softmax) -> bool:
    """Whether a node adds up a softmax and a constant, or one that looks at no keys: of positions alone, of weights."""
    if node.op != "add" or len(node.parents) != 2:
        return False
    if any(is_constant(graph, parent.id) for parent in node.parents):
        return True
    above = [list(climb(graph, parent.id, _hands_on)) for parent in node.parents]
    others = [one for names in above if softmax.node not in names for one in names]
    return any(one.op == "softmax" and not _is_of_scores(graph, one, softmax.dim) for one in others)


def _multiplied(graph: Graph, softmax: Softmax, way: tuple[Node, ...]) -> bool:
    """Whether a softmax is multiplied with another one of scores on its way."""
    factors = (climb(graph, parent.id, _hands_on) for node in way if node.op == "mul" for parent in node.parents)
    others = {node.id: node for above in factors for node in above if node.op == "softmax" and node.id != softmax.node.id}
    return any(_is_of_scores(graph, one, softmax.dim) for one in others.values())


def _is_of_scores(graph: Graph, node: Node, dim: int) -> bool:
    """Whether another softmax, over the same dimension, is of products of queries with keys."""
    return find_scores(graph, Softmax(node, node.parents[0].id, dim)) is not None


def unused(graph: Graph, softmax: Softmax) -> str:
    """Why a softmax of scores is no attention: nothing is multiplied by it alone."""
    for node, way in descend(graph, softmax.node, _adds_on):
        met = contraction(node) is not None and any(one.op in ("add", "sub", "mul") for one in way)
        if met and sum(one.op == "softmax" for one in climb(graph, way[-1].id, _adds_on)) > 1:
            return "a sum, a difference or a product of it and another softmax weighs the values"
    return "nothing below the softmax multiplies values by it"


def _adds_on(node: Node) -> bool:
    return _hands_on(node) or node.op in ("add", "sub", "neg")


def _values(found: Contraction, way: tuple[Node, ...]) -> TensorId:
    """The operand of a product that is not on a way."""
    return found.right if found.left in {node.id for node in way} else found.left


def use_of(graph: Graph, found: Contraction, way: tuple[Node, ...]) -> Use:
    """A product with values, on a way that began at a softmax."""
    letters, names = letters_of(graph, found), [node.id for node in way]
    first = found.left in names
    pattern, values = (found.left, found.right) if first else (found.right, found.left)
    return Use(found.node, letters, *letters.of(first), values, way[: names.index(pattern) + 1])


def hands_out(graph: Graph, use: Use, dim: int) -> bool:
    """Whether a product hands one value out to the places that a softmax chooses among, and sums over nothing."""
    start, end = use.way[0].shape, use.way[-1].shape
    summed = [n for n, letter in enumerate(use.weighs) if letter in use.letters.summed]
    if start[dim] == 1 or any(end[n] > 1 for n in summed):
        return False
    return any(place == dim % len(start) for n, place in enumerate(sources(graph, use.way)) if n not in summed)


def read_dims(graph: Graph, end: Projection) -> tuple[int, ...]:
    """The dimensions of what a projection reads in which its weight differs: those that it sums over, and its heads."""
    shape, found = graph[end.weight].shape, contraction(end.node)
    if end.node.op in LINEAR or found is None:
        return (len(graph[end.data].shape) - len(shape) + 1,)
    letters = letters_of(graph, found)
    data, weight = letters.of(found.left == end.data)
    own = weight[len(weight) - len(graph[once(graph, end.weight)].shape) :]
    sizes = dict(zip(weight, shape, strict=True))
    return tuple(n for n, letter in enumerate(data) if letter in own and sizes[letter] > 1)
