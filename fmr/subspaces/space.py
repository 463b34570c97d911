"""What a subspace is: two functions, one that reads coordinates off values and one that writes them back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fmr.errors import EditError

Index = int | slice | Sequence[int] | Sequence[Sequence[int]] | Tensor


@runtime_checkable
class Subspace(Protocol):
    """What may stand in `within=`: anything that reads coordinates off values and writes them back.

    `write(values, read(values))` is `values`, bit for bit, and what the coordinates do not tell stays as it is.
    """

    def read(self, values: Tensor) -> Tensor:
        """The coordinates of values of shape (..., width), of shape (..., size)."""

    def write(self, values: Tensor, coordinates: Tensor) -> Tensor:
        """The values with other coordinates."""


class Space(nn.Module, ABC):
    """A subspace of vectors of `width` numbers with `size` coordinates; `space[0:4]` is a part of it.

    Its parts are disjoint where their coordinates are, so that each may take those of another source.
    """

    width: int
    size: int

    def read(self, values: Tensor) -> Tensor:
        """The coordinates of values of shape (..., width), of shape (..., size)."""
        return self.now().read(values)

    def write(self, values: Tensor, coordinates: Tensor) -> Tensor:
        """The values with other coordinates; what these do not tell stays."""
        return self.now().write(values, coordinates)

    @abstractmethod
    def now(self) -> Subspace:
        """The subspace as its parameters make it at this moment, to be read and written several times."""

    def __getitem__(self, index: Index) -> Part:
        return Part(self, index)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr() or f'{self.width}, {self.size}'})"


class Part(Space):
    """Some coordinates of a subspace: `space[:4]`, `space[[1, 5]]`, or a row for each example, which means that one alone.

    >>> rotation = subspaces.Rotation(128, 16)
    >>> both = [edits.Interchange(source_ids, within=rotation[:8]), edits.Interchange(other_run, within=rotation[8:])]
    >>> fmr.run(model, input_ids, edits={site: both})

    index: of the coordinates: a whole number, a slice, a list, or a list of one row per example, all of one length.
    """

    def __init__(self, space: Space, index: Index) -> None:
        super().__init__()
        self.space, self.index = space, index
        self.places = _places(space, index)
        self.width, self.size = space.width, int(self.places.shape[-1])

    def now(self) -> Subspace:
        return Chosen(self.space.now(), self.places)

    def of(self, examples: Sequence[int]) -> Subspace:
        """The same part of these examples alone."""
        return Chosen(self.space.now(), self.places[list(examples)] if self.places.dim() == 2 else self.places)

    def __repr__(self) -> str:
        index = self.index
        ends = ["" if end is None else str(end) for end in (index.start, index.stop)] if isinstance(index, slice) else []
        return f"{self.space!r}[{':'.join(ends) if ends and index.step is None else repr(index)}]"  # type: ignore[union-attr]


class Chosen:
    """Some coordinates of a subspace, as places of one dimension, or of two with a row for each example."""

    def __init__(self, space: Subspace, places: Tensor) -> None:
        self.space, self.places = space, places

    def read(self, values: Tensor) -> Tensor:
        found = self.space.read(values)
        return found.gather(-1, self._spread(found))

    def write(self, values: Tensor, coordinates: Tensor) -> Tensor:
        found = self.space.read(values)
        return self.space.write(values, found.scatter(-1, self._spread(found), coordinates.to(found.dtype)))

    def _spread(self, found: Tensor) -> Tensor:
        """The places for each vector of coordinates."""
        places = self.places.to(found.device)
        if places.dim() == 2 and (found.dim() < 2 or len(places) != len(found)):
            raise EditError(
                f"A part of a subspace has {len(places)} rows of coordinates and was given values of shape "
                f"{tuple(found.shape)}. Expected a row for each of the {len(found)} examples."
            )
        if places.dim() == 2:
            places = places.reshape(len(places), *[1] * (found.dim() - 2), -1)
        return places.expand(*found.shape[:-1], -1)


def _places(space: Space, index: Index) -> Tensor:
    """An index of coordinates as whole numbers, checked."""
    if isinstance(index, slice):
        return torch.arange(space.size)[index]
    try:
        places = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        places = torch.empty(0, 0, 0)
    if places.numel() == 0 and places.dim() <= 2:
        places = places.long()
    if places.dtype == torch.bool or places.is_floating_point() or places.is_complex() or places.dim() > 2:
        raise EditError(
            f"space[{index!r}] is no part of a subspace. Expected whole numbers: one, a slice, a list, or a list of one row "
            f"for each example, all of one length."
        )
    if bool(((places < -space.size) | (places >= space.size)).any()):
        raise EditError(f"space[{index!r}] of a subspace of {space.size} coordinates: expected numbers below {space.size}.")
    places = (places % max(space.size, 1)).reshape(places.shape or (1,))
    ordered = places.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise EditError(f"space[{index!r}] takes a coordinate twice. Expected each once.")
    return places


def checked(values: Tensor, space: Space, device: torch.device | None) -> Tensor:
    """Values of a subspace's width on its device, or one clear error."""
    kind = type(space).__name__
    if not values.dim() or values.shape[-1] != space.width:
        raise EditError(
            f"A {kind} of vectors of {space.width} numbers was given values of shape {tuple(values.shape)}. Expected "
            f"{space.width} in the last dimension."
        )
    if not values.is_floating_point():
        raise EditError(f"A {kind} was given {values.dtype}. Expected values with fractions.")
    if device is not None and values.device != device:
        raise EditError(f"A {kind} on {device} was given values on {values.device}. Move it: .to({str(values.device)!r}).")
    return values
