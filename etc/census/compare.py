"""Which located values are the true ones: number by number, up to a view, in order."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor


class Plain(NamedTuple):
    """The numbers of a value with its smallest and its largest, which no view changes."""

    value: Tensor
    ends: tuple[float, ...]


def plain(values: Iterable[Tensor]) -> list[Plain]:
    """Values ready to be compared: as float32, without NaN."""
    numbers = [value.detach().float().nan_to_num() for value in values]
    return [Plain(value, tuple(map(float, value.aminmax())) if value.numel() else ()) for value in numbers]


def match(
    truth: Sequence[Plain], found: Sequence[Plain], tolerance: float = 0.0, rearranged: bool = False
) -> list[int | None]:
    """For each true value the place of the located one that equals it, None where there is none.

    Of several the first after the one before it is taken, so that places rise wherever the order is the true one.
    tolerance, rearranged: as in `same`.
    """
    places: list[int | None] = []
    last = -1
    for value in truth:
        order = [*range(last + 1, len(found)), *range(last + 1)]
        place = next((n for n in order if same(value, found[n], tolerance, rearranged)), None)
        places.append(place)
        last = last if place is None else max(last, place)
    return places


def in_order(places: Sequence[int | None]) -> list[bool]:
    """For each place whether it is one and comes after all that stand before it."""
    known = [-1 if place is None else place for place in places]
    return [place > max([-1, *known[:n]]) for n, place in enumerate(known)]


def same(truth: Plain, found: Plain, tolerance: float = 0.0, rearranged: bool = False) -> bool:
    """Whether a located value is the true one, bit by bit or within a tolerance, up to a view of the whole or a slice.

    A view may permute the dimensions. A slice is what a model returns of a pattern over two sets of keys, or of one that
    was padded; it begins or ends where the located value does. rearranged: the vectors of the last dimension may come in
    another order, as the windows of a picture do.
    """
    if truth.value.numel() != found.value.numel():
        return any(_near(truth.value, part, tolerance) for part in _slices(truth.value.shape, found.value))
    if any(abs(a - b) > tolerance for a, b in zip(truth.ends, found.ends, strict=True)):
        return False
    views = _views(truth.value.shape, found.value)
    return any(_near(truth.value, view, tolerance) for view in views) or (
        rearranged and _same_rows(truth.value, found.value)
    )


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether two values hold the same vectors, whatever their order."""
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-1]:
        return False
    (rows, counts), (others, times) = (torch.unique(one.flatten(0, -2), dim=0, return_counts=True) for one in (a, b))
    return torch.equal(rows, others) and torch.equal(counts, times)


def _near(truth: Tensor, found: Tensor, tolerance: float) -> bool:
    return torch.equal(truth, found) or bool(tolerance and (truth - found).abs().max() <= tolerance)


def _views(shape: torch.Size, found: Tensor) -> Iterator[Tensor]:
    """The located value in the shape of the true one, for each order of its dimensions, its own first."""
    squeezed = found.squeeze()
    for order in permutations(range(squeezed.dim())):
        yield squeezed.permute(order).reshape(shape)


def _slices(shape: torch.Size, found: Tensor) -> Iterator[Tensor]:
    for turned in (found, found.transpose(1, 2)) if found.dim() == 4 else (found,):
        if turned.dim() == len(shape) and all(a <= b for a, b in zip(shape, turned.shape, strict=True)):
            yield turned[tuple(slice(length) for length in shape)]
            yield turned[tuple(slice(-length, None) for length in shape)]
