"""What a residual stream must be by definition: its points follow one another by sums, with no layer on the way."""

from math import prod
from typing import TYPE_CHECKING

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import (
    NORM_PARTS,
    NORMS,
    STATISTICS,
    above,
    all_inputs,
    between,
    depends_on,
    projection,
    weights,
)

if TYPE_CHECKING:
    from fmr.structure.streams.stream import Stream


def misread(graph: Graph, stream: "Stream") -> str:
    """Which of the parts of a stream is not what it is said to be; empty where all are."""
    return _written(graph, stream) or _between(graph, stream) or _ended(graph, stream)


def _written(graph: Graph, stream: "Stream") -> str:
    """What is wrong about the writes."""
    points, afters = {*stream.points}, {write.after for write in stream.writes}
    for write in stream.writes:
        if write.added in points:
            return f"{write.added} is a value of the stream, and not added to it"
        if write.origin not in points or write.after not in points:
            return f"{write.after} is written to {write.origin}, which are not both values of the stream"
        if write.after == write.origin or not depends_on(graph, write.after, write.origin):
            return f"{write.after} is not computed from {write.origin}"
    for name in points - afters:
        read = [parent.id for parent in graph[name].parents]
        pair = graph[name].op == "add" and len(read) == 2 and points & {*read}
        if pair and any(not weights(graph, one) and not _light(graph, one) & points for one in read):
            return f"{name} adds to a value of the stream, and is not among its writes"
    return ""


def _between(graph: Graph, stream: "Stream") -> str:
    """A point that is made by a layer."""
    known = {name for write in stream.writes for name in (write.origin, write.before, write.after)}
    for name in stream.points:
        if name not in known and name != stream.final_norm:
            higher = [one for one in known if graph.place(one) < graph.place(name) and depends_on(graph, name, one)]
            if higher and not _light(graph, name) & {*higher}:
                return f"{name} is made of the stream by a layer, and is no value of it"
    return ""


def _ended(graph: Graph, stream: "Stream") -> str:
    """What is wrong about the final norm."""
    norm, last = stream.final_norm, stream.writes[-1].after
    if norm is None:
        return ""
    if norm == last or not depends_on(graph, norm, last) or last not in _light(graph, norm):
        return f"{norm} is no norm of {last}, where the stream ends"
    normed = any(node.op in NORMS | NORM_PARTS | STATISTICS for node in between(graph, last, norm))
    return "" if normed else f"nothing is normed between {last} and {norm}"


def _light(graph: Graph, name: TensorId) -> set[TensorId]:
    """What a value is made of without a layer between: no projection to several units."""
    return {node.id for node in above(graph, name, lambda node: not _is_layer(graph, node), all_inputs)}


def _is_layer(graph: Graph, node: Node) -> bool:
    """Whether a node projects to several units: sums over depth and shares of what is there do not."""
    found = projection(graph, node)
    shape = graph[found.weight].shape if found is not None else ()
    return len(shape) > 1 and prod(shape) > max(shape)
