"""Probes as a picture: accuracy and control over sites, and the chance line."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fmr.errors import number_of
from fmr.pictures.heatmap import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.probes.probed import Probed

TOLD, CONTROL = "#0072B2", "#D55E00"
"""Two colours that no kind of colour vision confuses; marks and strokes tell them apart in grey."""


def draw(result: Probed, ax: Axes | None) -> Figure:
    """Accuracy, control and majority of a result by site."""
    import matplotlib.pyplot as plt

    names, many = result.names, len(result.names)
    if ax is None:
        ax = plt.subplots(figsize=(max(3.6, min(1.6 + 0.3 * many, 12.0)), 3.0), layout="constrained")[1]
    places = list(range(many))
    ax.plot(places, result.accuracy, "o-", color=TOLD, markersize=4, label="labels")
    ax.plot(places, result.control, "s--", color=CONTROL, markersize=4, label="control task")
    ax.axhline(result.majority, color=INK, linestyle=":", linewidth=1, label="most frequent label")
    step = max(1, many // 12)
    ax.set_xticks(places[::step], [_short(name) for name in names[::step]], rotation=60, ha="right", fontsize=7)
    what = "token" if result.by_token else "example"
    ax.set(ylim=(min(0.0, *result.control) - 0.03, 1.03), ylabel="accuracy, held out")
    ax.set_title(f"{result.kind} probes, {number_of(result.test, what)} held out", fontsize=9)
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def _short(name: str) -> str:
    """A name with room for it: its end, where it is long."""
    return name if len(name) <= 24 else f"...{name[-21:]}"
