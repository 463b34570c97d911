"""Subspaces that are given: units, the span of vectors, directions in data, latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmr.errors import EditError, whole_number
from fmr.subspaces.space import Space, Subspace, checked


class Units(Space):
    """Chosen units: what is written there replaces them, and no other number moves.

    >>> fmr.run(model, input_ids, edits={site: edits.Interchange(source_ids, within=subspaces.Units(128, [0, 3]))})

    width: how many numbers a vector has. units: which of them, each once; their order is that of the coordinates.
    """

    def __init__(self, width: int, units: Sequence[int]) -> None:
        super().__init__()
        self.width = counted(width, "Units", "width")
        places = [whole_number(unit) for unit in units]
        if any(place is None or not 0 <= place < width for place in places) or len(set(places)) < len(places):
            raise EditError(f"Units({width}, {list(units)!r}): expected numbers from 0 to {width - 1}, each once.")
        self.units = [place for place in places if place is not None]
        self.size = len(self.units)

    def read(self, values: Tensor) -> Tensor:
        return checked(values, self, None)[..., self.units]

    def write(self, values: Tensor, coordinates: Tensor) -> Tensor:
        places = torch.tensor(self.units, dtype=torch.long, device=values.device)
        spread = coordinates.to(values.dtype).expand(*values.shape[:-1], self.size)
        return checked(values, self, None).index_copy(-1, places, spread)

    def now(self) -> Subspace:
        return self

    def extra_repr(self) -> str:
        return f"{self.width}, {self.units}"


@dataclass(frozen=True)
class Flat:
    """A linear subspace: the coordinates of v are (v - center) dual, and a change of them moves v along `matrix`.

    `matrix` and `dual` have shape (width, size) and are the same where the vectors are orthonormal. With `weights`, of
    shape (size,), a coordinate is written as far as its weight says: at 1 whole, at 0 not at all. Without a matrix the
    coordinates are the numbers of the value.
    """

    space: Space
    matrix: Tensor | None
    dual: Tensor | None = None
    center: Tensor | None = None
    weights: Tensor | None = None

    def read(self, values: Tensor) -> Tensor:
        """The coordinates, in the wider type of the values and of the matrix."""
        matrix = self.matrix if self.dual is None else self.dual
        wide = self._wide(values)
        wide = wide if self.center is None else wide - self.center
        return wide if matrix is None else wide @ matrix.to(wide.dtype)

    def write(self, values: Tensor, coordinates: Tensor) -> Tensor:
        """The values moved along the vectors, so far as the coordinates moved; in the type of the values."""
        moved = coordinates - self.read(values)
        moved = moved if self.weights is None else moved * self.weights
        wide = self._wide(values)
        return (wide + (moved if self.matrix is None else moved @ self.matrix.T.to(wide.dtype))).to(values.dtype)

    def _wide(self, values: Tensor) -> Tensor:
        known = self.matrix if self.matrix is not None else self.weights
        if known is None:
            return checked(values, self.space, None)
        return checked(values, self.space, known.device).to(torch.promote_types(values.dtype, known.dtype))


class Basis(Space):
    """The span of some vectors: a direction, or several, of any lengths and angles.

    >>> steering = subspaces.Basis(direction)
    >>> fmr.run(model, input_ids, edits={site: edits.Add(2.0, within=steering)})  # two directions further

    vectors: of shape (width,) or (width, size), independent of one another. center: of shape (width,), where the
    coordinates are 0; without it they are 0 at the zero vector. A coordinate of 1 is the vector once, whatever its length.
    """

    vectors: Tensor
    dual: Tensor
    center: Tensor | None

    def __init__(self, vectors: Tensor, center: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(vectors, Tensor) or vectors.dim() not in (1, 2) or not vectors.is_floating_point():
            told = f"shape {tuple(vectors.shape)}, {vectors.dtype}" if isinstance(vectors, Tensor) else repr(vectors)
            raise EditError(f"Basis got {told}, expected vectors as a tensor of shape (width,) or (width, size).")
        columns = vectors.detach().reshape(len(vectors), -1)
        self.width, self.size = columns.shape
        if center is not None and center.shape != (self.width,):
            raise EditError(f"Basis got a center of shape {tuple(center.shape)}, expected ({self.width},), as its vectors.")
        gram = columns.double().T @ columns.double()
        lengths = gram.diagonal().sqrt()
        spread = torch.linalg.matrix_rank(gram / (lengths[:, None] * lengths).clamp_min(1e-300)) if self.size else 0
        if not bool(gram.isfinite().all()) or int(spread) < self.size:
            raise EditError(
                f"Basis got {self.size} vectors of {self.width} numbers that span {int(spread)} dimensions. Expected finite "
                f"vectors that are independent of one another."
            )
        self.register_buffer("vectors", columns.clone())
        self.register_buffer("dual", (columns.double() @ torch.linalg.inv(gram)).to(columns.dtype))
        self.register_buffer("center", None if center is None else center.detach().to(columns.dtype).clone())

    def now(self) -> Subspace:
        return Flat(self, self.vectors, self.dual, self.center)


def pca(values: Tensor, size: int) -> Basis:
    """The directions in which collected values vary most, about their mean.

    >>> space = subspaces.pca(run[site].flatten(0, 1), 2)

    values: of shape (examples, width). size: how many directions, at most as many as values vary in.
    """
    rows = _rows(values, "pca")
    size = counted(size, "pca", "size")
    center = rows.mean(0)
    _, scales, directions = torch.linalg.svd(rows - center, full_matrices=False)
    varied = int((scales > scales.max().clamp_min(1e-300) * 1e-6).sum()) if len(scales) else 0
    if size > varied:
        raise EditError(
            f"pca got size={size}, and {len(rows)} values of {rows.shape[1]} numbers vary in {varied} directions. Expected "
            f"at most these, or more values."
        )
    return Basis(directions[:size].T.to(values.dtype), center.to(values.dtype))


def mean_difference(values: Tensor, others: Tensor) -> Basis:
    """The one direction from the mean of others to the mean of values: 0 at the first of these, 1 at the second.

    >>> toward = subspaces.mean_difference(run[site][:, -1], other_run[site][:, -1])

    values, others: of shape (examples, width), not as many of both. (Marks and Tegmark 2023; Rimsky et al. 2024)
    """
    rows, rest = _rows(values, "mean_difference"), _rows(others, "mean_difference")
    if rows.shape[1] != rest.shape[1]:
        raise EditError(f"mean_difference got vectors of {rows.shape[1]} and of {rest.shape[1]} numbers, expected as many.")
    direction = rows.mean(0) - rest.mean(0)
    if not float(direction.norm()):
        raise EditError("mean_difference got values with the same mean, between which lies no direction.")
    return Basis(direction.to(values.dtype), rest.mean(0).to(values.dtype))


class Latents(Space):
    """The latents of an autoencoder; what it does not reconstruct is kept, so that an empty edit changes nothing.

    >>> encoder, decoder = torch.randn(128, 512), torch.randn(512, 128)
    >>> latents = subspaces.Latents(lambda v: (v @ encoder).relu(), lambda c: c @ decoder, width=128, size=512)
    >>> fmr.run(model, input_ids, edits={site: edits.Zero(within=latents[7])})

    encode: from (..., width) to (..., size); decode: back. A module with its parameters is also a part of this one where
    it is given as `module`. v goes to v + decode(c) - decode(encode(v)).
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        width: int,
        size: int,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.width, self.size = counted(width, "Latents", "width"), counted(size, "Latents", "size")
        self.encode, self.decode, self.module = encode, decode, module

    def read(self, values: Tensor) -> Tensor:
        found = self.encode(checked(values, self, None))
        if found.shape != (*values.shape[:-1], self.size):
            raise EditError(
                f"The encoder of Latents returned shape {tuple(found.shape)} for values of shape {tuple(values.shape)}, "
                f"expected {self.size} in the last dimension."
            )
        return found

    def write(self, values: Tensor, coordinates: Tensor) -> Tensor:
        moved = self.decode(coordinates) - self.decode(self.read(values))
        return (values + moved).to(values.dtype)

    def now(self) -> Subspace:
        return self


def counted(given: object, kind: str, name: str) -> int:
    """A whole number from 0 on, or one clear error."""
    number = whole_number(given)
    if number is None or number < 0:
        raise EditError(f"{kind} got {name}={given!r}, expected a whole number from 0 on.")
    return number


def _rows(values: Tensor, kind: str) -> Tensor:
    """Vectors as rows, in double."""
    if not isinstance(values, Tensor) or values.dim() != 2 or not len(values) or not values.is_floating_point():
        told = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise EditError(f"{kind} got {told}, expected values of shape (examples, width): run[site].flatten(0, -2).")
    if not bool(values.isfinite().all()):
        raise EditError(f"{kind} got values that are not finite.")
    return values.detach().double()
