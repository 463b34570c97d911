"""Recomputing a part of a graph from its values, in double precision: what every certificate rests on."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.execute import execute, overwritten
from fmr.graph.graph import Graph
from fmr.ids import ALIAS, TensorId
from fmr.structure.normal.match import after

Values = Callable[[TensorId], Tensor]
"""Gives the recorded value of an ID: a run, or anything that reads like one."""


def evaluate(graph: Graph, target: TensorId, given: Mapping[TensorId, Tensor], value: Values) -> Tensor:
    """The value of `target` when some of the values that it depends on are given anew.

    What does not depend on a given value is taken as it was recorded, and so are choices, which rounding may tip: places
    of the largest, of what is sorted. Everything is computed in float64.
    """
    first = min(given, key=graph.place)
    known = {name: _double(tensor) for name, tensor in given.items()}
    for node in after(graph, first, target, lambda node: node.id not in given):
        if node.id not in known and node.dtype != torch.int64 and any(parent in known for parent in node.parents):
            tensors = {p.id: known[p.id] if p.id in known else _double(value(p.id)) for p in node.parents}
            known[node.id] = overwritten(graph.__getitem__, node, tensors) if node.op == ALIAS else execute(node, tensors)
    if target not in known:
        raise StructureError(f"{target} does not depend on any of {', '.join(given)}.")
    return known[target]


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64) if tensor.is_floating_point() else tensor.detach()
