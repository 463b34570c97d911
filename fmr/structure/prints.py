"""Weights known again by a few of their numbers, in a copy that was rounded or trained on, too."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fmr.errors import IdError
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.proof.evaluate import Values

Prints = Mapping[TensorId, bytes]
"""The shape of each weight and a few of its numbers."""

_COUNT = 64
"""How many numbers of a weight are taken, evenly over all."""

_SURE = 6.0
"""From how many standard deviations on two weights are the same: by chance one pair in a thousand million is."""

_ROWS = 1024
"""How many weights are compared with all of their shape at once."""


def find_prints(graph: Graph, value: Values | None) -> dict[TensorId, bytes]:
    """Shape and some numbers of each parameter that a run kept, and of each matrix in a buffer: weights may be quantised.

    Of what is one number throughout, nothing.
    """
    found: dict[TensorId, bytes] = {}
    for node in graph.sources if value is not None else ():
        is_weight = node.op == "param" and node.dtype.is_floating_point
        is_matrix = node.op == "buffer" and not node.dtype.is_complex and len(node.shape) > 1
        if not is_weight and not is_matrix:
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


def same_weights(ours: Prints, theirs: Prints) -> dict[TensorId, TensorId]:
    """The weights that are the same by their numbers, rounded or trained on: each the nearest of the other, and no second.

    The nearness of two is the correlation r of n numbers, as z = atanh(r) * sqrt(n - 3), which is one of a standard normal
    where they have nothing to do with each other (Fisher 1921). A second is what is more than half as near.
    """
    found: dict[TensorId, TensorId] = {}
    first, second = (_by_shape(prints) for prints in (ours, theirs))
    for shape in first.keys() & second.keys():
        (names, here), (others, there) = first[shape], second[shape]
        forth, back = _nearest(here, there), _nearest(there, here)
        found |= {names[n]: others[at] for n, at in enumerate(forth) if at >= 0 and back[at] == n}
    return found


def _by_shape(prints: Prints) -> dict[bytes, tuple[list[TensorId], Tensor]]:
    """The weights of each shape and their numbers, one weight a row, of mean 0 and length 1."""
    names: dict[bytes, list[TensorId]] = {}
    for name, said in prints.items():
        names.setdefault(said.partition(b")")[0], []).append(name)
    return {shape: (same, _rows([prints[name][len(shape) + 1 :] for name in same])) for shape, same in names.items()}


def _rows(numbers: Sequence[bytes]) -> Tensor:
    rows = torch.frombuffer(bytearray(b"".join(numbers)), dtype=torch.float32).reshape(len(numbers), -1).double()
    rows -= rows.mean(1, keepdim=True)
    return rows.div_(rows.norm(dim=1, keepdim=True))


def _nearest(rows: Tensor, others: Tensor) -> list[int]:
    """For each row the only other one that is surely the same, -1 where there is none or a second one is half as near."""
    found: list[int] = []
    for some in rows.split(_ROWS):
        near = (some @ others.T).clamp(-1, 1).atanh() * max(rows.shape[1] - 3, 0) ** 0.5
        near = near.nan_to_num(0, torch.inf, -torch.inf)
        best, at = near.max(1)
        near.scatter_(1, at[:, None], -torch.inf)
        alone = (best > _SURE) & (near.amax(1) < best / 2)
        found += at.where(alone, -1).tolist()
    return found
