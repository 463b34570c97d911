"""A figure as it was kept: a PNG, which shows itself in a notebook."""

import io
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmr.disk.files import write_whole

PNG = b"\x89PNG\r\n\x1a\n"
DPI = 120


@dataclass(frozen=True)
class Picture:
    """A kept figure. What was drawn is in its pixels; the axes are not.

    >>> drawn
    Picture(264 x 144)
    >>> drawn.pixels.shape
    (144, 264, 4)
    """

    png: bytes = field(repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """How wide and high it is, in pixels."""
        return int.from_bytes(self.png[16:20], "big"), int.from_bytes(self.png[20:24], "big")

    @property
    def pixels(self) -> NDArray[np.float32]:
        """(rows, columns, red green blue and alpha), 0 to 1."""
        from matplotlib.image import imread

        read: NDArray[np.float32] = imread(io.BytesIO(self.png), format="png")
        return read

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a PNG file."""
        write_whole(path, self.png)

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        wide, high = self.size
        return f"Picture({wide} x {high})"


def png_of(value: Any) -> bytes | None:
    """A figure of matplotlib or an image of Pillow as a PNG without its day or its program; None for anything else."""
    if isinstance(value, Picture):
        return value.png
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(value).__mro__}
    target = io.BytesIO()
    if "matplotlib.Figure" in kinds:
        value.savefig(target, format="png", dpi=DPI, bbox_inches="tight", metadata={"Software": None})
    elif "PIL.Image" in kinds:
        value.save(target, format="png")
    else:
        return None
    return target.getvalue()
