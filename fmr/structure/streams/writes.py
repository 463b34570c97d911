"""The writes of residual streams: the sums in which a value meets what was computed from it."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import islice

from fmr.graph.graph import Graph
from fmr.ids import OPAQUE, TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import subscripts_of
from fmr.structure.normal.form import form_of
from fmr.structure.normal.hidden import is_hidden, reads
from fmr.structure.normal.match import above, all_inputs, below, contraction, depends_on, looked_up, product, projection
from fmr.structure.normal.vocabulary import CELLS, CONVOLUTIONS, MASKING, MOVES, NONLINEAR, NORM_PARTS, NORMS
from fmr.structure.normal.walks import walk
from fmr.structure.streams.dominators import Flow, flow_of
from fmr.structure.streams.identity import (
    PARALLEL,
    POOLS,
    Starts,
    Writes,
    adaptive_norm,
    base,
    both_orders,
    ends,
    handed,
    highway,
    last_write,
    normed,
    reweighted,
    shortcut,
    start_of,
    unchanged,
    written_back,
)
from fmr.structure.streams.over_depth import addends
from fmr.structure.streams.stream import Stream, Write

_COMPUTES = CONVOLUTIONS | POOLS | CELLS
_COMPUTES |= frozenset("linear addmm matmul bmm baddbmm mm einsum inner tensordot grouped_mm embedding".split())
_COMPUTES |= frozenset("fft_fft fft_fft2 fft_fftn fft_rfft fft_rfft2 fft_rfftn".split())
"""What a layer makes something new with."""

_BENDS = NONLINEAR - frozenset("pow square sqrt rsqrt abs clamp max".split()) | {"softmax"}
"""What makes a branch more than a linear map; what norms are written with does not count."""

_RESIZES = frozenset({"interpolate", "upsample"})
"""What repeats positions, or makes new ones between them."""


Updates = Mapping[TensorId, Sequence[TensorId]]
"""What writes add, each with their sums."""


def find_writes(graph: Graph) -> Writes:
    """The writes to residual streams of an unfused graph."""
    found: dict[TensorId, Write] = {}
    starts: dict[TensorId, TensorId] = {}
    updates: dict[TensorId, list[TensorId]] = {}
    main = Flow(graph, conditions=False)
    for node in graph.nodes:
        write = _added(graph, node, found, starts, updates) or _gated(graph, node)
        write = write or _projected(graph, main, node, found)
        if write is not None:
            found[node.id], starts[node.id] = write, start_of(graph, write.origin, found, starts) or write.origin
            updates.setdefault(base(graph, write.added), []).append(node.id)
    found = dict(sorted((found | _coupled(graph, found, starts)).items(), key=lambda one: graph.place(one[0])))
    beside = set[TensorId]().union(*(sums(graph, found) for sums in _LOOKALIKES.values()))
    found = {name: write for name, write in found.items() if name not in beside}
    starts = {}
    for name, write in found.items():
        starts[name] = start_of(graph, write.origin, found, starts) or write.origin
    return {name: write for name, write in found.items() if not is_readout(graph, write, found, starts)}


def _added(graph: Graph, node: Node, found: Writes, starts: Starts, updates: Updates) -> Write | None:
    """The add of a node as a write: one operand was computed by a weight from what the other carries."""
    pair = addends(graph, node)
    if not pair or not node.dtype.is_floating_point or reweighted(graph, node) or adaptive_norm(graph, node):
        return None
    (a, b), times = pair, node.argument("alpha", 2, 1.0) * (-1 if node.op == "sub" else 1)
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


def _gated(graph: Graph, node: Node) -> Write | None:
    """The add of a node as a write to a stream that a gate keeps a share of.

    All data of the rest comes from the stream, or the gate is made of that rest: a recurrent cell that reads another input
    at each step writes to none.
    """
    for kept, added, gate, x, y in highway(graph, node):
        alone = flow_of(graph).dominates(x, node.id) or (depends_on(graph, gate, y) and depends_on(graph, gate, x))
        if alone and _computed_from(graph, added, x):
            return Write(kept, added, node.id, x)
    return None


def _projected(graph: Graph, flow: Flow, node: Node, found: Writes) -> Write | None:
    """The add of a node as a write to a stream that changes its width, or is normed, in the same step.

    Both operands come from one value, the first by a linear path and the other by a branch that bends. A branch with
    writes of its own is no layer: that is a skip across stages. Nor is one that is brought to the size of the other, or that
    something else reads, as a head of its level does: that is a pyramid.
    """
    origin = flow.higher.get(node.id)
    for before, added in both_orders(node, "add") if origin is not None else ():
        resized = graph[handed(graph, added)].op in _RESIZES or len(graph.readers(added)) > 1
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
    first, ends = graph.place(target), (target, origin)

    def onward(step: tuple[TensorId, bool]) -> Iterator[tuple[TensorId, bool]]:
        node = graph[step[0]]
        computed = step[1] or node.op in through or is_hidden(node)
        for parent in reads(graph, node) if node.id not in ends else ():
            if graph.place(parent) >= first and parent not in around:
                yield parent, computed

    steps = walk([(name, False)], onward)
    if never:
        steps = iter(every := list(steps))
        if any(here in never and here not in ends for here, _ in every):
            return False
    return any(computed and here in ends for here, computed in steps)


def writers(graph: Graph, write: Write, sums: Container[TensorId] = ()) -> tuple[Node, ...]:
    """The contractions whose results are summed up, weighed by one another or not, into what a write adds.

    Where that is another stream, or an earlier value of one, its writers are not told once more: `sums` are of all writes.
    """
    through = MOVES | NORMS | NORM_PARTS | {"masked_fill", "where", "sigmoid", "tanh"}
    start = write.before, base(graph, write.before)

    def goes_on(node: Node) -> bool:
        summed = (not _makes(graph, node) and node.id not in sums) and (node.op in through or contraction(node) is not None)
        return node.id not in start and (summed or product(graph, node) is not None)

    higher = (node for node in above(graph, write.added, goes_on, all_inputs) if node.id not in start)
    found = (node for node in higher if _makes(graph, node) or is_hidden(node))
    return tuple(sorted(found, key=lambda node: graph.place(node.id)))


def _makes(graph: Graph, node: Node) -> bool:
    """Whether a node sums products up: what a weight hands out to several copies of a stream is only scaled."""
    found = contraction(node)
    return found is not None and (node.op != "einsum" or bool(subscripts_of(graph, found).contracted))


_SCORED = MOVES | MASKING
"""What scores pass on their way to the softmax."""


def is_bias_of_scores(graph: Graph, node: Node) -> bool:
    """Whether a sum only goes into softmaxes: a bias that several layers share is no stream that their scores write to."""
    lower = (one.op for one, way in below(graph, node, _SCORED) if way and one.op not in _SCORED)
    return next(lower, None) == "softmax" and all(op == "softmax" for op in lower)


def is_shift_of_norm(graph: Graph, added: TensorId, before: TensorId, found: Writes, starts: Starts) -> bool:
    """Whether what is added is a stream, or a product of one, that did not begin with what it is added to, which is on none:
    a shift that is given to a scaled norm."""
    if start_of(graph, before, found, starts) is not None:
        return False
    made = graph[added]
    names = [parent.id for parent in made.parents] if made.op == "mul" else [added]
    others = (start_of(graph, name, found, starts) for name in names)
    return any(start is not None and not depends_on(graph, start, base(graph, before)) for start in others)


def positions(graph: Graph, found: Writes) -> set[TensorId]:
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
    return {write.after for write in alone if any(depends_on(graph, other.added, write.after) for other in others(write))}


def only_summed(graph: Graph, found: Writes) -> set[TensorId]:
    """The sums that no layer reads, as they only go into further ones, and what is added there does not know them.

    The layers are read from one another, or from the value that a projected one begins with; their outputs are summed up.
    """
    begun = {base(graph, name) for write in found.values() for name in (write.origin, write.before, write.added)}
    return {write.after for write in found.values() if write.after not in begun and _is_summed(graph, write, found)}


def _is_summed(graph: Graph, write: Write, found: Writes) -> bool:
    """Whether a write that no other begins with goes into sums alone, with what is made of the update or projected of
    what the value before was made of."""
    lower = [(one, way) for one, way in below(graph, graph[write.after], MOVES) if way and one.op not in MOVES]
    if not lower or any(one.op != "add" or one.id in found for one, _ in lower):
        return False
    others = [parent.id for one, way in lower for parent in one.parents if parent != way[-1].id]
    return any(_is_of_chain(graph, write, base(graph, other)) for other in others)


def _is_of_chain(graph: Graph, write: Write, other: TensorId) -> bool:
    """Whether a value is made of what a write adds, not of its sum, or projected of what the value before was made of."""
    update, layer = base(graph, write.added), projection(graph, graph[other])
    if any(node.id == update for node in above(graph, other, lambda node: node.id != write.after)):
        return True
    return write.origin != write.before and layer is not None and depends_on(graph, write.origin, layer.data)


def repeated(graph: Graph, found: Writes) -> set[TensorId]:
    """The sums of a state and an update of which another goes on: the same is added once more, for a head of its own."""
    begun = {base(graph, write.origin) for write in found.values()}
    alike: dict[tuple[TensorId, TensorId], list[TensorId]] = {}
    for name, write in found.items():
        alike.setdefault((base(graph, write.before), base(graph, write.added)), []).append(name)
    pairs = ((one, [name for name in names if name in begun]) for names in alike.values() for one in names)
    return {one for one, going in pairs if going and one not in going}


def added_up(graph: Graph, found: Writes) -> set[TensorId]:
    """The sums of two streams that write to each other, since they parted: no layer writes there."""
    told = set()
    for write in found.values():
        one, other = ({*_chain(graph, name, found)} for name in (write.before, write.added))
        if _tell(graph, one - other, other - one) and _tell(graph, other - one, one - other):
            told.add(write.after)
    return told


def _chain(graph: Graph, name: TensorId, found: Writes) -> Iterator[Write]:
    """The writes that a value comes from, the last one first."""
    write = last_write(graph, name, found)
    while write is not None:
        yield write
        write = last_write(graph, write.before, found)


def _tell(graph: Graph, one: set[Write], other: set[Write]) -> bool:
    """Whether what is written in a chain is made of the sums of another."""
    return any(depends_on(graph, a.added, b.after) for a in one for b in other)


_LOOKALIKES: Mapping[str, Callable[[Graph, Writes], set[TensorId]]] = {
    "nothing is written to it, and what it is made of goes on without it, as if it gave queries their places": positions,
    "no layer reads it: it goes into further sums alone": only_summed,
    "the same is added once more, and the stream goes on from that sum": repeated,
    "it adds up two streams that write to each other": added_up,
}
"""What sums are that only look like writes, each with those that are such."""


def is_readout(graph: Graph, write: Write, found: Writes, starts: Starts) -> bool:
    """Whether what is added and what it is added to are both read off another stream, and the one knows the other through
    that stream alone: values that are mixed over depth, skips and logits that are summed up.

    Where what is written to the other stream is made of it in turn, the two are coupled; but what a single write tells it
    are places given to queries, and where all that is written is projected of the other alone, that are values that
    attentions mix over depth.
    """
    parallel = islice(_chain(graph, write.origin, found), PARALLEL + 1)  # as many as may have been computed at once
    before, target = {one.after for one in parallel}, base(graph, write.origin)
    first = graph.place(target)

    def goes_on(node: Node) -> bool:
        return graph.place(node.id) > first and (node.id not in found or node.id in before)

    added = _mixed_in(graph, write)
    met = [one.id for one in above(graph, added, goes_on, all_inputs) if graph.place(one.id) >= first]
    if target in met:
        return False
    start = base(graph, starts[write.after])
    others = {base(graph, starts[one]) for one in met if one in found and one not in before} - {start}
    if not others:
        return False
    read_off = any(depends_on(graph, start, other) for other in others)
    own = [one for one, begin in starts.items() if begin == starts[write.after]]
    later = (one for one in found.values() if base(graph, starts[one.after]) in others)
    if any(depends_on(graph, one.added, own[0]) for one in later):  # it tells the others: of places, in a single write
        projected = (_is_projected(graph, _mixed_in(graph, found[one]), found) for one in own if one in found)
        return (starts[write.after] == write.origin and len(own) == 1) or (read_off and all(projected))
    return read_off


def _mixed_in(graph: Graph, write: Write) -> TensorId:
    """What a write adds; where that is a share of the way to another value, that value."""
    for way in (graph[one.id] for one in graph[write.added].parents if graph[write.added].op == "mul"):
        if way.op == "sub" and len(way.parents) == 2 and base(graph, way.parents[1].id) == base(graph, write.before):
            return way.parents[0].id
    return write.added


def _is_projected(graph: Graph, name: TensorId, found: Writes) -> bool:
    """Whether a value is a projection of sums of streams, normed, and no more."""
    through = ("move", "join", "affine", "norm", "projection")
    higher = form_of(graph)[name].above(lambda one: one.id not in found and one.kind in through)
    return all(one.id in found or one.kind in (*through, "input") or looked_up(graph, one.node) for one in higher)
