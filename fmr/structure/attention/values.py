"""What a pattern is for: the product with the values below a softmax, or several where each weighs by a cut of it; and the
projection into which what is mixed goes, through gates and norms."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import RESULT, TensorId
from fmr.nodes import Node
from fmr.structure.attention.scores import Scores, find_scores, mixes_heads, orient_scores
from fmr.structure.normal.einsum import Subscripts, of_projection
from fmr.structure.normal.form import form_of
from fmr.structure.normal.indices import dim_map, iota, trace, varies
from fmr.structure.normal.match import (
    Path,
    Projection,
    above,
    below,
    contraction,
    depends_on,
    is_constant,
    paths,
    product,
    projection,
    settled,
    squeezed,
    strip_views,
    weights,
)
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import ELEMENTWISE, LAID_OUT, MOVES, NONLINEAR, NORMS, SAME, SHAPE, STATISTICS

_AFTER = MOVES | frozenset("masked_fill mul where div tril triu pow square".split())
"""What may lie between a softmax and the product with the values: casts, masks, a cut sink, a power that sharpens it."""

_SUMMED = SAME | {"add"}
"""What may lie between the products of the parts of a pattern and the sum of all."""


class ValueProduct(NamedTuple):
    """The product of a pattern with values, its subscripts (those of the pattern on the left), and its way into it."""

    node: Node
    subscripts: Subscripts
    v: TensorId
    way: Path

    @property
    def units(self) -> tuple[int, ...]:
        """The dimensions of the result that count the units of a value."""
        return tuple(self.subscripts.result.index(letter) for letter in self.subscripts.free(self.subscripts.right))


def value_product(graph: Graph, softmax: Value, scores: Scores | None = None) -> ValueProduct | None:
    """The first product with values below a softmax, which takes the scores to see where heads are mixed."""
    return next(products_with_values(graph, softmax, scores), None)


def products_with_values(graph: Graph, softmax: Value, scores: Scores | None = None) -> Iterator[ValueProduct]:
    """The products with values below a softmax, the nearest first."""

    def through(node: Node, way: Path) -> bool:
        if _hands_on(node) or _is_mixture(graph, node, softmax):
            return True
        return scores is not None and mixes_heads(graph, scores.subscripts, (*scores.way, *way), node)

    uses = (_use(graph, node, way) for node, way in paths(graph, softmax.node, through) if way)
    yield from (use for use in uses if use and use.units and not _is_multiplied(graph, softmax, use.way))


def _use(graph: Graph, node: Node, way: Path) -> ValueProduct | None:
    """The product with values that a node computes, on a way that began at a softmax; None where it computes none."""
    found, names = form_of(graph)[node.id], [one.id for one in way]
    if found.kind not in ("product", "projection") or found.node is not node:
        return None
    first = found.operands[0] in names
    pattern, values = found.operands if first else found.operands[::-1]
    if pattern not in names or weights(graph, values):
        return None
    words = found.subscripts if first else found.subscripts.swapped
    return ValueProduct(node, words, values, way[: names.index(pattern) + 1])


def _hands_on(node: Node) -> bool:
    """Whether what a node makes of a pattern may still weigh values: masked, cast, divided by its sum, normalised."""
    return node.op in _AFTER | NORMS or (node.op == "add" and len(node.parents) == 1)


def _is_mixture(graph: Graph, node: Node, softmax: Value) -> bool:
    """Whether a node adds up a softmax and a constant, or one that looks at no keys: of positions alone, of weights."""
    if node.op != "add" or len(node.parents) != 2:
        return False
    if any(is_constant(graph, parent.id) for parent in node.parents):
        return True
    higher = [list(above(graph, parent.id, _hands_on)) for parent in node.parents]
    others = [one for names in higher if softmax.node not in names for one in names]
    return any(one.op == "softmax" and not _is_of_scores(graph, one, softmax.dim) for one in others)


def _is_multiplied(graph: Graph, softmax: Value, way: Path) -> bool:
    """Whether a softmax is multiplied with another one of scores on its way."""
    factors = (above(graph, parent.id, _hands_on) for node in way if node.op == "mul" for parent in node.parents)
    others = {node.id: node for higher in factors for node in higher if node.op == "softmax" and node.id != softmax.node.id}
    return any(_is_of_scores(graph, one, softmax.dim) for one in others.values())


def _is_of_scores(graph: Graph, node: Node, dim: int) -> bool:
    """Whether another softmax, over the same dimension, is of products of queries with keys."""
    return next(find_scores(graph, replace(form_of(graph)[node.id], dim=dim)), None) is not None


def unused(graph: Graph, softmax: Value) -> str:
    """Why a softmax of scores is no attention: nothing is multiplied by it alone."""
    for node, way in below(graph, softmax.node, _adds_on):
        met = contraction(node) is not None and any(one.op in ("add", "sub", "mul", "neg") for one in way)
        if met and sum(one.op == "softmax" for one in above(graph, way[-1].id, _adds_on)) > 1:
            named = ", as in differential attention" * any(one.op == "sub" for one in way)
            return f"a sum, a difference or a product of it and another softmax weighs the values{named}"
        if met and any(one.op == "neg" for one in way):
            return f"what weighs the values at {node.id} is the softmax negated: it is no distribution"
    for node, _ in below(graph, softmax.node, _hands_on):
        weighed = form_of(graph)[node.id]
        multiplied = weighed.operands if weighed.kind in ("product", "projection") else ()
        if weighed.kind == "projection" and any(product(graph, one) for one, _ in below(graph, node, MOVES)):
            return f"weights mix what it gives to several queries or keys, at {node.id}, before that weighs any values"
        summed = weighed.kind == "statistic" and weighed.op == "sum" and weighed.inputs[0].kind == "affine"
        if summed or any(is_constant(graph, name) for name in multiplied):
            return "what it weighs are constants, as in an expectation over a grid: they are no data"
        if weighed.kind == "gate":
            return f"values are multiplied by it number by number, at {node.id}, and not summed up in one product"
    return _why_changed(graph, softmax) or "nothing below the softmax multiplies values by it"


def _why_changed(graph: Graph, softmax: Value) -> str:
    """What makes something else of a softmax before it is multiplied with values; empty where it is with none."""
    form = form_of(graph)
    for node, way in below(graph, softmax.node, MOVES | ELEMENTWISE | STATISTICS | {"sum"}):
        stops = [one for one in way[1:] if not _hands_on(one)]
        if stops and form[node.id].kind == "product" and form[node.id].node is node:
            if form[stops[0].id].kind == "statistic":
                return f"what weighs the values is told of several of its patterns at once ({stops[0].op}), at {stops[0].id}"
            ops = ", ".join(dict.fromkeys(one.op for one in stops))
            return f"{stops[0].id} changes it ({ops}) before it weighs any values: their weights are no softmax"
    return ""


def _adds_on(node: Node) -> bool:
    return _hands_on(node) or node.op in ("add", "sub", "neg")


class Parts(NamedTuple):
    """The products of the parts of a pattern with values of their own, and the sum of all."""

    uses: tuple[ValueProduct, ...]
    total: Node

    def first(self, graph: Graph, scores: Scores) -> ValueProduct:
        """The product with the values that belong to these keys: with as many."""
        subscripts = scores.subscripts
        keys = _size(graph[scores.k], subscripts.right, subscripts.free(subscripts.right)[-1:])
        alike = (use for use in self.uses if _size(graph[use.v], use.subscripts.right, use.subscripts.contracted) == keys)
        return next(alike, self.uses[0])

    def whole(self, use: ValueProduct) -> Path:
        """The way of the pattern to where it is cut."""
        others = [{node.id for node in one.way} for one in self.uses]
        return tuple(node for node in use.way if all(node.id in names for names in others))


def _size(node: Node, word: str, subscripts: str) -> int:
    return math.prod(size for letter, size in zip(word, node.shape, strict=True) if letter in subscripts)


def split_keys(graph: Graph, softmax: Value, use: ValueProduct) -> Parts:
    """The product with the values alone, or all whose sum it is part of, where each weighs by a cut of the pattern."""
    cuts = (one for one in products_with_values(graph, softmax) if _is_cut(one, softmax.dim))
    others = (one for one in cuts if one.node is not use.node and one.node.shape == use.node.shape)
    uses = (use, *others) if _is_cut(use, softmax.dim) else (use,)
    total = _total(graph, uses) if len(uses) > 1 else None
    return Parts(uses, total) if total is not None else Parts((use,), use.node)


def _total(graph: Graph, uses: tuple[ValueProduct, ...]) -> Node | None:
    """The add in which the last of some products joins the sum of all."""
    own = {use.node.id for use in uses}
    for node, _ in below(graph, uses[0].node, _SUMMED):
        higher = above(graph, node.id, lambda one: one.op in _SUMMED and one.id not in own)
        if node.op == "add" and own <= {one.id for one in higher}:
            return node
    return None


def _is_cut(use: ValueProduct, dim: int) -> bool:
    """Whether a part is taken of the dimension that a softmax is over."""
    return any(len(a.shape) == len(b.shape) and b.shape[dim] < a.shape[dim] and b.op in SHAPE for a, b in pairwise(use.way))


def orient(graph: Graph, scores: Scores, use: ValueProduct, dim: int) -> Scores:
    """The scores with queries and keys told apart: keys are what the product with the values sums over.

    dim: what the softmax is over, which tells where only a part of the keys reaches the product.
    """
    subscripts = use.subscripts
    place = dim_map(graph, use.way)[subscripts.left.index(subscripts.contracted[-1])] if subscripts.contracted else None
    place = dim_map(graph, scores.way)[dim if place is None else place]
    if place is not None and scores.subscripts.result[place] in scores.subscripts.free(scores.subscripts.left):
        scores = scores.swapped
    return orient_scores(graph, scores)


def _laid_in(graph: Graph, use: ValueProduct, dim: int) -> str:
    """The subscripts of a pattern in its product with values that count what the softmax is over."""
    start = use.way[0].shape
    along = (size if n == dim % len(start) else 1 for n, size in enumerate(start))
    value = trace(graph, iota(*along).expand(start), use.way) if math.prod(start) else None
    return "".join(letter for n, letter in enumerate(use.subscripts.left) if value is not None and varies(value, n))


def why_not_summed(graph: Graph, use: ValueProduct, dim: int) -> str:
    """Why a product with values does not sum over what a softmax is over; empty where it does, and where it may."""
    words, letters = use.subscripts, _laid_in(graph, use, dim)
    summed = {letter in words.contracted for letter in letters}
    if len(summed) > 1 and all(node.op in LAID_OUT for node in use.way[1:]):
        return "its values are summed over a part of what the softmax is over"
    if summed == {False} and _size(use.way[-1], words.left, words.contracted) == 1:
        return "it chooses where a single value goes, and weighs none against another"
    return ""


def is_beside(graph: Graph, use: ValueProduct, dim: int) -> bool:
    """Whether a softmax is over what a product with values counts beside queries and keys, and sums over neither."""
    letters = _laid_in(graph, use, dim)
    return bool(letters and use.subscripts.free(use.subscripts.left)) and {*letters} <= {*use.subscripts.batch}


_GATHERED = MOVES | NORMS | {"mul", "sub", "div"}
"""What may lie between the values of the heads and their projection: a gate, or a norm, as one op or written out."""


class Output(NamedTuple):
    """The projection that reads z, the way of z into it, and its result with what reshapes or sums that."""

    projection: Projection
    way: Path
    id: TensorId


def handed_on(graph: Graph, node: Node) -> Node:
    """The output of the fused op that a node is the result of, else the node."""
    outer = next((reader for reader in graph.readers(node.id) if reader.op == RESULT), None)
    return handed_on(graph, outer) if outer is not None else node


def output_of(graph: Graph, z: Node, own: tuple[TensorId, ...] = ()) -> Output | None:
    """The first projection below the heads, and their sum where each head is projected alone, or what all are projected to
    after that; None where z is used as it is.

    What is made of its `own` parts in another way may be added to z.
    """
    for node, way in below(graph, z, lambda node: _goes_on(graph, node, own)):
        found = projection(graph, node) if way else None
        if found is not None and found.data == way[-1].id:
            last = settled(graph, node)
            readers = graph.readers(last.id)
            alone = len(readers) == 1 and readers[0].op == "sum" and len(node.shape) > 3
            further = output_of(graph, last) if of_projection(graph, found).batch and not alone else None
            return Output(found, way, further.id if further else (settled(graph, readers[0]) if alone else last).id)
    return None


def _goes_on(graph: Graph, node: Node, own: tuple[TensorId, ...]) -> bool:
    """Whether mixed values go on in a node: moved, gated, normed or bent alone, or added to what is theirs."""
    if node.op == "add":
        parts = (parent.id for parent in node.parents if not weights(graph, parent.id))
        return bool(own) and all(any(depends_on(graph, name, one) for one in own) for name in parts)
    alone = sum(not weights(graph, parent.id) for parent in node.parents) == 1
    return node.op in _GATHERED or (node.op in NONLINEAR and alone)


def own_parts(graph: Graph, q: TensorId, v: TensorId, softmax: TensorId) -> tuple[TensorId, ...]:
    """What may be added to mixed values before their projection: more of the values, the pattern, the split queries."""
    queries = strip_views(graph, squeezed(graph, q), SAME | {"mul", "div"})
    split = (queries,) if len(graph[queries].shape) > 3 else ()
    return (strip_views(graph, v, MOVES), softmax, *split)
