"""What an answer rests on as pictures: pixels over the picture, tokens in their colours, values as bars."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch.nn import functional as F

from analyzers.inputs.result import UNSIGNED
from analyzers.numbers.embed import Floats
from fmr.pictures.heatmap import INK, PALE, readable, with_glyphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.inputs.patchmaps import PatchMaps
    from analyzers.inputs.result import Attribution

SIGNED = "RdBu_r"
"""White where nothing is, red for the target and blue against it, which no kind of colour vision confuses."""

FULL = 0.995
"""The share of pixels that lie within the scale of colours; the few that are larger have the deepest one."""

LINE = 60
"""About how many characters of a text stand in one line."""

SMOOTH = 7
"""The side of the square over which the mean is drawn, in pixels, so that colours are seen and not speckles."""


def draw(result: Attribution, ax: Axes | None, example: int | None) -> Figure:
    """The examples of a result, each in its own colours."""
    import matplotlib.pyplot as plt

    examples = list(range(len(result))) if example is None else [example]
    if ax is not None:
        _one(result, ax, examples[0])
        return cast("Figure", ax.figure)
    size = {"image": (3.4, 3.6), "tokens": (6.4, 1.0 + 0.3), "values": (5.0, 2.6), "nodes": (5.0, 2.8)}[result.kind]
    if result.kind == "tokens":
        lines = max(len(_lines(result, one)) for one in examples)
        figure, axes = plt.subplots(
            len(examples), 1, figsize=(6.8, len(examples) * (0.75 + 0.34 * lines)), squeeze=False, layout="constrained"
        )
    else:
        figure, axes = plt.subplots(
            1, len(examples), figsize=(size[0] * len(examples), size[1]), squeeze=False, layout="constrained"
        )
    for one, here in zip(examples, axes.flat, strict=True):
        _one(result, here, one)
    return figure


def _one(result: Attribution, ax: Axes, example: int) -> None:
    {"image": _overlay, "tokens": _words, "values": _bars, "nodes": _bars}[result.kind](result, ax, example)
    ax.set_title(_title(result, example, "\n" if result.kind == "image" else ", "), fontsize=8.5, color=INK)


def _title(result: Attribution, example: int, between: str = ", ") -> str:
    words = with_glyphs(result.target[example]).replace("$", r"\$")
    if result.method in UNSIGNED:
        return f"attention rollout, {result.how}" if result.method == "rollout" else f"sizes of the gradient: {words}"
    difference = float(result.output[example] - result.base[example])
    gap = f", gap {result.gap[example]:.1%}" if result.complete is not None and difference else ""
    return f"{result.method}: {words}{between}{difference:+.2f} from {result.baseline} baseline{gap}"


def limit_of(scores: Floats) -> float:
    """The score of the deepest colour."""
    return float(np.quantile(np.abs(scores), FULL)) or float(np.abs(scores).max()) or 1.0


def _overlay(result: Attribution, ax: Axes, example: int) -> None:
    """Scores in colours over a picture in grey; of finer ones than can be seen, the mean over a few pixels."""
    scores = result.scores[example].double()
    picture = None if result.images is None else result.images[example].mean(-1)
    if picture is not None and scores.shape == picture.shape and min(scores.shape) >= 96:
        scores = F.avg_pool2d(scores[None, None], SMOOTH, 1, SMOOTH // 2, count_include_pad=False)[0, 0]
    values = scores.numpy()
    limit = limit_of(values)
    if picture is None:
        image = ax.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
    else:
        high, wide = picture.shape
        extent = (-0.5, wide - 0.5, high - 0.5, -0.5)
        ax.imshow(0.55 + 0.45 * picture.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
        strength = np.minimum(np.abs(values) / limit, 1) ** 0.6
        image = ax.imshow(
            values, cmap=SIGNED, vmin=-limit, vmax=limit, alpha=0.9 * strength, extent=extent, interpolation="nearest"
        )
    ax.set_xticks([])
    ax.set_yticks([])
    _bar(ax, image, least=0.0 if result.method in UNSIGNED else None)


def _bar(
    ax: Axes, image: Any, words: str = "score of a pixel", beside: list[Axes] | None = None, least: float | None = None
) -> None:
    from matplotlib.cm import ScalarMappable

    solid = ScalarMappable(norm=image.norm, cmap=image.cmap)
    bar = ax.figure.colorbar(solid, ax=beside or ax, fraction=0.04, pad=0.02)
    bar.ax.set_ylim(bottom=least)
    bar.ax.tick_params(labelsize=6)
    bar.set_label(words, fontsize=6.5)
    bar.outline.set_visible(False)


def _lines(result: Attribution, example: int) -> list[list[int]]:
    """Which tokens stand in which line."""
    tokens, _ = result.of_tokens(example)
    lines: list[list[int]] = [[]]
    room = 0
    for place, token in enumerate(tokens):
        wide = len(readable(token)) + 1
        if lines[-1] and room + wide > LINE:
            lines.append([])
            room = 0
        lines[-1].append(place)
        room += wide
    return lines


def _words(result: Attribution, ax: Axes, example: int) -> None:
    """Tokens one after the other on patches of their colour, with their scores below."""
    from matplotlib import colormaps

    tokens, scores = result.of_tokens(example)
    limit = float(np.abs(scores).max()) or 1.0
    lines = _lines(result, example)
    widest = max(sum(len(readable(tokens[place])) + 1 for place in line) for line in lines)
    ax.set_xlim(0, max(widest, LINE // 2))
    ax.set_ylim(len(lines), 0)
    for row, line in enumerate(lines):
        x = 0.0
        for place in line:
            text, share = readable(tokens[place]), float(scores[place]) / limit
            colour = colormaps[SIGNED](0.5 + 0.5 * share)
            wide = len(text) + 0.8
            ax.add_patch(_box(x, row, wide, colour))
            ink = "white" if _dark(colour) else INK
            ax.text(
                x + wide / 2,
                row + 0.42,
                text.strip() or "␣",
                ha="center",
                va="center",
                fontsize=8.5,
                color=ink,
                family="monospace",
            )
            ax.text(x + wide / 2, row + 0.93, f"{scores[place]:.2g}", ha="center", va="center", fontsize=5.5, color=INK)
            x += len(text) + 1
    ax.axis("off")


def _box(x: float, row: int, wide: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, row + 0.1), wide, 0.68, facecolor=colour, edgecolor=PALE, linewidth=0.4)


def _dark(colour: Any) -> bool:
    red, green, blue = colour[:3]
    return bool(0.299 * red + 0.587 * green + 0.114 * blue < 0.5)


def _bars(result: Attribution, ax: Axes, example: int) -> None:
    scores = result.scores[example].flatten().double().numpy()
    colours = np.where(scores >= 0, "#B2182B", "#2166AC")
    ax.bar(np.arange(len(scores)), scores, color=colours.tolist(), width=0.9)
    ax.axhline(0, color=PALE, linewidth=0.6)
    ax.tick_params(labelsize=7)
    if result.kind == "nodes":
        ax.set_xticks(np.arange(len(scores)), result.tokens[example], rotation=90, fontsize=5.5 if len(scores) > 24 else 7)
        ax.set_ylabel("of the metric, over its edges", fontsize=8)
    else:
        ax.set_xlabel("number at the place", fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


# ---- a notebook


def as_html(result: Attribution) -> str:
    """Tokens on patches of their colour; for other kinds the words of the result."""
    if result.kind != "tokens":
        return f"<pre>{html.escape(repr(result))}</pre>"
    from matplotlib import colormaps

    rows = []
    for example in range(len(result)):
        tokens, scores = result.of_tokens(example)
        limit = float(np.abs(scores).max()) or 1.0
        spans = []
        for token, score in zip(tokens, scores, strict=True):
            colour = colormaps[SIGNED](0.5 + 0.5 * float(score) / limit)
            red, green, blue = (round(255 * part) for part in colour[:3])
            ink = "white" if _dark(colour) else "black"
            style = f"background:rgb({red},{green},{blue});color:{ink};padding:1px 3px;margin:1px;border-radius:3px"
            spans.append(f'<span style="{style}" title="{score:.4g}">{html.escape(token.strip() or "␣")}</span>')
        rows.append(
            f"<div><b>{html.escape(_title(result, example))}</b></div><div style='line-height:2'>{' '.join(spans)}</div>"
        )
    return "".join(rows)


PANELS = 6
"""How many panels stand in a row."""


def draw_patches(result: PatchMaps, kind: str, layer: int, query: Any, example: int, ax: Axes | None) -> Figure:
    """A picture in grey under maps of its patches, all in one scale of colours from 0 on; few of them are above it."""
    import matplotlib.pyplot as plt

    maps, titles, words = _panels(result, kind, layer, query, example)
    most = 1.0 if kind == "classes" else limit_of(maps)
    if ax is not None:
        _over_picture(ax, result, example, maps[0], most, titles[0])
        return cast("Figure", ax.figure)
    columns = min(len(maps), PANELS)
    rows = -(-len(maps) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.0 + 1.7 * columns, 0.5 + 1.9 * rows), squeeze=False, layout="constrained"
    )
    for here in axes.flat[len(maps) :]:
        here.set_axis_off()
    for here, values, title in zip(axes.flat, maps, titles, strict=False):
        image = _over_picture(here, result, example, values, most, title)
    _bar(axes[0, 0], image, words, list(axes.flat))
    return figure


def _panels(result: PatchMaps, kind: str, layer: int, query: Any, example: int) -> tuple[Floats, list[str], str]:
    """Maps of patches, a title for each, and what they show."""
    if kind == "classes":
        here = result.probability[:, example].numpy()
        null = result.other[:, example].mean((1, 2))
        titles = [f"layer {name}\nanother class {one:.2g}" for name, one in zip(result.points, null, strict=True)]
        return here, titles, f"probability of class {result.answers[example]}"
    if kind == "rollout":
        return result.rollout[example, None].numpy(), ["attention rollout"], "share of what arrives"
    seen = result.seen_from(layer, query)[example]
    titles = [f"head {n}: {float(one.sum()):.0%}" for n, one in enumerate(seen)]
    alike = 1 / next(iter(result.attention.values())).shape[-1]
    return seen.numpy(), titles, f"attention (to all alike: {alike:.2g})"


def _over_picture(ax: Axes, result: PatchMaps, example: int, values: Floats, most: float, title: str) -> Any:
    picture = result.images[example].mean(0).numpy()
    extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=extent)
    image = ax.imshow(values, cmap="viridis", vmin=0, vmax=most, alpha=0.65, extent=extent, interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, fontsize=7.5, color=INK)
    return image
