"""The residual stream by dataflow: the chain of adds in which a value meets what was computed from it."""

from collections.abc import Container, Iterator, Mapping
from itertools import pairwise, takewhile
from typing import NamedTuple

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.depth import addends, over_depth
from fmr.structure.dominate import Flow
from fmr.structure.ending import ending, exits
from fmr.structure.match import LINEAR, NONLINEAR, NORM_PARTS, NORMS, SAME, SHAPE, contraction, depends, product
from fmr.structure.passage import (
    CUTS,
    OVERWRITES,
    POOLS,
    base,
    gated,
    handed,
    passage,
    resumed,
    shortcut,
    unchanged,
    under_norm,
)

_COMPUTES = LINEAR | frozenset(
    """linear addmm matmul bmm baddbmm mm einsum inner tensordot grouped_mm lstm gru embedding fft_fft fft_fft2 fft_fftn
    fft_rfft fft_rfft2 fft_rfftn""".split()
)

_BENDS = NONLINEAR - frozenset("pow square sqrt rsqrt abs clamp max".split()) | {"softmax"}
"""What makes a branch more than a linear map; what norms are written with does not count."""

_CHANGES = CUTS | OVERWRITES | {"mul", "div", "matmul"}
"""What a stream goes on through with other numbers, or with a part of them."""


class Write(NamedTuple):
    """One add of the stream: `before` it, what is `added`, `times` how often, and the sum `after`."""

    before: TensorId
    added: TensorId
    after: TensorId
    times: float = 1.0


class Stream(NamedTuple):
    """One residual stream: its writes in order, and the values that it takes, normalised ones included."""

    writes: tuple[Write, ...]
    points: tuple[TensorId, ...]
    final_norm: TensorId | None


def find_streams(graph: Graph, flow: Flow) -> Iterator[Stream]:
    """The residual streams of an unfused graph, longest first; one inside a write of another is not one."""
    found: dict[TensorId, Write] = {}
    origins: dict[TensorId, TensorId] = {}
    for node in graph.nodes:
        made = _added(graph, node, found) or _gated(graph, flow, node) or _projected(graph, flow, node, found)
        if made is not None:
            found[node.id], origins[node.id] = made
    for name in _dropped(graph, found, origins):
        del found[name]
    deep = over_depth(graph, flow)
    chains = sorted(_chains(graph, found, origins, deep), key=len, reverse=True)
    others = frozenset(found) | {origins[chain[0].after] for chain in chains}
    taken = [Write(a, b, b) for states in deep.values() for a, b in pairwise(states)]
    streams = []
    for chain in chains:
        if len(chain) > 2 or not any(_inside(graph, chain, write) for write in taken):
            taken += chain
            streams.append(_stream(graph, flow, chain, origins, others, deep))
    yield from _joined(graph, streams)


def _dropped(graph: Graph, found: Mapping[TensorId, Write], origins: Mapping[TensorId, TensorId]) -> list[TensorId]:
    """The sums that nothing is written to, in a branch of a write that begins where they do: positions given to queries.

    What such a sum was made of goes on without it: the stream, or the positions that are added to it once more.
    """
    begun: dict[TensorId, list[Write]] = {}
    for write in found.values():
        origin = origins[write.after]
        for name in _ends(graph, origin, found):
            begun.setdefault(name, []).append(write)
    dropped = []
    for sum_, write in found.items():
        beside = (
            other
            for operand in (origins[sum_], write.before, write.added)
            for name in _normed(graph, operand)
            for other in begun.get(name, ())
        )
        if sum_ not in begun and any(other is not write and depends(graph, other.added, sum_) for other in beside):
            dropped.append(sum_)
    return dropped


def _inside(graph: Graph, chain: list[Write], write: Write) -> bool:
    """Whether a chain lies between the value before a write and what it adds."""
    start, end = chain[0].before, chain[-1].after
    if not graph.place(write.before) < graph.place(start) < graph.place(end) < graph.place(write.after):
        return False
    return depends(graph, start, write.before) and depends(graph, write.added, end)


def _added(graph: Graph, node: Node, found: dict[TensorId, Write]) -> tuple[Write, TensorId] | None:
    """The add of a node as a write to a stream, and the stream: one operand was computed from the other by a weight.

    Parallel blocks add up one after the other what they all computed from the same value; then it is an earlier sum.
    """
    pair = addends(graph, node)
    if not pair or not node.dtype.is_floating_point or resumed(graph, node) is not None:
        return None
    (a, b), times = pair, node.argument("alpha", 2, 1.0)
    for before, added in ((a, b), (b, a)) if times == 1.0 else ((a, b),):
        if graph[before].shape == node.shape:
            origins, write = [before, *_returned(graph, before, found)], found.get(base(graph, before))
            while write is not None and len(origins) < 4:
                origins.append(write.before)
                write = found.get(base(graph, write.before))
            if any(_computed_from(graph, added, origin) for origin in origins):
                stream = unchanged(graph, before)
                return Write(stream, added, node.id, times), stream
    return None


def _gated(graph: Graph, flow: Flow, node: Node) -> tuple[Write, TensorId] | None:
    """The add of a node as a write to a stream that a gate keeps a share of, and the stream before it.

    All data of the rest comes from the stream, or the gate is made of that rest: a recurrent cell that reads another input
    at each step writes to none.
    """
    for kept, added, gate, x, y in gated(graph, node):
        alone = flow.dominates(x, node.id) or (depends(graph, gate, y) and depends(graph, gate, x))
        if alone and _computed_from(graph, added, x):
            return Write(kept, added, node.id), x
    return None


def _projected(graph: Graph, flow: Flow, node: Node, found: Mapping[TensorId, Write]) -> tuple[Write, TensorId] | None:
    """The add of a node as a write to a stream that changes its width, and the stream, which is projected or normed.

    Both operands come from one value, the first by a linear path and the other by a branch that bends. A branch with
    writes of its own is no layer: that is a skip across stages.
    """
    origin = flow.above.get(node.id)
    if node.op == "add" and len(node.parents) == 2 and origin is not None:
        a, b = (parent.id for parent in node.parents)
        for before, added in ((a, b), (b, a)):
            if graph[before].shape == graph[added].shape and before != origin:
                projected = shortcut(graph, before, origin)
                through = _BENDS if projected else _COMPUTES
                if projected is not None and _computed_from(graph, added, origin, through, found):
                    return Write(before, added, node.id), origin
    return None


def _computed_from(
    graph: Graph,
    name: TensorId,
    origin: TensorId,
    through: frozenset[str] = _COMPUTES,
    never: Container[TensorId] = (),
) -> bool:
    """Whether a value depends on another through at least one of these ops, contractions if not said otherwise."""
    target = base(graph, origin)
    first = graph.place(target)
    waiting, seen = [(name, False)], {(name, False)}
    while waiting:
        here, computed = waiting.pop()
        if here in (target, origin):
            if computed:
                return True
            continue
        if here in never:
            return False
        node = graph[here]
        computed = computed or node.op in through
        for parent in node.parents:
            step = (parent.id, computed)
            if graph.place(parent) >= first and step not in seen:
                seen.add(step)
                waiting.append(step)
    return False


def _chains(
    graph: Graph,
    found: dict[TensorId, Write],
    origins: dict[TensorId, TensorId],
    deep: Mapping[TensorId, list[TensorId]],
) -> list[list[Write]]:
    """The writes linked up: each begins where another ended, at its normalised value, or at a whole that it is a part of.

    Of several that begin at one, the stream goes on with the first, unless that lies inside what a later one adds.
    """
    following: dict[TensorId, Write] = {}
    for write in found.values():
        origin = origins[write.after]
        states = deep.get(base(graph, origin), [])
        ends = [*_ends(graph, origin, found), *(base(graph, state) for state in states[-1:])]
        for above in (name for name in ends if name in found):
            if above not in following or depends(graph, write.added, following[above].after):
                following[above] = write
                break
    later = {write.after for write in following.values()}
    return [_linked(write, following) for write in found.values() if write.after not in later]


def _linked(write: Write, following: Mapping[TensorId, Write]) -> list[Write]:
    """A write and those that follow it."""
    chain = [write]
    while chain[-1].after in following:
        chain.append(following[chain[-1].after])
    return chain


def _ends(graph: Graph, name: TensorId, found: Mapping[TensorId, Write]) -> Iterator[TensorId]:
    """Where a stream that a write begins with may have ended: written back into a whole, or normalised to it."""
    yield from _returned(graph, name, found)
    yield from _normed(graph, name)


def _returned(graph: Graph, name: TensorId, found: Mapping[TensorId, Write]) -> list[TensorId]:
    """The sums that were written back into a value on the way to this one, or laid beside the rest of it: a part of it was
    a stream for some writes."""
    returned = []
    for node in (graph[one] for one in passage(graph, name)):
        if node.op in OVERWRITES or node.op == "cat":
            parts = [parent.id for parent in node.parents if parent in found]
            into = {handed(graph, parent.id) for parent in node.parents if parent not in found}
            returned += [part for part in parts if any(_goes_back(graph, found, found[part], whole) for whole in into)]
    return returned


def _goes_back(graph: Graph, found: Mapping[TensorId, Write], write: Write | None, whole: TensorId) -> bool:
    """Whether a write or one before it in its stream was to a part of this value."""
    while write is not None and handed(graph, write.before) != whole:
        write = found.get(base(graph, write.before))
    return write is not None


def _normed(graph: Graph, name: TensorId) -> Iterator[TensorId]:
    """The base of a value, the value that was normalised or bent to it, and so on."""
    above: TensorId | None = base(graph, name)
    while above is not None:
        yield above
        above = under_norm(graph, above)


def _stream(
    graph: Graph,
    flow: Flow,
    chain: list[Write],
    origins: Mapping[TensorId, TensorId],
    others: frozenset[TensorId],
    deep: Mapping[TensorId, list[TensorId]],
) -> Stream:
    first = origins[chain[0].after]
    points: dict[TensorId, None] = dict.fromkeys(_beginning(graph, first))
    for write in chain:
        origin = origins[write.after]
        normed = list(takewhile(lambda name: name not in points, _normed(graph, origin)))[:0:-1] if points else []
        changed = graph[origin].op in _CHANGES or resumed(graph, graph[origin]) is not None
        way = _way(graph, origin) if changed else []
        points.update(dict.fromkeys((*normed, *way, origin, write.before, write.after)))
    beside = dict.fromkeys(state for states in deep.values() if base(graph, states[-1]) in points for state in states)
    last = [chain[-1].after, *(name for name, states in deep.items() if base(graph, states[-1]) == chain[-1].after)][-1]
    part = next((write.before for write in reversed(chain) if graph[write.before].op in CUTS), chain[-1].before)
    after, norm = ending(graph, flow, part, last, others)
    points.update(dict.fromkeys((*exits(graph, points, chain[-1].after), last, *after)))
    return Stream(tuple(chain), tuple({**beside, **points}), norm)


def _beginning(graph: Graph, name: TensorId) -> list[TensorId]:
    """The values above the first one of a stream that were normalised to it, or the pool that ends a stem above it."""
    node = graph[base(graph, name)]
    if node.op in NONLINEAR | {"batch_norm"}:
        return [one for one in _normed(graph, name) if graph[one].op in POOLS]
    above = under_norm(graph, node.id)
    return [*_beginning(graph, above), above] if above is not None else []


def _way(graph: Graph, name: TensorId) -> list[TensorId]:
    """The value that was scaled, mixed or cut to one, and those on the way that were written over or are read twice."""
    way = passage(graph, name)
    on = [one for one in way[1:-1] if len(graph.readers(one)) > 1 or graph[one].op in OVERWRITES]
    return list(dict.fromkeys((way[-1], *(handed(graph, one) for one in reversed(on)))))


def _joined(graph: Graph, streams: list[Stream]) -> Iterator[Stream]:
    """The streams, each with the value in which its last one is laid beside that of another."""
    ends = {
        handed(graph, point): n for n, one in enumerate(streams) for point in (one.writes[-1].after, one.final_norm) if point
    }
    joins: dict[int, TensorId] = {}
    for node in graph.nodes:
        if node.op in ("cat", "stack"):
            parts = [ends.get(handed(graph, parent.id)) for parent in node.parents]
            if None not in parts and len(set(parts)) > 1:
                joins[max(part for part in parts if part is not None)] = node.id
    for n, stream in enumerate(streams):
        yield stream._replace(points=(*stream.points, joins[n])) if n in joins else stream


def writers(graph: Graph, write: Write, sums: Container[TensorId] = ()) -> tuple[Node, ...]:
    """The contractions whose results are summed up, weighed by one another or not, into what a write adds.

    Where that is another stream, or an earlier value of one, its writers are not told once more: `sums` are of all writes.
    """
    through = SAME | SHAPE | NORMS | NORM_PARTS | {"masked_fill", "where", "sigmoid", "tanh"}
    found, waiting, seen = [], [write.added], {write.added, write.before, base(graph, write.before)}
    while waiting:
        node = graph[waiting.pop()]
        made = contraction(node)
        if made is not None:
            found.append(node)
        if (made is None and node.op in through and node.id not in sums) or product(graph, node) is not None:
            for parent in node.parents:
                if parent not in seen:
                    seen.add(parent.id)
                    waiting.append(parent.id)
    return tuple(found)
