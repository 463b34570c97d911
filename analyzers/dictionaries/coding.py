"""How well directions stand for values: how many at once, how much they explain, which never fire; and what stands beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        return noise @ (directions * sizes.clamp_min(0).sqrt()).T.float().cpu() + self.mean.float().cpu()


class Components(nn.Module):
    """The first directions in which values vary most, as a dictionary of which all latents are always on."""

    def __init__(self, moments: Moments, many: int) -> None:
        super().__init__()
        sizes, directions = torch.linalg.eigh(moments.covariance)
        self.directions, self.mean = directions[:, len(sizes) - many :].float(), moments.mean.float()

    def forward(self, values: Tensor) -> Tensor:
        """Values as so many components reconstruct them."""
        directions, mean = (one.to(values.device) for one in (self.directions, self.mean))
        return ((values.float() - mean) @ directions @ directions.T + mean).to(values.dtype)


@dataclass(frozen=True, eq=False)
class Coding:
    """What a dictionary makes of values: latents on at once, share of the variance explained, how often each latent fires."""

    l0: float
    explained: float
    density: Tensor

    @classmethod
    def of(cls, autoencoder: SparseAutoencoder, blocks: Iterable[Tensor]) -> Coding:
        """That of blocks of rows (rows, width)."""
        fired = torch.zeros(autoencoder.size, dtype=torch.float64)

        def made(rows: Tensor) -> Tensor:
            latents = autoencoder.encode(rows)
            fired.add_((latents > 0).sum(0).cpu())
            return autoencoder.decode(latents)

        count, share = explained(made, blocks)
        return cls(float(fired.sum()) / count, share, fired / count)


def explained(made: Callable[[Tensor], Tensor], blocks: Iterable[Tensor]) -> tuple[int, float]:
    """How many rows there are, and the share of their variance that what is made of them explains."""
    count, left, squares, start = 0, 0.0, 0.0, torch.empty(0)
    total = torch.empty(0)
    with torch.no_grad():
        for rows in blocks:
            if not count:
                start, total = rows[0].double(), torch.zeros_like(rows[0]).double()
            apart = rows.double() - start
            left += float((rows.double() - made(rows).double()).square().sum())
            count, squares, total = count + len(rows), squares + float(apart.square().sum()), total + apart.sum(0)
    return count, 1 - left / max(squares - float(total.square().sum()) / count, 1e-300)
