"""Sums that only look like writes: places given to queries, biases of scores, shifts of norms, what is read off a stream."""

from collections.abc import Iterator

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import MASKING, MOVES, above, all_inputs, below, depends_on, projection
from fmr.structure.streams.identity import base
from fmr.structure.streams.links import PARALLEL, Starts, Writes, ends, last_write, normed, start_of
from fmr.structure.streams.stream import Write

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


def is_readout(graph: Graph, write: Write, found: Writes, starts: Starts) -> bool:
    """Whether what is added and what it is added to are both read off another stream, and the one knows the other through
    that stream alone: values that are mixed over depth, skips and logits that are summed up.

    Where what is written to the other stream is made of it in turn, the two are coupled; but what a single write tells it
    are places given to queries.
    """
    before, target = {one.after for one in _back(graph, write.origin, found)}, base(graph, write.origin)
    first = graph.place(target)

    def goes_on(node: Node) -> bool:
        return graph.place(node.id) > first and (node.id not in found or node.id in before)

    met = [one.id for one in above(graph, write.added, goes_on, all_inputs) if graph.place(one.id) >= first]
    if target in met:
        return False
    start = base(graph, starts[write.after])
    others = {base(graph, starts[one]) for one in met if one in found and one not in before} - {start}
    if not others:
        return False
    own = [one for one, begin in starts.items() if begin == starts[write.after]]
    later = (one for one in found.values() if base(graph, starts[one.after]) in others)
    if any(depends_on(graph, one.added, own[0]) for one in later):  # it tells the others: of places, in a single write
        return starts[write.after] == write.origin and len(own) == 1
    return any(depends_on(graph, start, other) for other in others)


def _back(graph: Graph, name: TensorId, found: Writes) -> Iterator[Write]:
    """The last writes to the stream that a value is on, latest first, as many as may have been computed in parallel."""
    write = last_write(graph, name, found)
    for _ in range(PARALLEL + 1):
        if write is not None:
            yield write
            write = last_write(graph, write.before, found)
