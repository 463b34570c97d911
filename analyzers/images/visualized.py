"""What feature visualisation leaves: images, how their scores rose, and what these are to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from analyzers.numbers.embed import Floats
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Visualized(Stored):
    """Images that were made for objectives, with their scores.

    >>> visualized.images.shape, visualized.curve.shape
    (torch.Size([2, 1, 8, 8]), (10, 2))

    objectives: what each image was made for. images: (images, colours, height, width) from 0 to 1. curve: scores before each
    step, as transformed in it, (steps, images). By image: start and score, of the image as it was and is; robust, the mean
    under unseen transformations; null, the mean of random images of the same spectrum.
    """

    model: str
    objectives: tuple[str, ...]
    images: Tensor = field(repr=False)
    curve: Floats
    start: Floats
    score: Floats
    robust: Floats
    null: Floats
    settings: dict[str, Any]
    seed: int

    def table(self) -> DataFrame:
        """One row an image.

        >>> visualized.table()[["objective", "score", "robust", "null"]]
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "objective": self.objectives,
                "start": self.start,
                "score": self.score,
                "robust": self.robust,
                "null": self.null,
                **{name: str(value) for name, value in self.settings.items()},
                "seed": self.seed,
            }
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the images with their scores, and beside them how these rose; in given axes the images alone.

        >>> visualized.plot().savefig("features.png")
        """
        from analyzers.images.pictures import draw, mosaic
        from fmr.pictures.heatmap import returned

        return returned(draw(self)) if ax is None else mosaic(self, ax)

    def __repr__(self) -> str:
        steps, size = len(self.curve), " x ".join(map(str, self.images.shape[-2:]))
        lines = [
            f"Visualized: {number_of(len(self.images), 'image')} of {size} for {self.model}, "
            f"{self.settings['parameterization']}, {number_of(steps, 'step')}, seed {self.seed}"
        ]
        for n, name in enumerate(self.objectives[:_SHOWN]):
            lines.append(
                f"  {name}: {self.start[n]:.3g} -> {self.score[n]:.3g}; under unseen transformations {self.robust[n]:.3g}; "
                f"random images of the same spectrum {self.null[n]:.3g}"
            )
        return "\n".join(lines + [f"  and {len(self.objectives) - _SHOWN} more"] * (len(self.objectives) > _SHOWN))


_SHOWN = 4


def joined(parts: Sequence[Visualized]) -> Visualized:
    """Results of the same settings as one."""
    return replace(
        parts[0],
        objectives=tuple(name for part in parts for name in part.objectives),
        images=torch.cat([part.images for part in parts]),
        curve=np.concatenate([part.curve for part in parts], 1),
        start=np.concatenate([part.start for part in parts]),
        score=np.concatenate([part.score for part in parts]),
        robust=np.concatenate([part.robust for part in parts]),
        null=np.concatenate([part.null for part in parts]),
    )
