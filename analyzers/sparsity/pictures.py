"""Sparsity, pruning, calibration and relations as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from fmr.pictures.heatmap import INK, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.sparsity.curves import PruningCurves
    from analyzers.sparsity.known import Knowledge
    from analyzers.sparsity.related import Relations
    from analyzers.sparsity.sparsity import Sparsity

FIRST, SECOND, NULL = "#0072B2", "#009E73", "#D55E00"
"""Colours that no kind of colour vision confuses; marks tell them apart in grey."""


def _axes(ax: Axes | None, width: float = 4.4) -> Axes:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, 3.1), layout="constrained")[1] if ax is None else ax


def draw_sparsity(found: Sparsity, ax: Axes | None) -> Figure:
    """Shares by layer."""
    from matplotlib.ticker import MaxNLocator

    ax, sizes = _axes(ax), np.array(found.sizes)
    rows = [
        ("matter", found.active, found.active_null, FIRST, "o"),
        ("effective", found.effective / sizes, found.effective_null / sizes, SECOND, "s"),
    ]
    for name, share, null, colour, mark in rows:
        ax.plot(found.layers, share, f"{mark}-", color=colour, markersize=4, label=f"{name}")
        ax.plot(found.layers, null, f"{mark}--", color=colour, markersize=3, fillstyle="none", label=f"{name}, dense ones")
    ax.plot(found.layers, 1 - found.zero, ":", color=INK, linewidth=1, label="not zero")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="layer", ylabel="share of coefficients", ylim=(-0.03, 1.03))
    ax.set_title(f"eps {found.eps:g}, {found.seen} tokens", fontsize=9)
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def draw_curves(found: PruningCurves, ax: Axes | None) -> Figure:
    """Loss by what is kept."""
    ax = _axes(ax)
    style = {"magnitude": ("o-", FIRST), "effect": ("s-", SECOND), "random": ("^--", NULL)}
    order = np.argsort(found.keep)
    for name, row in zip(found.orders, found.loss, strict=True):
        line, colour = style[name]
        ax.plot(100 * found.keep[order], row[order], line, color=colour, markersize=4, label=name)
    ax.axhline(found.base, color=INK, linestyle=":", linewidth=1, label="whole model")
    ax.set(xlabel=f"{found.what} that are kept, %", ylabel="loss")
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def draw_knowledge(found: Knowledge, ax: Axes | None) -> Figure:
    """How often answers are right by how sure the model is of them."""
    ax = _axes(ax, 3.4)
    for told, colour, mark, name in ((found.bins(), FIRST, "o-", "facts"), (found.bins(null=True), NULL, "s--", "null")):
        some = told[told[:, 2] > 0]
        ax.plot(some[:, 0], some[:, 1], mark, color=colour, markersize=4, label=name)
    ax.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
    ax.set(xlabel="how sure", ylabel="how often right", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    ax.set_title(f"calibration error {found.ece:.3f}, Brier {found.brier:.3f}", fontsize=9)
    ax.legend(fontsize=7, frameon=False, loc="upper left")
    return cast("Figure", ax.figure)


def draw_relations(found: Relations, part: str, ax: Axes | None) -> Figure:
    """The scores of one part, subjects down and objects across."""
    ax = _axes(ax, 5.0)
    scores = found.scores[found.parts.index(part)]
    limit = float(np.abs(scores).max()) or 1.0
    image = ax.imshow(scores, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for axis, names in ((ax.yaxis, found.subjects), (ax.xaxis, found.objects)):
        step = max(1, len(names) // 24)
        axis.set_ticks(range(0, len(names), step), [readable(name) for name in names[::step]], fontsize=6)
    ax.tick_params(axis="x", rotation=60)
    ax.set_title(f"{part}, read from the {found.source}", fontsize=9)
    ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02).set_label("cosine", fontsize=8)
    return cast("Figure", ax.figure)
