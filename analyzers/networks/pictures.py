"""A network as a picture: layers as columns, units in the colours of their communities, and Q beside that of its nulls."""

from typing import TYPE_CHECKING, cast

import numpy as np

from analyzers.networks.search import ratio
from analyzers.numbers.embed import Floats, Ints
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.networks.communities import Communities

INK, PALE, BETWEEN = "#333333", "#8a8a8a", "#c9c9c9"

COLOURS = "#0072b2 #e69f00 #009e73 #cc79a7 #56b4e9 #d55e00 #f0e442 #332288 #882255 #44aa99".split()
"""Colours that stay apart for every kind of colour vision (Okabe and Ito 2008; Tol 2021)."""

SHOWN = 500
"""How many of the strongest edges are drawn."""

LONGEST = 18
"""Characters of the name of a column."""

MARKS = ("o", "D")
"""Of the two kinds of nulls."""


def draw(result: "Communities", ax: "Axes | None" = None) -> "Figure":
    """The network, and where there are nulls and room, Q of it and of them."""
    import matplotlib.pyplot as plt

    if ax is None:
        columns = len(result.groups)
        wide = min(max(4.5, 1.0 * columns + 1.5), 13.0)
        with_nulls = result.null_q.size > 0
        figure = plt.figure(figsize=(wide + (3.6 if with_nulls else 0), 4.4), layout="constrained")
        grid = figure.add_gridspec(1, 2 if with_nulls else 1, width_ratios=[wide, 3.6] if with_nulls else [1])
        ax = figure.add_subplot(grid[0, 0])
        if with_nulls:
            nulls(result, figure.add_subplot(grid[0, 1]))
        figure.suptitle(_headline(result), x=0.01, ha="left", fontsize=11, color=INK)
    network(result, ax)
    return cast("Figure", ax.figure)


def _headline(result: "Communities") -> str:
    kept = "all edges" if result.shares[0] >= 1 else f"the strongest {100 * result.shares[0]:g} % of edges"
    alone = int((result.labels < 0).sum())
    grey = f"; {number_of(alone, 'unit')} without an edge in white" if alone else ""
    return (
        f"{result.model}: {result.k[0]} communities of {number_of(len(result.labels), 'unit')} by {result.graph}, {kept}, "
        f"Q = {result.q[0]:.3f}{grey}"
    )


def network(result: "Communities", ax: "Axes") -> None:
    """Columns of units, those of one community together, and the strongest edges between them."""
    from matplotlib.collections import LineCollection

    places = _places(result)
    colours = _colours(result.labels)
    ends, sizes = result.ends[:SHOWN], result.sizes[:SHOWN]
    apart = ends[:, 0] != ends[:, 1]
    ends, sizes = ends[apart][::-1], sizes[apart][::-1]  # the strongest on top
    same = result.labels[ends[:, 0]] == result.labels[ends[:, 1]]
    order = np.argsort(same, kind="stable")
    ends, sizes, same = ends[order], sizes[order], same[order]
    weight = sizes / (sizes.max() if len(sizes) else 1.0)
    shades = [
        (*_rgb(colours[a] if one else BETWEEN), 0.2 + 0.6 * w) for (a, _), one, w in zip(ends, same, weight, strict=True)
    ]
    lines = [_curve(places[a], places[b]) for a, b in ends]
    ax.add_collection(LineCollection(lines, colors=shades, linewidths=0.3 + 1.6 * weight, zorder=1, capstyle="round"))
    counts = np.bincount(result.group)
    dots = np.minimum(np.maximum(260 / counts[result.group], 2.2), 6.5) ** 2
    rims = np.where(dots > 15, 0.5, 0.0).tolist()
    edge = [INK if label < 0 else "white" for label in result.labels]
    ax.scatter(
        places[:, 0],
        places[:, 1],
        s=dots,
        c=colours,
        edgecolors=edge,
        linewidths=rims,
        zorder=2,
    )
    ax.set(xlim=(-0.5, len(counts) - 0.5), ylim=(-0.06, 1.04), yticks=[])
    turned = len(counts) > 5 or max(len(_short(name)) for name in result.groups) > 12
    named = [
        f"{_short(name)}\n{count}" if not turned else f"{_short(name)} ({count})"
        for name, count in zip(result.groups, counts, strict=True)
    ]
    ax.set_xticks(
        range(len(counts)), named, fontsize=8, color=INK, rotation=40 if turned else 0, ha="right" if turned else "center"
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    shown = f"{len(ends)} strongest edges: coloured within a community, grey between two"
    ax.set_title(shown, fontsize=8, color=INK, loc="left")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _places(result: "Communities") -> Floats:
    """Where units stand: a column for each group, sorted by community."""
    places = np.zeros((len(result.group), 2))
    for group in range(len(result.groups)):
        members = np.flatnonzero(result.group == group)
        order = members[np.lexsort((members, np.where(result.labels[members] < 0, 10**6, result.labels[members])))]
        places[order, 0] = group
        places[order, 1] = 1 - (np.arange(len(order)) + 0.5) / len(order)
    return places


def _curve(start: Floats, end: Floats) -> Floats:
    """A line between two units that leaves and enters sideways; within a column a bow to the right."""
    t = np.linspace(0, 1, 17)[:, None]
    if start[0] == end[0]:
        bow = 0.06 + 0.25 * abs(end[1] - start[1])
        return np.hstack([start[0] + bow * 4 * t * (1 - t), start[1] + (end[1] - start[1]) * t])
    smooth = t * t * (3 - 2 * t)
    return np.hstack([start[0] + (end[0] - start[0]) * t, start[1] + (end[1] - start[1]) * smooth])


def _colours(labels: Ints) -> list[str]:
    """The colour of each unit; after ten communities all others are one grey."""
    return ["white" if label < 0 else COLOURS[label] if label < len(COLOURS) else PALE for label in labels.tolist()]


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def nulls(result: "Communities", ax: "Axes") -> None:
    """Q of the network, and of each null network, for each share of edges."""
    random = np.random.default_rng(0)
    places, names = [], []
    for n, share in enumerate(result.shares):
        for kind, name in enumerate(result.kinds):
            row = -(n * (len(result.kinds) + 1) + kind)
            drawn = result.null_q[n, kind]
            _, p = ratio(result.q[n], drawn, larger=True)
            ax.scatter(
                drawn, row + random.uniform(-0.17, 0.17, len(drawn)), s=16, color=PALE, marker=MARKS[kind % 2], alpha=0.7
            )
            ax.plot([result.q[n]] * 2, [row - 0.34, row + 0.34], color="#d55e00", linewidth=2.5, solid_capstyle="butt")
            ax.annotate(
                f"p = {p:.2g}",
                (1.0, row),
                xycoords=("axes fraction", "data"),
                fontsize=8,
                ha="right",
                va="bottom",
                color=INK,
            )
            places.append(row)
            names.append(f"{name}\n{'all edges' if share >= 1 else f'strongest {100 * share:g} %'}")
    ax.set_yticks(places, names, fontsize=8, color=INK)
    low, high = min(0.0, float(result.null_q.min())), max(float(result.null_q.max()), float(result.q.max()))
    ax.set(xlim=(low, low + 1.25 * (high - low)), ylim=(min(places) - 0.7, 0.7))
    ax.set_xlabel("Newman's Q (weighted)", fontsize=9, color=INK)
    ax.set_title(f"the network (line) and {result.null_q.shape[2]} of each null (dots)", fontsize=8, color=INK, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(PALE)
    ax.tick_params(colors=INK, color=PALE, labelsize=8)
