"""Dictionaries as pictures: how training went, how often latents fire."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from fmr.pictures.heatmap import INK, PALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.dictionaries.dictionary import Dictionary
    from analyzers.dictionaries.latents import LatentPages
    from analyzers.dictionaries.polysemantic import Answers
    from analyzers.dictionaries.scores import DictionaryScored
    from analyzers.dictionaries.steering import LatentSteered
    from analyzers.numbers.embed import Floats

FOUND, CONTROL = "#0072B2", "#D55E00"
"""Two colours that no kind of colour vision confuses."""

STROKES = ("--", ":", "-.")


def draw(result: Dictionary, ax: Axes | None) -> Figure:
    """The share of the variance by step with the controls, and beside it how often latents fire."""
    import matplotlib.pyplot as plt

    beside = None
    if ax is None:
        ax, beside = plt.subplots(1, 2, figsize=(7.4, 3.4), layout="constrained")[1]
    ax.plot(result.curves["step"], result.curves["explained"], color=FOUND, label="in training")
    ax.axhline(result.explained, color=INK, linewidth=0.8, label=f"held out, {result.l0:.1f} latents on")
    for (name, (l0, share)), stroke in zip(result.controls.items(), STROKES, strict=False):
        if share > -0.5:
            ax.axhline(share, color=CONTROL, linestyle=stroke, linewidth=1, label=f"{name}, {l0:.1f} on")
    ax.set(xlabel="step", ylabel="variance explained", ylim=(min(0.0, ax.get_ylim()[0]), 1.02))
    ax.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))  # above all lines
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


def draw_scored(result: DictionaryScored, ax: Axes | None) -> Figure:
    """What the dictionary and its controls recover of both ablations."""
    import matplotlib.pyplot as plt

    beside = None
    if ax is None:
        ax, beside = plt.subplots(1, 2, figsize=(7.4, 2.6), layout="constrained")[1]
    names = list(result.l0)
    for n, (ablated, colour) in enumerate((("zero", FOUND), ("mean", CONTROL))):
        found = np.array([result.recovered(name, ablated) for name in names])
        shown = np.maximum(found, -0.5)
        wide = np.nan_to_num(np.abs(shown[:, 1:] - shown[:, :1]).T)
        places = np.arange(len(names)) + 0.2 * (2 * n - 1)
        ax.barh(places, shown[:, 0], 0.36, xerr=wide, color=colour, label=f"beside {ablated} ablation", error_kw={"lw": 1})
    ax.set_yticks(range(len(names)), [f"{name}, {result.l0[name]:.0f} on" for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color=INK, linewidth=0.6)
    ax.set(xlabel="loss recovered", xlim=(min(0.0, ax.get_xlim()[0]), 1.05))
    ax.legend(fontsize=7, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    if beside is not None:
        densities(result.density, beside)
    return cast("Figure", ax.figure)


def draw_steered(result: LatentSteered, ax: Axes | None) -> Figure:
    """The effect of a latent by dose over those of random directions."""
    import matplotlib.pyplot as plt

    if ax is None:
        ax = plt.subplots(figsize=(4.2, 2.8), layout="constrained")[1]
    ax.plot(result.doses, result.random, color=PALE, linewidth=0.8)
    ax.plot([], [], color=PALE, label=f"{result.random.shape[1]} random directions")
    ax.plot(result.doses, result.effect, "o-", color=FOUND, markersize=4, label=f"latent {result.latent}")
    ax.axhline(0, color=INK, linewidth=0.6)
    ax.set(xlabel="added, in units of the latent", ylabel="change of the metric")
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def draw_answers(result: Answers, ax: Axes | None) -> Figure:
    """How many units answer to how many types, beside shuffled labels."""
    import matplotlib.pyplot as plt

    if ax is None:
        ax = plt.subplots(figsize=(4.2, 2.8), layout="constrained")[1]
    most = int(max(result.counts.max(), result.null.max()))
    places = np.arange(most + 1)
    own = np.bincount(result.counts, minlength=most + 1) / len(result.counts)
    null = np.bincount(result.null.astype(np.int64).ravel(), minlength=most + 1) / result.null.size
    ax.bar(places - 0.2, own, 0.4, color=FOUND, label="labels")
    ax.bar(places + 0.2, null, 0.4, color=PALE, label="shuffled labels")
    ax.set(xlabel="types that a unit answers to", ylabel="share of units")
    ax.set_xticks(places)
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def draw_pages(result: LatentPages, ax: Axes | None) -> Figure:
    """What each part writes of each latent, as a map; how often latents fire where nothing is known of parts."""
    import matplotlib.pyplot as plt

    names = list(result.writers[0]) if result.writers else []
    if ax is None:
        size = (2.4 + 0.5 * max(len(names), 3), 1.4 + 0.28 * len(result.latents))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    labels = [f"latent {one}, {share:.1%}" for one, share in zip(result.latents, result.density, strict=True)]
    if not names:
        ax.barh(range(len(labels)), result.density, color=FOUND)
        ax.set(xlabel="share of tokens")
        ax.invert_yaxis()
    else:
        shares = np.array([[one.get(name, (np.nan,))[0] for name in names] for one in result.writers])
        image = ax.imshow(shares, cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        ax.figure.colorbar(image, ax=ax, shrink=0.8, label="share of the score")
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    return cast("Figure", ax.figure)
