"""Readings of the stream as pictures: heads as a map, layers as bars, tokens across."""

from typing import TYPE_CHECKING, cast

import numpy as np

from analyzers.lenses.decomposition import MEASURED, NULLS, WITH_SIGN
from analyzers.lenses.readings import LENS, MEASURES, NULL, TRANSLATED
from analyzers.numbers.embed import Floats
from fmr.errors import number_of
from fmr.pictures.heatmap import INK, PALE, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from analyzers.lenses.decomposition import Decomposition
    from analyzers.lenses.readings import Lens
    from analyzers.lenses.shares import LogitParts

SIGNED = "RdBu_r"
"""White where nothing is, red and blue for the two directions, which no kind of colour vision confuses."""

EVEN = "viridis"
"""Even in lightness, for what has no sign."""

CROWDED = 24
"""With more columns than this, cells hold no words."""

TITLES = {LENS: "as it is", TRANSLATED: "through the translator", NULL: "translator fitted to other tokens (null)"}

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
        f"{result.title}{capped}, {number_of(len(result.total), 'prompt')}: "
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
    kinds = (("attention", ("head", "cross head", "attention"), ATTENTION, 0.2), ("memories", ("mlp",), MEMORIES, -0.2))
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


def draw_lens(result: "Lens", ax: "Axes | None", what: str, view: str | None, example: int) -> "Figure":
    """A map a way of reading: layers up, tokens across, the top token in each cell."""
    import matplotlib.pyplot as plt

    views = [view] if view is not None else list(result.views)[: 1 if ax is not None else None]
    columns = result.read[example].nonzero()[:, 0].tolist()
    layers = len(result.points)
    worded = len(columns) <= CROWDED
    if ax is None:
        wide = max(len(columns) * (0.62 if worded else 0.16), 1.6 if len(views) == 1 else 2.8)  # titles stand side by side
        size = (1.3 + len(views) * (wide + 0.25), 1.9 + (0.17 if worded else 0.12) * layers)
        figure, made = plt.subplots(1, len(views), figsize=size, squeeze=False, sharey=True, layout="constrained")
        axes: list[Axes] = list(made[0])
        figure.suptitle(f"Logit lens: {MEASURES[what]}, and the top token", fontsize=10, color=INK)
    else:
        axes = [ax]
    held = {one: np.asarray(getattr(result, what)[one][:, example, columns]) for one in views}
    top = 1.0 if what == "probability" else max(float(np.nanmax(values)) for values in held.values()) or 1.0
    for one, here in zip(views, axes, strict=True):
        image = _lens_map(result, here, held[one], one, what, top)
        _label_tokens(here, [result.labels[example][column] for column in columns])
        if worded:
            _words(result, here, one, example, columns, held[one], what, top)
    axes[0].set_ylabel("layer", fontsize=8)
    bar = axes[-1].figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    bar.set_label(MEASURES[what], fontsize=7)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return cast("Figure", axes[0].figure)


def _lens_map(result: "Lens", ax: "Axes", values: Floats, view: str, what: str, top: float) -> "AxesImage":
    from matplotlib.colors import Normalize, SymLogNorm

    scale = SymLogNorm(1, vmin=0, vmax=max(top, 10)) if what == "rank" else Normalize(0, top)
    colours = f"{EVEN}_r" if what == "rank" else EVEN
    image = ax.imshow(values, cmap=colours, norm=scale, origin="lower", aspect="auto", interpolation="nearest")
    ax.set_title(TITLES[view], fontsize=9)
    step = max(1, len(result.points) // 15)
    ax.set_yticks(range(0, len(result.points), step), result.points[::step], fontsize=7)
    ax.tick_params(length=2)
    ax.spines[:].set_visible(False)
    ax.set_facecolor("#E8E2D8")
    return image


def _label_tokens(ax: "Axes", labels: list[str]) -> None:
    ax.set_xticks(range(len(labels)), [readable(label) for label in labels], rotation=60, ha="right", fontsize=7)


def _words(
    result: "Lens", ax: "Axes", view: str, example: int, columns: list[int], values: Floats, what: str, top: float
) -> None:
    """The top token of each cell, in a colour that is read on the cell's own."""
    from matplotlib import colormaps

    light = colormaps[EVEN]
    for row, place in np.ndindex(values.shape):
        token = int(result.top[view][row, example, columns[place], 0])
        if token < 0:
            continue
        share = values[row, place] / top
        share = 1 - np.log1p(values[row, place]) / np.log1p(max(top, 10)) if what == "rank" else share
        red, green, blue, _ = light(float(share))
        dark = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
        word = readable(result.words[str(token)])[:8]
        ax.text(place, row, word, ha="center", va="center", fontsize=5.5, color=INK if dark else "white")


def draw_decomposition(result: "Decomposition", ax: "Axes | None", what: str, example: int) -> "Figure":
    """A map, parts up and tokens across, and beside it the medians over all tokens, with the null where there is one."""
    import matplotlib.pyplot as plt

    columns = result.mask[example].nonzero()[:, 0].tolist()
    values = np.asarray(getattr(result, what)[:, example, columns])
    parts = len(result.names)
    side = None
    if ax is None:
        wide = max(0.3 * len(columns), 2.0)
        figure, (ax, side) = plt.subplots(
            1, 2, figsize=(wide + 4.4, 1.9 + 0.13 * max(parts, 10)), width_ratios=[wide + 1.2, 2.2], sharey=True,
            layout="constrained",
        )  # fmt: skip
        figure.suptitle(f"Who wrote into the stream: {MEASURED[what]}", fontsize=10, color=INK)
    if what in WITH_SIGN:
        limit = float(np.nanquantile(np.abs(values), 0.99)) or 1.0
        image = ax.imshow(
            values, cmap=SIGNED, vmin=-limit, vmax=limit, origin="lower", aspect="auto", interpolation="nearest"
        )
    else:
        limit = float(np.nanquantile(values[np.isfinite(values)], 0.99)) or 1.0
        image = ax.imshow(values, cmap=EVEN, vmin=0, vmax=limit, origin="lower", aspect="auto", interpolation="nearest")
    step = max(1, parts // 31)
    ax.set_yticks(range(0, parts, step), result.names[::step], fontsize=6)
    _label_tokens(ax, [result.labels[example][column] for column in columns])
    ax.tick_params(length=2)
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02, extend="max")
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    if side is not None:
        _medians_of_parts(result, side, what)
    return cast("Figure", ax.figure)


def _medians_of_parts(result: "Decomposition", ax: "Axes", what: str) -> None:
    values, places = result.medians(what), np.arange(len(result.names))
    colours = [
        MEMORIES if name.startswith("mlp") else ATTENTION if name.startswith("attention") else PALE for name in result.names
    ]
    ax.barh(places, values, 0.8, color=colours)
    if what in NULLS:
        ax.plot(result.medians(NULLS[what]), places, "|", color=INK, markersize=4, label="with the end at another token")
        ax.legend(fontsize=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
    ax.axvline(0, color=PALE, linewidth=0.6)
    ax.set_xlabel(f"median over {number_of(int(result.mask.sum()), 'token')}\nattention blue, memories orange", fontsize=7)
    ax.tick_params(labelsize=7, length=2)
    ax.spines[["top", "right"]].set_visible(False)
