"""Where mixed values go: from z, through gates and norms, into the projection that writes them."""

from typing import NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import RESULT, TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import (
    MOVES,
    NONLINEAR,
    NORMS,
    SAME,
    Path,
    Projection,
    below,
    depends_on,
    projection,
    settled,
    strip_views,
    weights,
)

_GATHERED = MOVES | NORMS | {"mul", "sub", "div"}
"""What may lie between the values of the heads and their projection: a gate, or a norm, as one op or written out."""


class Output(NamedTuple):
    """The projection that reads z, the way of z into it, and its result with what reshapes or sums that."""

    projection: Projection
    way: Path
    id: TensorId


def handed_on(graph: Graph, node: Node) -> Node:
    """The output of the fused op that a node is the result of, else the node."""
    outer = next((reader for reader in graph.readers(node.id) if reader.op == RESULT), None)
    return handed_on(graph, outer) if outer is not None else node


def output_of(graph: Graph, z: Node, own: tuple[TensorId, ...] = ()) -> Output | None:
    """The first projection below the heads, and their sum where each head is projected alone; None where z is used as it is.

    What is made of its `own` parts in another way may be added to z.
    """
    for node, way in below(graph, z, lambda node: _goes_on(graph, node, own)):
        found = projection(graph, node) if way else None
        if found is not None and found.data == way[-1].id:
            last = settled(graph, node)
            readers = graph.readers(last.id)
            alone = len(readers) == 1 and readers[0].op == "sum" and len(node.shape) > 3
            return Output(found, way, (settled(graph, readers[0]) if alone else last).id)
    return None


def _goes_on(graph: Graph, node: Node, own: tuple[TensorId, ...]) -> bool:
    """Whether mixed values go on in a node: moved, gated, normed or bent alone, or added to what is theirs."""
    if node.op == "add":
        return bool(own) and all(any(depends_on(graph, parent.id, one) for one in own) for parent in node.parents)
    alone = sum(not weights(graph, parent.id) for parent in node.parents) == 1
    return node.op in _GATHERED or (node.op in NONLINEAR and alone)


def own_parts(graph: Graph, q: TensorId, v: TensorId, softmax: TensorId) -> tuple[TensorId, ...]:
    """What may be added to mixed values before their projection: more of the values, the pattern, the split queries."""
    queries = strip_views(graph, q, SAME | {"mul", "div"})
    split = (queries,) if len(graph[queries].shape) > 3 else ()
    return (strip_views(graph, v, MOVES), softmax, *split)
