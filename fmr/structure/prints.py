"""Weights by a few of their numbers, so that they are known again where they go by another name."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from fmr.errors import IdError
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.proof.evaluate import Values

Prints = Mapping[TensorId, bytes]

_COUNT = 64
"""How many numbers of a weight are taken, evenly over all."""


def find_prints(graph: Graph, value: Values | None) -> dict[TensorId, bytes]:
    """Shape and some numbers of each parameter that a run kept; of those that are one number throughout, nothing."""
    found: dict[TensorId, bytes] = {}
    for node in graph.sources if value is not None else ():
        if node.op != "param" or node.dtype.is_complex or not node.dtype.is_floating_point:
            continue
        try:
            weight = value(node.id)  # type: ignore[misc]
        except IdError:
            continue
        if type(weight) not in (Tensor, Parameter) or weight.layout != torch.strided or weight.is_nested:
            continue  # a class of its own says what its numbers are when it is asked to compute
        flat = weight.detach().reshape(-1)
        some = numbers_of(flat[:: max(1, len(flat) // _COUNT)])
        if len(set(zip(*(some[n::4] for n in range(4)), strict=True))) > 1:
            found[node.id] = str(node.shape).encode() + some
    return found


def numbers_of(vector: Tensor) -> bytes:
    """The numbers of a vector as bytes of float32."""
    return bytes(vector.detach().float().contiguous().cpu().numpy().tobytes())
