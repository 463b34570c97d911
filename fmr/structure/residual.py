"""The residual stream by dataflow: the chain of adds in which a value meets what was computed from it."""

from collections.abc import Iterator
from typing import NamedTuple

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.match import LINEAR, NONLINEAR, NORM_PARTS, NORMS, SAME, SHAPE, contraction, product, weights

_COMPUTES = LINEAR | frozenset("linear addmm matmul bmm baddbmm mm einsum grouped_mm lstm gru embedding".split())
_HANDED = SAME | frozenset("view reshape flatten unflatten transpose permute squeeze unsqueeze getitem roll pad".split())
"""What may lie on the stream between two adds: no new numbers."""


_OVERWRITES = frozenset("setitem index_put masked_scatter index_copy index_add scatter slice_scatter".split())
"""What writes over a part of the stream from outside; the rest of it goes on."""


class Write(NamedTuple):
    """One add of the stream: `before` it, what is `added`, and the sum `after`."""

    before: TensorId
    added: TensorId
    after: TensorId


class Stream(NamedTuple):
    """One residual stream: its writes in order, and the values that it takes, normalised ones included."""

    writes: tuple[Write, ...]
    points: tuple[TensorId, ...]
    final_norm: TensorId | None


def find_streams(graph: Graph) -> Iterator[Stream]:
    """The residual streams of an unfused graph, longest first; one inside a write of another is not one."""
    found: dict[TensorId, Write] = {}
    for node in graph.nodes:
        write = _write(graph, node, found)
        if write is not None:
            found[write.after] = write
    writes = list(found.values())
    chains = sorted(_chains(graph, writes), key=len, reverse=True)
    taken: list[Write] = []
    for chain in chains:
        if len(chain) > 2 or not any(_inside(graph, chain, write) for write in taken):
            taken += chain
            yield _stream(graph, chain)


def _inside(graph: Graph, chain: list[Write], write: Write) -> bool:
    """Whether a chain lies between the value before a write and what it adds."""
    start, end = chain[0].before, chain[-1].after
    if not graph.place(write.before) < graph.place(start) < graph.place(end) < graph.place(write.after):
        return False
    return reaches(graph, start, write.before) and reaches(graph, write.added, end)


def reaches(graph: Graph, name: TensorId, origin: TensorId) -> bool:
    """Whether a value depends on another."""
    first, waiting, seen = graph.place(origin), [name], {name}
    for here in waiting:
        if here == origin:
            return True
        for parent in graph[here].parents:
            if parent not in seen and graph.place(parent) >= first:
                seen.add(parent.id)
                waiting.append(parent.id)
    return False


def _write(graph: Graph, node: Node, found: dict[TensorId, Write]) -> Write | None:
    """The add of a node as a write to a stream: one operand was computed from the other by a weight.

    Parallel blocks add up one after the other what they all computed from the same value; then it is an earlier sum.
    """
    if node.op != "add" or len(node.parents) != 2 or not node.dtype.is_floating_point:
        return None
    a, b = (parent.id for parent in node.parents)
    for before, added in ((a, b), (b, a)):
        if graph[before].shape == node.shape:
            origins, write = [before], found.get(base(graph, before))
            while write is not None and len(origins) < 4:
                origins.append(write.before)
                write = found.get(base(graph, write.before))
            if any(_computed_from(graph, added, origin) for origin in origins):
                return Write(unchanged(graph, before), added, node.id)
    return None


def _computed_from(graph: Graph, name: TensorId, origin: TensorId) -> bool:
    """Whether a value depends on another through at least one contraction with a weight."""
    target = base(graph, origin)
    first = graph.place(target)
    waiting, seen = [(name, False)], {(name, False)}
    while waiting:
        here, computed = waiting.pop()
        if here in (target, origin):
            if computed:
                return True
            continue
        node = graph[here]
        computed = computed or node.op in _COMPUTES
        for parent in node.parents:
            step = (parent.id, computed)
            if graph.place(parent) >= first and step not in seen:
                seen.add(step)
                waiting.append(step)
    return False


def unchanged(graph: Graph, name: TensorId) -> TensorId:
    """The value under casts to its own type and other ops that hand on the very same numbers."""
    node = graph[name]
    while node.op in ("to", "contiguous", "detach") and node.parents:
        above = graph[node.parents[0].id]
        if (above.shape, above.dtype) != (node.shape, node.dtype):
            break
        node = above
    return node.id


def base(graph: Graph, name: TensorId) -> TensorId:
    """The value that a stream carries, seen through casts, dropout, reshaping and scaling by a constant."""
    node = graph[name]
    while True:
        data = [parent.id for parent in node.parents if not weights(graph, parent.id)]
        if node.op == "to" or node.op in _OVERWRITES:
            data = data[:1]  # `x.type_as(y)` reads y for its type alone
        if len(data) != 1 or not (node.op in _HANDED | _OVERWRITES or (node.op in ("mul", "div") and not node.id.is_source)):
            return node.id
        node = graph[data[0]]


def _chains(graph: Graph, writes: list[Write]) -> list[list[Write]]:
    """The writes linked up: each begins where another ended, or at its normalised value."""
    chains: dict[TensorId, list[Write]] = {}
    for write in writes:
        root = base(graph, write.before)
        above = root if root in chains else _under_norm(graph, root)
        chain = chains.pop(above, []) if above is not None else []
        chains[write.after] = [*chain, write]
    return list(chains.values())


def _under_norm(graph: Graph, name: TensorId) -> TensorId | None:
    """The value that was normalised to this one; None where it is no normalised value."""
    node = graph[name]
    if node.op in NORMS or (node.op in NONLINEAR and len(node.parents) == 1):
        return base(graph, node.parents[0].id)
    if node.op not in ("mul", "add", "to"):
        return None
    waiting, seen, roots, parts = [name], {name}, set(), set()
    while waiting:
        node = graph[waiting.pop()]
        parts.add(node.op)
        for parent in node.parents:
            above = graph[parent.id]
            if weights(graph, parent.id) or parent in seen:
                continue
            seen.add(parent.id)
            if (above.op in NORM_PARTS and above.op != "add") or (above.op == "add" and len(above.parents) == 1):
                waiting.append(parent.id)
            else:
                roots.add(parent.id)
    if len(roots) == 1 and parts & {"mean", "var", "norm", "vector_norm", "var_mean", "std"}:
        return base(graph, roots.pop())
    return None


def _stream(graph: Graph, chain: list[Write]) -> Stream:
    points: dict[TensorId, None] = {}
    for write in chain:
        scaled = graph[write.before].op in ("mul", "div")
        points.update(dict.fromkeys((*([base(graph, write.before)] if scaled else []), write.before, write.after)))
    last = chain[-1].after
    while (over := _overwritten(graph, last)) is not None:
        last = over.id
        points[last] = None
    norm = final_norm(graph, last)
    if norm is None and len(graph.readers(last)) == 1 and graph.readers(last)[0].op in NONLINEAR:
        points[graph.readers(last)[0].id] = None
    return Stream(tuple(chain), tuple(points) + ((norm,) if norm is not None else ()), norm)


def final_norm(graph: Graph, name: TensorId) -> TensorId | None:
    """The normalised value that a stream ends in, one op or written out; None where nothing normalises it."""
    for reader in graph.readers(name):
        if reader.op in NORMS:
            return reader.id
    seen, waiting, last = {name}, [name], None
    while waiting:
        for reader in graph.readers(waiting.pop()):
            if reader.id not in seen and reader.op in NORM_PARTS and contraction(reader) is None:
                seen.add(reader.id)
                waiting.append(reader.id)
                last = reader if last is None or graph.place(reader) > graph.place(last) else last
    ops = {graph[one].op for one in seen}
    return last.id if last is not None and ops & {"mean", "var", "norm", "vector_norm", "var_mean"} else None


def _overwritten(graph: Graph, name: TensorId) -> Node | None:
    """The value that goes on where a part of the stream was written over from outside, in place or in a copy."""
    readers = [reader for reader in graph.readers(name) if reader.parents[0] == name]
    copies = [after for reader in readers if reader.op == "clone" for after in graph.readers(reader.id)]
    return next((reader for reader in readers + copies if reader.op in _OVERWRITES), None)


def writers(graph: Graph, write: Write) -> tuple[Node, ...]:
    """The contractions whose results are summed up, weighed by one another or not, into what a write adds."""
    through = SAME | SHAPE | NORMS | NORM_PARTS | frozenset({"mul", "add", "masked_fill", "where", "sum", "sigmoid", "tanh"})
    found, waiting, seen = [], [write.added], {write.added, write.before, base(graph, write.before)}
    while waiting:
        node = graph[waiting.pop()]
        made = contraction(node)
        if made is not None:
            found.append(node)
        if (made is None and node.op in through) or product(graph, node) is not None:
            for parent in node.parents:
                if parent not in seen:
                    seen.add(parent.id)
                    waiting.append(parent.id)
    return tuple(found)
