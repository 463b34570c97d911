"""Similarities as pictures: a map of sites by sites, and lines over a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from fmr.errors import number_of
from fmr.pictures.heatmap import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.compare.similarities import Similarities
    from analyzers.compare.timeline import Timeline

NAMES = {"cka": "CKA", "rsa": "RSA", "procrustes": "Procrustes", "svcca": "SVCCA"}
STYLES = ("-", "--", "-.", ":")


def draw(result: Similarities, kind: str, ax: Axes | None) -> Figure:
    """A map of sites: all by all of one model, those of the first by those of the last of several."""
    import matplotlib.pyplot as plt

    values, names = result.values[kind], list(result.names)
    rows = columns = list(range(len(names)))
    if len(result.models) > 1:
        first, last = result.models[0], result.models[-1]
        rows, columns = ([place for place, owner in enumerate(result.owners) if owner == one] for one in (first, last))
    shown = values[np.ix_(rows, columns)]
    if ax is None:
        size = (min(12.0, 3.4 + 0.28 * len(columns)), min(10.0, 2.2 + 0.28 * len(rows)))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    image = ax.imshow(shown, cmap="cividis", vmin=min(0.0, float(np.nanmin(shown))), vmax=1.0, aspect="auto")
    cast("Figure", ax.figure).colorbar(image, ax=ax, label=NAMES[kind])
    _ticks(ax, [names[place] for place in rows], [names[place] for place in columns])
    null = result.nulls[kind]
    ax.set_title(
        f"{number_of(result.rows, 'row')}\nin another order {np.nanmin(null):.2f} to {np.nanmax(null):.2f}", fontsize=9
    )
    return cast("Figure", ax.figure)


def _ticks(ax: Axes, rows: list[str], columns: list[str]) -> None:
    for names, put, turned in ((rows, ax.set_yticks, 0), (columns, ax.set_xticks, 60)):
        step = max(1, -(-len(names) // 32))
        put(list(range(0, len(names), step)), [_short(name) for name in names[::step]], fontsize=7)
        if turned:
            for label in ax.get_xticklabels():
                label.set(rotation=turned, ha="right")


def lines(result: Similarities, kind: str, ax: Axes | None) -> Figure:
    """How alike each site is to itself in the last of several models, by the numbers that these are called."""
    import matplotlib.pyplot as plt

    steps, last = result.steps, result.models[-1]
    sites = [
        name.removeprefix(f"{last}: ") for name, owner in zip(result.names, result.owners, strict=True) if owner == last
    ]
    if ax is None:
        ax = plt.subplots(figsize=(5.2, 3.2), layout="constrained")[1]
    for n, site in enumerate(sites):
        known = [(x, f"{model}: {site}") for x, model in zip(steps, result.models, strict=True)]
        shown = [(x, name) for x, name in known if name in result.names]
        colour = plt.get_cmap("viridis")(0.9 * n / max(1, len(sites) - 1))
        values = [result.of(name, f"{last}: {site}", kind) for _, name in shown]
        nulls = [result.null(name, f"{last}: {site}", kind) for _, name in shown]
        xs = [x for x, _ in shown]
        ax.plot(xs, values, "o-", color=colour, markersize=3, label=_short(site))
        ax.plot(xs, nulls, ":", color=colour, linewidth=1)
    ax.set(xlabel="step", ylabel=f"{NAMES[kind]} with step {last}", ylim=(min(0.0, ax.get_ylim()[0]), 1.04))
    ax.set_title(f"{number_of(result.rows, 'row')}; dotted: rows in another order", fontsize=9)
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def timeline(result: Timeline, ax: Axes | None) -> Figure:
    """Each score over the steps, its null dotted, and the date at which it has come half its way."""
    import matplotlib.pyplot as plt

    if ax is None:
        ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")[1]
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe, Ito: told apart by every eye
    for n, (name, values) in enumerate(result.values.items()):
        colour = palette[n % len(palette)]
        ax.plot(result.steps, values, STYLES[n % len(STYLES)], color=colour, label=name)
        if name in result.nulls:
            ax.plot(result.steps, result.nulls[name], ":", color=colour, linewidth=1, label=f"{name}, null")
        date = result.dates[name]
        if date is not None:
            ax.axvline(date, color=colour, linewidth=0.8, alpha=0.6)
            ax.annotate(
                f"{date:,}", (date, 1.0), xycoords=("data", "axes fraction"), fontsize=7, color=INK, ha="center", va="bottom"
            )
    ax.set(xlabel="step", ylabel="score")
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def _short(name: str) -> str:
    """A name with room for it: its end, where it is long."""
    return name if len(name) <= 28 else f"...{name[-25:]}"
