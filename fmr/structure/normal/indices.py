"""Which number of a value became which further down: its places are numbered, and the numbers sent along a way.

The ops of the way run again on these numbers: heads that `view` and `transpose` lay side by side stand side by side in
what arrives. -1 stands for a number that comes from elsewhere, or for several that were summed up.
"""

import math
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fmr.errors import FmrError
from fmr.graph.execute import draws
from fmr.graph.graph import Graph
from fmr.nodes import Node
from fmr.structure.normal.einsum import read_dims, summed_alone
from fmr.structure.normal.match import Path, Projection, between, contraction, is_constant
from fmr.structure.normal.vocabulary import MEANS, SHAPE, VIEWS
from fmr.structure.proof.evaluate import in_double


def iota(*shape: int) -> Tensor:
    """A value of this shape in which each place has its own number, to be sent along a way.

    >>> iota(2, 1).expand(2, 3)  # one number for each of two heads, the same for its three units
    tensor([[0., 0., 0.],
            [1., 1., 1.]], dtype=torch.float64)
    """
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def trace(graph: Graph, value: Tensor, way: Path) -> Tensor | None:
    """What becomes of a value between the ends of a way, where only what moves numbers counts; None where that fails, or
    where a number that is not known here says which part is taken."""
    known, own = {way[0].id: value.contiguous() + 1}, {node.id for node in way}  # so that 0 is what is filled up with
    try:
        for node in between(graph, way[0].id, way[-1].id, lambda node: node.id in own or contraction(node) is None):
            met = [parent.id for parent in node.parents if parent in known]
            if node.op in VIEWS and met:
                known[node.id] = known[met[0]].reshape(node.shape)  # a size that is computed is not known here
            elif node.op in SHAPE and met:
                tensors = {p.id: known[p.id] if p.id in known else _foreign(graph, graph[p.id]) for p in node.parents}
                known[node.id] = in_double(node, tensors).to(torch.float64).contiguous()
            elif met and node.op in MEANS:
                mean, squared = (in_double(node, {met[0]: known[met[0]] ** power}) for power in (1, 2))
                known[node.id] = torch.where(squared == mean**2, mean, 0.0)  # that of equal numbers is one of them
            elif met and node.op in ("sum", "mean"):
                known[node.id] = _reduced(known[met[0]], node.argument("dim", 1), len(node.shape) == known[met[0]].dim())
            elif met and (contraction(node) is not None or node.op == "einsum"):
                told = summed_alone(graph, node)
                known[node.id] = _reduced(known[met[0]], told[1]) if told else known[met[0]].expand(node.shape)
            elif met and node.op in ("topk", "sort"):  # the first ones stand for those that are chosen
                known |= {node.id: known[met[0]][tuple(map(slice, node.shape))]} if node.dtype.is_floating_point else {}
            elif met and (node.id in own or _fits(known[met[0]], node.shape)):  # the largest of many is no number of one
                known[node.id] = known[met[0]].expand(node.shape)
    except (FmrError, RuntimeError, TypeError, KeyError, IndexError, ValueError):
        return None
    found = known.get(way[-1].id)
    return found - 1 if found is not None and found.shape == way[-1].shape else None


def _fits(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether numbers can be repeated to this shape."""
    sizes = zip(reversed(value.shape), reversed(shape), strict=False)
    return value.dim() <= len(shape) and all(size in (1, wanted) for size, wanted in sizes)


def _reduced(value: Tensor, dim: Any, keep: bool = False) -> Tensor:
    """What is left of numbers that are summed up: those that are the same all along, but for what comes from elsewhere."""
    most = torch.amax(value, dim=dim, keepdim=keep)
    least = torch.amin(value.masked_fill(value == 0, torch.inf), dim=dim, keepdim=keep)
    return torch.where(most == least, most, 0.0)


def _foreign(graph: Graph, node: Node) -> Tensor:
    """A value of a node's shape that comes from elsewhere; places that are counted out are known."""
    if not node.dtype.is_floating_point:
        with suppress(KeyError):
            return _counted(graph, node)
        if not node.shape and node.dtype != torch.bool:
            raise KeyError(node.id)  # one place that is not known here
    return torch.zeros(node.shape, dtype=torch.float64 if node.dtype.is_floating_point else node.dtype)


def _counted(graph: Graph, node: Node) -> Tensor:
    """A value that is made of numbers in the code alone; a `KeyError` for any other."""
    if node.id.is_source or draws(node) or not is_constant(graph, node.id):
        raise KeyError(node.id)
    return in_double(node, {parent.id: _counted(graph, graph[parent.id]) for parent in node.parents}).cpu()


def dim_map(graph: Graph, way: Path) -> tuple[int | None, ...]:
    """For each dimension of the last value of a way the dimension of the first that it is; None where it is none alone."""
    start, end = way[0].shape, way[-1].shape
    if not any(node.op in SHAPE for node in way[1:]):
        return tuple(range(len(end))) if len(start) == len(end) else (None,) * len(end)
    value = trace(graph, iota(*start), way) if math.prod(start) else None
    if value is None or not value.numel():
        return (None,) * len(end)
    return tuple(_source(value, dim, start, len(end)) for dim in range(len(end)))


def _source(value: Tensor, dim: int, start: tuple[int, ...], rank: int) -> int | None:
    """The one dimension of the start along which a line of numbers goes; of the same place where the line is a point."""
    line = value[tuple(slice(None) if n == dim else 0 for n in range(rank))].long()
    line = line[line >= 0]
    places = torch.unravel_index(line, start)
    moving = [
        n for n, place in enumerate(places) if len(place) == start[n] > 1 and torch.equal(place, torch.arange(start[n]))
    ]
    if len(line) == 1 and len(start) == rank and start[dim] == 1:
        return dim
    return moving[0] if len(moving) == 1 else None


def rows_of(graph: Graph, found: Projection, value: Tensor, places: Collection[int] = ()) -> Tensor:
    """What a projection reads, row by row: what it sums over for one place, and the heads that it tells apart there.

    A weight for each position tells `places` apart, dimensions that count no heads.
    """
    dims = tuple(n for n in read_dims(graph, found) if n not in places)
    return value.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).unsqueeze(0).flatten(0, -2)


def varies(value: Tensor, dim: int) -> bool:
    """Whether a value is not the same all along a dimension."""
    return value.numel() > 0 and bool((value != value.narrow(dim, 0, 1)).any())
