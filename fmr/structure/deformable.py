"""Deformable attention (Zhu et al. 2021): each query weighs values sampled at a few places that it chooses itself."""

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.attention import Attention
from fmr.structure.match import MOVES, climb, descend, projection, unshaped
from fmr.structure.output import output_of
from fmr.structure.softmax import Softmax

_LAYOUT = ("examples", "positions", "heads", "units")


def deformable(graph: Graph, softmax: Softmax) -> Attention | str:
    """The attention around a softmax of a projection of the queries that weighs values sampled on a grid.

    `q` are the queries that the weights are projected from, `k` the places that are looked at, `v` the sampled values.
    """
    above = climb(graph, softmax.scores, MOVES)
    scored = next((found for node in above if (found := projection(graph, node)) is not None), None)
    weighed = _weighed(graph, softmax.node)
    if scored is None or weighed is None:
        return "no product of two activations lies above the softmax, and it weighs no sampled values"
    v, grid, z = weighed
    shape = softmax.node.shape
    heads = shape[2] if len(shape) > 3 else shape[1]
    units, output = graph[v].shape, output_of(graph, z)
    return Attention(
        softmax=softmax.node.id,
        q=unshaped(graph, scored.data),
        k=grid,
        v=v,
        scores=softmax.scores,
        pattern=softmax.node.id,
        z=z.id,
        out=output.id if output is not None else None,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=units[1] if len(units) > 1 else 1,
        kind="deformable",
        scope=softmax.node.module,
        layouts=(None, None, None, _LAYOUT, _LAYOUT, None),
    )


def _weighed(graph: Graph, softmax: Node) -> tuple[TensorId, TensorId, Node] | None:
    """The sampled values that a softmax multiplies, the grid of their places, and the sum."""
    for node, way in descend(graph, softmax, MOVES):
        if node.op == "mul" and way:
            other = next((parent.id for parent in node.parents if parent != way[-1].id), None)
            sampled = list(climb(graph, other, MOVES)) if other else []
            grid = next((one.parent("grid", 1) for one in sampled if one.op == "grid_sample"), None)
            total = next((after for after in graph.readers(node.id) if after.op == "sum"), None)
            if other is not None and grid is not None and total is not None:
                return other, grid.id, total
    return None
