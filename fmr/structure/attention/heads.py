"""How many heads an attention has, read off the way of its mixed values into the output projection.

A row of what the projection reads is the mixed values of all heads, one beside the other. So every vector of z is given a
number, the numbers are sent along that way, and those that meet in one row are the heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.graph.graph import Graph
from fmr.nodes import Node
from fmr.structure.attention.output import Output
from fmr.structure.attention.values import ValueProduct
from fmr.structure.normal.einsum import summed_dim
from fmr.structure.normal.indices import dim_map, iota, rows_of, trace


class Heads(NamedTuple):
    """The number of heads, the dimensions of z that count them and how many each does, and whether one counts more too.

    `places` are where in z the vectors of one row lie, one for each head in order; None where that is not known.
    """

    number: int
    dims: tuple[int, ...]
    counts: tuple[int, ...]
    folded: bool
    places: tuple[Tensor, ...] | None = None


def heads_in_rows(graph: Graph, use: ValueProduct, z: Node, output: Output) -> Heads | None:
    """The heads whose values meet in a row that the output projection reads; None where its rows are not made of z.

    A pattern may weigh values of several places at once; then only the last dimension of a value counts its units.
    """
    query = use.subscripts.free(use.subscripts.left)[-1:]
    row = use.subscripts.result.index(query) if query else None
    summed = summed_dim(graph, output.projection) % len(output.way[-1].shape)
    asked = [n for n, place in enumerate(dim_map(graph, output.way)) if place is not None and place == row and n != summed]
    found = (_meeting(graph, units, z.shape, output, asked, row) for units in dict.fromkeys((use.units, use.units[-1:])))
    return next((heads for heads in found if heads is not None), None)


def _meeting(
    graph: Graph, units: tuple[int, ...], shape: tuple[int, ...], output: Output, asked: list[int], query: int | None
) -> Heads | None:
    """The heads, where these dimensions of z count the units of a value, and those `asked` of what is projected queries.

    Where z has a dimension for heads, the rest may only be folded into that of the queries.
    """
    lead = tuple(1 if n in units else size for n, size in enumerate(shape))
    value = trace(graph, iota(*lead).expand(shape), output.way) if math.prod(shape) else None
    if value is None:
        return None
    row = rows_of(graph, output.projection, value, asked)[0]
    if any(node.op == "cat" for node in output.way):
        row = row[row >= 0]  # the coefficients of a memory may lie beside them
    met = row.unique().long()
    if not len(met) or met[0] < 0 or len(met) * math.prod(shape[n] for n in units) != len(row):
        return None
    places = [place.unique() for place in torch.unravel_index(met, lead)]
    several = tuple(n for n, place in enumerate(places) if len(place) > 1)
    in_order = torch.tensor(list(dict.fromkeys(row.long().tolist())))
    counts = tuple(len(places[n]) for n in several)
    if len(shape) > 3 and any(n != query and count != shape[n] for count, n in zip(counts, several, strict=True)):
        return None
    folded = math.prod(counts) != math.prod(shape[n] for n in several)
    return Heads(len(met), several, counts, folded, torch.unravel_index(in_order, lead))


def key_heads(graph: Graph, use: ValueProduct, heads: Heads, repeated: float) -> int:
    """Key-value heads: fewer where values are repeated, or broadcast, over several query heads."""
    sizes = dict(zip(use.subscripts.right, graph[use.v].shape, strict=True))
    least = 0 if heads.folded else 1
    own = [
        n for place, n in zip(heads.dims, heads.counts, strict=True) if sizes.get(use.subscripts.result[place], 0) > least
    ]
    return max(1, round(math.prod(own) / repeated))
