"""Whether what two projections make is a memory of a stream: what it writes, how wide, and what lies between the two."""

import math
from collections.abc import Collection, Iterator

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.axes import Axes
from fmr.structure.memories.memory import Memory
from fmr.structure.memories.up_projections import ON_THE_WAY
from fmr.structure.normal.einsum import window
from fmr.structure.normal.form import Form, form_of
from fmr.structure.normal.match import between, depends_on, dims_told, strip_views
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import CONVOLUTIONS, MOVES
from fmr.structure.normal.walks import walk
from fmr.structure.streams.stream import Stream


def why_no_memory(graph: Graph, found: Memory, streams: Collection[Stream], sums: frozenset[TensorId], axes: Axes) -> str:
    """Why two projections with something bent between them are no memory of these streams; empty where they are one."""
    written = [stream for stream in streams for names in stream.writers if found.down in names]
    if not written:
        lower = form_of(graph)[found.down].below(lambda one: one.kind in ("move", "affine"))
        again = next((one.id for one in lower if one.kind == "projection" and one.id != found.down), None)
        return f"its output is not written to a residual stream{f': {again} projects it first' if again else ''}"
    if not _is_as_wide(graph, found, {size for stream in written for point in stream.points for size in graph[point].shape}):
        return "its keys and values are not as wide as the stream"
    writes = (pair for stream in written for pair in zip(stream.writes, stream.writers, strict=True))
    after = [write.after for write, names in writes if found.down in names]
    if _is_over_positions(graph, found, after, axes):
        return f"{found.up} sums over positions, as in a network over these, and not over the units of the stream"
    points = {strip_views(graph, name) for stream in streams if stream.writes for name in stream.points}
    made = [name for name in (found.up, found.post.id) if strip_views(graph, name) in points]
    if made:
        return f"{made[0]} is a state of the stream itself"
    if hidden := _hidden(graph, found.source, points | {strip_views(graph, name) for name in sums}):
        return f"its keys read what {hidden} makes, bent: they are hidden units, and not the stream"
    way = between(graph, strip_views(graph, found.source, MOVES), found.post.id)
    if across := next(filter(None, (_across(axes, found, node) for node in way)), ""):
        return f"its coefficients are made of other positions, too: {across}"
    return _why_not_added(graph, found, sums, after, axes)


def _across(axes: Axes, found: Memory, node: Node) -> str:
    """How an op on the way to coefficients hears other positions, also in a run of one; empty where it does not."""
    graph, rank = axes.graph, len(node.shape)
    own = depends_on(graph, node.id, found.source)
    if own and rank < 4 and window(graph, node):
        return f"{node.id} is a window over these"
    if own and node.op in _TURNS and rank == len(graph[found.post.id].shape):
        units, dims = axes.dims.of(found.post.id, rank)[found.axis], axes.dims.of(node.id, rank)
        along = (n for n in dims_told(node, rank, _TURNS[node.op]) if n != found.axis % rank or units in dims)
        return f"{node.id} turns these round" if any(dims[n] != units for n in along) else ""
    read = [graph[one.id] for one in node.parents] if node.op == "mul" and node.shape[-1:] == (found.n,) else []
    empty = next((one.id for one in read if one.op in _STATES and one.shape == node.shape), None)
    return f"{node.id} weighs {empty}, the state before the first of these" if empty is not None else ""


_TURNS = {"flip": 1, "roll": 2}
"""Ops that put places in another order, with the place of the argument that names the dimensions."""

_STATES = frozenset(["zeros", "zeros_like", "new_zeros"])
"""Ops that make what is handed from one position to the next before there is any."""


def _hidden(graph: Graph, source: TensorId, points: Collection[TensorId]) -> TensorId | None:
    """The projection whose units a value is, bent, with no value of a stream between; None where it is none."""

    def higher(here: tuple[Value, bool]) -> Iterator[tuple[Value, bool]]:
        value, bent = here
        if value.kind in ON_THE_WAY and strip_views(graph, value.id) not in points:
            yield from ((one, bent or value.kind == "bend") for one in value.inputs)

    ends = list(walk([(form_of(graph)[source], False)], higher))
    units = [value.id for value, bent in ends if bent and value.kind == "projection"]
    return units[0] if units and not any(strip_views(graph, value.id) in points for value, _ in ends) else None


def _is_over_positions(graph: Graph, found: Memory, points: Collection[TensorId], axes: Axes) -> bool:
    """Whether what the keys read is another dimension of the stream than that of its units."""
    made = form_of(graph)[found.up].unmoved
    read = [(made.operands[0], made.subscripts.left.index(one)) for one in made.subscripts.contracted]
    return any(axes.is_another(one, point) for one in read for point in points)


def _is_as_wide(graph: Graph, found: Memory, widths: set[int]) -> bool:
    """Whether a key and a value of a memory are vectors as wide as a stream that has values of these sizes."""
    form = form_of(graph)
    for name, contracted in ((found.up, True), (found.down, False)):
        made = form[name].unmoved
        words = made.subscripts
        letters = words.contracted if contracted else words.free(words.right)
        sizes = dict(zip(words.right, graph[made.operands[1]].shape, strict=True)) if letters else {}
        groups = made.node.argument("groups", 6, 1) if contracted and made.node.op in CONVOLUTIONS else 1
        last = contracted or len(words.result) > len(made.node.shape)  # rows that go to one matrix each are of one vector
        if letters and math.prod(sizes[one] for one in (letters[-1:] if last else letters)) * groups not in widths:
            return False
    return True


def _why_not_added(graph: Graph, found: Memory, sums: frozenset[TensorId], points: Collection[TensorId], axes: Axes) -> str:
    """Why what a memory makes is not added to a stream: on all of its ways to the sums it only weighs what another part
    writes, repeated along it or bent and multiplied with it, or a product of two activations sums it over a dimension of
    the stream, as attention does with values and a network with the weights that another one makes."""
    form = form_of(graph)

    def onward(here: tuple[Value, bool, str]) -> Iterator[tuple[Value, bool, str]]:
        value, bent, why = here
        for user in value.users if value.id not in sums else ():
            weighs = (user.kind == "gate" and bent) or _is_share(form, value, user)
            if user.id in sums or user.kind in ON_THE_WAY | {"product"}:
                mixed = f"is summed by {user.id}, a product of two activations" * _sums_up(axes, value, user, points)
                yield user, bent or user.kind == "bend", why or mixed or "only weighs what another part writes" * weighs

    ways = [why for value, _, why in walk([(form[found.down], False, "")], onward) if value.id in sums]
    return f"its output {ways[0]}" if ways and all(ways) else ""


def _sums_up(axes: Axes, value: Value, user: Value, points: Collection[TensorId]) -> bool:
    """Whether a product sums a value over a dimension that these points have."""
    words = user.subscripts
    sides = zip(user.operands, (words.left, words.right), strict=False) if user.kind == "product" else ()
    own = [(name, word) for name, word in sides if form_of(axes.graph)[name].unmoved is value.unmoved]
    dims = [(name, word.index(one)) for name, word in own for one in words.contracted]
    return any(axes.has(one, point) for one in dims for point in points)


def _is_share(form: Form, value: Value, user: Value) -> bool:
    """Whether a value multiplies another one that has more dimensions, which the first alone is repeated along."""
    shape = user.node.shape
    if user.kind == "gate":
        return math.prod(value.node.shape) < math.prod(shape) and any(one.node.shape == shape for one in user.inputs)
    if user.kind != "product":
        return False
    first = form[user.operands[0]].unmoved is value.unmoved
    words = user.subscripts if first else user.subscripts.swapped
    return bool(words.free(words.right)) and not words.free(words.left)
