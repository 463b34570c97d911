"""What becomes of a residual stream after its last write: overwritten in parts, bent, pooled, normalised, returned."""

from collections.abc import Iterable
from math import prod

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nests import ids_in
from fmr.nodes import Node
from fmr.structure.normal.form import form_of
from fmr.structure.normal.hidden import reads
from fmr.structure.normal.match import (
    NONLINEAR,
    NORMS,
    above,
    contraction,
    data_inputs,
    depends_on,
    projection,
)
from fmr.structure.streams.dominators import Flow
from fmr.structure.streams.identity import (
    CUTS,
    HANDED,
    OVERWRITES,
    POOLS,
    REDUCED,
    adaptive_norm,
    handed,
    identity_input,
    norms,
)


def ending(
    graph: Graph, flow: Flow, before: TensorId, last: TensorId, others: frozenset[TensorId]
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
    norm = _final_norm(graph, last, others)
    if norm is not None and any(depends_on(graph, reader.id, norm) for reader in graph.readers(last) if reader.id != norm):
        norm = None  # the stream goes on, in a way that is not understood, with what was made of its norm
    if norm is None and len(readers := graph.readers(last)) == 1 and readers[0].op in NONLINEAR:
        points.append(readers[0].id)
    points += [norm, _modulated(graph, norm) or norm] if norm is not None else []
    points += _leaving(graph, flow, last, others, {_viewed(graph, name) for name in [last, *points]}, norm is None)
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
    if readers[0].op in ("mul", "div", "add") and identity_input(graph, readers[0]) == last:
        return readers[0].id
    return _modulated(graph, last)


def _modulated(graph: Graph, name: TensorId) -> TensorId | None:
    """A value scaled and shifted by a condition."""
    lower = (after for reader in graph.readers(name) if reader.op == "mul" for after in graph.readers(reader.id))
    return next((after.id for after in lower if adaptive_norm(graph, after) == name), None)


def _final_norm(graph: Graph, last: TensorId, others: frozenset[TensorId]) -> TensorId | None:
    """The norm that a stream ends in, seen through views, pools and clamps; a norm that alone reads a norm is the last.

    Of several it is the first from which nothing is written to another stream.
    """
    norm: TensorId | None = None
    name: TensorId | None = last
    while name is not None and (norm is None or len(graph.readers(name)) == 1):
        found = norms(graph, name)
        found = [one for one in found[:-1] if not _is_told(graph, one, others)] or found[-1:]
        norm = found[0] if found else norm
        name = found[0] if found else _step(graph, name)
    return norm


def _is_told(graph: Graph, norm: TensorId, others: frozenset[TensorId]) -> bool:
    """Whether a write to another stream is computed from a norm."""
    return any(graph.place(one) > graph.place(norm) and depends_on(graph, one, norm) for one in others)


def _step(graph: Graph, name: TensorId) -> TensorId | None:
    """The only reader of a value, where it is a view, a pool or a nonlinearity of it alone."""
    readers = graph.readers(name)
    if len(readers) != 1 or readers[0].op not in HANDED | POOLS | REDUCED | NONLINEAR | {"sum"}:
        return None
    form = form_of(graph)
    data = [parent for parent in readers[0].parents if form[parent.id].kind not in ("weight", "constant")]
    return readers[0].id if len(data) == 1 else None


def _leaving(
    graph: Graph, flow: Flow, last: TensorId, others: frozenset[TensorId], known: set[TensorId], bare: bool
) -> list[TensorId]:
    """What is made of the last value alone and without a projection: normed, returned, or, where bare, read by a layer."""
    reached = _reached(graph, flow, last, others)
    returned = [name for name in ids_in(graph.scopes[0].output) if name in reached] if graph.scopes else []
    found = [name for name in reached if graph[name].op in NORMS] + [_viewed(graph, name) for name in returned]
    if bare:
        layers = (projection(graph, reader) for name in reached for reader in graph.readers(name))
        found += [handed(graph, layer.data) for layer in layers if layer is not None and layer.data in reached]
    return [name for name in found if name not in known]


def _viewed(graph: Graph, name: TensorId) -> TensorId:
    """The value of which one is a view; the view itself where it is a part of it."""
    whole = handed(graph, name)
    return whole if prod(graph[whole].shape) == prod(graph[name].shape) else name


def _reached(graph: Graph, flow: Flow, last: TensorId, others: frozenset[TensorId]) -> dict[TensorId, None]:
    """The values into which data comes from one value alone, and from there without a projection."""

    seen, waiting = {graph[last].id: None}, [graph[last]]
    for node in waiting:
        for reader in graph.readers(node.id):
            alone = reader.id not in others and flow.dominates(last, reader.id) and not _computes(graph, flow, reader)
            if alone and reader.id not in seen and node.id in data_inputs(graph, reader):  # it may be read for its type
                seen[reader.id] = None
                waiting.append(reader)
    return seen


def _computes(graph: Graph, flow: Flow, node: Node) -> bool:
    """Whether a node is a product with a weight or of two values that carry data."""
    found = contraction(node)
    return found is not None and (projection(graph, node) is not None or (found.left in flow) == (found.right in flow))
