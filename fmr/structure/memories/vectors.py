"""The key and the value vector of one memory: slices of the weights, as the projections read them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.memories.memory import Memory
from fmr.structure.memories.ups import THROUGH
from fmr.structure.normal.indices import carried, numbers
from fmr.structure.normal.match import LINEAR, MOVES, SAME, climb, unshaped


def count(graph: Graph, found: Memory) -> int:
    """How many memories there are: the units of the coefficients, which are channels where a window reads them."""
    return graph[found.post].shape[found.axis]


def vectors(
    graph: Graph, found: Memory, weights: Mapping[TensorId, Tensor], index: int, expert: int | None
) -> tuple[Tensor, Tensor]:
    """The key and the value of one memory: slices of the weights as the projections read them."""
    n = count(graph, found)
    keys, values = _matrices(graph, found, weights[found.keys], found.own(weights[found.values], n), index, expert)
    places = _places(graph, found, keys) if keys.dim() > found.key_dim else ()
    if not places or values.shape[found.value_dim : found.value_dim + 1] != (n,):
        shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
        raise StructureError(
            f"{found.scope!r} holds its weights as {shapes}: no row or column is that of one memory. Expected matrices with "
            f"one of {n} each; block.w_in and block.w_out name them as they are."
        )
    return _vector(keys.select(found.key_dim, places[index])), _vector(values.select(found.value_dim, index))


def _matrices(
    graph: Graph, found: Memory, keys: Tensor, values: Tensor, index: int, expert: int | None
) -> tuple[Tensor, Tensor]:
    """The matrices of the keys and of the values, those of one expert where there are several."""
    several = keys.dim() == values.dim() == 3 and graph[found.down].op not in LINEAR
    if not several and expert is not None:
        raise StructureError(f"{found.scope!r} has one matrix for all: expected block.memory({index}) without expert=.")
    if not several:
        return keys, values
    if expert is None:
        raise StructureError(f"{found.scope!r} has {len(keys)} experts. Name one: block.memory({index}, expert=0).")
    if not 0 <= expert < len(keys):
        raise StructureError(f"Expert {expert} of {found.scope!r}: expected 0 to {len(keys) - 1}.")
    return keys[expert], values[expert]


def _vector(weight: Tensor) -> Tensor:
    """The weights of one unit without the sizes of a window of one place."""
    return weight.flatten() if weight.numel() == len(weight) else weight


def _places(graph: Graph, found: Memory, keys: Tensor) -> Sequence[int]:
    """Where in a matrix the key of each memory lies; nowhere where that cannot be told."""
    size, n = keys.shape[found.key_dim], count(graph, found)
    if found.fused_gate:
        return _gated(graph, found, size) if size == 2 * n else ()
    if size == n:
        return range(n)
    return _cut(graph, found, size) if keys.dim() == 2 and graph[found.up].shape[-1:] == (size,) else ()


def _gated(graph: Graph, found: Memory, size: int) -> Sequence[int]:
    """Which units of a projection that makes gates and what they gate are gated."""
    n = count(graph, found)
    if graph[unshaped(graph, found.post, SAME)].op == "glu":
        return range(n)  # the second half gates the first
    up, pre = graph[found.up].shape, graph[found.pre].shape
    split = next(at for at in range(len(up) + 1) if math.prod(up[at:]) <= size)
    units = numbers(size).reshape(up[split:]).expand(up)
    gates = carried(graph, units, (graph[found.up], graph[found.pre]))
    gated = sorted(set(range(size)) - set(gates.reshape(-1, pre[-1])[0].long().tolist())) if gates is not None else []
    if len(gated) != n:
        raise StructureError(
            f"{found.scope!r}: the units of {found.w_in} that are gated cannot be told from the gates. Expected {n} of its "
            f"{size} units in {found.pre}; block.w_in names all of them."
        )
    return gated


def _cut(graph: Graph, found: Memory, size: int) -> Sequence[int]:
    """Which units of a projection that makes more than a memory are its keys: what is gated, where there is a gate."""
    up, n = graph[found.up], count(graph, found)
    above = climb(graph, found.post, lambda node: node.op in THROUGH and node.id != up.id)
    cuts = [node for node in above if node.shape[-1:] == (n,) and unshaped(graph, node.id, MOVES) == up.id]
    units = {node.id: _units(graph, up, node, size) for node in cuts}
    gates = units.get(found.pre, [])
    return next((one for one in units.values() if one and one != gates), gates)


def _units(graph: Graph, up: Node, cut: Node, size: int) -> list[int]:
    """Which units of a projection a cut of it has; none where it is not the same at every position."""
    value = carried(graph, numbers(size).expand(up.shape), (up, cut))
    rows = value.flatten(0, -2) if value is not None else torch.zeros(0)
    return rows[0].long().tolist() if len(rows) and bool((rows == rows[0]).all()) else []
