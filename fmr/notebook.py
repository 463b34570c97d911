"""How things look at the end of a notebook cell: a picture where one is small enough, else a table or plain text."""

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fmr.draw import svg
from fmr.errors import DrawError
from fmr.picture import View, picture

if TYPE_CHECKING:
    from fmr.graph import Graph

MOST_BOXES = 32
"""A picture with more boxes than this does not fit a notebook."""

DEPTHS = (3, 2, 1)
"""How many levels of modules a notebook's picture opens: as many of these as fit."""


def drawn(graph: "Graph") -> str | None:
    """The picture of a graph for a notebook; None where Graphviz is missing or no depth gives a small one."""
    depth = next((d for d in DEPTHS if len(picture(graph, View(depth=d)).boxes) <= MOST_BOXES), None)
    if depth is None:
        return None
    try:
        text = svg(graph, depth=depth).decode()
    except (DrawError, OSError):
        return None
    return text[text.index("<svg") :].replace("<svg ", '<svg style="max-width:100%;height:auto" ', 1)


def preformatted(value: object) -> str:
    """The text of a value as HTML."""
    try:
        text = repr(value)
    except Exception as error:  # a display must not stop a notebook
        text = f"{type(value).__name__} that cannot be shown: {error}"
    return f"<pre>{html.escape(text)}</pre>"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], after: str = "") -> str:
    """A compact HTML table with a title above it and lines of text below; everything is escaped."""
    cells = "".join(_row("th", head)) + "".join(_row("td", row) for row in rows)
    below = f'<pre style="margin:0.3em 0">{html.escape(after)}</pre>' if after else ""
    return f"<div><b>{html.escape(title)}</b><table>{cells}</table>{below}</div>"


def _row(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{kind} style="text-align:left">{html.escape(cell)}</{kind}>' for cell in cells) + "</tr>"
