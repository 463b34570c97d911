"""Dictionaries as pictures: how training went, how often latents fire."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from fmr.pictures.heatmap import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.dictionaries.dictionary import Dictionary
    from analyzers.numbers.embed import Floats

FOUND, CONTROL = "#0072B2", "#D55E00"
"""Two colours that no kind of colour vision confuses."""

STROKES = ("--", ":", "-.")


def draw(result: Dictionary, ax: Axes | None) -> Figure:
    """The share of the variance by step with the controls, and beside it how often latents fire."""
    import matplotlib.pyplot as plt

    beside = None
    if ax is None:
        ax, beside = plt.subplots(1, 2, figsize=(7.4, 2.8), layout="constrained")[1]
    ax.plot(result.curves["step"], result.curves["explained"], color=FOUND, label="in training")
    ax.axhline(result.explained, color=INK, linewidth=0.8, label=f"held out, {result.l0:.1f} latents on")
    for (name, (l0, share)), stroke in zip(result.controls.items(), STROKES, strict=False):
        if share > -0.5:
            ax.axhline(share, color=CONTROL, linestyle=stroke, linewidth=1, label=f"{name}, {l0:.1f} on")
    ax.set(xlabel="step", ylabel="variance explained", ylim=(min(0.0, ax.get_ylim()[0]), 1.02))
    ax.legend(fontsize=7, frameon=False)
    if beside is not None:
        densities(result.density, beside)
    return cast("Figure", ax.figure)


def densities(density: Floats, ax: Axes) -> None:
    """How many latents fire how often, on a scale of powers of ten; those that never do are named."""
    alive = density[density > 0]
    if len(alive):
        ax.hist(np.log10(alive), bins=24, color=FOUND)
    ax.set(xlabel="log10 of the share of rows", ylabel="latents")
    ax.set_title(f"{len(alive)} latents fire, {len(density) - len(alive)} never", fontsize=9)
