"""From the second projection of a memory up to its first ones: what is bent or gated on the way, and what bends."""

from collections.abc import Container, Iterator
from typing import NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import is_depthwise, read_dims
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import Projection
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import CONVOLUTIONS, ELEMENTWISE, NONLINEAR

ON_THE_WAY = frozenset("move join affine bend gate norm statistic sum".split())
"""What may lie between the two projections."""

_CHOICES = ELEMENTWISE | frozenset("topk sort kthvalue median masked_fill".split())
"""The ops on several coefficients that choose among them."""

_LARGEST = frozenset("max amax min amin".split())
"""What is told of several coefficients is one of them."""

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
    """A value on the way up and as what it is read, what was met below it, what entered that, and whether a convolution
    lies below."""

    value: Value
    name: TensorId
    bent: int
    pre: TensorId
    windowed: bool


def ups_of(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> list[UpProjection]:
    """The first projections above a second one, through elementwise ops alone; empty where anything else flows in.

    A convolution of each unit alone may lie below the projection, but nothing may bend between the two. What is told of
    many coefficients, a threshold or a norm's scale, is no way of one.
    """
    found: list[UpProjection] = []
    form = form_of(graph)
    waiting = [_Step(form[down.data], down.data, STRAIGHT, down.data, False)]
    seen = {(waiting[0].value, STRAIGHT)}
    while waiting and len(seen) < _MOST:
        step = waiting.pop()
        value = step.value
        if value.kind == "projection" and not is_depthwise(graph, value.node):
            up = Projection(value.node, *value.operands)
            found.append(UpProjection(up, step.bent, step.pre if step.bent else step.name))
        elif _goes_on(graph, value, down) and value.id not in stream:
            read = _coefficients(graph, value, down)
            over = bends(value, len(read) > 1 and (step.bent == STRAIGHT or step.windowed))
            if step.windowed and over > STRAIGHT:
                return []
            higher = [one for one in _above(step, read, over) if (one.value, one.bent) not in seen]
            seen.update((one.value, one.bent) for one in higher)
            waiting += higher
        elif value.is_data:
            return []
    return [] if waiting else found


def why_none(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> str:
    """Why no way up from a second projection is followed to a first one: what lies between, or comes in beside."""

    def through(value: Value) -> bool:
        return value.id not in stream and _goes_on(graph, value, down)

    way = form_of(graph)[down.data].above(through)
    stops = [one for one in way if one.is_data and not through(one) and (one.kind != "projection" or one.id in stream)]
    lies = [one for one in stops if one.id not in stream and next(firsts(one, stream), None) is not None]
    if not stops:
        return "more lies between its two projections than is followed, or a window over positions and then what bends"
    told = next((one for one in stops if not is_wide(one)), None)
    if told is not None:
        return f"what it reads is told of several positions or units: {told.id}"
    if lies:
        what = _SAID.get(lies[0].kind, "")
        return f"{lies[0].id}{what and f', {what},'} lies between its two projections"
    what = "a value of the stream" if stops[0].id in stream else _SAID.get(stops[0].kind, "and is of no projection")
    return f"{stops[0].id}, {what}, goes into what it reads beside what is projected"


_SAID = {"product": "a product of two activations", "softmax": "a softmax", "input": "which comes from outside"}


def firsts(value: Value, stream: Container[TensorId]) -> Iterator[Value]:
    """The projections above a value that no other one lies between, nearest first, not beyond the values of a stream."""
    for one in value.above(lambda one: one.kind != "projection" and one.id not in stream):
        if one.kind == "projection" and one.id not in stream:
            yield one


def _goes_on(graph: Graph, value: Value, down: Projection) -> bool:
    """Whether coefficients may come through a value."""
    if value.kind in ("softmax", "projection"):
        return _is_choice(graph, value.node, down) or is_depthwise(graph, value.node)
    return is_wide(value) and (value.kind in ON_THE_WAY or value.node.op in _CHOICES)


def is_wide(value: Value) -> bool:
    """Whether a value has a number for each memory still: a mean or a sum is told of many."""
    return value.kind != "statistic" or value.op in _LARGEST


def _is_choice(graph: Graph, node: Node, down: Projection) -> bool:
    """Whether a node is a softmax over the units that a projection reads: a memory that is read by attention."""
    last = node.argument("dim", 1) in (-1, len(node.shape) - 1)
    return node.op == "softmax" and last and read_dims(graph, down) == (len(graph[down.data].shape) - 1,)


def bends(value: Value, gates: bool) -> int:
    """What a value adds to a way up; whether it `gates` is asked of products of two activations."""
    scaled = value.folded if value.kind == "affine" else (value.node,)
    if value.kind in ("bend", "softmax", "statistic") or any(node.op in NONLINEAR for node in scaled):
        return BENT
    return GATED if gates and value.kind == "gate" and value.node.op == "mul" else STRAIGHT


def _above(step: _Step, read: list[tuple[TensorId, Value]], bends: int) -> list[_Step]:
    """The steps above a value, which bends what it has read this much."""
    alone, over = step.value.kind == "projection", STRAIGHT < bends >= step.bent
    bent, windowed = max(step.bent, bends), step.windowed or alone
    return [_Step(higher, name, bent, name if over else step.pre, windowed) for name, higher in read]


def read_as(graph: Graph, value: Value) -> list[TensorId]:
    """The names under which a value reads its inputs."""
    names = [name for name in value.operands or value.node.parents if form_of(graph)[name] in value.inputs]
    return [graph[name].id for name in names] or [one.id for one in value.inputs]


def _coefficients(graph: Graph, value: Value, down: Projection) -> list[tuple[TensorId, Value]]:
    """What a value reads that has a number for each memory, and under which name; one for all of them is only a share, and
    so is what is told of many."""
    read = [(name, form_of(graph)[name]) for name in read_as(graph, value)]
    whole = [one for one in read if is_wide(one[1])]
    wide = [one for one in whole if down.node.op in CONVOLUTIONS or not value.node.shape or graph[one[0]].shape[-1:] != (1,)]
    return wide if value.kind in ("gate", "affine") and wide else whole
