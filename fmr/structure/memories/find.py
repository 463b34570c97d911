"""Feed-forward memories by dataflow: a contraction with keys, a nonlinearity, a contraction with values."""

import math
from dataclasses import replace
from itertools import combinations, takewhile

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.structure.memories.definition import held, matrices
from fmr.structure.memories.memory import Memory
from fmr.structure.memories.up_projections import ON_THE_WAY, STRAIGHT, UpProjection, ups_of, why_none
from fmr.structure.normal.einsum import made_dim, summed_dim, window
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import Projection, above, between, product, projection, settled, strip_views, value_number
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import MOVES, SAME


def memory_of(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> Memory | str:
    """The memory whose second projection this is: its input is an elementwise nonlinear function of a first one; or the
    reason why it is none.

    `stream` are the sums of the residual stream, beyond which no memory reaches.
    """
    found = _memory(graph, down, stream)
    return found if isinstance(found, Memory) else _beside_heads(graph, down, stream) or found


def _beside_heads(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> Memory | None:
    """The memory whose coefficients a projection reads side by side with the mixed values of an attention."""
    joined = graph[strip_views(graph, down.data)]
    parts = [graph[parent.id] for parent in joined.parents]
    matrix = len(graph[down.weight].shape) == 2 and joined.shape == graph[down.data].shape
    if joined.op != "cat" or len(parts) != 2 or not matrix or joined.shape[-1] != sum(part.shape[-1] for part in parts):
        return None
    for part, other, start in zip(parts, reversed(parts), (0, parts[0].shape[-1]), strict=True):
        higher = above(graph, other.id, lambda node: node.op in MOVES and node.id not in stream)
        mixed = any(product(graph, node) is not None for node in higher)
        found = _memory(graph, down._replace(data=part.id), stream) if mixed else ""
        if isinstance(found, Memory):
            return replace(found, first=start)
    return None


def _memory(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> Memory | str:
    """The memory whose values a projection weighs; the reason why there is none where what it reads is no function of one or
    two others."""
    ups = _without_updates(graph, ups_of(graph, down, stream))
    if reason := _why_not_of_one(graph, down, ups) if ups else why_none(graph, down, stream):
        return reason
    most = max(up.bent for up in ups)
    shares = _shares(graph, down)
    gate = min(
        (up for up in ups if up.bent == most), key=lambda up: (up.projection.node.id not in shares, graph.place(up.pre))
    )
    gated = next((up for up in ups if up.projection.weight != gate.projection.weight), None)
    value = (gated or gate).projection
    post = strip_views(graph, down.data, frozenset({"view", "reshape"}))
    axis = summed_dim(graph, down)
    up = settled(graph, value.node).id
    entering, projected, bent = (math.prod(graph[name].shape) for name in (gate.pre, up, post))
    return Memory(
        graph=graph,
        pre=Site(_whole(graph, up, gate.pre, post) if entering == projected < bent else gate.pre),
        post=Site(post),
        out=Site(settled(graph, down.node).id),
        w_in=held(graph, value.weight),
        w_gate=held(graph, gate.projection.weight) if gated is not None else None,
        w_out=held(graph, down.weight),
        source=strip_views(graph, value.data),
        up=up,
        down=down.node.id,
        keys=matrices(graph, value.weight),
        values=matrices(graph, down.weight),
        key_dim=made_dim(graph, value),
        value_dim=1 - made_dim(graph, down),
        fused_gate=gated is None and value.node.shape[axis] == 2 * graph[post].shape[axis] and _gates(graph, down),
        axis=axis,
        scope=shared_scope(gate.projection.node, down.node),
    )


def _whole(graph: Graph, up: TensorId, pre: TensorId, post: TensorId) -> TensorId:
    """The last value of which all is made that units become which are bent in several ways, side by side."""

    def is_past(name: TensorId) -> bool:
        return up not in {one.id for one in above(graph, post, lambda one: one.id not in (name, up))}

    wide = (node.id for node in reversed(between(graph, up, pre)) if node.shape == graph[up].shape)
    return next(filter(is_past, wide), up)


def _shares(graph: Graph, down: Projection) -> set[TensorId]:
    """What softmaxes on the way to a second projection are made of: a share of all gates what is bent by itself."""

    def goes_on(value: Value) -> bool:
        return value.kind != "projection"

    softmaxes = (one for one in form_of(graph)[down.data].above(goes_on) if one.kind == "softmax")
    return {higher.id for one in softmaxes for higher in one.above(goes_on)}


def _gates(graph: Graph, down: Projection) -> bool:
    """Whether one value gates another on the way to a second projection."""
    way = form_of(graph)[down.data].above(lambda one: one.kind != "projection")
    return any(one.kind == "gate" or one.op == "glu" for one in way)


def _source(graph: Graph, up: UpProjection) -> TensorId:
    """What a first projection reads, before any view; what is computed several times is one."""
    return value_number(graph, strip_views(graph, up.projection.data))


def _without_updates(graph: Graph, ups: list[UpProjection]) -> list[UpProjection]:
    """The first projections without small updates of another: what is itself projected from the same value."""
    sources = {_source(graph, up) for up in ups}

    def is_update(up: UpProjection) -> bool:
        lower = projection(graph, graph[strip_views(graph, up.projection.data, SAME | {"view", "reshape", "mul"})])
        return lower is not None and value_number(graph, strip_views(graph, lower.data)) in sources - {_source(graph, up)}

    return [up for up in ups if not is_update(up)]


def _why_not_of_one(graph: Graph, down: Projection, ups: list[UpProjection]) -> str:
    """Why these are not the first projections of one memory; empty where something bends, and of two one gates the other."""
    made = [up.projection.node.id for up in ups]
    every = (one.node for one in (down, *(up.projection for up in ups)))
    windowed = next((node for node in every if window(graph, node)), None)
    if windowed is not None:
        what = f"{'it' if windowed is down.node else windowed.id} is a filter over"
        return f"{what} {'an image' if len(windowed.shape) > 3 else 'positions'}, and no vector for each unit"
    if all(up.bent == STRAIGHT for up in ups):
        way = list(form_of(graph)[down.data].above(lambda one: one.kind != "projection"))
        other, normed = next((one for one in way if one.kind == "op"), None), any(one.kind == "norm" for one in way)
        if other is not None:
            return f"{other.id} lies between its two projections"
        return f"nothing{' but a norm' * normed} bends what {made[0]} makes"
    if len({up.projection.weight for up in ups}) > 2:
        return f"what it reads is made by more than two projections: {', '.join(made[:3])}"
    if len({_source(graph, up) for up in ups}) > 1:
        return f"{made[0]} and {made[-1]} project different values"
    apart = _put_together(graph, down, {up.projection.node.id: up.projection.weight for up in ups})
    return f"what {' and '.join(made[:2])} make {apart}, and neither gates the other" if apart else ""


def _put_together(graph: Graph, down: Projection, ups: dict[TensorId, TensorId]) -> str:
    """How results of different first projections are put together if neither is gated by the other: they are added up, or
    all that a second one reads is laid side by side."""
    size = math.prod(graph[down.data].shape)

    def higher(value: Value) -> list[Value]:
        return list(value.above(lambda one: one.kind in ON_THE_WAY and one.id not in ups))

    for value in higher(form_of(graph)[down.data]) if len({*ups.values()}) > 1 else ():
        beside = value.kind == "join" and math.prod(value.node.shape) == size
        sides = [{ups[one.id] for one in higher(side) if one.id in ups} for side in value.inputs]
        if value.kind == "sum" or beside:
            pairs = combinations(sides, 2)
            if any(one and other and one.isdisjoint(other) for one, other in pairs):
                return "is laid side by side" if beside else "is added up"
    return ""


def shared_scope(first: Node, last: Node) -> str:
    """The innermost module call that holds both values."""
    pairs = zip(first.module.split("."), last.module.split("."), strict=False)
    return ".".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
