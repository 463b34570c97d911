"""The residual streams: writes linked up one after another, and the values that a stream takes on its way."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise, takewhile
from math import prod

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nests import ids_in
from fmr.nodes import Node
from fmr.structure.normal.form import form_of
from fmr.structure.normal.hidden import reads
from fmr.structure.normal.match import (
    above,
    between,
    contraction,
    data_inputs,
    depends_on,
    is_constant,
    projection,
    value_number,
    weights,
)
from fmr.structure.normal.vocabulary import NONLINEAR, NORMS, STATISTICS
from fmr.structure.normal.walks import walk
from fmr.structure.streams.dominators import flow_of
from fmr.structure.streams.identity import (
    CUTS,
    HANDED,
    OVERWRITES,
    POOLS,
    REDUCED,
    Writes,
    adaptive_norm,
    base,
    ends,
    handed,
    identity_input,
    identity_path,
    normed,
    norms,
    reweighted,
    split_branches,
    under_norm,
)
from fmr.structure.streams.over_depth import over_depth
from fmr.structure.streams.stream import Stream, Write, is_layer
from fmr.structure.streams.writes import find_writes

_CHANGES = CUTS | OVERWRITES | {"mul", "div", "matmul", "cat"}
"""What a stream goes on through with other numbers, with more or with a part of them."""

Deep = Mapping[TensorId, list[TensorId]]
"""The values that are sums over depth, each with the states that it sums up."""


def find_streams(graph: Graph) -> Iterator[Stream]:
    """The residual streams of an unfused graph, longest and last first; a short one inside a write of another is not one."""
    found, deep = find_writes(graph), over_depth(graph)
    wholes = {node.id: halves for node in graph.nodes if (halves := split_branches(graph, node, found))}
    chains = [chain for chain in _chains(graph, found, deep, wholes.values()) if not _is_state(graph, chain)]
    chains.sort(key=lambda chain: (-len(chain), -graph.place(chain[-1].after)))
    others = frozenset(found) | {chain[0].origin for chain in chains}
    taken = [(a, b, b) for states in deep.values() for a, b in pairwise(states)]
    laid = {halves[-1][1].after: whole for whole, halves in wholes.items()}
    streams = []
    for chain in chains:
        if len(chain) > 2 or not any(_inside(graph, chain, *step) for step in taken):
            taken += [(write.before, write.added, write.after) for write in chain]
            streams.append(_stream(graph, chain, others, deep, laid.get(chain[-1].after)))
    yield from _joined(graph, streams)


def _is_state(graph: Graph, chain: list[Write]) -> bool:
    """Whether a chain is the state of a loop, and no stream: it begins with constants, and each write is made of another
    part of one value, as of one position."""
    if len(chain) < 2 or not is_constant(graph, base(graph, chain[0].origin)):
        return False
    read = [_cut(graph, write) for write in chain]
    return any(len({one[name] for one in read}) == len(chain) for name in set(read[0]).intersection(*read[1:]))


def _cut(graph: Graph, write: Write) -> dict[TensorId, TensorId]:
    """The values of which what is added is made by a part, each with the last such part."""
    higher = above(graph, write.added, lambda node: node.op not in CUTS and node.id != write.before)
    return {node.parents[0].id: value_number(graph, node.id) for node in higher if node.op in CUTS and node.parents}


def _inside(graph: Graph, chain: list[Write], before: TensorId, added: TensorId, after: TensorId) -> bool:
    """Whether a chain lies between the value before a step of a stream and what is added there."""
    before, start, end = base(graph, before), chain[0].before, chain[-1].after
    if not graph.place(before) < graph.place(start) < graph.place(end) < graph.place(after):
        return False
    begin = base(graph, start)  # a part that is cut out of what was laid beside it is made of its own alone
    return (begin == before or depends_on(graph, begin, before)) and depends_on(graph, added, end)


def _chains(graph: Graph, found: Writes, deep: Deep, parts: Iterable[list[tuple[Write, Write]]]) -> list[list[Write]]:
    """The writes linked up: each begins where another ended, at its normalised value, or at a whole that it is a part of.

    Of several that begin at one, the stream goes on with the first, unless that lies inside what a later one adds. Where
    each of `parts` has writes of its own, those of one part follow those of another.
    """
    following: dict[TensorId, Write] = {}
    for write in found.values():
        states = deep.get(base(graph, write.origin), [])
        higher = [*ends(graph, write.origin, found), *(base(graph, state) for state in states[-1:])]
        for name in (name for name in higher if name in found):
            if name not in following or depends_on(graph, write.added, following[name].after):
                following[name] = write
                break
    later = {write.after for write in following.values()}
    for (_, last), (first, _) in (pair for halves in parts for pair in pairwise(halves)):
        if last.after not in following and first.after not in later:
            following[last.after] = first
    later = {write.after for write in following.values()}
    firsts = (write for write in found.values() if write.after not in later)
    return [[*walk([first], lambda one: [following[one.after]] if one.after in following else [])] for first in firsts]


def _stream(graph: Graph, chain: list[Write], others: frozenset[TensorId], deep: Deep, whole: TensorId | None) -> Stream:
    """A chain of writes with the values that its stream takes before, between and after them; `whole` is what the last part
    that is written to is laid into."""
    points: dict[TensorId, None] = dict.fromkeys(_beginning(graph, chain[0].origin))
    for write in chain:
        points.update(dict.fromkeys((*_between(graph, write.origin, points), write.origin, write.before, write.after)))
    end = chain[-1].after
    beside = dict.fromkeys(state for states in deep.values() if base(graph, states[-1]) in points for state in states)
    sums = (name for name, states in deep.items() if base(graph, states[-1]) == end and not is_layer(graph, graph[name]))
    last = [end, *sums][-1]
    last = whole or last
    part = next((write.before for write in reversed(chain) if graph[write.before].op in CUTS), chain[-1].before)
    after, norm = ending(graph, part, last, others)
    first, whole_size = graph[next(iter(points))].shape, prod(graph[last].shape)
    parts = (one for one in graph.readers(last) if one.op in CUTS and prod(one.shape) < whole_size)
    cut = [one.id for one in parts if one.shape == first]  # without what was laid beside the first one
    points.update(dict.fromkeys((*exits(graph, points, end), last, *sorted((*cut, *after), key=graph.place))))
    return Stream(tuple(chain), tuple(sorted({**beside, **points}, key=graph.place)), norm)


def _beginning(graph: Graph, name: TensorId) -> list[TensorId]:
    """The values above the first one of a stream that were normalised to it, or the pool that ends a stem above it."""
    node = graph[base(graph, name)]
    if node.op in NONLINEAR | {"batch_norm"}:
        return [one for one in normed(graph, name) if graph[one].op in POOLS]
    higher = under_norm(graph, node.id)
    return [*_beginning(graph, higher), higher] if higher is not None else []


def _between(graph: Graph, name: TensorId, points: Mapping[TensorId, None]) -> list[TensorId]:
    """The values that a stream takes on from its known points to the one that a write begins with: normed, scaled, cut."""
    higher = list(takewhile(lambda one: one not in points, normed(graph, name)))[:0:-1] if points else []
    node = graph[name]
    changed = node.op in _CHANGES or reweighted(graph, node) is not None or adaptive_norm(graph, node) is not None
    return [*higher, *(_way(graph, name) if changed else [])]


def _way(graph: Graph, name: TensorId) -> list[TensorId]:
    """The value that was scaled, mixed or cut to one, and those on the way that were written over or are read twice."""
    way = identity_path(graph, name)
    on = [one for one in way[1:-1] if len(graph.readers(one)) > 1 or graph[one].op in OVERWRITES | {"add"}]
    return list(dict.fromkeys((way[-1], *(handed(graph, one) for one in reversed(on)))))


def _joined(graph: Graph, streams: list[Stream]) -> Iterator[Stream]:
    """The streams, each with the value in which its last one is laid beside that of another."""
    last = {
        handed(graph, point): n for n, one in enumerate(streams) for point in (one.writes[-1].after, one.final_norm) if point
    }
    joins: dict[int, TensorId] = {}
    for node in graph.nodes:
        if node.op in ("cat", "stack"):
            parts = [last.get(handed(graph, parent.id)) for parent in node.parents]
            if None not in parts and len(set(parts)) > 1:
                joins[max(part for part in parts if part is not None)] = node.id
    for n, stream in enumerate(streams):
        points = (*stream.points, joins[n]) if n in joins else stream.points
        yield replace(stream, points=tuple(sorted(points, key=graph.place)))


def ending(
    graph: Graph, before: TensorId, last: TensorId, others: frozenset[TensorId]
) -> tuple[list[TensorId], TensorId | None]:
    """The values that a stream takes after its last write, and the final norm among them, None where there is none.

    `before` is the stream before that write, or the part that the last ones write to; `others` are the sums of all writes
    and the beginnings of all streams.
    """
    points = []
    while (over := _overwritten(graph, before, last)) is not None:
        before, last = last, over.id
        points.append(last)
    while (on := _scaled(graph, last)) is not None:
        last = on
        points.append(last)
    norm = _final_norm(graph, last)
    if norm is not None and any(depends_on(graph, reader.id, norm) for reader in graph.readers(last) if reader.id != norm):
        norm = None  # the stream goes on, in a way that is not understood, with what was made of its norm
    if norm is None and len(readers := graph.readers(last)) == 1 and readers[0].op in NONLINEAR:
        points.append(readers[0].id)
    points += [norm, _modulated(graph, norm) or norm] if norm is not None else []
    points += _leaving(graph, last, others, {_viewed(graph, name) for name in [last, *points]}, norm)
    points += [reader.id for reader in graph.readers(norm or last) if reader.op in ("split", "chunk", "tensor_split")]
    return sorted(dict.fromkeys(points), key=graph.place), norm


def exits(graph: Graph, points: Iterable[TensorId], last: TensorId) -> list[TensorId]:
    """The norms through which values of a stream leave it on the way: nothing that is written to it depends on them."""
    readers = (reader for point in points if point != last for reader in graph.readers(point))
    found = [reader.id for reader in readers if reader.op in NORMS]
    needed = {node.id for node in above(graph, last, lambda node: True, reads)} if found else set()
    return [name for name in found if name not in needed]


def _overwritten(graph: Graph, before: TensorId, last: TensorId) -> Node | None:
    """The value that goes on where a part of the stream was written over, in place or in a copy.

    Either the stream is written over from outside, or it is a part itself and written back into the whole.
    """
    whole = handed(graph, before) if graph[before].op in CUTS else None
    readers = [one for one in graph.readers(last) if one.parents[0] == last or handed(graph, one.parents[0].id) == whole]
    copies = [after for reader in readers if reader.op == "clone" for after in graph.readers(reader.id)]
    return next((reader for reader in readers + copies if reader.op in OVERWRITES), None)


def _scaled(graph: Graph, last: TensorId) -> TensorId | None:
    """What alone is made of a value by scaling it by constants, mixing it with an earlier one, or as a condition says; or by
    laying its parts side by side again."""
    readers = graph.readers(last)
    laid = {after for reader in readers if reader.op in CUTS for after in graph.readers(reader.id)}
    if len(laid) == 1 and identity_input(graph, one := laid.pop()) == last:
        return one.id
    if len(readers) != 1:
        return None
    if readers[0].op in ("mul", "div", "add", "masked_fill", "where") and identity_input(graph, readers[0]) == last:
        return readers[0].id
    return _modulated(graph, last)


def _modulated(graph: Graph, name: TensorId) -> TensorId | None:
    """A value scaled and shifted by a condition."""
    lower = (after for reader in graph.readers(name) if reader.op == "mul" for after in graph.readers(reader.id))
    return next((after.id for after in lower if adaptive_norm(graph, after) == name), None)


def _final_norm(graph: Graph, last: TensorId) -> TensorId | None:
    """The norm that a stream ends in, seen through views, pools and clamps; a norm that alone reads a norm is the last."""
    norm: TensorId | None = None
    name: TensorId | None = last
    while name is not None and (norm is None or len(graph.readers(name)) == 1):
        found = norms(graph, name)
        norm = found[0] if found else norm
        name = found[0] if found else _step(graph, name)
    return norm


def _step(graph: Graph, name: TensorId) -> TensorId | None:
    """The only reader of a value, where it is a view, a pool or a nonlinearity of it alone."""
    readers = graph.readers(name)
    if len(readers) != 1 or readers[0].op not in HANDED | POOLS | REDUCED | NONLINEAR | {"sum"}:
        return None
    form = form_of(graph)
    data = [parent for parent in readers[0].parents if form[parent.id].kind not in ("weight", "constant")]
    return readers[0].id if len(data) == 1 else None


def _leaving(
    graph: Graph, last: TensorId, others: frozenset[TensorId], known: set[TensorId], norm: TensorId | None
) -> list[TensorId]:
    """What is made of the last value alone and without a projection: normed, but not for the final norm alone, returned, or,
    where there is none, read by a layer."""
    reached = _reached(graph, last, others)
    returned = [name for name in ids_in(graph.scopes[0].output) if name in reached] if graph.scopes else []
    inner = [name for name in reached if norm is not None and _is_step(graph, name, norm)]
    found = [name for name in reached if graph[name].op in NORMS and name not in inner]
    found += [_viewed(graph, name) for name in returned]
    if norm is None:
        layers = (projection(graph, reader) for name in reached for reader in graph.readers(name))
        found += [handed(graph, layer.data) for layer in layers if layer is not None and layer.data in reached]
    return [name for name in found if name not in known]


def _is_step(graph: Graph, name: TensorId, norm: TensorId) -> bool:
    """Whether a value goes into a norm alone, and is no norm before it but a part of it."""
    alone = depends_on(graph, norm, name) and len(graph.readers(name)) == 1
    return alone and all(node.op not in NORMS | STATISTICS for node in between(graph, name, norm))


def _viewed(graph: Graph, name: TensorId) -> TensorId:
    """The value of which one is a view; the view itself where it is a part of it."""
    whole = handed(graph, name)
    return whole if prod(graph[whole].shape) == prod(graph[name].shape) else name


def _reached(graph: Graph, last: TensorId, others: frozenset[TensorId]) -> dict[TensorId, None]:
    """The values into which data comes from one value alone, and from there without a projection."""

    def onward(name: TensorId) -> Iterator[TensorId]:
        for reader in graph.readers(name):
            computes = contraction(reader) is not None and form_of(graph)[reader.id].kind in ("projection", "product")
            alone = reader.id not in others and not computes and flow_of(graph).dominates(last, reader.id)
            if alone and not _adds_other(graph, reader, last) and name in data_inputs(graph, reader):  # or for its type
                yield reader.id

    return dict.fromkeys(walk([graph[last].id], onward))


def _adds_other(graph: Graph, node: Node, last: TensorId) -> bool:
    """Whether a node adds what is neither made of a value, nor a weight or a constant: of choices, which carry no data."""
    names = [parent.id for parent in node.parents] if node.op == "add" else []
    return any(not (depends_on(graph, one, last) or is_constant(graph, one) or weights(graph, one)) for one in names)
