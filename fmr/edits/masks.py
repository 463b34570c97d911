"""Which columns hold real tokens, read off masks of any form; where a mask does not prove it, nothing is told."""

from collections.abc import Sequence

import torch
from torch import Tensor

_HIDES = -1e4
"""From this number down, what is added to scores hides a column."""


def of_keys(mask: Tensor, hides: bool) -> Tensor | None:
    """The real columns of a two-dimensional mask, example by example, as it is now; `hides` where True means padding."""
    mask = mask.detach()
    if mask.is_floating_point() and hides:
        shown = _shown(mask)
        return None if shown is None else shown.clone()
    real = mask.to(torch.bool, copy=True)
    return ~real if hides else real


def of_queries_and_keys(masks: Sequence[Tensor], past: int | None, known: Tensor | None) -> Tensor | None:
    """The real columns where one of these masks hides padding and what is to come, or lies outside a window, and no more.

    The columns of keys are those before, which `past` counts, and those of the queries. Of a single query a window and
    padding look alike: then the columns must be all there, or have been `known` before.
    """
    return next((real for one in masks if (real := _proven(one.detach(), past, known)) is not None), None)


def _proven(mask: Tensor, past: int | None, known: Tensor | None) -> Tensor | None:
    shown = _shown(mask)
    shown = shown.unsqueeze(1) if shown is not None and shown.dim() == 3 else shown
    if shown is None or not (shown == shown[:, :1]).all():
        return None
    shown = shown[:, 0]
    queries, keys = shown.shape[1:]
    rows = torch.arange(queries, device=shown.device) + (keys - queries if past is None else past)
    if rows[0] < 0 or rows[-1] >= keys:  # a window of keys, which says nothing of those before it
        return known if keys < queries + (past or 0) else None
    last, diagonal = shown[:, -1], shown[:, range(queries), rows]
    if queries == 1 and keys > 1:
        whole = torch.arange(keys, device=shown.device) <= rows[0]
        if (last == whole).all():
            return last
        return (
            _padded(known, keys) if known is not None and not (last & ~_padded(known, keys).to(last.device)).any() else None
        )
    tried = [last, diagonal] if queries == keys else [last]
    return next((real.clone() for real in tried if _explains(real, shown, rows)), None)


def _explains(real: Tensor, shown: Tensor, rows: Tensor) -> bool:
    """Whether every real query sees just the real columns, all of them or those up to its own, within a window or not.

    The others see no column that is not real, or all.
    """
    columns = torch.arange(shown.shape[2], device=shown.device)
    apart = rows[:, None] - columns
    asks = real[:, rows, None]
    whole = real[:, None]
    widest = int(torch.where(asks & shown, apart, 0).max())
    causal = whole & (apart >= 0) & (apart <= widest)
    idle = ~asks & ((shown & ~whole).logical_not().all(-1, keepdim=True) | shown.all(-1, keepdim=True))
    return any(bool((torch.where(asks, shown == seen, idle)).all()) for seen in (whole.expand_as(shown), causal))


def _padded(known: Tensor, keys: int) -> Tensor:
    """A mask with columns that are not filled yet."""
    return torch.nn.functional.pad(known, (0, max(0, keys - known.shape[1])))


def _shown(mask: Tensor) -> Tensor | None:
    """Where a mask lets a query see: where it is true, or adds nothing; None where it adds what neither shows nor hides."""
    if not mask.is_floating_point():
        return mask != 0
    shown: Tensor = mask == 0
    return shown if bool((shown | (mask <= _HIDES)).all()) else None
