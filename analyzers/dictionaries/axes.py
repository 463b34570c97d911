"""Values of any layout as rows of vectors, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

FRONT = ("examples", "positions")
"""The axes that count vectors; all others count their numbers."""


def spliced(made: Callable[[Tensor], Tensor], value: Tensor, axes: Sequence[str]) -> Tensor:
    """What is made of the vectors of a value, laid out as this is; the heads of a value are one vector.

    >>> from analyzers.dictionaries.axes import spliced
    >>> spliced(lambda rows: 2 * rows, torch.ones(2, 4, 3, 8), ("examples", "heads", "positions", "units")).shape
    torch.Size([2, 4, 3, 8])

    made: takes and gives vectors (..., width).
    """
    if len(axes) != value.dim():
        return made(value)
    order = [n for n, axis in enumerate(axes) if axis in FRONT] + [n for n, axis in enumerate(axes) if axis not in FRONT]
    front = sum(axis in FRONT for axis in axes)
    moved = value.permute(order)
    if front == value.dim():
        return made(value)
    found = made(moved.flatten(front)).reshape(moved.shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    return found.permute(back)
