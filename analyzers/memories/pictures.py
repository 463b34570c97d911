"""Memories as pictures: agreement by layer over what chance gives, and one memory with its triggers and its words."""

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from analyzers.memories.spelling import joined
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of
from fmr.pictures.heatmap import INK, PALE, readable, with_glyphs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.memories.predictions import Composed, Promotion
    from analyzers.memories.result import Memories

COLOURS = {1: "#B35806", -1: "#542788"}
"""Positive and negative coefficients: the two ends of PuOr, told apart by every kind of colour vision and in grey."""

_NAMES = {1: "positive trigger, first word", -1: "negative trigger, last word"}
_LINES = 10


def by_layer(found: "Memories", ax: "Axes | None") -> "Figure":
    """Agreement by layer, in per cent, one line a sign; chance as a band up to its 97.5 % point."""
    import matplotlib.pyplot as plt

    if found.unread:
        raise AnalyzerError(f"There is no agreement to draw: the values have no words, since {found.unread}.")
    ax = ax or plt.subplots(figsize=(5.2, 3.2), layout="constrained")[1]
    for side, sign in enumerate(found.signs):
        style: dict[str, Any] = {"color": COLOURS[sign], "marker": "o" if sign > 0 else "s", "markersize": 4}
        ax.plot(
            found.layers, 100 * found.agreement[:, side], label=_NAMES[sign], linestyle="-" if sign > 0 else "--", **style
        )
    high, mean = 100 * found.high.max(1), 100 * found.chance.mean(1)
    if len(found.layers) > 1:
        ax.fill_between(found.layers, 0, high, color=PALE, alpha=0.6, linewidth=0, label="chance, up to 97.5 %")
    else:
        ax.bar(found.layers, high, 0.6, color=PALE, alpha=0.6, label="chance, up to 97.5 %")
    ax.plot(found.layers, mean, color=INK, linewidth=0.8, linestyle=":", label="chance, mean")
    ax.set_ylim(bottom=0)
    title = f"next token after the top trigger = word of the value\n{number_of(found.n_tokens, 'token')}"
    _axes(ax, found.layers, "memories that agree (%)", title)
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def one_memory(found: "Memories", layer: int, memory: int, sign: int, ax: "Axes | None") -> "Figure":
    """The triggers of a memory, what followed each, in colour where the value says it, and the words of the value."""
    import matplotlib.pyplot as plt

    triggers = found.triggers(layer, memory, sign).head(_LINES)
    if triggers.empty:
        others = -sign in found.signs and len(found.triggers(layer, memory, -sign))
        raise AnalyzerError(
            f"Memory {memory} of layer {layer} has no trigger of sign {sign:+d} among {number_of(found.n_tokens, 'token')}. "
            f"Expected {f'sign={-sign}, of which it has some' if others else 'one with triggers'}: see table()."
        )
    words = [] if found.unread else list(found.says(layer, memory, sign)["word"][:_LINES])
    ax = ax or plt.subplots(figsize=(7.2, 0.9 + 0.26 * len(triggers)), layout="constrained")[1]
    places = np.arange(len(triggers))
    sizes = triggers["coefficient"].abs()
    ax.barh(places, sizes, 0.55, color=COLOURS[sign], alpha=0.85)
    for place, (prefix, following, size) in enumerate(zip(triggers["prefix"], triggers["next"], sizes, strict=True)):
        ax.text(-0.02 * sizes.max(), place, _line(prefix, 44), ha="right", va="center", fontsize=7, color=INK)
        agrees = following in words[:1]
        colour, weight = (COLOURS[sign], "bold") if agrees else (INK, "normal")
        label = _quoted(following) if following else "(end)"
        ax.text(size + 0.02 * sizes.max(), place, label, va="center", fontsize=7, color=colour, weight=weight)
    ax.invert_yaxis()
    ax.set_yticks([])
    ax.set_xlim(0, sizes.max() * 1.2)
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel("coefficient" if sign > 0 else "size of the negative coefficient", fontsize=8)
    said = ", ".join(map(_quoted, words[:6]))
    says = f"\nits value says{' the opposite of' * (sign < 0)}: {said}" if words else ""
    ax.set_title(f"memory {memory} of layer {layer}{says}", fontsize=8, color=INK)
    return cast("Figure", ax.figure)


def _quoted(word: str) -> str:
    """A token in quotes, so that its blank is seen."""
    return f"'{readable(word)}'"


def _line(text: str, longest: int) -> str:
    """The end of a text on one line."""
    flat = " ".join(text.split())
    return with_glyphs(flat if len(flat) <= longest else "…" + flat[-longest + 1 :]).replace("$", r"\$")


def composition(found: "Composed", ax: "Axes | None") -> "Figure":
    """The share of tokens at which none of a layer's memories says what the layer says, with coefficients shuffled too."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(5.2, 3.0), layout="constrained")[1]
    ax.plot(found.layers, 100 * found.none, color=COLOURS[1], marker="o", markersize=4, linewidth=1.4, label="as it is")
    ax.plot(found.layers, 100 * found.shuffled, color=INK, linestyle=":", linewidth=1.2, label="coefficients shuffled")
    ax.set_ylim(0, 102)
    _axes(
        ax,
        found.layers,
        "tokens (%)",
        f"the layer says what none of its memories says\n{number_of(found.n_tokens, 'token')}",
    )
    ax.legend(fontsize=7, frameon=False)
    return cast("Figure", ax.figure)


def promoted(found: "Promotion", ax: "Axes | None") -> "Figure":
    """How the memories of each layer promote a word, over the spread of that of other words."""
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=(5.2, 3.0), layout="constrained")[1]
    colours = [COLOURS[1 if one >= 0 else -1] for one in found.by_layer]
    label = f"{found.draws} other words, twice their spread"
    ax.bar(found.layers, 4 * found.spread, 0.9, bottom=-2 * found.spread, color=PALE, alpha=0.6, label=label)
    ax.bar(found.layers, found.by_layer, 0.5, color=colours)
    ax.axhline(0, color=INK, linewidth=0.6)
    prompt = _line(joined(found.prompt, found.between), 50)
    title = f"{prompt} → {readable(found.word)!r} (p {found.probability:.2f})"
    _axes(ax, found.layers, "added to the logit, above an average word", title)
    ax.yaxis.label.set_fontsize(8)
    ax.legend(fontsize=7, frameon=False, loc="upper left")
    return cast("Figure", ax.figure)


def _axes(ax: "Axes", layers: "Sequence[int]", what: str, title: str) -> None:
    ax.set_xlabel("layer", fontsize=9)
    ax.set_ylabel(what, fontsize=9)
    ax.set_title(title, fontsize=9, color=INK)
    ax.tick_params(labelsize=8)
    ax.set_xticks(layers if len(layers) <= 12 else range(0, max(layers) + 1, 5))
    ax.spines[["top", "right"]].set_visible(False)
