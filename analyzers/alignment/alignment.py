"""How well a network follows a causal model where values at a site are interchanged: numbers, with their controls."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

import fmr
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.disk.files import named
from fmr.errors import number_of

if TYPE_CHECKING:
    from typing import Self

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

NUMBERS, TRAINED = "alignment.safetensors", "intervention"


@dataclass(frozen=True, eq=False)
class Alignment(Stored):
    """How often a network says what the causal model says when variables are interchanged: at each site, and by chance.

    >>> alignment.iia, alignment.controls["random subspace"] < 0.8
    (array([1.]), True)
    >>> alignment.intervention.save("wx")

    iia: interchange-intervention accuracy on the held-out examples, by site; changed: on those alone whose label the
    interchange changes. validation: by site on the part of the training data by which the best site is chosen. controls:
    at the best site the accuracy of what should not work, and controls_changed that on the changed examples; ignored: that
    of the network without any interchange. task: how often that gives the label of the base. losses: of training at the
    best site, (epochs, 2) with that on the validation part. sizes: how many coordinates of each variable are written
    there. intervention: what was found there, with the variables for the names of its sources.
    """

    variables: tuple[str, ...]
    rows: tuple[str, ...] = field(repr=False)
    columns: tuple[str, ...] = field(repr=False)
    sites: tuple[str, ...]
    iia: Floats
    changed: Floats
    validation: Floats
    best: int
    controls: dict[str, float]
    controls_changed: dict[str, float]
    ignored: float
    ignored_changed: float
    task: float
    losses: Floats
    sizes: dict[str, int]
    examples: dict[str, int]
    settings: dict[str, Any]
    seed: int
    intervention: fmr.Intervention = field(repr=False)

    @property
    def map(self) -> Floats:
        """The accuracy as rows and columns of sites, layers by positions in a sweep; NaN where there is no site."""
        rows, columns = (list(dict.fromkeys(names)) for names in (self.rows, self.columns))
        found = np.full((len(rows), len(columns)), np.nan)
        for row, column, value in zip(self.rows, self.columns, self.iia, strict=True):
            found[rows.index(row), columns.index(column)] = value
        return found

    def table(self) -> DataFrame:
        """One row a site and one a control: the accuracy on all held-out examples, and on those whose label changes.

        >>> alignment.table().set_index("what").accuracy["random subspace"]
        """
        import pandas as pd

        names = [" ".join(filter(None, pair)) for pair in zip(self.rows, self.columns, strict=True)]
        return pd.DataFrame(
            {
                "what": [*names, *self.controls, "no interchange"],
                "control": [False] * len(names) + [True] * (len(self.controls) + 1),
                "accuracy": [*self.iia, *self.controls.values(), self.ignored],
                "changed": [*self.changed, *self.controls_changed.values(), self.ignored_changed],
                "site": [*self.sites, *[self.sites[self.best]] * (len(self.controls) + 1)],
            }
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the accuracy of several sites as a heat map, that of one as a bar beside its controls.

        >>> alignment.plot().savefig("alignment.png")
        """
        from analyzers.alignment.maps import draw
        from fmr.pictures.heatmap import returned

        return returned(draw(self, ax)) if ax is None else draw(self, ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the numbers and the intervention to a folder: JSON and safetensors alone.

        >>> alignment.save("wx")
        """
        folder = named(path)
        self.intervention.save(folder / TRAINED)
        held = {one.name: getattr(self, one.name) for one in fields(self)} | {"intervention": None}
        plain: Any = object.__new__(type(self))
        for name, value in held.items():
            object.__setattr__(plain, name, value)
        Stored.save(plain, folder / NUMBERS)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what was saved.

        >>> alignment.save("wx")
        >>> bool((analyzers.Alignment.load("wx").iia == alignment.iia).all())
        True
        """
        folder = named(path)
        if not folder.is_dir():
            raise AnalyzerError(f"{folder} is no folder. Expected what alignment.save(path) wrote.")
        found = super().load(folder / NUMBERS)
        object.__setattr__(found, "intervention", fmr.Intervention.load(folder / TRAINED))
        return found

    def __repr__(self) -> str:
        where = f"at {self.sites[self.best]}" + f", the best of {len(self.sites)} sites" * (len(self.sites) > 1)
        known = self.examples.get("trained on", 0)
        told = f" ({known} of them trained on)" if known else ""
        lines = [
            f"Alignment of {' and '.join(self.variables)}: interchange accuracy {self.iia[self.best]:.3f} {where}",
            f"  {self.changed[self.best]:.3f} where the label changes; {self.ignored:.3f} without the interchange; "
            f"{number_of(self.examples['test'], 'held-out example')}{told}, task accuracy {self.task:.3f}",
        ]
        if self.controls:
            lines.append("  " + ", ".join(f"{name} {value:.3f}" for name, value in self.controls.items()))
        size = ", ".join(f"{name} in {number_of(many, 'coordinate')}" for name, many in self.sizes.items())
        if len(self.losses):
            lines.append(
                f"  {size}; {len(self.losses)} of {number_of(self.settings['epochs'], 'epoch')} over "
                f"{self.examples['train']} examples, batch {self.settings['batch']}, lr {self.settings['lr']:g} falling "
                f"to 0, seed {self.seed}"
            )
        else:
            lines.append(f"  {size}, nothing trained; seed {self.seed}")
        return "\n".join(lines)
