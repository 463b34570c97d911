"""From the second projection of a memory up to its first ones: what is bent or gated on the way, and what bends."""

from typing import NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import read_dims
from fmr.structure.normal.match import (
    CONVOLUTIONS,
    ELEMENTWISE,
    MOVES,
    NONLINEAR,
    NORMS,
    STATISTICS,
    Projection,
    data_inputs,
    is_constant,
    projection,
    weights,
)

THROUGH = MOVES | ELEMENTWISE | NORMS | STATISTICS | frozenset("topk sort kthvalue median masked_fill".split())
"""What may lie between the two projections: number by number, and a norm or a threshold of the coefficients."""

_MOST = 128
"""How many ops may lie between the two projections; recurrent models have endless ones."""

STRAIGHT, GATED, BENT = range(3)
"""What a way meets: nothing but linear ops, a product with another way, a nonlinearity."""


class UpProjection(NamedTuple):
    """A first projection, what it meets on its way to the second one, and what enters that."""

    projection: Projection
    bent: int
    pre: TensorId


class _Step(NamedTuple):
    """A value on the way up, what was met below it, what entered that, and whether a convolution lies below."""

    name: TensorId
    bent: int
    pre: TensorId
    windowed: bool


def ups_of(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> list[UpProjection]:
    """The first projections above a second one, through elementwise ops alone; empty where anything else flows in.

    A convolution of each unit alone may lie below the projection, but nothing may bend between the two.
    """
    found: list[UpProjection] = []
    waiting = [_Step(down.data, STRAIGHT, down.data, False)]
    seen = {waiting[0][:2]}
    while waiting and len(seen) < _MOST:
        step = waiting.pop()
        node = graph[step.name]
        up = projection(graph, node) if not _is_depthwise(graph, node) else None
        if up is not None:
            found.append(UpProjection(up, step.bent, step.pre if step.bent else step.name))
        elif _goes_on(graph, node, down) and step.name not in stream:
            bends = _bends(graph, node, step.bent == STRAIGHT or step.windowed)
            if step.windowed and bends > STRAIGHT:
                return []
            higher = [one for one in _above(graph, step, node, down, bends) if one[:2] not in seen]
            seen.update(one[:2] for one in higher)
            waiting += higher
        elif not is_constant(graph, step.name):
            return []
    return [] if waiting else found


def _goes_on(graph: Graph, node: Node, down: Projection) -> bool:
    """Whether coefficients may come through a node."""
    return not weights(graph, node.id) and (
        node.op in THROUGH or _is_depthwise(graph, node) or _is_choice(graph, node, down)
    )


def _is_depthwise(graph: Graph, node: Node) -> bool:
    """Whether a node is a convolution of each unit alone."""
    shape = graph[node.parents[1].id].shape if node.op in CONVOLUTIONS and len(node.parents) > 1 else ()
    return len(shape) > 2 and shape[1] == 1 < shape[0] and max(shape[2:]) > 1


def _is_choice(graph: Graph, node: Node, down: Projection) -> bool:
    """Whether a node is a softmax over the units that a projection reads: a memory that is read by attention."""
    last = node.argument("dim", 1) in (-1, len(node.shape) - 1)
    return node.op == "softmax" and last and read_dims(graph, down) == (len(graph[down.data].shape) - 1,)


def _bends(graph: Graph, node: Node, gates: bool) -> int:
    """What a node adds to a way up; whether it `gates` is asked of products of two activations."""
    if node.op in NONLINEAR | {"softmax"}:
        return BENT
    if not gates or node.op != "mul" or len(node.parents) < 2 or any(weights(graph, parent.id) for parent in node.parents):
        return STRAIGHT
    return GATED


def _above(graph: Graph, step: _Step, node: Node, down: Projection, bends: int) -> list[_Step]:
    """The steps above a node, which bends this much."""
    alone = _is_depthwise(graph, node)
    parents = [node.parents[0].id] if alone else _coefficients(graph, node, down)
    over = STRAIGHT < bends >= step.bent
    return [_Step(name, max(step.bent, bends), name if over else step.pre, step.windowed or alone) for name in parents]


def _coefficients(graph: Graph, node: Node, down: Projection) -> list[TensorId]:
    """The operands of a node that have a number for each memory; one for all of them is only a share."""
    wide = [p.id for p in node.parents if down.node.op in CONVOLUTIONS or not node.shape or graph[p.id].shape[-1:] != (1,)]
    return wide if node.op in ("mul", "div", "masked_fill") and wide else data_inputs(graph, node)
