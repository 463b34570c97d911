"""Traces as heat maps: tokens down, layers across, nothing in white."""

from typing import TYPE_CHECKING, cast

import numpy as np

from analyzers.protocol import AnalyzerError
from analyzers.tracing.cells import ALL
from fmr.pictures.heatmap import INK, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.tracing.traces import Traces

COLOURS = {"state": "Purples", "attention": "Reds", "mlp": "Greens"}
"""As in the paper; what is severed has the colour of states. From white to dark, so that more is darker in grey too."""


def draw(traces: "Traces", ax: "Axes | None", kind: str | None) -> "Figure":
    """The maps of a result, side by side."""
    import matplotlib.pyplot as plt

    if kind is not None and kind not in traces.effects:
        raise AnalyzerError(f"kind={kind!r} was not traced. Expected one of {', '.join(map(repr, traces.effects))}.")
    chosen = [kind] if kind is not None else list(traces.effects)[: 1 if ax is not None else None]
    layers, columns = traces.effects[chosen[0]].shape
    if ax is None:
        size = (1.6 + len(chosen) * (1.3 + 0.12 * max(layers, 8)), 1.3 + 0.24 * columns)
        figure, made = plt.subplots(1, len(chosen), figsize=size, squeeze=False, sharey=True, layout="constrained")
        axes: list[Axes] = list(made[0])
        what = traces.facts[0] if len(traces.facts) == 1 else f"{len(traces.facts)} facts"
        figure.suptitle(
            f"{what}: p {traces.clean.mean():.2f} clean, {traces.corrupted.mean():.2f} corrupted; what is brought back",
            fontsize=9,
        )
    else:
        axes = [ax]
    for one, here in zip(chosen, axes, strict=True):
        _map(traces, one, here)
    _label(traces, axes[0])
    return cast("Figure", axes[0].figure)


def _map(traces: "Traces", kind: str, ax: "Axes") -> None:
    values = traces.effects[kind].T
    limit = max(float(np.nanmax(values)), 1e-9)
    colours = COLOURS.get(kind.split()[0], "Purples")
    image = ax.imshow(values, cmap=colours, vmin=0, vmax=limit, aspect="auto", interpolation="nearest")
    window = f", {traces.window} layers" if kind in ("attention", "mlp") and traces.window > 1 else ""
    ax.set_title(kind + window, fontsize=9)
    ax.set_xlabel("layer", fontsize=8)
    ax.tick_params(labelsize=8, length=2)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _label(traces: "Traces", ax: "Axes") -> None:
    ax.set_yticks(
        range(len(traces.columns)), [label.strip() or readable(label) for label in traces.columns], fontsize=8, color=INK
    )
    ax.axhline(len(traces.columns) - 1.5, color=INK, linewidth=0.6) if traces.columns[-1] == ALL else None
