"""Changes of one number as a heat map: none in white, what is larger in red, what is smaller in blue."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from fmr.pictures.heatmap import INK, UNKNOWN, pyplot, readable, returned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "RdBu_r"
MOST = 32  # labels of an axis


def draw(
    changes: Tensor, rows: Sequence[str], columns: Sequence[str], across: str, title: str, ax: "Axes | None"
) -> "Figure":
    """A map with a label for each row and column, the first row below. changes: (rows, columns), NaN where there is none."""
    plt = pyplot()
    values = changes.float().cpu().numpy()
    here = ax
    if here is None:
        wide = 0.07 * max(map(len, rows)) + 0.3 * max(len(columns), 6)
        wide = max(wide, 0.055 * max(map(len, title.split("\n"))))
        size = 2.4 + wide, 1.8 + 0.2 * max(len(rows), 5)
        _, here = plt.subplots(figsize=tuple(min(side, 16.0) for side in size), layout="constrained")
    known = changes[~changes.isnan()].abs()
    limit = float(known.max()) if known.numel() else 0.0
    colours = plt.colormaps[COLOURS].with_extremes(bad=UNKNOWN)
    image = here.imshow(values, cmap=colours, vmin=-limit or -1, vmax=limit or 1, origin="lower", aspect="auto")
    _label(here.set_yticks, list(rows), {})
    _label(here.set_xticks, [readable(column) for column in columns], {"rotation": 60, "ha": "right"})
    here.set_xlabel(across, fontsize=8, color=INK)
    here.set_title(title, fontsize=9, color=INK)
    here.figure.colorbar(image, ax=here, fraction=0.05, pad=0.02).set_label("change of the metric", fontsize=8, color=INK)
    figure = cast("Figure", here.figure)
    return returned(figure) if ax is None else figure


def numbered(names: Sequence[str]) -> tuple[list[int], str] | None:
    """The numbers in which names differ, where they differ in one alone, and what they have in common.

    >>> numbered(["h.0.attn/matmul#1", "h.12.attn/matmul#1"])
    ([0, 12], 'h.*.attn/matmul#1')
    """
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({tuple(part[::2]) for part in parts}) != 1:
        return None
    differing = [place for place in range(1, len(parts[0]), 2) if len({part[place] for part in parts}) > 1]
    if len(differing) != 1:
        return None
    (place,) = differing
    return [int(part[place]) for part in parts], "".join([*parts[0][:place], "*", *parts[0][place + 1 :]])


def _label(put: Any, labels: list[str], turned: dict[str, Any]) -> None:
    """All labels of an axis, or every n-th where they are many."""
    step = -(-len(labels) // MOST)
    long = max(map(len, labels), default=0) > 2
    put(range(0, len(labels), step), labels[::step], fontsize=7, color=INK, **(turned if long else {}))
