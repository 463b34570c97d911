"""Self or cross: whether the queries of an attention and some of its keys come from the same values, or from one stream.

A layer may look at keys of an earlier one (Brandon et al. 2024; Sun et al. 2024): what these were projected from goes on,
through sums alone, in what its queries are projected from.
"""

import math
from collections.abc import Container, Iterator

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.attention.scores import BEFORE, Scores, products_beside
from fmr.structure.attention.values import Parts
from fmr.structure.normal.form import form_of
from fmr.structure.normal.hidden import is_hidden, read_alone
from fmr.structure.normal.match import above, is_constant, product, value_number
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import MEANS

_SCALED = frozenset("move norm affine gate statistic".split())
"""What moves, norms or scales values."""


def kind_of(graph: Graph, scores: Scores, parts: Parts) -> str | Node:
    """Self-attention where queries and some of the keys come from the same values, else cross-attention; the node where one
    of them was made of values that are not seen."""
    keys = _keys(graph, scores, parts)
    if any(of_one_stream(graph, scores.q, k) for k in keys):
        return "self"
    unseen = (one.node for name in (scores.q, *sorted(keys)) for one in _made_of(graph, name) if is_hidden(one.node))
    return next((node for node in unseen if read_alone(graph, node) is None), "cross")


def of_one_stream(graph: Graph, q: TensorId, k: TensorId) -> bool:
    """Whether queries and keys were projected from one value, or the keys from an earlier value of the same stream."""
    asked, keys = _roots(graph, q), _roots(graph, k)
    return bool(asked & keys) or any(_goes_on_from(graph, name, keys) for name in asked)


def units_beside(graph: Graph, end: TensorId, q: TensorId, k: TensorId) -> int:
    """The units of further queries and keys whose products are added to the scores that end in a value.

    A latent and a turned part are compared so, each with keys of its own (MLA, DeepSeek-AI 2024); what queries and keys of
    another stream say is a bias.
    """
    units = 0
    for one in products_beside(graph, end, q, k):
        if any(of_one_stream(graph, q, name) for name in one.operands):
            sizes = dict(zip(one.subscripts.left, graph[one.operands[0]].shape, strict=False))
            units += math.prod(sizes[letter] for letter in one.subscripts.contracted)
    return units


def _goes_on_from(graph: Graph, name: TensorId, earlier: Container[TensorId]) -> bool:
    """Whether a value is a sum of one of some earlier ones, as wide as it is, and of what was added since."""
    value = form_of(graph)[name]
    higher = value.above(lambda one: one.kind == "sum" or one.kind in _SCALED)
    width = value.node.shape[-1:]
    return any(width == one.node.shape[-1:] != () and value_number(graph, one.id) in earlier for one in higher)


def _keys(graph: Graph, scores: Scores, parts: Parts) -> set[TensorId]:
    """The keys of an attention: of each part those that its queries are multiplied with."""
    higher = above(graph, scores.way[-1].id, BEFORE)
    found = [one for node in higher if (one := product(graph, node)) is not None] if len(parts.uses) > 1 else []
    return {scores.k} | {one.left if one.right == scores.q else one.right for one in found}


def _roots(graph: Graph, name: TensorId) -> set[TensorId]:
    """What queries or keys were projected from, and what that was made of by norms and further projections alone."""
    made = list(_made_of(graph, name))
    data = [data for one in made for data in (_projected(graph, one), *_factors(one)) if data is not None]
    ends = _linear(graph, form_of(graph)[name]).union(*(_linear(graph, one) for one in data))
    bent = (form_of(graph)[end] for end in ends)  # by the one hidden layer of a network that projects
    ends = ends.union(*(_linear(graph, one.inputs[0]) for one in bent if one.kind == "bend"))
    return ends | {value_number(graph, one.unmoved.id) for one in data}


def _made_of(graph: Graph, name: TensorId) -> Iterator[Value]:
    """What a value was made of, up to what was projected to it."""
    ends = ("projection", "product", "input")
    return form_of(graph)[name].above(lambda one: one.kind not in ends and not is_hidden(one.node))


def _projected(graph: Graph, value: Value) -> Value | None:
    """What was projected to a value, or multiplied with constants; what one that is not seen makes of one
    activation alone counts as projected."""
    if value.kind == "product":
        data = [one for one in value.operands if not is_constant(graph, one)]
        return form_of(graph)[data[0]] if len(data) == 1 else None
    alone = read_alone(graph, value.node) if is_hidden(value.node) else None
    read = value.operands[0] if value.kind == "projection" else alone
    return form_of(graph)[read] if read is not None else None


def _factors(value: Value) -> list[Value]:
    """The operands of a product of two activations that have a row for each of its own, as queries that a matrix of each
    example turned; weights of a softmax are no such."""
    words, inputs = value.subscripts, value.inputs
    if value.kind != "product" or len(inputs) != 2 or any(one.unmoved.kind == "softmax" for one in inputs):
        return []
    return [one for one, word in zip(inputs, (words.left, words.right), strict=True) if words.result[-2:-1] in word]


def _linear(graph: Graph, value: Value) -> set[TensorId]:
    """The activations that a value is a normalised linear function of, up to a sum; one that is computed twice is one."""
    higher = value.above(lambda one: _is_linear(graph, one))
    return {value_number(graph, one.id) for one in higher if one.is_data}


def _is_linear(graph: Graph, value: Value) -> bool:
    """Whether a value is one that was moved, normed or projected, or several functions of one laid side by side, or one
    behind another, but for those that are learned; what lays others there adds keys of others."""
    if value.op == "cat":
        made = [_linear(graph, one) for one in value.inputs if one.is_data]
        return bool(made and set.intersection(*made))
    return value.kind in _SCALED or value.node.op in MEANS or _projected(graph, value) is not None
