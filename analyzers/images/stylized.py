"""What style transfer leaves: the image, and how far it is from the content of one and the style of the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from analyzers.numbers.embed import Floats
from analyzers.results import Stored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Stylized(Stored):
    """An image with the content of one and the style of another.

    >>> stylized.image.shape, stylized.style_loss.shape
    (torch.Size([1, 8, 8]), (2,))

    image, content_image, style_image: (colours, height, width) from 0 to 1. By site: what content and style differ by, at
    the start, at the end (loss) and of a null: the style image for content, a random image with its spectrum for style.
    curve: the weighted loss before each step.
    """

    model: str
    image: Tensor = field(repr=False)
    content_image: Tensor = field(repr=False)
    style_image: Tensor = field(repr=False)
    content_sites: tuple[str, ...]
    style_sites: tuple[str, ...]
    content_start: Floats
    content_loss: Floats
    content_null: Floats
    style_start: Floats
    style_loss: Floats
    style_null: Floats
    curve: Floats
    settings: dict[str, Any]
    seed: int

    @property
    def falls(self) -> float:
        """How many times smaller the loss of style is than at the start."""
        return float(self.style_start.sum() / max(float(self.style_loss.sum()), 1e-300))

    def table(self) -> DataFrame:
        """One row a site.

        >>> stylized.table()[["what", "site", "start", "loss", "null"]]
        """
        import pandas as pd

        what = ["content"] * len(self.content_sites) + ["style"] * len(self.style_sites)
        three = {
            name: [*getattr(self, f"content_{name}"), *getattr(self, f"style_{name}")] for name in ("start", "loss", "null")
        }
        return pd.DataFrame({"what": what, "site": [*self.content_sites, *self.style_sites], **three})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw content, style and what became of them, with the loss; in given axes the image alone.

        >>> stylized.plot().savefig("style.png")
        """
        from analyzers.images.pictures import draw_style, show
        from fmr.pictures.heatmap import returned

        if ax is None:
            return returned(draw_style(self))
        show(ax, self.image)
        return ax.figure  # type: ignore[return-value]

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.image.shape[-2:]))
        return "\n".join(
            [
                f"Stylized: an image of {size} by {self.model}, {len(self.curve)} steps, seed {self.seed}",
                f"  style {self.style_start.mean():.3g} -> {self.style_loss.mean():.3g}, {self.falls:.3g} times less; "
                f"random image of its spectrum {self.style_null.mean():.3g}",
                f"  content {self.content_start.mean():.3g} -> {self.content_loss.mean():.3g}; the style image "
                f"{self.content_null.mean():.3g}",
            ]
        )
