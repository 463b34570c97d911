"""The residual streams: writes linked up one after another, and the values that a stream takes on its way."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise, takewhile
from math import prod

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import NONLINEAR, depends_on
from fmr.structure.streams.dominators import Flow
from fmr.structure.streams.identity import (
    CUTS,
    OVERWRITES,
    POOLS,
    adaptive_norm,
    base,
    handed,
    identity_path,
    reweighted,
    under_norm,
)
from fmr.structure.streams.links import Writes, ends, normed, split_branches
from fmr.structure.streams.over_depth import over_depth
from fmr.structure.streams.stream import Stream, Write
from fmr.structure.streams.tail import ending, exits
from fmr.structure.streams.writes import find_writes

_CHANGES = CUTS | OVERWRITES | {"mul", "div", "matmul", "cat"}
"""What a stream goes on through with other numbers, with more or with a part of them."""

Deep = Mapping[TensorId, list[TensorId]]
"""The values that are sums over depth, each with the states that it sums up."""


def find_streams(graph: Graph, flow: Flow) -> Iterator[Stream]:
    """The residual streams of an unfused graph, longest and last first; a short one inside a write of another is not one."""
    found, deep = find_writes(graph, flow), over_depth(graph, flow)
    wholes = {node.id: halves for node in graph.nodes if (halves := split_branches(graph, node, found))}
    chains = _chains(graph, found, deep, wholes.values())
    chains.sort(key=lambda chain: (-len(chain), -graph.place(chain[-1].after)))
    others = frozenset(found) | {chain[0].origin for chain in chains}
    taken = [(a, b, b) for states in deep.values() for a, b in pairwise(states)]
    laid = {halves[-1][1].after: whole for whole, halves in wholes.items()}
    streams = []
    for chain in chains:
        if len(chain) > 2 or not any(_inside(graph, chain, *step) for step in taken):
            taken += [(write.before, write.added, write.after) for write in chain]
            streams.append(_stream(graph, flow, chain, others, deep, laid.get(chain[-1].after)))
    yield from _joined(graph, streams)


def _inside(graph: Graph, chain: list[Write], before: TensorId, added: TensorId, after: TensorId) -> bool:
    """Whether a chain lies between the value before a step of a stream and what is added there."""
    before, start, end = base(graph, before), chain[0].before, chain[-1].after
    if not graph.place(before) < graph.place(start) < graph.place(end) < graph.place(after):
        return False
    return depends_on(graph, start, before) and depends_on(graph, added, end)


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
    return [_linked(write, following) for write in found.values() if write.after not in later]


def _linked(write: Write, following: Writes) -> list[Write]:
    """A write and those that follow it."""
    chain = [write]
    while chain[-1].after in following:
        chain.append(following[chain[-1].after])
    return chain


def _stream(
    graph: Graph, flow: Flow, chain: list[Write], others: frozenset[TensorId], deep: Deep, whole: TensorId | None
) -> Stream:
    """A chain of writes with the values that its stream takes before, between and after them; `whole` is what the last part
    that is written to is laid into."""
    points: dict[TensorId, None] = dict.fromkeys(_beginning(graph, chain[0].origin))
    for write in chain:
        points.update(dict.fromkeys((*_between(graph, write.origin, points), write.origin, write.before, write.after)))
    end = chain[-1].after
    beside = dict.fromkeys(state for states in deep.values() if base(graph, states[-1]) in points for state in states)
    last = [end, *(name for name, states in deep.items() if base(graph, states[-1]) == end)][-1]
    last = whole or last
    part = next((write.before for write in reversed(chain) if graph[write.before].op in CUTS), chain[-1].before)
    after, norm = ending(graph, flow, part, last, others)
    cut = [one.id for one in graph.readers(last) if _is_cut_off(graph[next(iter(points))], graph[last], one)]
    points.update(dict.fromkeys((*exits(graph, points, end), last, *sorted((*cut, *after), key=graph.place))))
    return Stream(tuple(chain), tuple(sorted({**beside, **points}, key=graph.place)), norm)


def _is_cut_off(first: Node, last: Node, node: Node) -> bool:
    """Whether a node takes of the last value of a stream what was laid beside its first one."""
    return node.op in CUTS and node.shape == first.shape and prod(node.shape) < prod(last.shape)


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
        yield replace(stream, points=(*stream.points, joins[n])) if n in joins else stream
