"""Curves as pictures: the target as cells go and come, and correlations as weights are made random."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from analyzers.protocol import AnalyzerError
from fmr.pictures.heatmap import INK, PALE, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.inputs.curves import Curves
    from analyzers.inputs.sanity import Sanity

OWN, OTHER = "#D55E00", "#0072B2"


def check_axes(ax: Axes | None) -> None:
    """Raise for what is nothing to draw on."""
    if ax is not None and not hasattr(ax, "figure"):
        raise AnalyzerError(f"ax is a {type(ax).__name__}: expected axes of matplotlib, or None for a figure of its own.")


def _opened(ax: Axes | None, wide: float) -> tuple[Figure, Axes]:
    import matplotlib.pyplot as plt

    check_axes(ax)
    if ax is not None:
        return cast("Figure", ax.figure), ax
    figure, made = plt.subplots(figsize=(wide, 2.9), layout="constrained")
    return figure, made


def _plain(ax: Axes) -> None:
    ax.tick_params(labelsize=7, length=2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.axhline(0, color=PALE, linewidth=0.6)


def draw_curves(result: Curves, ax: Axes | None, example: int) -> Figure:
    """Both curves of an example, with the range of random orders behind them."""
    figure, here = _opened(ax, 4.4)
    kinds = (
        ("deletion", result.deletion, result.random_deletion, OTHER),
        ("insertion", result.insertion, result.random_insertion, OWN),
    )
    for name, own, random, colour in kinds:
        low, high = random[example].min(0), random[example].max(0)
        here.fill_between(result.shares, low, high, color=colour, alpha=0.15, linewidth=0)
        here.plot(
            result.shares, random[example].mean(0), color=colour, linewidth=0.9, linestyle=":", label=f"{name}, random order"
        )
        here.plot(result.shares, own[example], color=colour, linewidth=1.8, label=name)
    _plain(here)
    here.set_xlabel("share of cells taken away, or put in", fontsize=8)
    here.set_ylabel("target (0 baseline, 1 input)", fontsize=8)
    here.set_title(f"{result.method}: {readable(result.target[example])}", fontsize=9, color=INK)
    here.legend(fontsize=6.5, frameon=False, loc="best")
    return figure


def draw_sanity(result: Sanity, ax: Axes | None) -> Figure:
    """Both correlations over the number of randomised layers, with the range of chance."""
    figure, here = _opened(ax, 4.4)
    places = np.arange(len(result.randomised))
    here.axhspan(-2 * result.chance, 2 * result.chance, color=PALE, alpha=0.35, linewidth=0, label="chance (two deviations)")
    here.plot(places, result.signed, "o-", color=OWN, linewidth=1.6, markersize=3.5, label="scores")
    here.plot(places, result.sizes, "s--", color=OTHER, linewidth=1.2, markersize=3, label="their absolute values")
    _plain(here)
    here.set_ylim(min(-0.25, float(result.signed.min()) - 0.1), 1.05)
    here.set_xticks(places, [str(many) for many in result.randomised])
    here.set_xlabel("layers with random weights, from the top", fontsize=8)
    here.set_ylabel("rank correlation", fontsize=8)
    here.set_title(f"{result.method}: does it depend on what was learned?", fontsize=9, color=INK)
    here.legend(fontsize=7, frameon=False, loc="best")
    return figure
