"""Costs as pictures: layers and memories as dots with their intervals beside the control, heads as a map."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from fmr.pictures.heatmap import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.surgery.costs import LayerCosts

MARKS = {"layer": ("o", "#0072B2"), "memory": ("s", "#009E73")}
CONTROL = "#D55E00"


def draw(costs: LayerCosts, ax: Axes | None) -> Figure:
    """The costs of a result."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    heads = costs.maps.get("head") if ax is None else None
    if ax is None:
        made = plt.subplots(1, 2 if heads is not None else 1, figsize=(8.4, 3.2), squeeze=False, layout="constrained")[1][0]
        ax = made[0]
    for shift, (kind, (mark, colour)) in enumerate(MARKS.items()):
        own = np.array([one == kind for one in costs.kinds])
        if own.any():
            at = costs.layers[own] + 0.18 * shift
            spread = np.abs(np.stack([costs.low[own], costs.high[own]]) - costs.cost[own])
            ax.errorbar(
                at, costs.cost[own], spread, fmt=mark, color=colour, markersize=4, elinewidth=1, label=f"{kind} left out"
            )
            ax.plot(
                at, costs.control[own], mark, color=CONTROL, markersize=4, fillstyle="none", label=f"{kind}, random change"
            )
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="layer", ylabel=f"loss more than {costs.base:.2f}")
    ax.legend(fontsize=7, frameon=False)
    if heads is not None:
        _map(made[1], heads)
    return cast("Figure", ax.figure)


def _map(ax: Axes, heads: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    from matplotlib.ticker import MaxNLocator

    limit = float(np.nanmax(np.abs(heads))) or 1.0
    image = ax.imshow(heads, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="head", ylabel="layer", title="cost of single heads")
    ax.title.set_fontsize(9)
    ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
