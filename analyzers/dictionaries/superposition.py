"""Superposition measured: how directions that share a space interfere, and how much of a dimension each has for itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, Method, check_counts
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

REPRESENTED = 0.5
"""A feature whose direction is at least this long is represented, where a direction of its own would have length 1."""

TINY = 1e-300

OPPOSITE = -0.9
"""Two directions with a cosine below this are an antipodal pair."""


def units(rows: Tensor) -> Tensor:
    """Directions (features, width), in double, at length 1, however short they are; those of length 0 stay."""
    scaled = rows / rows.abs().amax(1, keepdim=True).clamp_min(TINY)
    return F.normalize(scaled, dim=1)


def dimensionality(directions: Tensor) -> Tensor:
    """How much of a dimension each direction has for itself, (features,), of directions (features, width).

    >>> dimensionality(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    tensor([1.0000, 0.5000, 0.5000])

    D_i = |w_i|^2 / sum_j (w_i . w_j / |w_i|)^2: 1 for a direction that is orthogonal to all others, 1/2 in an antipodal
    pair, 2/3 in a triangle, 2/5 in a pentagon; 0 for one of length 0. (Elhage et al. 2022)
    """
    rows = _checked(directions)
    rows = rows / rows.abs().max().clamp_min(TINY)  # whatever their scale
    found: Tensor = rows.square().sum(1) / (units(rows) @ rows.T).square().sum(1).clamp_min(TINY)
    return found.to(directions.dtype)


@dataclass(frozen=True, eq=False)
class Interference(Stored):
    """How directions interfere, beside random directions as many and as long.

    >>> interference = analyzers.Superposition().run(torch.randn(12, 6))
    >>> interference.cosines.shape, interference.dimensionality.shape
    ((12, 12), (12,))

    cosines: between any two directions; lengths: of each. dimensionality: how much of a dimension each has for itself.
    others: by direction, the sum of squares of what it reads of all others, (w_i . w_j / |w_i|)^2; random_others,
    random_dimensionality: the same of random directions of these lengths, (draws, features), and random_largest the largest
    cosine of each, as an absolute number.
    """

    width: int
    lengths: Floats = field(repr=False)
    cosines: Floats = field(repr=False)
    dimensionality: Floats = field(repr=False)
    others: Floats = field(repr=False)
    random_others: Floats = field(repr=False)
    random_dimensionality: Floats = field(repr=False)
    random_largest: Floats = field(repr=False)
    seed: int

    @property
    def represented(self) -> int:
        """How many features have a direction of some length."""
        return int((self.lengths >= REPRESENTED).sum())

    @property
    def largest(self) -> Floats:
        """By direction, the largest cosine with another one, as an absolute number."""
        apart = np.abs(self.cosines) * (1 - np.eye(len(self.cosines)))
        found: Floats = apart.max(1)
        return found

    @property
    def pairs(self) -> int:
        """How many antipodal pairs there are among the represented features."""
        on = self.lengths >= REPRESENTED
        return int((np.triu(self.cosines < OPPOSITE, 1) & on[:, None] & on[None]).sum())

    @property
    def p(self) -> float:
        """The share of draws of random directions, and of these, that interfere as little in sum."""
        less = (self.random_others.sum(1) <= self.others.sum() * (1 + 1e-9)).sum()
        return float((less + 1) / (len(self.random_others) + 1))

    def table(self) -> DataFrame:
        """One row a direction: its length, its dimensionality, its largest cosine, and those of random ones.

        >>> analyzers.Superposition().run(torch.randn(12, 6)).table()
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "length": self.lengths,
                "dimensionality": self.dimensionality,
                "random_dimensionality": self.random_dimensionality.mean(0),
                "interference": self.others,
                "random_interference": self.random_others.mean(0),
                "largest": self.largest,
                "random_largest": self.random_largest.mean(0),
            }
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """The cosines as a map; where no axes are given, dimensionalities beside those of random directions, too.

        >>> analyzers.Superposition().run(torch.randn(12, 6)).plot()
        """
        from analyzers.dictionaries.superposed import draw_interference

        return draw_interference(self, ax)

    def __repr__(self) -> str:
        on = self.lengths >= REPRESENTED
        own, random = self.dimensionality[on], self.random_dimensionality[:, on]
        told = f"median {np.median(own):.3f}, random {np.median(random):.3f}" if on.any() else "none represented"
        interference = f"{self.others.sum():.3g} in sum, random {self.random_others.sum(1).mean():.3g}, p {self.p:.3f}"
        return (
            f"Interference of {number_of(len(self.lengths), 'direction')} in {number_of(self.width, 'dimension')}: "
            f"{self.represented} represented, {number_of(self.pairs, 'antipodal pair')}\n"
            f"  dimensionality: sum {self.dimensionality.sum():.2f}, {told}\n"
            f"  interference: {interference}\n"
            f"  largest cosine: median {np.median(self.largest):.3f}, random {np.median(self.random_largest):.3f}; seed "
            f"{self.seed}"
        )


class Superposition(Method):
    """Measure how directions share a space: those of a dictionary, columns of weights, features of a toy model.

    >>> analyzers.Superposition().run(dictionary.autoencoder.decoder)
    Interference of 64 directions in 128 dimensions: 64 represented, ...

    draws: how many sets of random directions stand beside, of the same lengths. seed: of these.

    Source: N. Elhage et al., "Toy Models of Superposition", 2022.
    """

    def __init__(self, *, draws: int = 100, seed: int = 0) -> None:
        check_counts(1, draws=draws)
        check_counts(0, seed=seed)
        self.draws, self.seed = int(draws), int(seed)

    def run(self, directions: Tensor) -> Interference:
        """Measure directions (features, width).

        >>> analyzers.Superposition(draws=10).run(torch.eye(4)).dimensionality
        array([1., 1., 1., 1.])
        """
        rows = _checked(directions)
        lengths, draw = rows.norm(dim=1), torch.Generator().manual_seed(self.seed)
        random = [_measured(_random(lengths, rows.shape[1], draw)) for _ in range(self.draws)]
        found = _measured(rows)
        return Interference(
            width=rows.shape[1],
            lengths=lengths.numpy(),
            cosines=(units(rows) @ units(rows).T).numpy(),
            dimensionality=found[0].numpy(),
            others=found[1].numpy(),
            random_others=torch.stack([one[1] for one in random]).numpy(),
            random_dimensionality=torch.stack([one[0] for one in random]).numpy(),
            random_largest=torch.stack([one[2] for one in random]).numpy(),
            seed=self.seed,
        )


def _random(lengths: Tensor, width: int, draw: torch.Generator) -> Tensor:
    noise = torch.randn(len(lengths), width, generator=draw, dtype=torch.float64)
    return F.normalize(noise, dim=1) * lengths[:, None]


def _measured(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dimensionality, interference with all others and largest cosine of each direction."""
    ways = units(rows)
    read = (ways @ rows.T).square().fill_diagonal_(0)
    cosines = (ways @ ways.T).abs().fill_diagonal_(0)
    return dimensionality(rows), read.sum(1), cosines.max(1).values


def _checked(directions: Any) -> Tensor:
    """Directions as rows, in double."""
    if (
        not isinstance(directions, Tensor)
        or directions.dim() != 2
        or not directions.is_floating_point()
        or not len(directions)
    ):
        told = f"shape {tuple(directions.shape)}" if isinstance(directions, Tensor) else type(directions).__name__
        raise AnalyzerError(
            f"The directions are {told}: expected a tensor (features, width), as dictionary.autoencoder.decoder or the "
            "columns of a weight, weight.T."
        )
    if not bool(directions.isfinite().all()):
        raise AnalyzerError("The directions hold numbers that are not finite. Expected finite ones.")
    return directions.detach().double().cpu()
