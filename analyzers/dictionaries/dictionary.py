"""A trained dictionary as a result: its autoencoder, what it reaches on held-out values, and what controls reach there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from analyzers.dictionaries.autoencoder import SparseAutoencoder
from analyzers.dictionaries.coding import Components, Moments
from analyzers.numbers.embed import Floats
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

RANDOM = "untrained"
NULL = "of Gaussian values"
COMPONENTS = "principal components"
"""What stands beside a dictionary."""


@dataclass(frozen=True, eq=False)
class Dictionary(Stored):
    """A dictionary that was trained, and how well it stands for values that it was not trained on.

    >>> dictionary.autoencoder
    SparseAutoencoder(128, 64, 'top-k', k=8)
    >>> dictionary.direction(7).shape
    torch.Size([128])

    site: what the values are called. settings: of the autoencoder, and training: how it was trained. weights: its
    parameters; null: those of one trained in the same way on Gaussian values with the same mean and covariance.
    curves: by step, the loss, the share of the variance explained, and how many latents are on at once.
    l0, explained: of held-out rows. controls: both, held out, of the untrained autoencoder, of the one that was trained on
    Gaussian values, and of as many principal components as latents are on. itself: what the latter explains of Gaussian
    values. density: how often each latent fires, of all rows; revived: how many latents began anew.
    train, test: how many rows. mean, covariance: of those trained on. place: the site that they are the values of, as it
    prints, empty where nothing told it.
    """

    site: str
    settings: dict[str, Any]
    training: dict[str, Any]
    weights: dict[str, Tensor] = field(repr=False)
    null: dict[str, Tensor] = field(repr=False)
    curves: dict[str, Floats] = field(repr=False)
    l0: float
    explained: float
    controls: dict[str, tuple[float, float]]
    itself: float
    density: Floats = field(repr=False)
    revived: int
    train: int
    test: int
    mean: Tensor = field(repr=False)
    covariance: Tensor = field(repr=False)
    place: str = ""

    @property
    def autoencoder(self) -> SparseAutoencoder:
        """The autoencoder; a new one each time, with the same numbers."""
        return SparseAutoencoder.of(self.settings, self.weights).requires_grad_(False)

    @property
    def dead(self) -> int:
        """How many latents fire on no row."""
        return int((self.density == 0).sum())

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the values that it was trained on."""
        return Moments(self.mean, self.covariance)

    def direction(self, latent: int) -> Tensor:
        """What a latent adds to a value for each 1 of its coefficient, (width,)."""
        return self.autoencoder.direction(latent)

    def rivals(self) -> dict[str, SparseAutoencoder | Components]:
        """What stands beside it: the autoencoder as it began, as it became on Gaussian values, and principal components."""
        start = SparseAutoencoder(**self.settings, seed=self.training["seed"])
        with torch.no_grad():
            start.bias.copy_(self.mean)
        made: dict[str, SparseAutoencoder | Components] = {RANDOM: start.requires_grad_(False)}
        if self.null:
            made[NULL] = SparseAutoencoder.of(self.settings, self.null).requires_grad_(False)
        return made | {COMPONENTS: Components(self.moments, min(len(self.mean), max(1, round(self.l0))))}

    def table(self) -> DataFrame:
        """One row for the dictionary and for each control: latents on at once, share of the variance explained.

        >>> dictionary.table()
        """
        import pandas as pd

        rows = {"dictionary": (self.l0, self.explained), **self.controls}
        return pd.DataFrame(rows.values(), pd.Index(rows.keys(), name="what"), columns=["l0", "explained"])

    def plot(self, ax: Axes | None = None) -> Figure:
        """Its curves by step, with the controls as lines; on two axes, how often latents fire beside them.

        >>> dictionary.plot()
        """
        from analyzers.dictionaries.pictures import draw

        return draw(self, ax)

    def __repr__(self) -> str:
        made = self.settings
        rest = f", k={made['k']}" if made["k"] is not None else ""
        own = {NULL: f" ({self.itself:.3f} of such)"}
        controls = "; ".join(
            f"{name} {share:.3f}{own.get(name, '')} with {l0:.1f}" for name, (l0, share) in self.controls.items()
        )
        alive = self.density[self.density > 0]
        often = f", the others on {np.median(alive):.2%} of rows (median)" if len(alive) else ""
        return (
            f"Dictionary of {made['size']} latents ({made['kind']}{rest}) of {made['width']} numbers"
            f"{f' at {self.site}' if self.site else ''}\n"
            f"  {number_of(self.test, 'row')} held out: {self.explained:.3f} of the variance, {self.l0:.1f} latents on\n"
            f"  controls: {controls}\n"
            f"  dead: {self.dead} of {made['size']}{often}; {self.revived} revived\n"
            f"  trained on {number_of(self.train, 'row')} for {number_of(self.training['steps'], 'step')}, "
            f"seed {self.training['seed']}"
        )
