"""What was found of the natural images that channels answer to most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from analyzers.numbers.embed import Floats, Ints
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class TopCrops(Stored):
    """The images that each channel answers to most, cut to what it sees where it answers most.

    >>> topcrops.crops["3/0"].shape
    torch.Size([1, 3, 3])

    By channel and rank: values; numbers, of the images in the order in which they came; places in the layer; boxes (top,
    left, bottom, right) in the image; outside, by how much of it the value changes when all outside the box becomes noise.
    mean and spread of a channel: over all images that were seen, of its largest value, the null. crops: by "channel/rank",
    from 0 to 1. notes: what cannot be trusted, in words.
    """

    model: str
    site: str
    channels: tuple[int, ...]
    values: Floats
    numbers: Ints
    places: Ints
    boxes: Ints
    outside: Floats
    mean: Floats
    spread: Floats
    seen: int
    crops: dict[str, Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()

    def table(self) -> DataFrame:
        """One row an image of a channel.

        >>> topcrops.table()[["channel", "rank", "image", "value"]]
        """
        import pandas as pd

        rows, ranks = self.values.shape
        return pd.DataFrame(
            [
                {
                    "channel": self.channels[row],
                    "rank": rank,
                    "image": int(self.numbers[row, rank]),
                    "value": self.values[row, rank],
                    "mean": self.mean[row],
                    "spread": self.spread[row],
                    "place": tuple(self.places[row, rank].tolist()),
                    "box": tuple(self.boxes[row, rank].tolist()),
                    "outside": self.outside[row, rank],
                }
                for row in range(rows)
                for rank in range(ranks)
            ]
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw a row of crops for each channel; in given axes the best crop of the first one.

        >>> topcrops.plot().savefig("top.png")
        """
        from analyzers.images.pictures import draw_crops, show
        from fmr.pictures.heatmap import returned

        if ax is None:
            return returned(draw_crops(self))
        show(ax, self.crops[f"{self.channels[0]}/0"], f"{self.site} {self.channels[0]}: {self.values[0, 0]:.3g}")
        return ax.figure  # type: ignore[return-value]

    def __repr__(self) -> str:
        lines = [
            f"TopCrops: {number_of(len(self.channels), 'channel')} of {self.site!r} of {self.model}, the first "
            f"{self.values.shape[1]} of {number_of(self.seen, 'image')}"
        ]
        for row, channel in enumerate(self.channels[:_SHOWN]):
            lines.append(
                f"  channel {channel}: {self.values[row, 0]:.3g} in image {self.numbers[row, 0]}; all images "
                f"{self.mean[row]:.3g} +- {self.spread[row]:.3g}"
            )
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines + [f"  and {len(self.channels) - _SHOWN} more"] * (len(self.channels) > _SHOWN))


_SHOWN = 4
