"""One residual stream: the values that it takes, who writes to it and who reads it, and the proof of each write."""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

from fmr.errors import StructureError, number_of
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.normal.match import above, all_inputs, between, depends_on, projection, unbroadcast, weights
from fmr.structure.normal.vocabulary import NORM_PARTS, NORMS, STATISTICS
from fmr.structure.proof.certificate import TOLERANCE, Certificate, error, tolerance_of
from fmr.structure.proof.evaluate import Values, check_run, own_work, why_unproving
from fmr.structure.streams.copies import hyper_connection


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


@dataclass(frozen=True, eq=False)
class Stream:
    """A residual stream: its values in order, each write, and who wrote it; a plain stack of layers has no writes.

    `points` are the values that the stream takes, from the embedding to the final norm, normalised ones included; of a
    stack those that each of its layers reads: no data goes past any of them. `writers` are the values that each write adds,
    `readers` what reads each point. Where all that is written is made of
    another stream, and what is written there is made of this one, both are halves of one: `coupled` is where that one ends.
    """

    writes: tuple[Write, ...]
    points: tuple[TensorId, ...]
    final_norm: TensorId | None
    writers: tuple[tuple[TensorId, ...], ...] = ()
    readers: tuple[tuple[TensorId, ...], ...] = ()
    certified: Certificate | None = None
    coupled: TensorId | None = None

    def check(self, run: Run | Pass) -> Certificate:
        """Compare each write with the difference that it makes in another run of the same code."""
        check_run(run)
        with own_work():
            return certify_stream(run.graph.unfused, self, run.__getitem__)

    def __repr__(self) -> str:
        if not self.writes:
            return f"no writes, a plain stack of {len(self.points)} states from {self.points[0]} to {self.points[-1]}"
        half = f", a half of one stream with the one that ends in {self.coupled}" if self.coupled else ""
        return f"{number_of(len(self.writes), 'write')} from {self.points[0]} to {self.points[-1]}{half}"


def certify_stream(graph: Graph, stream: Stream, value: Values) -> Certificate:
    """Compare each write with the difference that it makes.

    A stream of which a point is made by a layer, a sum is no write, or the final norm norms something else, is a
    `StructureError`.
    """
    if stream.writes and (wrong := _misread(graph, stream)):
        raise StructureError(wrong)
    nothing = [why_unproving([write.after], value) for write in stream.writes]
    if nothing and all(nothing):
        raise StructureError(nothing[0])
    worst, tolerance = 0.0, TOLERANCE
    for write in stream.writes:
        before, added, after = (value(name) for name in (write.before, write.added, write.after))
        worst = max(worst, error(before.double() + write.times * added.double(), after))
        tolerance = max(tolerance, tolerance_of(before, added, after))
    return Certificate({"writes": worst}, tolerance)


def _misread(graph: Graph, stream: Stream) -> str:
    """Which of the parts of a stream is not what it is said to be; empty where all are."""
    places = [graph.place(name) for name in stream.points]
    afters = [write.after for write in stream.writes]
    if places != sorted({*places}) or any(depends_on(graph, a, b) for a, b in pairwise(afters)):
        return f"{', '.join(stream.points)} are not in the order in which they are computed, or written to"
    if stream.coupled is not None and not _is_coupled(graph, stream, stream.coupled):
        return f"{stream.coupled} ends a half that is made of it in no layer"
    return _written(graph, stream) or _between(graph, stream) or _ended(graph, stream)


def _is_coupled(graph: Graph, stream: Stream, end: TensorId) -> bool:
    """Whether the end of another stream is made of what was written to this one."""
    return end not in stream.points and depends_on(graph, end, stream.writes[0].after)


def _written(graph: Graph, stream: Stream) -> str:
    """What is wrong about the writes."""
    points, afters = {*stream.points}, {write.after for write in stream.writes}
    for number, write in enumerate(stream.writes):
        if write.added in points:
            return f"{write.added} is a value of the stream, and not added to it"
        if write.origin not in points or write.after not in points:
            return f"{write.after} is written to {write.origin}, which are not both values of the stream"
        earlier = (one.after for one in reversed(stream.writes[:number]))
        last = next((one for one in earlier if depends_on(graph, write.before, one)), write.origin)
        if not depends_on(graph, write.origin, last) or not depends_on(graph, write.before, write.origin):
            return f"{write.before} does not begin with {write.origin}, which is not what goes on from {last}"
    for name in points - afters:
        read = [parent.id for parent in graph[name].parents]
        pair = graph[name].op == "add" and len(read) == 2 and points & {*read}
        if pair and any(not weights(graph, one) and not _light(graph, one) & points for one in read):
            return f"{name} adds to a value of the stream, and is not among its writes"
    return ""


def _between(graph: Graph, stream: Stream) -> str:
    """A point that is made by a layer, or that layers alone read."""
    known = {name for write in stream.writes for name in (write.origin, write.before, write.after)}
    for name in stream.points:
        if name not in known and name != stream.final_norm:
            higher = [one for one in known if graph.place(one) < graph.place(name) and depends_on(graph, name, one)]
            if higher and not _light(graph, name) & {*higher}:
                return f"{name} is made of the stream by a layer, and is no value of it"
            first, last = stream.writes[0].after, stream.writes[-1].after
            later = graph.place(name) > graph.place(first) and depends_on(graph, last, name)
            if later and not any(name in _light(graph, one) for one in known):
                return f"{name} is read by layers alone, and is no value of the stream"
    return ""


def _ended(graph: Graph, stream: Stream) -> str:
    """What is wrong about the final norm."""
    norm, last = stream.final_norm, stream.writes[-1].after
    if norm is None:
        end = _end(graph, stream)
        ends = {node.op for node in graph.readers(end)}
        missed = ends and ends <= NORMS and stream.coupled is None
        return f"a norm alone reads {end}, and no final norm is named" if missed else ""
    layers = (node for node in between(graph, last, norm) if is_layer(graph, node))
    if norm not in stream.points or any(depends_on(graph, node.id, last) for node in layers):
        return f"{norm} is no value of the stream, or a layer lies between it and {last}"
    if norm == last or not depends_on(graph, norm, last) or last not in _light(graph, norm):
        return f"{norm} is no norm of {last}, where the stream ends"
    normed = any(node.op in NORMS | NORM_PARTS | STATISTICS for node in between(graph, last, norm))
    return "" if normed else f"nothing is normed between {last} and {norm}"


def _end(graph: Graph, stream: Stream) -> TensorId:
    """The last sum of a stream, or the point where it is laid beside other parts that have writes of their own."""
    sums, last = {write.after for write in stream.writes}, stream.writes[-1].after
    for laid in (graph[name] for name in stream.points if graph[name].op == "cat"):
        parts = [_light(graph, part.id) & sums for part in laid.parents]
        own = [one.difference(*(other for other in parts if other is not one)) for one in parts]
        if all(own) and any(last in one for one in own):
            return laid.id
    return last


def _light(graph: Graph, name: TensorId) -> set[TensorId]:
    """What a value is made of without a layer between: no projection to several units."""
    return {node.id for node in above(graph, name, lambda node: not is_layer(graph, node), all_inputs)}


def is_layer(graph: Graph, node: Node) -> bool:
    """Whether a node projects to several units: sums over depth, shares of what is there and mixed copies do not."""
    found = projection(graph, node) if hyper_connection(graph, node) is None else None
    shape = graph[unbroadcast(graph, found.weight)].shape if found is not None else ()
    return len(shape) > 1 and prod(shape) > max(shape)
