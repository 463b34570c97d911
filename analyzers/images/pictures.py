"""Made images as pictures: each with what it was made for, and how its score rose."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from fmr.pictures.heatmap import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.images.stylized import Stylized
    from analyzers.images.topcrops import TopCrops
    from analyzers.images.visualized import Visualized

COLUMNS, LONGEST = 6, 24
CURVES = 12
"""How many curves are drawn one by one."""


def shown(image: Tensor) -> dict[str, Any]:
    """An image as `imshow` takes it."""
    array = image.permute(1, 2, 0).clamp(0, 1).numpy()
    return {"X": array if array.shape[2] == 3 else array.mean(2), "cmap": "gray", "vmin": 0, "vmax": 1}


def show(ax: Axes, image: Tensor, title: str = "") -> None:
    """One image in its axes, with a line above it."""
    ax.imshow(**shown(image))
    ax.set_axis_off()
    ax.set_title(title, fontsize=7, color=INK)


def draw(result: Visualized) -> Figure:
    """All images, and the curves of their scores."""
    import matplotlib.pyplot as plt

    many = len(result.images)
    columns = min(many, COLUMNS)
    rows = math.ceil(many / columns)
    side = 2.6 if many == 1 else 1.6
    figure = plt.figure(figsize=(columns * side + 3.0, max(2.4, rows * (side + 0.25))), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=[columns * side, 3.0])
    inner = grid[0, 0].subgridspec(rows, columns)
    for n in range(many):
        title = f"{_short(result.objectives[n])}\n{result.score[n]:.3g}"
        show(figure.add_subplot(inner[n // columns, n % columns]), result.images[n], title)
    _curves(result, figure.add_subplot(grid[0, 1]))
    return figure


def _curves(result: Visualized, ax: Axes) -> None:
    steps = np.arange(len(result.curve))
    few = result.curve.shape[1] <= CURVES
    ax.plot(
        steps, result.curve if few else np.quantile(result.curve, [0.25, 0.5, 0.75], axis=1).T, linewidth=1, color="#0072B2"
    )
    ax.axhline(float(result.null.mean()), color=INK, linestyle=":", linewidth=1, label="same spectrum, random")
    ax.axhline(float(result.robust.mean()), color="#D55E00", linestyle="--", linewidth=1, label="unseen transformations")
    ax.set_xlabel("step", fontsize=8)
    ax.set_title("score" if few else "score: quartiles over images", fontsize=8, color=INK, loc="left")
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=6, frameon=False)


def mosaic(result: Visualized, ax: Axes) -> Figure:
    """All images side by side in one pair of axes."""
    images = result.images
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    _, colours, height, width = images.shape
    whole = images.new_ones(colours, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for n, image in enumerate(images):
        top, left = n // columns * (height + 1), n % columns * (width + 1)
        whole[:, top : top + height, left : left + width] = image
    title = f"{result.objectives[0]}: {result.score[0]:.3g}" if len(images) == 1 else f"{len(images)} images"
    show(ax, whole, title)
    return cast("Figure", ax.figure)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def draw_style(result: Stylized) -> Figure:
    """Content, style, what became of them, and how the loss fell."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), layout="constrained", width_ratios=[1, 1, 1, 1.1])
    show(axes[0], result.content_image, "content")
    show(axes[1], result.style_image, "style")
    content, style = result.content_loss.mean(), result.style_loss.mean()
    show(axes[2], result.image, f"content {content:.3g}, style {style:.3g}")
    axes[3].plot(result.curve, color="#0072B2", linewidth=1)
    axes[3].set(yscale="log")
    axes[3].set_xlabel("step", fontsize=8)
    axes[3].set_title("weighted loss", fontsize=8, color=INK, loc="left")
    axes[3].tick_params(labelsize=7, which="both")
    axes[3].spines[["top", "right"]].set_visible(False)
    return figure


def draw_crops(result: TopCrops) -> Figure:
    """A row of crops for each channel."""
    import matplotlib.pyplot as plt

    rows, ranks = result.values.shape
    figure, axes = plt.subplots(
        rows, ranks, figsize=(1.25 * ranks + 0.4, 1.45 * rows + 0.4), layout="constrained", squeeze=False
    )
    for row, channel in enumerate(result.channels):
        for rank in range(ranks):
            name = f"channel {channel}: " if rank == 0 else ""
            show(axes[row, rank], result.crops[f"{channel}/{rank}"], f"{name}{result.values[row, rank]:.3g}")
    figure.suptitle(f"{result.site}: the first {ranks} of {result.seen} images", fontsize=9, color=INK, x=0.01, ha="left")
    return figure
