"""What probes tell at each site: accuracy beside the control task, and their directions as subspaces to edit within."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from analyzers.numbers.embed import Floats
from analyzers.probes.fits import Fit
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of
from fmr.ids import Site
from fmr.subspaces import Basis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Probed(Stored):
    """How well probes tell labels at each site, on examples that they were not fitted to.

    >>> probed.names, probed.selectivity.shape
    (('layers[0].resid_post', ..., 'layers[3].resid_post'), (4,))
    >>> probed.subspace("layers[2].resid_post")
    Basis(128, 1)

    By site: accuracy, control (that of the same probe at random labels, one for each type), on_train and by_heart (both on
    what the probes were fitted to). majority: the accuracy of always saying the most frequent label. classes: the labels.
    train, test: how many labelled vectors; seen: how many came by. types: how many have a random label of their own.
    layers: the number of each, where all were read. fits: the probes' weights.
    """

    kind: str
    sites: tuple[str, ...] = field(repr=False)
    layers: tuple[int, ...]
    accuracy: Floats
    control: Floats
    on_train: Floats
    by_heart: Floats
    majority: float
    classes: tuple[int, ...]
    train: int
    test: int
    types: int
    seen: int
    by_token: bool
    whole_inputs: bool
    held_out: float
    ridge: float
    width: int
    epochs: int
    seed: int
    fits: dict[str, dict[str, Tensor]] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """What the sites are called."""
        return tuple(self.fits)

    @property
    def selectivity(self) -> Floats:
        """Accuracy less that of the control task."""
        return self.accuracy - self.control

    def predict(self, site: str | Site, values: Tensor) -> Tensor:
        """The class that the probe of a site tells of values (..., width).

        >>> probed.predict("layers[2].resid_post", run[structure.layers[2].resid_post]).shape
        torch.Size([1, 6])
        """
        fit = Fit.of(self.fits[self._named(site)])
        if not isinstance(values, Tensor) or not values.dim() or values.shape[-1] != len(fit.center):
            told = f"of shape {list(values.shape)}" if isinstance(values, Tensor) else f"are a {type(values).__name__}"
            raise AnalyzerError(
                f"Values {told}: the probe of {site!r} reads a tensor (..., {len(fit.center)}), as run[site] gives it."
            )
        return fit(values)

    def directions(self, site: str | Site) -> Tensor:
        """The weights of a linear probe, (classes, width): what each number of a value adds to the score of each class.

        >>> probed.directions("layers[2].resid_post").shape
        torch.Size([2, 128])
        """
        if self.kind != "linear":
            raise AnalyzerError(f"The probe is of kind {self.kind!r}, which has no directions. Expected kind='linear'.")
        weights: Tensor = self.fits[self._named(site)]["0.weight"]
        return weights

    def subspace(self, site: str | Site) -> Basis:
        """The span of a linear probe's directions, all that it reads: for edits `within=` it.

        >>> edits.Zero(within=probed.subspace("layers[2].resid_post"))
        Zero(within=Basis(128, 1))

        The basis is orthonormal, of one direction less than there are classes; with two classes the way up is that to the
        second. Coordinates are 0 at the mean of the values that it was fitted to, where the probe says the same of all.
        """
        weights = self.directions(site).double()
        apart = weights - weights.mean(0)
        _, sizes, rows = torch.linalg.svd(apart, full_matrices=False)
        basis = rows[: max(1, int((sizes > 1e-6 * sizes.max()).sum()))]
        signs = torch.where(basis @ apart[-1] < 0, -1.0, 1.0)
        return Basis((basis * signs[:, None]).T.float(), self.fits[self._named(site)]["center"])

    def _named(self, site: str | Site) -> str:
        if site in self.fits:
            return str(site)
        found = dict(zip(self.sites, self.names, strict=True)).get(repr(site))
        if found is None:
            raise AnalyzerError(f"{site!r} was not probed. Expected one of {', '.join(map(repr, self.names))}.")
        return found

    def table(self) -> DataFrame:
        """One row a site, in the order in which they were read.

        >>> probed.table()[["site", "accuracy", "control", "selectivity"]]
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "site": self.names,
                **({"layer": self.layers} if self.layers else {}),
                "accuracy": self.accuracy,
                "control": self.control,
                "selectivity": self.selectivity,
                "majority": self.majority,
                "on train": self.on_train,
                "control by heart": self.by_heart,
                "classes": len(self.classes),
                "train": self.train,
                "test": self.test,
            }
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw accuracy and control by site, and what always saying the most frequent label comes to; returns the figure.

        >>> probed.plot().savefig("probe.png")
        """
        from analyzers.probes.pictures import draw
        from fmr.pictures.heatmap import returned

        return returned(draw(self, ax)) if ax is None else draw(self, ax)

    def __repr__(self) -> str:
        best = int(self.accuracy.argmax())
        what = "token" if self.by_token else "example"
        hidden = f", {self.width} hidden units, {self.epochs} epochs" if self.kind == "mlp" else ""
        kept = self.train + self.test
        part = f" (of {self.seen} that came by)" if kept < self.seen else ""
        lines = [
            f"Probed: {number_of(len(self.names), 'site')}, {len(self.classes)} classes, {self.kind} probes{hidden}, ridge "
            f"{self.ridge:g}, seed {self.seed}",
            f"  fitted to {number_of(self.train, what)}, tested on {self.test}{part}; majority {self.majority:.3f}",
            f"  best at {self.names[best]}: accuracy {self.accuracy[best]:.3f}, control {self.control[best]:.3f}, "
            f"selectivity {self.selectivity[best]:.3f}",
        ]
        if self.whole_inputs:
            lines.append(
                f"  the control is of whole inputs, each on one side: {self.by_heart[best]:.3f} of it is learned by heart"
            )
        return "\n".join(lines)
