"""Accuracies of interchanges as pictures: a heat map over sites, or bars with the controls."""

from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.alignment.alignment import Alignment
    from analyzers.alignment.induced import Induced

FOUND, CONTROL = "#0072B2", "#BBBBBB"


def draw(result: "Alignment", ax: "Axes | None") -> "Figure":
    """The picture of a result."""
    import matplotlib.pyplot as plt

    one = len(result.iia) == 1
    if ax is None:
        shape = result.map.shape
        size = (5.2, 0.6 + 0.32 * (len(result.controls) + 2)) if one else (2.6 + 0.5 * shape[1], 1.4 + 0.3 * shape[0])
        _, ax = plt.subplots(figsize=size, layout="constrained")
    (_bars if one else _map)(result, ax)
    return cast("Figure", ax.figure)


def _bars(result: "Alignment", ax: "Axes") -> None:
    table = result.table()[::-1]
    ax.barh(range(len(table)), table.accuracy, color=[CONTROL if one else FOUND for one in table.control])
    ax.set_yticks(range(len(table)), table.what, fontsize=8)
    for place, value in enumerate(table.accuracy):
        ax.text(value + 0.01, place, f"{value:.2f}", va="center", fontsize=8)
    ax.set_xlim(0, 1.12)
    ax.set_xlabel("interchange accuracy", fontsize=8)
    ax.set_title(" and ".join(result.variables), fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _map(result: "Alignment", ax: "Axes") -> None:
    values = result.map
    image = ax.imshow(values, cmap="viridis", vmin=min(result.ignored, float(np.nanmin(values))), vmax=1, origin="lower",
                      aspect="auto")  # fmt: skip
    ax.set_yticks(range(values.shape[0]), list(dict.fromkeys(result.rows)), fontsize=7)
    ax.set_xticks(range(values.shape[1]), list(dict.fromkeys(result.columns)), fontsize=7)
    for (row, column), value in np.ndenumerate(values):
        if value == value and values.size <= 200:
            dark = value < (1 + image.norm.vmin) / 2  # type: ignore[operator]
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    bar.set_label("interchange accuracy", fontsize=8)
    ax.set_title(" and ".join(result.variables), fontsize=9)


def draw_losses(result: "Induced", ax: "Axes | None") -> "Figure":
    """The losses of a training by epoch."""
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(4.6, 2.8), layout="constrained")
    epochs = range(1, len(result.losses) + 1)
    for column, name, colour in ((0, "training", CONTROL), (1, "validation", FOUND)):
        ax.plot(epochs, result.losses[:, column], color=colour, label=name)
    ax.set_xlabel("epoch", fontsize=8)
    ax.set_ylabel("cross-entropy", fontsize=8)
    ax.set_title(" and ".join(result.variables), fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return cast("Figure", ax.figure)
