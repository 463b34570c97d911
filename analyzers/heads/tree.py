"""The dendrogram of heads: which join at what distance."""

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from analyzers.heads.scatter import COLOURS, INK, PALE
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.heads.clusters import HeadClusters

READABLE = 5.5  # points
NAMED = 100
"""So many leaves have room for names."""


def linkage(distances: Floats) -> Floats:
    """Which heads join at what mean distance, as scipy writes it: (heads - 1, 4)."""
    from scipy.cluster.hierarchy import linkage as joined
    from scipy.spatial.distance import squareform

    if len(distances) < 2:
        raise AnalyzerError("One head joins no other: expected two or more for a tree.")
    return cast("Floats", joined(squareform(distances, checks=False), "average", optimal_ordering=True))


def draw(result: "HeadClusters", ax: "Axes | None" = None) -> "Figure":
    """A tree with a leaf per head, coloured by layer, and a line where it is cut into the clusters."""
    import matplotlib.pyplot as plt
    from matplotlib import colormaps
    from scipy.cluster.hierarchy import dendrogram

    n, joined = len(result.heads), linkage(result.distances)
    if ax is None:
        ax = plt.subplots(figsize=(min(max(7.0, 0.11 * n + 1.5), 12.0), 4.4), layout="constrained")[1]
    drawn: dict[str, Any] = dendrogram(joined, ax=ax, no_labels=True, link_color_func=lambda _: PALE)
    order, layers = drawn["leaves"], [layer for layer, _ in result.heads]
    top, most = float(joined[-1, 2]) or 1.0, max(layers)
    colours = colormaps[COLOURS].resampled(most + 1)
    places = 10 * np.arange(n) + 5.0
    ax.bar(places, np.full(n, -0.04 * top), 10.0, -0.01 * top, color=[colours(layers[i]) for i in order], linewidth=0)
    for place, i in zip(places, order, strict=True) if n <= NAMED else ():
        ax.annotate(result.names[i], (place, -0.065 * top), rotation=90, ha="center", va="top", fontsize=READABLE, color=INK)
    ax.set_ylim((-0.17 if n <= NAMED else -0.06) * top, 1.03 * top)
    ax.spines["left"].set_bounds(0, top)
    k = int(result.clusters.max()) + 1
    if 1 < k < n:
        cut = (joined[-k, 2] + joined[-k + 1, 2]) / 2
        ax.axhline(cut, color=INK, linewidth=0.7, linestyle=(0, (4, 2)))
        ax.annotate(
            f"{number_of(k, 'cluster')}",
            (10 * n, cut),
            (3, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=7.5,
            color=INK,
        )
    ax.set_yticks([tick for tick in ax.get_yticks() if 0 <= tick <= top])
    ax.set_ylabel(result.unit, color=INK)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.set_title(f"{n} attention heads, joined by their mean distance", loc="left", fontsize=11, color=INK)
    _bar(ax, most, colours)
    return cast("Figure", ax.figure)


def _bar(ax: "Axes", most: int, colours: Any) -> None:
    """The scale of the layers."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    norm = BoundaryNorm(np.arange(most + 2) - 0.5, most + 1)
    ticks = range(0, most + 1, -(-(most + 1) // 12))
    bar = ax.figure.colorbar(ScalarMappable(norm, colours), ax=ax, shrink=0.8, aspect=18, pad=0.06, ticks=ticks)
    bar.set_label("layer")
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
