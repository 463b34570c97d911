"""Numbers on their way into a page: values in one order, and arrays as text."""

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.ids import Site

Json = dict[str, Any]

LEVELS = 254
"""Steps from 0 to the largest weight of a pattern in one byte; the byte above means no number."""

_KINDS = {torch.uint8: "u1", torch.int32: "i4", torch.float32: "f4"}


def packed(values: Tensor) -> Json:
    """An array as text: its kind, its shape, and its bytes, the last dimension first, the low byte of a number first."""
    numbers = values.detach().cpu().contiguous().numpy()
    data = numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
    return {"kind": _KINDS[values.dtype], "shape": list(values.shape), "data": base64.b64encode(data).decode()}


def unpacked(told: Json) -> Tensor:
    """The array that was packed.

    >>> unpacked(packed(torch.tensor([[1.5, 2.0]])))
    tensor([[1.5000, 2.0000]])
    """
    kind = np.dtype(f"<{told['kind']}")
    return torch.from_numpy(
        np.frombuffer(base64.b64decode(told["data"]), kind).reshape(told["shape"]).astype(kind.newbyteorder("="))
    )


def pattern_bytes(maps: Tensor) -> tuple[Tensor, float]:
    """Weights of a pattern as bytes, and the weight that the largest byte stands for: 1 unless one is larger.

    >>> pattern_bytes(torch.tensor([0.0, 0.5, 1.0, float("nan")]))
    (tensor([  0, 127, 254, 255], dtype=torch.uint8), 1.0)
    """
    weights = maps.detach().float()
    known = weights.nan_to_num(0.0)
    if known.numel() and float(known.min()) < -0.5 / LEVELS:
        raise StructureError(f"it has weights below zero, {float(known.min()):.2g}, which the page has no colours for.")
    most = max(1.0, float(known.max()) if known.numel() else 1.0)
    levels = (known.clamp(min=0) * (LEVELS / most)).round().to(torch.uint8)
    return torch.where(weights.isnan(), torch.tensor(LEVELS + 1, dtype=torch.uint8, device=levels.device), levels), most


def by_position(value: Tensor, site: Site) -> Tensor:
    """A value as (examples, positions, units), however it is laid out; rows and columns of an image are positions.

    >>> by_position(torch.zeros(2, 8, 4, 4), Site("conv/conv2d#0", layout=("examples", "units", "rows", "columns"))).shape
    torch.Size([2, 16, 8])
    """
    names = site.axes(value)
    if "units" not in names:
        raise StructureError(f"{site.id} of {list(value.shape)} has no dimension that is said to count units.")
    examples, units = ([n for n, name in enumerate(names) if name == one] for one in ("examples", "units"))
    rest = [n for n in range(value.dim()) if n not in (*examples, *units)]
    ordered = value.detach().permute(*examples, *rest, *units)
    lead = ordered.shape[: len(examples)]
    return ordered.reshape(int(np.prod(lead)) if lead else 1, -1, ordered.shape[-1])
