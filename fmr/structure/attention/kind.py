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
from fmr.structure.normal.hidden import is_hidden, read_alone
from fmr.structure.normal.match import (
    MEANS,
    MOVES,
    NORM_PARTS,
    NORMS,
    above,
    contraction,
    data_inputs,
    is_constant,
    product,
    projection,
    strip_views,
    value_number,
    weights,
)

_NORMED = NORMS | NORM_PARTS | MEANS
"""Ops that norm or scale values."""


def kind_of(graph: Graph, scores: Scores, parts: Parts) -> str | Node:
    """Self-attention where queries and some of the keys come from the same values, else cross-attention; the node where one
    of them was made of values that are not seen."""
    keys = _keys(graph, scores, parts)
    if any(of_one_stream(graph, scores.q, k) for k in keys):
        return "self"
    unseen = (node for name in (scores.q, *sorted(keys)) for node in _made_of(graph, name) if is_hidden(node))
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
    width = graph[name].shape[-1:]
    higher = above(graph, name, lambda node: node.op == "add" or _hands_on(graph, node))
    return any(width == one.shape[-1:] != () and value_number(graph, one.id) in earlier for one in higher)


def _hands_on(graph: Graph, node: Node) -> bool:
    """Whether a node moves, norms or scales one value."""
    data = [name for name in data_inputs(graph, node) if not is_constant(graph, name)]
    return (node.op in MOVES or node.op in NORMS or node.op in NORM_PARTS) and len(set(data)) == 1


def _keys(graph: Graph, scores: Scores, parts: Parts) -> set[TensorId]:
    """The keys of an attention: of each part those that its queries are multiplied with."""
    higher = above(graph, scores.way[-1].id, BEFORE)
    found = [one for node in higher if (one := product(graph, node)) is not None] if len(parts.uses) > 1 else []
    return {scores.k} | {one.left if one.right == scores.q else one.right for one in found}


def _roots(graph: Graph, name: TensorId) -> set[TensorId]:
    """What queries or keys were projected from, and what that was made of by norms and further projections alone."""
    data = [one for node in _made_of(graph, name) if (one := _data(graph, node)) is not None]
    return {value_number(graph, strip_views(graph, one)) for one in data}.union(
        *(_linear(graph, one) for one in (name, *data))
    )


def _made_of(graph: Graph, name: TensorId) -> Iterator[Node]:
    """What a value was made of, up to what was projected to it."""
    return above(graph, name, lambda node: not (contraction(node) or node.id.is_source or is_hidden(node)))


def _data(graph: Graph, node: Node) -> TensorId | None:
    """What a node projects, or multiplies with constants, as a rotation does; what one that is not seen makes of one
    activation alone counts as projected."""
    found, pair = projection(graph, node), product(graph, node)
    if found is None and pair is not None and is_constant(graph, pair.left) != is_constant(graph, pair.right):
        return pair.right if is_constant(graph, pair.left) else pair.left
    return found.data if found is not None else read_alone(graph, node) if is_hidden(node) else None


def _linear(graph: Graph, name: TensorId) -> set[TensorId]:
    """The activations that a value is a normalised linear function of, up to a sum; one that is computed twice is one."""
    higher = above(graph, name, lambda node: not _adds_up(graph, node) and _is_linear(graph, node))
    return {value_number(graph, node.id) for node in higher if _adds_up(graph, node) or not is_constant(graph, node.id)}


def _adds_up(graph: Graph, node: Node) -> bool:
    """Whether a node is the sum of two activations."""
    return node.op == "add" and sum(not weights(graph, parent.id) for parent in node.parents) > 1


def _is_linear(graph: Graph, node: Node) -> bool:
    """Whether a node moves, norms or projects one value; what lays one behind another adds keys of others."""
    moved = node.op in MOVES and (len(set(data_inputs(graph, node))) == 1 or _is_of_one(graph, node))
    return moved or node.op in _NORMED or _data(graph, node) is not None


def _is_of_one(graph: Graph, node: Node) -> bool:
    """Whether a node lays values side by side, or one behind another, that are linear functions of one activation, but for
    those that are learned."""
    made = [_linear(graph, parent.id) for parent in node.parents if not is_constant(graph, parent.id)]
    return node.op == "cat" and bool(made and set.intersection(*made))
