"""How many heads an attention has, read off the way of its mixed values into the output projection.

A row of what the projection reads is the mixed values of all heads, one beside the other. So every vector of z is given a
number, the numbers are sent along that way, and those that meet in one row are the heads.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.evaluate import execute
from fmr.structure.match import LINEAR, SHAPE, Contraction


class Heads(NamedTuple):
    """The number of heads, the dimensions of z that count them, and whether such a dimension counts something else too."""

    number: int
    dims: tuple[int, ...]
    folded: bool


def heads_in_rows(graph: Graph, z: Node, way: tuple[Node, ...], end: Node) -> Heads | None:
    """The heads whose values meet in a row that the projection `end` reads; None where its rows are not made of z."""
    lead = z.shape[:-1]
    if not math.prod(z.shape):
        return None
    numbers = torch.arange(math.prod(lead), dtype=torch.float64).reshape(*lead, 1).expand(z.shape)
    value = moved(numbers, way)
    if value is None:
        return None
    rows = value.movedim(1, -1) if end.op in LINEAR else value
    row = rows.reshape(-1, rows.shape[-1])[0]
    met = row.unique().long()
    if len(met) * z.shape[-1] != len(row):
        return None
    places = torch.unravel_index(met, lead)
    dims = tuple(n for n, place in enumerate(places) if len(place.unique()) > 1)
    folded = math.prod(len(places[n].unique()) for n in dims) != math.prod(lead[n] for n in dims)
    return Heads(len(met), dims, folded)


def moved(value: Tensor, way: tuple[Node, ...]) -> Tensor | None:
    """A value at the beginning of a way as the ops that only move numbers leave it at the end; other ops are passed over.

    None where something else is moved in beside it.
    """
    try:
        for before, node in pairwise(way):
            if node.op in SHAPE:
                value = execute(node, {before.id: value.contiguous()})[node.id]
    except (StructureError, RuntimeError, TypeError, KeyError, IndexError, ValueError):
        return None
    return value


def axes_of(
    graph: Graph, scored: Contraction, use: Contraction, roles: tuple[TensorId, ...], heads: Heads
) -> tuple[int | None, ...]:
    """The dimension of the heads in q, k, v, scores, pattern and z; None where they share one or are spread over two."""
    q, k, v, scores, pattern, z = (graph[name].shape for name in roles)
    if heads.folded or len(heads.dims) != 1:
        return (None,) * 6
    here = heads.dims[0] - len(z)
    if use.node.op == "einsum":
        (a, b), word = subscripts(use.node)
        weighs, values = (a, b) if use.right == roles[2] else (b, a)
        letter = word[here]
        in_pattern, in_v = _from_right(weighs, letter), _from_right(values, letter)
    else:
        in_pattern = in_v = here
    in_q = in_k = in_pattern
    if scored.node.op == "einsum" and in_pattern is not None:
        (left, right), word = subscripts(scored.node)
        in_q, in_k = _from_right(left, word[in_pattern]), _from_right(right, word[in_pattern])
    places = zip((q, k, v, scores, pattern, z), (in_q, in_k, in_v, in_pattern, in_pattern, here), strict=True)
    return tuple(_dimension(shape, place, heads.number) for shape, place in places)


def shared_heads(graph: Graph, scored: Contraction, k: TensorId, z: Node, heads: Heads, repeated: float) -> int:
    """Key-value heads: fewer where keys were repeated, or are broadcast, over several query heads."""
    if heads.folded:
        among_positions = len(z.shape) - 2 in heads.dims
        return 1 if among_positions else max(1, round(heads.number / repeated))
    shape = graph[k].shape
    if scored.node.op == "einsum":
        (_, right), _ = subscripts(scored.node)
        sizes = dict(zip(reversed(right), reversed(graph[scored.right].shape), strict=False))
        (left, _), scores = subscripts(scored.node)
        own = [letter for letter in left if letter in scores and letter in right]
        count = math.prod(sizes[letter] for letter in own[1:])
        return max(1, round(min(count, heads.number) / repeated))
    count = 1
    for dim in heads.dims:
        place = dim - len(z.shape)
        if place != -2:  # heads among the queries of one product share its keys
            count *= shape[place] if -place <= len(shape) else 1
    return max(1, round(count / repeated))


def subscripts(node: Node) -> tuple[list[str], str]:
    """The subscripts of the operands and of the result of an einsum, without spaces and dots."""
    equation = str(node.args.get("0", node.args.get("equation", ""))).replace(" ", "").replace("...", "")
    operands, _, result = equation.partition("->")
    return operands.split(","), result


def _from_right(word: str, letter: str) -> int | None:
    return word.index(letter) - len(word) if letter in word else None


def _dimension(shape: tuple[int, ...], place: int | None, count: int) -> int | None:
    if place is None or -place > len(shape) or shape[place] != count:
        return None
    return len(shape) + place
