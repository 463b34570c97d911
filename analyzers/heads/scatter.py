"""The map of heads as a picture."""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from analyzers.numbers.embed import Floats
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure

    from analyzers.heads.clusters import HeadClusters

COLOURS = "viridis"
"""Even in lightness, so that layers keep their order for every kind of colour vision and in grey."""

MARKERS = "osD^v"
"""The heads of each model on one map."""

INK, PALE, TAG = "#333333", "#8a8a8a", "#a6460a"
LABEL = 6.5  # points
MOVED = 10
"""How many heads have names where there are several models."""


def draw(result: "HeadClusters", ax: "Axes | None" = None) -> "Figure":
    """A labelled point per head, coloured by layer, with the outline of each cluster of several heads."""
    import matplotlib.pyplot as plt

    low, high = result.points.min(0), result.points.max(0)
    margin = np.array([0.1, 0.07]) * (float((high - low).max()) or 1.0)
    low, high = low - margin, high + margin
    if ax is None:
        size = (high - low) / (high - low).max() * 9
        ax = plt.subplots(figsize=(size[0] + 1.8, max(size[1], 3) + 1.5), layout="constrained")[1]
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_xlabel(f"MDS dimension 1 ({result.unit})", color=INK)
    ax.set_ylabel(f"MDS dimension 2 ({result.unit})", color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(PALE)
    ax.tick_params(colors=INK, color=PALE, labelsize=8)
    _title(ax, result)
    _outlines(ax, result, 0.33 * margin[1])
    _points(ax, result)
    _labels(ax, result)
    return cast("Figure", ax.figure)


def _title(ax: "Axes", result: "HeadClusters") -> None:
    """What was measured, in one line, and how sure the picture is, in smaller ones."""
    within, between, p_value = result.by_layer
    how = "where they look" if "JS" in result.unit else "what they write"
    ax.set_title(f"{number_of(len(result.heads), 'attention head')} by {how}", loc="left", fontsize=12, color=INK, pad=28)
    bits = " bits" if "JS" in result.unit else ""
    lines = (
        f"{result.tokens:,} tokens; mean distance within a layer {within:.3f}, between layers {between:.3f}{bits}, "
        f"permutation p = {p_value:.2g}; map: stress {result.stress:.3f}, seed {result.seed}",
        f"{number_of(result.clusters.max() + 1, 'cluster')}, outlined where of several heads (silhouette "
        f"{result.silhouette:.2f}); "
        f"beside them the token that gets unusual weight, or broad attention",
    )
    ax.annotate("\n".join(lines), (0, 1), (0, 4), "axes fraction", "offset points", fontsize=8, color=INK, va="bottom")


def _points(ax: "Axes", result: "HeadClusters") -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    layers = [layer for layer, _ in result.heads]
    n = max(layers) + 1
    colours = colormaps[COLOURS].resampled(n)
    models = list(dict.fromkeys(result.models))
    fixed: dict[str, Any] = {"cmap": colours, "norm": BoundaryNorm(np.arange(n + 1) - 0.5, n), "s": 34}
    fixed |= {"edgecolors": INK, "linewidths": 0.5, "zorder": 3}
    for model, marker in zip(models, MARKERS * len(models), strict=False):
        own = np.array([name == model for name in result.models])
        x, y = result.points[own].T
        dots = ax.scatter(x, y, c=np.array(layers)[own], marker=marker, label=model, **fixed)
    if len(models) > 1:
        _counterparts(ax, result)
        legend = ax.legend(loc="best", fontsize=8, frameon=False, labelcolor=INK)
        for handle in legend.legend_handles[: len(models)]:
            cast("PathCollection", handle).set_facecolor("none")
    bar = ax.figure.colorbar(dots, ax=ax, shrink=0.5, aspect=18, pad=0.02, ticks=range(0, n, -(-n // 12)))
    bar.set_label("layer")
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _counterparts(ax: "Axes", result: "HeadClusters") -> None:
    """A line from each head to the same one of another model, those that lie farthest apart in dark."""
    place = dict(zip(result.names, result.points, strict=True))
    every, same = result.counterparts(), "the same head of two models"
    said = {True: f"{same}, the {MOVED} farthest apart", False: same} if len(every) > MOVED else {True: same}
    for number, (one, other, _) in enumerate(every):
        dark = number < MOVED
        x, y = np.stack([place[one], place[other]]).T
        label = said.pop(dark, "")
        ax.plot(x, y, color=TAG if dark else PALE, linewidth=1.1 if dark else 0.5, zorder=2.5 if dark else 2, label=label)


def _outlines(ax: "Axes", result: "HeadClusters", margin: float) -> None:
    """A rounded hull around the heads of each cluster of several, and beside each cluster what sets it apart."""
    from scipy.spatial import ConvexHull

    angles = np.linspace(0, 2 * np.pi, 33)[:-1]
    circle = margin * np.stack([np.cos(angles), np.sin(angles)], 1)
    for label in range(result.clusters.max() + 1):
        members = result.clusters == label
        cloud = (result.points[members][:, None] + circle).reshape(-1, 2)
        hull = cloud[ConvexHull(cloud).vertices]
        if members.sum() > 1:
            ax.fill(*hull.T, facecolor="#00000008", edgecolor=PALE, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        if said := _mark(result, members):
            _beside(ax, hull, said)


def _mark(result: "HeadClusters", members: NDArray[np.bool_]) -> str:
    """What sets these heads apart from the mean head: a token with a tenth more of the weight, else broader rows."""
    excess = {look: float(values[members].mean() - values.mean()) for look, values in result.looks.items()}
    bits = excess.pop("entropy")
    look = max(excess, key=lambda name: excess[name])
    if excess[look] > 0.1:
        return f"{look} {result.looks[look][members].mean():.2f}"
    return "broad" if bits > 0.75 else ""


def _beside(ax: "Axes", hull: Floats, said: str) -> None:
    """Write at the end of a hull that is farthest from the middle of the map, on its outer side."""
    end = hull[np.linalg.norm(hull, axis=1).argmax()]
    across, up = end / np.linalg.norm(end)
    ha = "left" if across > 0.4 else "right" if across < -0.4 else "center"
    va = "bottom" if up > 0.4 else "top" if up < -0.4 else "center"
    ax.annotate(
        said, end, (3 * across, 4 * up), textcoords="offset points", ha=ha, va=va, fontsize=7.5, style="italic", color=TAG
    )


def _labels(ax: "Axes", result: "HeadClusters") -> None:
    """The name of each head beside its point, moved apart where names would cover names or points."""
    ax.apply_aspect()
    scale = 72 / ax.figure.dpi
    shown = _named(result)
    names, own = [f"{layer}.{head}" for layer, head in (result.heads[n] for n in shown)], result.points[shown]
    points = ax.transData.transform(own) * scale
    sizes = np.array([(0.62 * LABEL * len(name), 1.15 * LABEL) for name in names]).reshape(-1, 2)
    for name, point, place, away in zip(names, own, *_apart(points, sizes), strict=True):
        line: dict[str, Any] = {"arrowstyle": "-", "color": PALE, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3}
        ax.annotate(
            name,
            point,
            place,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=LABEL,
            color=INK,
            arrowprops=line if away else None,
            zorder=4,
        )


def _named(result: "HeadClusters") -> list[int]:
    """The heads whose names are written: all of one model; of several, those of the first that lie farthest from others."""
    moved = {one for one, _, _ in result.counterparts()[:MOVED]}
    return [n for n, name in enumerate(result.names) if name in moved or not moved]


def _apart(points: Floats, sizes: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Where to put each label, as an offset from its point, and whether it stands so far off that it needs a line.

    Each label in turn, those in the thickest crowd first, takes the place around its point, nearer rings before farther
    ones, that covers least of the points and of the labels already there. points: (n, 2); sizes: (n, 2) widths and
    heights; all in printer's points.
    """
    angles = np.deg2rad([90, 270, 0, 180, 45, 135, 225, 315, 22, 158, 202, 338, 67, 113, 247, 293])
    directions = np.stack([np.cos(angles), np.sin(angles)], 1)
    gaps = np.repeat([0.0, 5.0, 10.0, 16.0, 23.0, 31.0], len(angles))
    taken, spans = points.copy(), np.full_like(points, 7.0)
    near = (np.linalg.norm(points[:, None] - points[None], axis=-1) < 30).sum(1)
    places = np.zeros_like(points)
    away = np.zeros(len(points), dtype=bool)
    for i in np.argsort(-near, kind="stable"):
        around = np.tile(directions, (len(gaps) // len(angles), 1)) * (sizes[i] / 2 + 5.0 + gaps[:, None])
        reach = (sizes[i] + spans) / 2 + 0.5 - np.abs(points[i] + around[:, None] - taken)
        best = int((np.maximum(reach, 0).prod(-1).sum(1) + 0.3 * gaps).argmin())
        places[i], away[i] = around[best], gaps[best] > 0
        taken, spans = np.concatenate([taken, points[i : i + 1] + places[i]]), np.concatenate([spans, sizes[i : i + 1]])
    return places, away
