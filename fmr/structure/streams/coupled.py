"""Streams that are halves of one: what is written to each is made of the other alone (Gomez et al. 2017, RevNet)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.hidden import reads
from fmr.structure.normal.match import above, depends_on
from fmr.structure.normal.vocabulary import NORMS
from fmr.structure.streams.identity import CUTS, base, identity_input
from fmr.structure.streams.over_depth import addends
from fmr.structure.streams.residual import ending
from fmr.structure.streams.stream import Stream, Write


def coupled(graph: Graph, streams: Sequence[Stream]) -> list[Stream]:
    """The streams, each with the end of the one that it is coupled with."""
    if sum(bool(one.writes) for one in streams) < 2:
        return list(streams)
    pairs = [(point, n) for n, one in enumerate(streams) if one.writes for point in {*one.points}]
    several = {point for point, number in Counter(point for point, _ in pairs).items() if number > 1}
    whose = dict(pairs)

    def read(write: Write) -> set[int]:
        """The streams whose points are the first that what is written is made of; a point of several is of none."""
        higher = above(graph, write.added, lambda node: node.id not in whose, _read)
        return {whose[node.id] for node in higher if node.id in whose and node.id not in several}

    told = [{n for write in one.writes for n in read(write)} for one in streams]
    found = []
    for n, stream in enumerate(streams):
        other = next(iter(told[n])) if len(told[n]) == 1 else n
        pair = other != n and told[other] == {n}
        found.append(_half(graph, stream, streams[other].writes[-1].after) if pair else stream)
    return found


def _read(graph: Graph, node: Node) -> list[TensorId]:
    """What a node is made of: of values that are laid side by side, the one that it cuts out."""
    part = identity_input(graph, node) if node.op in CUTS else None
    return [part] if part is not None else reads(graph, node)


def _half(graph: Graph, stream: Stream, end: TensorId) -> Stream:
    """A stream with where its other half ends; a norm that goes on to there is not its own end."""
    last = graph.place(stream.writes[-1].after)
    on = {one for one in stream.points if graph.place(one) > last and graph[one].op in NORMS and depends_on(graph, end, one)}
    points = tuple(one for one in stream.points if one not in on)
    norm = None if stream.final_norm is not None and depends_on(graph, end, stream.final_norm) else stream.final_norm
    points = tuple(one for one in points if one != stream.final_norm or norm is not None)
    whole = _added_up(graph, stream.writes[-1].after, end) if last > graph.place(end) else None
    if whole is not None:
        after, norm = ending(graph, stream.writes[-1].before, whole, frozenset())
        points = tuple(sorted({*points, whole, *after}, key=graph.place))
    return replace(stream, points=points, final_norm=norm, coupled=end)


def _added_up(graph: Graph, one: TensorId, other: TensorId) -> TensorId | None:
    """The sum of the ends of two halves."""
    sums = (node for node in graph.nodes if node.op in ("add", "sum"))
    return next((node.id for node in sums if {base(graph, name) for name in addends(graph, node)} == {one, other}), None)
