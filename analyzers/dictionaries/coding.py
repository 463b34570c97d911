"""How well directions stand for values: how many at once, how much they explain, which never fire; and controls."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from analyzers.dictionaries.autoencoder import SparseAutoencoder


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (width,) and covariance (width, width) of values, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, blocks: Iterable[Tensor]) -> Moments:
        """Those of blocks of rows; sums are taken about the first row."""
        count, start, first, second = 0, torch.empty(0), torch.empty(0), torch.empty(0)
        for block in blocks:
            if not count:
                start = block[0].double()
                first, second = torch.zeros_like(start), torch.zeros(len(start), len(start)).to(start)
            rows = block.double() - start
            count, first, second = count + len(rows), first + rows.sum(0), second + rows.T @ rows
        mean = first / count
        return cls(start + mean, second / count - torch.outer(mean, mean))

    @property
    def variance(self) -> float:
        """The mean squared distance from the mean."""
        return float(self.covariance.trace())

    def drawn(self, many: int, seed: int) -> Tensor:
        """Gaussian rows with this mean and this covariance, (many, width): no direction is sparse in them."""
        sizes, directions = torch.linalg.eigh(self.covariance)
        noise = torch.randn(many, len(sizes), generator=torch.Generator().manual_seed(seed))
        spread = (directions * sizes.clamp_min(0).sqrt()).T.float().cpu()
        found: Tensor = noise @ spread + self.mean.float().cpu()
        return found


class Components(nn.Module):
    """The first directions in which values vary most, as a dictionary of which all latents are always on."""

    def __init__(self, moments: Moments, many: int) -> None:
        super().__init__()
        directions = torch.linalg.eigh(moments.covariance)[1]
        self.size = many
        self.directions: Tensor
        self.mean: Tensor
        self.register_buffer("directions", directions[:, len(directions) - many :].float())
        self.register_buffer("mean", moments.mean.float())

    def encode(self, values: Tensor) -> Tensor:
        """The coordinates of values (..., width) along the components, of either sign."""
        return (values.to(self.mean.dtype) - self.mean) @ self.directions

    def decode(self, coordinates: Tensor) -> Tensor:
        """The values with these coordinates, and no others."""
        return coordinates @ self.directions.T + self.mean

    def forward(self, values: Tensor) -> Tensor:
        """Values as so many components reconstruct them."""
        return self.decode(self.encode(values)).to(values.dtype)


@dataclass(eq=False)
class Tally:
    """Sums over rows: how far what is made of them lies from them, how far they lie from their mean, which latents fire."""

    about: Tensor
    fired: Tensor
    total: Tensor
    count: int = 0
    left: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, about: Tensor, size: int) -> Tally:
        """One in which nothing was counted; about: a vector near the rows."""
        start = about.detach().double().cpu()
        return cls(start, torch.zeros(size, dtype=torch.float64), torch.zeros_like(start))

    def add(self, rows: Tensor, made: Tensor, latents: Tensor | None = None) -> None:
        """Count rows (rows, width), what was made of them, and the latents (rows, size) by which it was."""
        apart = rows.double().cpu() - self.about
        self.left += float((rows.double() - made.double()).square().sum())
        self.count, self.squares = self.count + len(rows), self.squares + float(apart.square().sum())
        self.total = self.total + apart.sum(0)
        if latents is not None:
            self.fired += (latents > 0).sum(0).cpu()

    def merge(self, other: Tally) -> None:
        """Add what another one counted about the same vector."""
        self.count, self.left, self.squares = self.count + other.count, self.left + other.left, self.squares + other.squares
        self.total, self.fired = self.total + other.total, self.fired + other.fired

    @property
    def explained(self) -> float:
        """The share of the variance of the rows that was made of them; NaN where they do not differ, but for rounding."""
        varied = self.squares - float(self.total.square().sum()) / self.count
        return 1 - self.left / varied if varied > 1e-12 * self.squares else math.nan

    @property
    def density(self) -> Tensor:
        """The share of rows on which each latent fires."""
        return self.fired / self.count

    @property
    def l0(self) -> float:
        """How many latents fire on a row."""
        return float(self.fired.sum()) / self.count


def tallied(dictionary: SparseAutoencoder | Components, about: Tensor, blocks: Iterable[Tensor]) -> Tally:
    """What a dictionary makes of blocks of rows."""
    found = Tally.of(about, dictionary.size)
    with torch.no_grad():
        for rows in blocks:
            latents = dictionary.encode(rows)
            found.add(rows, dictionary.decode(latents), latents)
    return found
