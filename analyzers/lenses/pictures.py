"""Readings of the stream as pictures: heads as a map, layers as bars, tokens across."""

from typing import TYPE_CHECKING, cast

import numpy as np

from analyzers.numbers.embed import Floats
from fmr.pictures.heatmap import INK, PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.lenses.shares import LogitParts

SIGNED = "RdBu_r"
"""White where nothing is, red and blue for the two directions, which no kind of colour vision confuses."""

ATTENTION, MEMORIES = "#0072B2", "#D55E00"


def draw_parts(result: "LogitParts", ax: "Axes | None" = None) -> "Figure":
    """A map of the heads, and beside it what the heads and the memories of each layer wrote, with the control in grey."""
    import matplotlib.pyplot as plt

    if ax is not None:
        _map_of_heads(result, ax)
        return cast("Figure", ax.figure)
    layers = int(result.layers[[kind != "bias" for kind in result.kinds]].max()) + 1
    heads = max(int(result.places.max()) + 1, 6)
    size = (2.2 + 0.3 * heads + 3.2, 1.8 + 0.17 * max(layers, 8))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=size, width_ratios=[0.3 * heads + 1.2, 3.2], sharey=True, layout="constrained"
    )
    if "head" in result.kinds:
        _map_of_heads(result, left)
    else:
        left.text(0.5, 0.5, "no heads told apart", ha="center", transform=left.transAxes, color=INK)
    _bars_of_layers(result, right, layers)
    parts = "  ".join(f"{name} {share:+.2f}" for name, share in result.by_kind().items() if abs(share) > 5e-4)
    capped = " before the soft cap" if result.capped else ""
    figure.suptitle(
        f"{result.title}{capped}, {len(result.total)} prompt{'s' * (len(result.total) > 1)}: "
        f"{float(result.total.mean()):.2f}\n{parts}",
        fontsize=9, color=INK,
    )  # fmt: skip
    return figure


def _map_of_heads(result: "LogitParts", ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    values = result.heads
    limit = float(np.nanmax(np.abs(values))) or 1.0
    image = ax.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, origin="lower", aspect="auto", interpolation="nearest")
    ax.set_xlabel("head", fontsize=8)
    ax.set_ylabel("layer", fontsize=8)
    ax.set_title("single heads", fontsize=9)
    ax.tick_params(labelsize=7, length=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.03)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of the logit (nats)", fontsize=7)
    bar.outline.set_visible(False)


def _bars_of_layers(result: "LogitParts", ax: "Axes", layers: int) -> None:
    """What attention and memories of each layer wrote, and in grey what they wrote for the control."""
    other = np.asarray(result.others.mean(1))
    kinds = (("attention", ("head", "attention"), ATTENTION, 0.2), ("memories", ("mlp",), MEMORIES, -0.2))
    for name, own, colour, offset in kinds:
        values, null = (_by_layer(result, shares, own, layers) for shares in (result.shares, other))
        ax.barh(np.arange(layers) + offset, values, 0.4, color=colour, label=name)
        label = result.control if name == "memories" else None
        ax.plot(null, np.arange(layers) + offset, "|", color=INK, markersize=5, markeredgewidth=1.2, label=label)
    ax.axvline(0, color=PALE, linewidth=0.6)
    ax.set_xlabel("share of the logit (nats)", fontsize=8)
    ax.set_title("by layer", fontsize=9)
    ax.tick_params(labelsize=7, length=2)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False, loc="best")


def _by_layer(result: "LogitParts", shares: Floats, kinds: tuple[str, ...], layers: int) -> Floats:
    found = np.zeros(layers)
    own = [n for n, kind in enumerate(result.kinds) if kind in kinds]
    np.add.at(found, result.layers[own], shares[own])
    return found
