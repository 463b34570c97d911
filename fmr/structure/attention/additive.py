"""Additive attention (Bahdanau, Cho, Bengio 2015): what a score is read off is a sum over a query and a key.

A vector reads it off the sum of the two, or off the two side by side; or each is projected to one number, and these are
added for all pairs (Veličković et al. 2018). A nonlinearity keeps the query from adding the same to all scores.
"""

import math
from typing import NamedTuple

import torch

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.attention.attention import Attention
from fmr.structure.attention.dot_product import acting
from fmr.structure.attention.heads import Heads
from fmr.structure.attention.layouts import described, laid_out, mixing, over_others
from fmr.structure.attention.scores import BEFORE
from fmr.structure.attention.values import ValueProduct, handed_on, is_beside, output_of, value_product
from fmr.structure.normal.einsum import of_projection
from fmr.structure.normal.indices import iota, trace, varies
from fmr.structure.normal.match import Projection, above, is_constant, projection, strip_views, weights
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import MOVES, NONLINEAR, SAME


class _Pair(NamedTuple):
    """What is read off queries and keys, and how many units of each."""

    q: TensorId
    k: TensorId
    units: int


def additive(graph: Graph, softmax: Value) -> Attention | str | None:
    """The attention around a softmax of scores that are read off a sum over two activations, or why it is over no keys; None
    for another."""
    higher = list(above(graph, softmax.operands[0], BEFORE | NONLINEAR))
    bent = any(node.op in NONLINEAR for node in higher)
    scored = next((found for node in higher if (found := _by_vector(graph, node)) is not None), None)
    pair = (_read_off(graph, softmax, scored, bent) if scored is not None else None) or _all_pairs(graph, softmax, higher)
    mixed = value_product(graph, softmax)
    if pair is None or mixed is None:
        return None
    z, heads = handed_on(graph, mixed.node), _heads(graph, mixed)
    v, pattern, mixture = mixing(graph, mixed, heads)
    if reason := over_others(pattern[softmax.dim], is_beside(graph, mixed, softmax.dim)):
        return reason
    return described(
        graph,
        softmax,
        (laid_out(graph, pair.q), laid_out(graph, pair.k), laid_out(graph, mixed.v, v)),
        (laid_out(graph, acting(graph, mixed.way), pattern), laid_out(graph, z.id, mixture)),
        output_of(graph, z),
        (heads.number, heads.number, pair.units),
        "additive",
    )


def _read_off(graph: Graph, softmax: Value, scored: Projection, bent: bool) -> _Pair | None:
    """The query and the key that a vector reads a score off: their sum under a nonlinearity, or both side by side."""
    beside = _beside(graph, softmax, scored) if bent else None
    for node in above(graph, scored.data, MOVES | NONLINEAR):
        bent = bent or node.op in NONLINEAR
        first = projection(graph, node)
        if first is not None and bent:
            beside = beside or _beside(graph, softmax, first)
        if node.op == "add" and bent and len(node.parents) == 2:
            place = len(softmax.node.shape) + softmax.dim
            sides = sorted(
                (graph[one.id] for one in node.parents), key=lambda one: (math.prod(one.shape), one.shape[place:])
            )
            a, b = (one.id for one in sides)
            return None if weights(graph, a) or weights(graph, b) else _Pair(a, b, node.shape[-1])
    return beside


def _by_vector(graph: Graph, node: Node) -> Projection | None:
    """What a node reads off by a vector that is a weight: a projection to one unit, or a multiplication and its sum."""
    found = projection(graph, node)
    if found is not None:
        words = of_projection(graph, found)
        sizes = dict(zip(words.right, graph[found.weight].shape, strict=True))
        return found if all(sizes[letter] == 1 for letter in words.free(words.right)) else None
    factors = graph[node.parents[0].id] if node.op == "sum" else node
    learned = [one.id for one in factors.parents if weights(graph, one.id)]
    if factors.op != "mul" or factors is node or len(factors.parents) != 2 or len(learned) != 1:
        return None
    return Projection(node, next(one.id for one in factors.parents if one.id not in learned), learned[0])


def _beside(graph: Graph, softmax: Value, found: Projection) -> _Pair | None:
    """The query and the key that a projection reads side by side: all keys meet the same query."""
    data, joined = graph[found.data], graph[strip_views(graph, found.data)]
    place = len(softmax.node.shape) + softmax.dim
    sides = [graph[parent.id] for parent in joined.parents] if joined.op == "cat" else []
    sizes = [side.shape[-1] for side in sides]
    beside = len(sides) == 2 and all(side.shape[:-1] == joined.shape[:-1] for side in sides)
    if not beside or place >= len(data.shape) - 1 or data.shape[-1] != sum(sizes):
        return None
    sources = [graph[strip_views(graph, side.id, MOVES)] for side in sides]  # which are repeated, as the same numbers
    made = (trace(graph, iota(*one.shape), (one, side)) for one, side in zip(sources, sides, strict=True))
    values = [value for value in made if value is not None]
    read = trace(graph, torch.cat(values, -1), (joined, data)) if len(values) == 2 else None
    if read is None or not read.numel():
        return None
    same = [not varies(part, place) for part in read.split(sizes, -1)]
    if sum(same) != 1:
        return None
    q, k = sides if same[0] else reversed(sides)
    return _Pair(q.id, k.id, q.shape[-1])


def _all_pairs(graph: Graph, softmax: Value, higher: list[Node]) -> _Pair | None:
    """The numbers of queries and keys that are added, each with each, under a nonlinearity."""
    dim = softmax.dim
    for node in (
        graph[strip_views(graph, one.parents[0].id, SAME)] for one in higher if one.op in NONLINEAR and one.parents
    ):
        if node.op != "add" or len(node.parents) != 2 or len(node.shape) != len(softmax.node.shape):
            continue
        q, k = sorted((graph[parent.id] for parent in node.parents), key=lambda one: one.shape[dim:][:1])
        wide = len(q.shape) == len(k.shape) and q.shape[dim] == 1 < k.shape[dim]
        crossed = wide and any(a > 1 == b for a, b in zip(q.shape, k.shape, strict=True))
        if crossed and not is_constant(graph, q.id) and not is_constant(graph, k.id):
            return _Pair(q.id, k.id, 1)
    return None


def _heads(graph: Graph, mixed: ValueProduct) -> Heads:
    """The heads that those units of a projection were split into which reach the values; one where there is none."""
    made, one = graph[strip_views(graph, mixed.v, MOVES)], Heads(1, (), (), False)
    if projection(graph, made) is None:
        return one
    value = trace(graph, iota(made.shape[-1]).expand(made.shape), (made, graph[mixed.v]))
    size = math.prod(mixed.node.shape[n] for n in mixed.units)
    number, rest = divmod(len(value.unique()) if value is not None else 0, max(1, size))
    if value is None or rest or number < 2:
        return one
    subscripts = mixed.subscripts
    of_heads = [letter for n, letter in enumerate(subscripts.right) if letter in subscripts.batch and varies(value, n)]
    dims = tuple(subscripts.result.index(letter) for letter in of_heads)
    return Heads(
        number, dims, tuple(mixed.node.shape[n] for n in dims), math.prod(mixed.node.shape[n] for n in dims) != number
    )
