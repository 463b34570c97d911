"""Changes of one number as a heat map: none in white, what is larger in red, what is smaller in blue."""

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
        size = 2.4 + 0.07 * max(map(len, rows)) + 0.3 * max(len(columns), 6), 1.8 + 0.2 * max(len(rows), 5)
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


def _label(put: Any, labels: list[str], turned: dict[str, Any]) -> None:
    """All labels of an axis, or every n-th where they are many."""
    step = -(-len(labels) // MOST)
    long = max(map(len, labels), default=0) > 2
    put(range(0, len(labels), step), labels[::step], fontsize=7, color=INK, **(turned if long else {}))
