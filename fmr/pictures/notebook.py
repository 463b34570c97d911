"""How things look at the end of a notebook cell: a picture where one is small enough, else a table or plain text."""

import html
import re
from collections.abc import Iterable, Sequence

from fmr.errors import DrawError
from fmr.nodes import Nodes
from fmr.pictures.draw import svg
from fmr.pictures.picture import View, picture

MOST_BOXES = 32
"""A picture with more boxes than this does not fit a notebook."""

WIDEST = 1200
"""Points of a picture's width; a wider one would be made too small to read."""

DEPTHS = (3, 2, 1)
"""How many levels of modules a notebook's picture opens: as many of these as fit."""


def drawn(graph: Nodes) -> str | None:
    """The picture of a graph for a notebook; None where Graphviz is missing or no depth gives a small one."""
    for depth in DEPTHS:
        if len(picture(graph, View(depth=depth)).boxes) > MOST_BOXES:
            continue
        try:
            text = svg(graph, depth=depth).decode()
        except (DrawError, OSError):
            return None
        width = re.search(r'<svg width="(\d+)', text)
        if width is not None and int(width[1]) <= WIDEST:
            return text[width.start() :].replace("<svg ", '<svg style="max-width:100%;height:auto" ', 1)
    return None


def preformatted(value: object) -> str:
    """The text of a value as HTML."""
    try:
        text = repr(value)
    except Exception as error:  # a display must not stop a notebook
        text = f"{type(value).__name__} that cannot be shown: {error}"
    return f"<pre>{html.escape(text)}</pre>"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], after: str = "") -> str:
    """A compact HTML table with a title above it and lines of text below; everything is escaped."""
    cells = "".join(_row("td", row) for row in rows)
    cells = f"<table>{_row('th', head)}{cells}</table>" if cells else ""
    below = f'<pre style="margin:0.3em 0">{html.escape(after)}</pre>' if after else ""
    return f"<div><b>{html.escape(title)}</b>{cells}{below}</div>"


def _row(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{kind} style="text-align:left">{html.escape(cell)}</{kind}>' for cell in cells) + "</tr>"
