"""Deformable attention (Zhu et al. 2021): each query weighs values sampled at a few places that it chooses itself."""

import math
from typing import NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.attention.attention import Attention
from fmr.structure.attention.layouts import Layout, described, laid_out
from fmr.structure.attention.values import output_of
from fmr.structure.normal.indices import dim_map
from fmr.structure.normal.match import Path, above, below, projection, strip_views
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import MOVES


class _Weighed(NamedTuple):
    """The sampled values that a softmax multiplies, the grid of their places, the sum, and the way of the softmax there."""

    v: TensorId
    grid: TensorId
    z: Node
    way: Path


def deformable(graph: Graph, softmax: Value) -> Attention | str | None:
    """The attention around a softmax of a projection of the queries that weighs values sampled on a grid; None for another.

    `q` are the queries that the weights are projected from, `k` the places that are looked at, `v` the sampled values.
    """
    higher = above(graph, softmax.operands[0], MOVES)
    scored = next((found for node in higher if (found := projection(graph, node)) is not None), None)
    weighed = _weighed(graph, softmax.node)
    if scored is None or weighed is None:
        return None
    layout = _layout(graph, softmax, weighed.way)
    if layout is None:
        return "it weighs sampled values, and which of its dimensions count queries and heads cannot be told"
    heads = math.prod(n for n, name in zip(softmax.node.shape, layout, strict=True) if name == "heads")
    units = graph[weighed.v].shape
    return described(
        graph,
        softmax,
        (laid_out(graph, strip_views(graph, scored.data)), laid_out(graph, weighed.grid), laid_out(graph, weighed.v)),
        (laid_out(graph, softmax.node.id, layout), laid_out(graph, weighed.z.id)),
        output_of(graph, weighed.z),
        (heads, heads, units[1] if len(units) > 1 else 1),
        "deformable",
    )


def _weighed(graph: Graph, softmax: Node) -> _Weighed | None:
    """What a softmax weighs, if it multiplies values that were sampled on a grid, and the products are summed up."""
    for node, way in below(graph, softmax, MOVES):
        if node.op == "mul" and way:
            other = next((parent.id for parent in node.parents if parent != way[-1].id), None)
            sampled = list(above(graph, other, MOVES)) if other else []
            grid = next((one.parent("grid", 1) for one in sampled if one.op == "grid_sample"), None)
            total = next((after for after in graph.readers(node.id) if after.op == "sum"), None)
            if other is not None and grid is not None and total is not None:
                return _Weighed(other, grid.id, total, way)
    return None


def _layout(graph: Graph, softmax: Value, way: Path) -> Layout | None:
    """What the dimensions of the weights count; None where that cannot be told.

    The sampled values are (examples and heads, units, queries, places): the one before the last tells the queries apart.
    """
    rank, lower = len(softmax.node.shape), dim_map(graph, way)
    queries, places = lower[-2] if len(lower) > 1 else None, softmax.dim % rank
    rest = [n for n in range(1, rank) if n not in (queries, places)]
    if queries in (None, 0, places) or len(rest) > 1:
        return None
    names = {0: "examples", queries: "positions", places: "units"} | dict.fromkeys(rest, "heads")
    return tuple(names[n] for n in range(rank))
