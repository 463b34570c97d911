"""Attention patterns as pictures: one small heat map per head, with the tokens on both axes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fmr.errors import DrawError, StructureError, number_of, whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Tokens = Sequence[Any] | tuple[Sequence[Any], Sequence[Any]] | None
"""One token per position; or those of the queries and those of the keys; or None for positions."""

COLOURS = "Blues"
"""From white to dark in one hue, so that more is darker for every kind of colour vision and in grey."""

INK, PALE, UNKNOWN = "#333333", "#B8B8B8", "#E8E2D8"
LONGEST, LINE, WIDE = 16, 1.25, 0.6  # characters of a token; height of a line of text and width of a letter in font sizes


class Sizes(NamedTuple):
    """How large a panel is drawn: inches of a cell at most, of a panel's longer side, and points of its labels."""

    cell: float
    least: float
    most: float
    font: float


SMALL, LARGE = Sizes(0.15, 1.5, 3.0, 6.0), Sizes(0.22, 2.6, 12.0, 8.0)
WIDEST = 16.0  # inches of all panels side by side


def chosen(heads: int | Sequence[int] | None, n_heads: int) -> list[int]:
    """The numbers of the heads to draw."""
    if heads is None:
        return list(range(n_heads))
    one = whole_number(heads)
    several = list(heads) if isinstance(heads, Iterable) and not isinstance(heads, str) and one is None else [one]
    numbers = [number for number in map(whole_number, several) if number is not None and 0 <= number < n_heads]
    if not numbers or len(numbers) < len(several):
        raise StructureError(f"heads={heads!r}: expected some of 0 to {n_heads - 1}, as heads=[0], or None for all of them.")
    return numbers


@dataclass(frozen=True)
class Labels:
    """What stands at the rows and at the columns of a map; None for positions."""

    queries: list[str] | None
    keys: list[str] | None

    @staticmethod
    def of(tokens: Tokens, rows: int, columns: int) -> "Labels":
        """The labels that `tokens` stands for, checked against the size of the maps."""
        if tokens is None:
            return Labels(None, None)
        if isinstance(tokens, str):
            raise DrawError(
                f"tokens={tokens!r} is one text. Expected one token per position, {columns} here, as "
                f"tokenizer.convert_ids_to_tokens(input_ids[0]) gives."
            )
        if not isinstance(tokens, Sequence) and getattr(tokens, "ndim", 0) != 1:
            raise DrawError(f"tokens is {type(tokens).__name__}, expected a list of one token per position, {columns} here.")
        pair = isinstance(tokens, tuple) and len(tokens) == 2 and not any(isinstance(part, str) for part in tokens)
        if len(tokens) == 1 and not isinstance(tokens[0], str) and isinstance(tokens[0], Sequence):
            raise DrawError(
                "tokens holds the tokens of each example. Expected those of the example that is drawn: tokens[0]."
            )
        pair = pair and all(isinstance(part, Sequence) or getattr(part, "ndim", 0) == 1 for part in tokens)
        queries, keys = (list(part) for part in (tokens if pair else (tokens, tokens)))
        if (len(queries), len(keys)) != (rows, columns):
            given = (
                f"{len(queries)} for the queries and {len(keys)} for the keys" if pair else number_of(len(queries), "token")
            )
            also = "" if pair or rows == columns else " Queries and keys differ in number: pass tokens=(queries, keys)."
            raise DrawError(
                f"Got {given}, but the pattern has {number_of(rows, 'query', 'queries')} and "
                f"{number_of(columns, 'key')}. Expected one each.{also}"
            )
        return Labels([readable(token) for token in queries], [readable(token) for token in keys])

    def room(self, font: float) -> tuple[float, float]:
        """About how wide and how high the labels at the left and below are, in inches."""
        longest = (max(map(len, texts or ["000"]), default=0) for texts in (self.queries, self.keys if self.keys else [""]))
        left, below = (0.2 + 0.6 * font / 72 * length for length in longest)
        return left, below


def readable(token: object) -> str:
    """A token as a label: one line, not too long, no mathematics, and no sign that the font of pictures lacks."""
    text = with_glyphs("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(token)))
    return (text if len(text) <= LONGEST else text[: LONGEST - 1] + "…").replace("$", r"\$")


def with_glyphs(text: str) -> str:
    """A text with numbers for the characters that the font of pictures does not have."""
    if text.isascii():
        return text
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) or not c.isprintable() else f"<{ord(c):04X}>" for c in text)


def draw(maps: Tensor, numbers: Sequence[int], labels: Labels, title: str, note: str, sizes: Sizes = SMALL) -> "Figure":
    """A figure with one heat map per head on one scale from 0 to 1. maps: (heads, queries, keys); numbers: their names."""
    plt = pyplot()
    figure: Figure
    rows, columns = maps.shape[-2:]
    cell = max(min(sizes.cell, sizes.most / max(rows, columns)), sizes.least / max(rows, columns))
    across = max(1, min(math.ceil(len(maps) ** 0.5), int(WIDEST // (columns * cell))))
    down = math.ceil(len(maps) / across)
    left, below = labels.room(sizes.font)
    wide, high = columns * cell + 0.2, max(rows * cell, 0.3) + 0.4
    size = across * wide + left * _labelled(across, sizes) + 1.4, down * high + below * _labelled(down, sizes) + 0.8
    figure = plt.figure(figsize=(max(size[0], 5.0), size[1]), layout="constrained")
    axes = [figure.add_subplot(down, across, n + 1) for n in range(len(maps))]
    values = maps.float().cpu().numpy()
    for n, (ax, number) in enumerate(zip(axes, numbers, strict=True)):
        image = ax.imshow(values[n], cmap=_colours(), vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        ax.set_title(f"head {number}", fontsize=max(sizes.font, 7.5), color=INK, pad=3)
        full = sizes is LARGE
        _ticks(ax, "y", labels.queries, rows, cell, sizes, full or n % across == 0)
        _ticks(ax, "x", labels.keys, columns, cell, sizes, full or n + across >= len(maps))
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 2.2 / (down * high)), aspect=16, pad=0.02)
    bar.set_label("attention", color=INK, fontsize=8)
    bar.ax.tick_params(labelsize=7, colors=INK)
    bar.outline.set_visible(False)
    figure.supxlabel("key", fontsize=8, color=INK)
    figure.supylabel("query", fontsize=8, color=INK)
    figure.suptitle(f"{title}\n{note}", x=0.01, ha="left", fontsize=9.5, color=INK)
    return returned(figure)


def returned(figure: "Figure") -> "Figure":
    """A figure as a plot returns it: a notebook shows what a cell returns, and an open one would be shown a second time.
    A title wider than the figure goes on in another line."""
    plt = pyplot()
    for text in figure.texts:
        most = int(figure.get_figwidth() * 72 / (WIDE * float(text.get_fontsize())))
        text.set_text("\n".join(fill(line, most) for line in text.get_text().split("\n")))
    if "inline" in plt.get_backend():
        plt.close(figure)
    return figure


def _labelled(panels: int, sizes: Sizes) -> int:
    """How many of the panels beside each other have labels between them: each of the large ones, else the first."""
    return panels if sizes is LARGE else 1


def _ticks(ax: "Axes", side: str, labels: list[str] | None, count: int, cell: float, sizes: Sizes, shown: bool) -> None:
    """Label one axis of a panel: every token where there is room or the panels are large, else every n-th."""
    line = cell * 72 / LINE
    font = max(2.0, min(sizes.font, line)) if sizes is LARGE else sizes.font
    step = 1 if sizes is LARGE and labels else max(1, math.ceil((sizes.font if labels else 2.5 * sizes.font) / line))
    places = list(range(0, count, step))
    texts = [labels[place] if labels else str(place) for place in places] if shown else []
    set_ticks = ax.set_xticks if side == "x" else ax.set_yticks
    set_ticks(places if shown else [], texts, fontsize=font, color=INK)
    ax.tick_params(axis=side, length=2 if shown else 0, width=0.5, pad=1.5, color=PALE)  # type: ignore[arg-type]
    if side == "x" and labels and shown:
        ax.tick_params(axis="x", labelrotation=90)
    ax.spines[:].set(color=PALE, linewidth=0.5)


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps[COLOURS].with_extremes(bad=UNKNOWN)


def pyplot() -> Any:
    """matplotlib's functions, or one clear error."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise DrawError(
            "Heat maps need matplotlib, which is not installed. Get it with: pip install 'fmr[analysis]'. "
            "Expected nothing else: run[structure.attention[0].pattern] holds the numbers."
        ) from None
    return plt
