"""Subspaces that are learned: rotations, masks of units, rotations with a learned boundary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmr.errors import EditError
from fmr.subspaces.fixed import Flat, counted
from fmr.subspaces.space import Space, Subspace


class Rotation(Space):
    """A subspace of learned directions, orthonormal throughout: distributed alignment search (Geiger et al. 2024).

    >>> rotation = subspaces.Rotation(128, 16)
    >>> run = fmr.run(model, input_ids, grad=True, edits={site: edits.Interchange(source_ids, within=rotation)})

    width: how many numbers a vector has. size: how many directions, all of them by default. seed: of those it begins with.
    v goes to v + (c - v R) R^T, with R of shape (width, size) and R^T R = 1.
    """

    def __init__(self, width: int, size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.width = counted(width, type(self).__name__, "width")
        self.size = self.width if size is None else counted(size, type(self).__name__, "size")
        if self.size > self.width:
            raise EditError(
                f"{type(self).__name__}({width}, {size}): a subspace of vectors of {width} numbers has at most as many "
                f"directions."
            )
        start = torch.randn(self.width, self.size, generator=torch.Generator().manual_seed(seed))
        self.columns = nn.Parameter(_orthonormal(start))

    @property
    def matrix(self) -> Tensor:
        """The directions as columns, of shape (width, size): the columns that are trained, made orthonormal in turn."""
        return _orthonormal(self.columns)

    def now(self) -> Subspace:
        return Flat(self, self.matrix)


class _Tempered(Space):
    """A subspace whose coordinates are written as far as weights say, the harder the lower its temperature is."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    @property
    def temperature(self) -> float:
        """How soft the weights are; at 0 each is 0 or 1, and nothing is learned any more."""
        return self._temperature

    @temperature.setter
    def temperature(self, given: float) -> None:
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < float("inf"):
            raise EditError(f"{type(self).__name__} got temperature={given!r}, expected a number from 0 on.")
        self._temperature = float(given)

    def _softened(self, margins: Tensor) -> Tensor:
        """The weight of each coordinate by how far it lies inside."""
        return torch.sigmoid(margins / self._temperature) if self._temperature else (margins > 0).to(margins.dtype)


class Mask(_Tempered):
    """Learned units: each is written by a sigmoid weight (Csordas et al. 2021; De Cao et al. 2022).

    >>> mask = subspaces.Mask(128)
    >>> run = fmr.run(model, input_ids, grad=True, edits={site: edits.Interchange(source_ids, within=mask)})

    width: how many numbers a vector has. temperature: anneal it towards 0, `mask.temperature = 0.1`; at 0 each weight is
    0 or 1 exactly. v goes to v + m (c - v), with m = sigmoid(logits / temperature); `mask.weights.sum()` is the price of
    units in a loss.
    """

    def __init__(self, width: int, temperature: float = 1.0) -> None:
        super().__init__(temperature)
        self.width = self.size = counted(width, "Mask", "width")
        self.logits = nn.Parameter(torch.zeros(self.width))

    def extra_repr(self) -> str:
        return f"{self.width}"

    @property
    def weights(self) -> Tensor:
        """How far each unit is written, of shape (width,)."""
        return self._softened(self.logits)

    def now(self) -> Subspace:
        return Flat(self, None, weights=self.weights)


class Boundless(_Tempered):
    """A rotation and how many of its directions are written, both learned: boundless DAS (Wu et al. 2023).

    >>> space = subspaces.Boundless(128)
    >>> run = fmr.run(model, input_ids, grad=True, edits={site: edits.Interchange(source_ids, within=space)})

    width: how many numbers a vector has. temperature: in directions; anneal it towards 0, where the first
    `space.directions` of them are written whole and no other is. share: of the directions at the start.
    Weight i of n is sigmoid((b n - i - 1/2) / temperature): at temperature 0 and b = 1 all are 1, at b = 0 all are 0.
    """

    def __init__(self, width: int, temperature: float = 1.0, share: float = 0.5, seed: int = 0) -> None:
        super().__init__(temperature)
        self.rotation = Rotation(width, None, seed)
        self.width = self.size = self.rotation.width
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise EditError(f"Boundless got share={share!r}, expected a number between 0 and 1.")
        self.boundary = nn.Parameter(torch.tensor(float(share)).logit())

    @property
    def matrix(self) -> Tensor:
        """The directions as columns, of shape (width, width)."""
        return self.rotation.matrix

    @property
    def weights(self) -> Tensor:
        """How far each direction is written, of shape (width,)."""
        places = torch.arange(self.width, dtype=self.boundary.dtype, device=self.boundary.device)
        return self._softened(self.boundary.sigmoid() * self.width - places - 0.5)

    def extra_repr(self) -> str:
        return f"{self.width}"

    @property
    def directions(self) -> int:
        """How many directions are written at temperature 0."""
        return int((self.weights > 0.5).sum())

    def now(self) -> Subspace:
        return Flat(self, self.matrix, weights=self.weights)


def _orthonormal(columns: Tensor) -> Tensor:
    """Columns as Gram and Schmidt make them orthonormal, smooth in what is given; a tenth of the time, at most, that
    `torch.nn.utils.parametrizations.orthogonal` takes."""
    wide = columns if columns.dtype == torch.float64 else columns.float()
    directions, lengths = torch.linalg.qr(wide)
    made: Tensor = directions * lengths.diagonal().sign()
    return made
