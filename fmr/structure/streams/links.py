"""The way back from a value along the writes to its stream: where these ended, and where the stream began."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import depends_on
from fmr.structure.streams.identity import CUTS, OVERWRITES, base, handed, identity_path, under_norm
from fmr.structure.streams.stream import Write

PARALLEL = 3
"""Before how many writes what is added may have been computed."""


Writes = Mapping[TensorId, Write]
"""The writes of all streams in execution order, by their sums."""

Starts = Mapping[TensorId, TensorId]
"""Where the stream of each write began, by their sums."""


def ends(graph: Graph, name: TensorId, found: Writes) -> Iterator[TensorId]:
    """Where a stream that a write begins with may have ended: written back into a whole, or normalised to it."""
    yield from written_back(graph, name, found)
    yield from normed(graph, name)


def normed(graph: Graph, name: TensorId) -> Iterator[TensorId]:
    """The base of a value, the value that was normalised or bent to it, and so on."""
    higher: TensorId | None = base(graph, name)
    while higher is not None:
        yield higher
        higher = under_norm(graph, higher)


def written_back(graph: Graph, name: TensorId, found: Writes) -> list[TensorId]:
    """The sums that were written back into a value on the way to this one, or laid beside the rest of it: a part of it was
    a stream for some writes."""
    sums: list[TensorId] = []
    for node in (graph[one] for one in identity_path(graph, name)):
        sums += [last.after for _, last in reversed(split_branches(graph, node, found))]
        if node.op in OVERWRITES or node.op == "cat":
            parts = [parent.id for parent in node.parents]
            rest = parts[:1] if node.op in OVERWRITES else [part for part in parts if part not in found]
            wholes = {handed(graph, part) for part in rest}
            sums += [part for part in parts if part not in rest and _goes_back(graph, found, part, wholes)]
    return sums


def _goes_back(graph: Graph, found: Writes, part: TensorId, wholes: set[TensorId]) -> bool:
    """Whether a value is the sum of a write which, or one before it in its stream, was to a part of one of these."""
    write = found.get(part)
    while write is not None and handed(graph, write.before) not in wholes:
        write = found.get(base(graph, write.before))
    return write is not None


def split_branches(graph: Graph, node: Node, found: Writes) -> list[tuple[Write, Write]]:
    """The first and the last write to each part of a value, where each part has writes of its own, none with what was made
    of another, and all are laid side by side again, in the order in which they begin; none of another op."""
    lasts = [last_write(graph, parent.id, found) for parent in node.parents] if node.op == "cat" else []
    halves = [(_first_to_part(graph, end, found), end) for end in lasts if end is not None]
    if len(halves) < max(len(lasts), 2) or len({first and handed(graph, first.before) for first, _ in halves}) > 1:
        return []
    parts = sorted(((a, b) for a, b in halves if a is not None), key=lambda half: graph.place(half[0].after))
    alone = (a is not b and not depends_on(graph, b.added, a.after) for (a, _), (b, _) in pairwise(parts))
    return parts if all(alone) else []


def last_write(graph: Graph, name: TensorId, found: Writes) -> Write | None:
    """The write that a value comes from, normalised or not."""
    return next((found[one] for one in normed(graph, name) if one in found), None)


def _first_to_part(graph: Graph, write: Write, found: Writes) -> Write | None:
    """The first of the writes that go on to this one and are to a part of a value."""
    first: Write | None = write
    while first is not None and graph[first.before].op not in CUTS:
        first = last_write(graph, first.before, found)
    return first


def start_of(graph: Graph, name: TensorId, found: Writes, starts: Starts) -> TensorId | None:
    """Where the stream began that a value is on; None where it is on none."""
    return next((starts[one] for one in ends(graph, name, found) if one in starts), None)
