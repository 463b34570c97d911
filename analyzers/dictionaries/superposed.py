"""Superposition as pictures: cosines, dimensionalities, and the phases of toy models."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from analyzers.dictionaries.superposition import REPRESENTED, dimensionality
from fmr.pictures.heatmap import INK, PALE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.dictionaries.superposition import Interference

FOUND, PAIRED = "#0072B2", "#D55E00"


def draw_interference(result: Interference, ax: Axes | None) -> Figure:
    """Cosines as a map, and dimensionalities in order beside those of random directions."""
    import matplotlib.pyplot as plt

    beside = None
    if ax is None:
        ax, beside = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")[1]
    image = ax.imshow(result.cosines, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest")
    ax.set(xlabel="feature", ylabel="feature")
    ax.figure.colorbar(image, ax=ax, shrink=0.8, label="cosine")
    if beside is not None:
        beside.plot(np.sort(result.random_dimensionality, 1)[:, ::-1].T, color=PALE, linewidth=0.5)
        beside.plot(np.sort(result.dimensionality)[::-1], "o", markersize=3, color=FOUND, label="these")
        beside.plot([], [], color=PALE, label="random directions")
        beside.set(xlabel="feature, in order", ylabel="dimensionality", ylim=(-0.03, 1.05))
        beside.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def draw_features(directions: Tensor, ax: Axes) -> None:
    """Directions in two dimensions as arrows, (features, 2); those that are hardly represented stay short."""
    for n, (x, y) in enumerate(directions.detach().tolist()):
        ax.plot([0, x], [0, y], color=FOUND, linewidth=1.2)
        ax.plot(x, y, "o", color=FOUND, markersize=3)
        if np.hypot(x, y) >= REPRESENTED:
            ax.annotate(str(n), (x * 1.22, y * 1.22), fontsize=7, color=INK, ha="center", va="center")
    ax.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    ax.set_xticks([])
    ax.set_yticks([])


def draw_dimensionalities(models: Tensor, dense: Sequence[float], ax: Axes) -> None:
    """The dimensionality of each represented feature of models (models, features, width), by one over how often they are."""
    marks = {"1": 1.0, "2/3": 2 / 3, "1/2": 1 / 2, "2/5": 2 / 5}
    for name, height in marks.items():
        ax.axhline(height, color=PALE, linewidth=0.8)
        ax.annotate(name, (1.0, height), xycoords=("axes fraction", "data"), fontsize=7, color=INK, va="center")
    for weights, often in zip(models.detach(), dense, strict=True):
        lengths = weights.norm(dim=1)
        found = dimensionality(weights)[lengths >= REPRESENTED]
        spread = torch.linspace(0.94, 1.06, len(found)) if len(found) else found
        ax.plot((spread / often).tolist(), found.sort().values.tolist(), ".", color=FOUND, markersize=3)
    ax.set(xscale="log", ylim=(0, 1.08), xlabel="1 / share of examples that have a feature", ylabel="dimensionality")


def draw_phases(models: Tensor, rows: Sequence[float], columns: Sequence[float], ax: Axes) -> None:
    """What became of the second of two features in one dimension: models (rows, columns, 2, 1), importance by sparsity.

    White where it is not represented, blue where it has the dimension for itself, red where it shares it with the first.
    """
    first, second = models.detach()[..., 0, 0].abs(), models.detach()[..., 1, 0].abs()
    both = (first >= REPRESENTED) & (second >= REPRESENTED)
    colours = torch.where(both[..., None], torch.tensor([0.84, 0.37, 0.0]), torch.tensor([0.0, 0.45, 0.70]))
    picture = (1 - second.clamp(0, 1)[..., None] * (1 - colours)).numpy()
    edges = [columns[0], columns[-1], rows[0], rows[-1]]
    ax.imshow(picture, origin="lower", aspect="auto", interpolation="nearest", extent=(0, 1, 0, 1))
    ax.set_xticks([0, 0.5, 1], [f"{(edges[0] ** (1 - t)) * edges[1] ** t:.2g}" for t in (0, 0.5, 1)])
    ax.set_yticks([0, 0.5, 1], [f"{(edges[2] ** (1 - t)) * edges[3] ** t:.2g}" for t in (0, 0.5, 1)])
    ax.set(xlabel="share of examples that have a feature", ylabel="importance of the second feature")
