"""The writes of residual streams: the sums in which a value meets what was computed from it."""

from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.depth import addends
from fmr.structure.dominate import Flow
from fmr.structure.match import LINEAR, MASKING, MOVES, NONLINEAR, NORM_PARTS, NORMS, contraction, depends, descend, product
from fmr.structure.passage import (
    CUTS,
    OVERWRITES,
    POOLS,
    base,
    gated,
    handed,
    modulated,
    passage,
    resumed,
    shortcut,
    unchanged,
    under_norm,
)

_COMPUTES = (
    LINEAR
    | POOLS
    | frozenset(
        """linear addmm matmul bmm baddbmm mm einsum inner tensordot grouped_mm lstm gru embedding fft_fft fft_fft2 fft_fftn
    fft_rfft fft_rfft2 fft_rfftn""".split()
    )
)

_BENDS = NONLINEAR - frozenset("pow square sqrt rsqrt abs clamp max".split()) | {"softmax"}
"""What makes a branch more than a linear map; what norms are written with does not count."""


_RESIZES = frozenset({"interpolate", "upsample"})
"""What repeats positions, or makes new ones between them."""

_SCORED = MOVES | MASKING
"""What scores pass on their way to the softmax."""

_PARALLEL = 3
"""Before how many writes what is added may have been computed."""


class Write(NamedTuple):
    """One add of a stream: `before` it, what is `added`, `times` how often, and the sum `after`.

    `origin` is the value of the stream that the write begins with: `before` itself, where that is not a gated share or a
    projection of it.
    """

    before: TensorId
    added: TensorId
    after: TensorId
    origin: TensorId
    times: float = 1.0


Writes = Mapping[TensorId, Write]
"""The writes of all streams in execution order, by their sums."""

Starts = Mapping[TensorId, TensorId]
"""Where the stream of each write began, by their sums."""


def find_writes(graph: Graph, flow: Flow) -> Writes:
    """The writes to residual streams of an unfused graph."""
    found: dict[TensorId, Write] = {}
    starts: dict[TensorId, TensorId] = {}
    main = Flow(graph, conditions=False)
    for node in graph.nodes:
        write = _added(graph, node, found, starts) or _gated(graph, flow, node) or _projected(graph, main, node, found)
        if write is not None:
            found[node.id], starts[node.id] = write, _begin(graph, write, found, starts)
    beside = _beside(graph, found)
    found = {name: write for name, write in found.items() if name not in beside}
    starts = {}
    for name, write in found.items():
        starts[name] = _begin(graph, write, found, starts)
    return {name: write for name, write in found.items() if not _is_read_off(graph, write, found, starts)}


def _added(graph: Graph, node: Node, found: Writes, starts: Starts) -> Write | None:
    """The add of a node as a write: one operand was computed by a weight from what the other carries."""
    pair = addends(graph, node)
    if not pair or not node.dtype.is_floating_point or resumed(graph, node) or modulated(graph, node):
        return None
    (a, b), times = pair, node.argument("alpha", 2, 1.0)
    for before, added in ((a, b), (b, a)) if times == 1.0 else ((a, b),):
        carried = _carried(graph, before, found) if graph[before].shape == node.shape else ()
        if any(_computed_from(graph, added, origin, around=sums) for origin, sums in carried):
            stream = unchanged(graph, before)
            if not (_is_bias_of_scores(graph, node) or _is_stream_beside(graph, added, stream, found, starts)):
                return Write(stream, added, node.id, stream, times)
    return None


def _is_bias_of_scores(graph: Graph, node: Node) -> bool:
    """Whether a sum only goes into softmaxes: a bias that several layers share is no stream that their scores write to."""
    below = (one.op for one, way in descend(graph, node, _SCORED) if way and one.op not in _SCORED)
    return next(below, None) == "softmax" and all(op == "softmax" for op in below)


def _is_stream_beside(graph: Graph, added: TensorId, before: TensorId, found: Writes, starts: Starts) -> bool:
    """Whether what is added is a stream, or a product of one, that did not begin with what it is added to, which is on none:
    a shift that is given to a scaled norm."""
    if _start(graph, before, found, starts) is not None:
        return False
    made = graph[added]
    names = [parent.id for parent in made.parents] if made.op == "mul" else [added]
    others = (_start(graph, name, found, starts) for name in names)
    return any(start is not None and not depends(graph, start, base(graph, before)) for start in others)


def _begin(graph: Graph, write: Write, found: Writes, starts: Starts) -> TensorId:
    """Where the stream began that a write is to."""
    return _start(graph, write.origin, found, starts) or write.origin


def _start(graph: Graph, name: TensorId, found: Writes, starts: Starts) -> TensorId | None:
    """Where the stream began that a value is on; None where it is on none."""
    return next((starts[one] for one in ends(graph, name, found) if one in starts), None)


def _carried(graph: Graph, name: TensorId, found: Writes) -> Iterator[tuple[TensorId, tuple[TensorId, ...]]]:
    """A value, the sums that are parts of it, and the stream before up to three more writes, with the sums of these:
    parallel blocks add up one after the other what they all computed from the same value."""
    yield name, ()
    yield from ((part, ()) for part in _returned(graph, name, found))
    write = found.get(base(graph, name))
    sums: tuple[TensorId, ...] = ()
    for _ in range(_PARALLEL):
        if write is not None:
            sums = (*sums, write.after)
            yield write.before, sums
            write = found.get(base(graph, write.before))


def _is_read_off(graph: Graph, write: Write, found: Writes, starts: Starts) -> bool:
    """Whether what is added and what it is added to are both read off another stream, and the one knows the other through
    that stream alone: values that are mixed over depth, skips and logits that are summed up."""
    own, target = {one.after for one in _back(graph, write.origin, found)}, base(graph, write.origin)
    first, waiting, seen, met = graph.place(target), [write.added], {write.added}, []
    while waiting:
        here = waiting.pop()
        if here == target:
            return False
        if here in found and here not in own:
            met.append(here)
            continue
        above = [parent.id for parent in graph[here].parents if parent not in seen and graph.place(parent) >= first]
        seen.update(above)
        waiting += above
    start = base(graph, starts[write.after])
    others = {base(graph, starts[one]) for one in met} - {start}
    return any(depends(graph, start, other) for other in others) or _is_read_again(graph, write, others, found, starts)


def _is_read_again(graph: Graph, write: Write, others: set[TensorId], found: Writes, starts: Starts) -> bool:
    """Whether the only write to a value tells the other streams alone what was read off them: places given to queries."""
    if not others or starts[write.after] != write.origin or list(starts.values()).count(write.origin) > 1:
        return False
    later = (one for one in found.values() if base(graph, starts[one.after]) in others)
    return any(depends(graph, one.added, write.after) for one in later)


def _back(graph: Graph, name: TensorId, found: Writes) -> Iterator[Write]:
    """The last writes to the stream that a value is on, latest first, as many as may have been computed in parallel."""
    write = _last(graph, name, found)
    for _ in range(_PARALLEL + 1):
        if write is not None:
            yield write
            write = _last(graph, write.before, found)


def _gated(graph: Graph, flow: Flow, node: Node) -> Write | None:
    """The add of a node as a write to a stream that a gate keeps a share of.

    All data of the rest comes from the stream, or the gate is made of that rest: a recurrent cell that reads another input
    at each step writes to none.
    """
    for kept, added, gate, x, y in gated(graph, node):
        alone = flow.dominates(x, node.id) or (depends(graph, gate, y) and depends(graph, gate, x))
        if alone and _computed_from(graph, added, x):
            return Write(kept, added, node.id, x)
    return None


def _projected(graph: Graph, flow: Flow, node: Node, found: Writes) -> Write | None:
    """The add of a node as a write to a stream that changes its width, or is normed, in the same step.

    Both operands come from one value, the first by a linear path and the other by a branch that bends. A branch with
    writes of its own is no layer: that is a skip across stages. Nor is one that is brought to the size of the other: that
    is a pyramid.
    """
    origin = flow.above.get(node.id)
    if node.op == "add" and len(node.parents) == 2 and origin is not None:
        a, b = (parent.id for parent in node.parents)
        for before, added in ((a, b), (b, a)):
            resized = graph[handed(graph, added)].op in _RESIZES
            if graph[before].shape == graph[added].shape and before != origin and not resized:
                projected = shortcut(graph, before, origin)
                through = _BENDS if projected else _COMPUTES
                if projected is not None and _computed_from(graph, added, origin, through, found):
                    return Write(before, added, node.id, origin)
    return None


def _computed_from(
    graph: Graph,
    name: TensorId,
    origin: TensorId,
    through: frozenset[str] = _COMPUTES,
    never: Container[TensorId] = (),
    around: Container[TensorId] = (),
) -> bool:
    """Whether a value depends on another through at least one of these ops, contractions and pools if not said otherwise.

    Some values may `never` be met; a way that leads through one of `around` does not count.
    """
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
            if graph.place(parent) >= first and parent not in around and step not in seen:
                seen.add(step)
                waiting.append(step)
    return False


def _beside(graph: Graph, found: Writes) -> set[TensorId]:
    """The sums that nothing is written to, in a branch of a write that begins where they do: positions given to queries.

    What such a sum was made of goes on without it: the stream, or the positions that are added to it once more.
    """
    begun: dict[TensorId, list[Write]] = {}
    for write in found.values():
        for name in ends(graph, write.origin, found):
            begun.setdefault(name, []).append(write)

    def others(write: Write) -> Iterator[Write]:
        """The other writes that begin with one of its operands."""
        for operand in (write.origin, write.before, write.added):
            for name in normed(graph, operand):
                yield from (other for other in begun.get(name, ()) if other is not write)

    alone = (write for write in found.values() if write.after not in begun)
    return {write.after for write in alone if any(depends(graph, other.added, write.after) for other in others(write))}


def ends(graph: Graph, name: TensorId, found: Writes) -> Iterator[TensorId]:
    """Where a stream that a write begins with may have ended: written back into a whole, or normalised to it."""
    yield from _returned(graph, name, found)
    yield from normed(graph, name)


def _returned(graph: Graph, name: TensorId, found: Writes) -> list[TensorId]:
    """The sums that were written back into a value on the way to this one, or laid beside the rest of it: a part of it was
    a stream for some writes."""
    returned = []
    for node in (graph[one] for one in passage(graph, name)):
        returned += [last.after for _, last in reversed(parted(graph, node, found))]
        if node.op in OVERWRITES or node.op == "cat":
            parts = [parent.id for parent in node.parents]
            rest = parts[:1] if node.op in OVERWRITES else [part for part in parts if part not in found]
            wholes = {handed(graph, part) for part in rest}
            returned += [part for part in parts if part not in rest and _goes_back(graph, found, part, wholes)]
    return returned


def parted(graph: Graph, node: Node, found: Writes) -> list[tuple[Write, Write]]:
    """The first and the last write to each part of a value, where all parts were written to and are laid side by side
    again, in the order in which they begin; none of another op."""
    ends = [_last(graph, parent.id, found) for parent in node.parents] if node.op == "cat" else []
    halves = [(_first_to_part(graph, end, found), end) for end in ends if end is not None]
    if len(halves) < max(len(ends), 2) or len({first and handed(graph, first.before) for first, _ in halves}) > 1:
        return []
    return sorted(((a, b) for a, b in halves if a is not None), key=lambda half: graph.place(half[0].after))


def _last(graph: Graph, name: TensorId, found: Writes) -> Write | None:
    """The write that a value comes from, normalised or not."""
    return next((found[one] for one in normed(graph, name) if one in found), None)


def _first_to_part(graph: Graph, write: Write, found: Writes) -> Write | None:
    """The first of the writes that go on to this one and are to a part of a value."""
    first: Write | None = write
    while first is not None and graph[first.before].op not in CUTS:
        first = _last(graph, first.before, found)
    return first


def _goes_back(graph: Graph, found: Writes, part: TensorId, wholes: set[TensorId]) -> bool:
    """Whether a value is the sum of a write which, or one before it in its stream, was to a part of one of these."""
    write = found.get(part)
    while write is not None and handed(graph, write.before) not in wholes:
        write = found.get(base(graph, write.before))
    return write is not None


def normed(graph: Graph, name: TensorId) -> Iterator[TensorId]:
    """The base of a value, the value that was normalised or bent to it, and so on."""
    above: TensorId | None = base(graph, name)
    while above is not None:
        yield above
        above = under_norm(graph, above)


def writers(graph: Graph, write: Write, sums: Container[TensorId] = ()) -> tuple[Node, ...]:
    """The contractions whose results are summed up, weighed by one another or not, into what a write adds.

    Where that is another stream, or an earlier value of one, its writers are not told once more: `sums` are of all writes.
    """
    through = MOVES | NORMS | NORM_PARTS | {"masked_fill", "where", "sigmoid", "tanh"}
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
