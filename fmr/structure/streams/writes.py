"""The writes of residual streams: the sums in which a value meets what was computed from it."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

from fmr.graph.graph import Graph
from fmr.ids import OPAQUE, TensorId
from fmr.nodes import Node
from fmr.structure.normal.hidden import is_hidden, reads
from fmr.structure.normal.match import (
    CONVOLUTIONS,
    MOVES,
    NONLINEAR,
    NORM_PARTS,
    NORMS,
    above,
    all_inputs,
    contraction,
    depends_on,
    product,
)
from fmr.structure.streams.dominators import Flow
from fmr.structure.streams.identity import (
    POOLS,
    adaptive_norm,
    base,
    both_orders,
    handed,
    highway,
    reweighted,
    shortcut,
    unchanged,
)
from fmr.structure.streams.links import PARALLEL, Starts, Writes, start_of, written_back
from fmr.structure.streams.lookalikes import (
    is_bias_of_scores,
    is_readout,
    is_shift_of_norm,
    only_summed,
    positions,
    repeated,
)
from fmr.structure.streams.over_depth import addends
from fmr.structure.streams.stream import Stream, Write

_COMPUTES = CONVOLUTIONS | POOLS
_COMPUTES |= frozenset("linear addmm matmul bmm baddbmm mm einsum inner tensordot grouped_mm lstm gru embedding".split())
_COMPUTES |= frozenset("fft_fft fft_fft2 fft_fftn fft_rfft fft_rfft2 fft_rfftn".split())
"""What a layer makes something new with."""

_BENDS = NONLINEAR - frozenset("pow square sqrt rsqrt abs clamp max".split()) | {"softmax"}
"""What makes a branch more than a linear map; what norms are written with does not count."""

_RESIZES = frozenset({"interpolate", "upsample"})
"""What repeats positions, or makes new ones between them."""


Updates = Mapping[TensorId, Sequence[TensorId]]
"""What writes add, each with their sums."""


def find_writes(graph: Graph, flow: Flow) -> Writes:
    """The writes to residual streams of an unfused graph."""
    found: dict[TensorId, Write] = {}
    starts: dict[TensorId, TensorId] = {}
    updates: dict[TensorId, list[TensorId]] = {}
    main = Flow(graph, conditions=False)
    for node in graph.nodes:
        write = _added(graph, node, found, starts, updates) or _gated(graph, flow, node)
        write = write or _projected(graph, main, node, found)
        if write is not None:
            found[node.id], starts[node.id] = write, _begin(graph, write, found, starts)
            updates.setdefault(base(graph, write.added), []).append(node.id)
    found = dict(sorted((found | _coupled(graph, found, starts)).items(), key=lambda one: graph.place(one[0])))
    beside = set[TensorId]().union(*(sums(graph, found) for sums in _LOOKALIKES.values()))
    found = {name: write for name, write in found.items() if name not in beside}
    starts = {}
    for name, write in found.items():
        starts[name] = _begin(graph, write, found, starts)
    return {name: write for name, write in found.items() if not is_readout(graph, write, found, starts)}


def _added(graph: Graph, node: Node, found: Writes, starts: Starts, updates: Updates) -> Write | None:
    """The add of a node as a write: one operand was computed by a weight from what the other carries."""
    pair = addends(graph, node)
    if not pair or not node.dtype.is_floating_point or reweighted(graph, node) or adaptive_norm(graph, node):
        return None
    (a, b), times = pair, node.argument("alpha", 2, 1.0)
    for before, added in ((a, b), (b, a)) if times == 1.0 else ((a, b),):
        carried = _carried(graph, before, found, starts, updates) if graph[before].shape == node.shape else ()
        if any(_computed_from(graph, added, origin, around=sums) for origin, sums in carried):
            stream = unchanged(graph, before)
            if not (is_bias_of_scores(graph, node) or is_shift_of_norm(graph, added, stream, found, starts)):
                return Write(stream, added, node.id, stream, times)
    return None


def why_no_write(graph: Graph, node: Node, streams: Sequence[Stream]) -> str:
    """Why a sum is no write to any of the streams that were found."""
    pair = addends(graph, node)
    if not pair or not node.dtype.is_floating_point:
        return "it does not add two values"
    found = {write.after: write for stream in streams for write in stream.writes}
    starts = {write.after: stream.writes[0].origin for stream in streams for write in stream.writes}
    if is_bias_of_scores(graph, node):
        return "it goes into softmaxes alone, as a bias of scores does"
    write = _added(graph, node, found, starts, {})
    if write is None:
        return f"no layer computes {pair[1]} from what {pair[0]} carries, nor the other way round"
    if is_readout(graph, write, found, {**starts, node.id: write.origin}):
        return f"{write.before} and {write.added} are both read off another stream"
    found[node.id] = write
    for what, sums in _LOOKALIKES.items():
        if node.id in sums(graph, found):
            return what
    return "its stream is short, and lies inside what another write adds"


_LOOKALIKES: Mapping[str, Callable[[Graph, Writes], set[TensorId]]] = {
    "nothing is written to it, and what it is made of goes on without it, as if it gave queries their places": positions,
    "no layer reads it: it goes into further sums alone": only_summed,
    "the same is added once more, and the stream goes on from that sum": repeated,
}
"""What sums are that only look like writes, each with those that are such."""


def _begin(graph: Graph, write: Write, found: Writes, starts: Starts) -> TensorId:
    """Where the stream began that a write is to."""
    return start_of(graph, write.origin, found, starts) or write.origin


def _carried(
    graph: Graph, name: TensorId, found: Writes, starts: Starts, updates: Updates
) -> Iterator[tuple[TensorId, Sequence[TensorId]]]:
    """A value, the sums that are parts of it, and the stream before up to three more writes, each with what a way from it
    must not lead through.

    Parallel blocks add up one after the other what they all computed from the same value, and not from one another. What
    is known through the stream that a value is added to is not computed from a state that this value would be.
    """
    beside = updates.get(base(graph, name), ())
    yield name, beside if start_of(graph, name, found, starts) is None else ()
    yield from ((part, ()) for part in written_back(graph, name, found))
    write = found.get(base(graph, name))
    sums: tuple[TensorId, ...] = ()
    for _ in range(PARALLEL):
        if write is not None:
            sums = (*sums, write.after, base(graph, write.added))
            yield write.before, sums
            write = found.get(base(graph, write.before))


def _gated(graph: Graph, flow: Flow, node: Node) -> Write | None:
    """The add of a node as a write to a stream that a gate keeps a share of.

    All data of the rest comes from the stream, or the gate is made of that rest: a recurrent cell that reads another input
    at each step writes to none.
    """
    for kept, added, gate, x, y in highway(graph, node):
        alone = flow.dominates(x, node.id) or (depends_on(graph, gate, y) and depends_on(graph, gate, x))
        if alone and _computed_from(graph, added, x):
            return Write(kept, added, node.id, x)
    return None


def _projected(graph: Graph, flow: Flow, node: Node, found: Writes) -> Write | None:
    """The add of a node as a write to a stream that changes its width, or is normed, in the same step.

    Both operands come from one value, the first by a linear path and the other by a branch that bends. A branch with
    writes of its own is no layer: that is a skip across stages. Nor is one that is brought to the size of the other: that
    is a pyramid.
    """
    origin = flow.higher.get(node.id)
    for before, added in both_orders(node, "add") if origin is not None else ():
        resized = graph[handed(graph, added)].op in _RESIZES
        if origin is not None and graph[before].shape == graph[added].shape and before != origin and not resized:
            projected = shortcut(graph, before, origin)
            through = _BENDS if projected else _COMPUTES
            if projected is not None and _computed_from(graph, added, origin, through, found):
                return Write(before, added, node.id, origin)
    return None


def untold(graph: Graph, found: Container[TensorId]) -> Iterator[tuple[Node, Node]]:
    """The sums that would be writes if it were known what code that is hidden read, each with what that made."""
    for node in graph.nodes:
        for before, added in both_orders(node, "add") if node.id not in found else ():
            made = graph[base(graph, added)]
            if made.op == OPAQUE and not reads(graph, made) and graph[before].shape == node.shape == graph[added].shape:
                yield node, made


def _coupled(graph: Graph, found: Writes, starts: Starts) -> dict[TensorId, Write]:
    """The first writes of streams that are coupled: what is added is computed from a value to which is written what is
    computed of the sum, and not from what it is added to."""
    projected = (write.after for write in found.values() if write.origin != write.before)
    firsts = {}
    for name in dict.fromkeys((*(base(graph, start) for start in starts.values()), *projected)):
        place, pair = graph.place(name), addends(graph, graph[name])
        others = [one for one in found.values() if graph.place(one.before) < place < graph.place(one.after)]
        others = [one for one in others if pair and depends_on(graph, one.added, name)]
        for before, added in (pair, pair[::-1]) if others else ():
            apart = (one.before for one in others if not depends_on(graph, before, one.before))
            if any(_computed_from(graph, added, other) for other in apart):
                firsts[name] = Write(before, added, name, before)
    return firsts


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
    waiting, seen, met = [(name, False)], {(name, False)}, False
    while waiting:
        here, computed = waiting.pop()
        if here in (target, origin):
            if computed and not never:
                return True
            met = met or computed
            continue
        if here in never:
            return False
        node = graph[here]
        computed = computed or node.op in through or is_hidden(node)
        for parent in reads(graph, node):
            step = (parent, computed)
            if graph.place(parent) >= first and parent not in around and step not in seen:
                seen.add(step)
                waiting.append(step)
    return met


def writers(graph: Graph, write: Write, sums: Container[TensorId] = ()) -> tuple[Node, ...]:
    """The contractions whose results are summed up, weighed by one another or not, into what a write adds.

    Where that is another stream, or an earlier value of one, its writers are not told once more: `sums` are of all writes.
    """
    through = MOVES | NORMS | NORM_PARTS | {"masked_fill", "where", "sigmoid", "tanh"}
    start = write.before, base(graph, write.before)

    def goes_on(node: Node) -> bool:
        summed = contraction(node) is None and node.op in through and node.id not in sums
        return node.id not in start and (summed or product(graph, node) is not None)

    higher = (node for node in above(graph, write.added, goes_on, all_inputs) if node.id not in start)
    found = (node for node in higher if contraction(node) is not None or is_hidden(node))
    return tuple(sorted(found, key=lambda node: graph.place(node.id)))
