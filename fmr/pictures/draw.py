"""How a picture of a graph looks, in the DOT language and as SVG."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmr.disk.files import write_whole
from fmr.errors import DrawError
from fmr.ids import OPAQUE
from fmr.nodes import Nodes
from fmr.pictures.captions import Captions, Line
from fmr.pictures.endings import check_ending
from fmr.pictures.picture import Box, Picture, View, notes_of, picture, roles_of

if TYPE_CHECKING:
    import graphviz


INK, SOFT, GREY, PALE, BLUE, VIOLET, RED = "#222222", "#555555", "#767676", "#B8B8B8", "#0072B2", "#5A5470", "#B34700"
TITLE, LARGE, SMALL = 15, 12, 9.5
"""Font sizes, in points: at the last two, Graphviz reserves nearly the width that a browser then needs."""

SHEET = {
    "rankdir": "TB",
    "newrank": "true",
    "ranksep": "0.3",
    "nodesep": "0.24",
    "compound": "true",
    "outputorder": "edgesfirst",
    "pad": "0.3",
    "bgcolor": "#FFFFFF",
    "labelloc": "t",
    "labeljust": "l",
    "fontname": "Helvetica,Arial,sans-serif",
}
NODE = {"fontname": SHEET["fontname"], "margin": "0.11,0.045", "height": "0.2", "width": "0.3", "penwidth": "0.9"}
EDGE = {"color": "#5A5A5A", "arrowsize": "0.55", "penwidth": "0.9"}
FRAMES = ("#FCFCFC", "#F5F5F5", "#EEEEEE", "#F8F8F8")

MANY_BOXES = 1000
"""From here on the horizontal places are improved for a limited time: without a limit it grows with the square."""

MANY_READERS = 4
"""Edges of a value with more readers than this are pale: masks and positions go everywhere."""

TOP_INPUTS = 4
"""Up to so many inputs stand side by side at the top; more would draw long lines through the whole picture."""


@dataclass(frozen=True)
class Look:
    """How a kind of box is drawn, and what the legend says of it."""

    legend: str
    fill: str = "#FFFFFF"
    line: str = "#6E6E6E"
    style: str = "rounded,filled"
    ink: str = INK
    shape: str = "box"
    sides: int = 1


LOOKS = {
    "input": Look("input", "#3D3D3D", "#3D3D3D", ink="#FFFFFF"),
    "param": Look("parameter", "#DCEAF6", BLUE, "filled"),
    "buffer": Look("buffer", "#FFFFFF", BLUE, "filled,dashed"),
    "op": Look("op"),
    "fused": Look("fused op", "#FFF3D6", "#8A6100", sides=2),
    "opaque": Look("opaque: its producer could not be seen", "#FDE7DC", RED, "rounded,filled,dashed"),
    "module": Look("module call, closed", "#E4E1EC", VIOLET, "filled"),
    "fold": Look("equal module calls in a row", "#E4E1EC", VIOLET, "filled", sides=2),
    "run": Look("ops that no parameter reaches", "#F2F2F2", style="rounded,filled,dotted"),
    "output": Look("output", "#3D3D3D", "#3D3D3D", ink="#FFFFFF"),
    "cut": Look("… more beyond the cut", line="#FFFFFF", style="", ink=GREY, shape="plaintext", sides=0),
}
ROLES = (
    ("#56B4E9", INK),
    ("#E69F00", INK),
    ("#3DB48C", INK),
    ("#F0E442", INK),
    ("#DD8FB8", INK),
    ("#0072B2", "#FFFFFF"),
    ("#C25400", "#FFFFFF"),
    ("#999999", INK),
    ("#005F47", "#FFFFFF"),
    ("#BFE6F5", INK),
)
"""Fill and ink of roles, after Okabe and Ito: told apart with any colour vision. A role's name stands in its box as well.

They are given out in the order of the roles in the structure, so that a role looks the same in each of its pictures.
"""


def save_dot(
    graph: Nodes,
    path: str | os.PathLike[str],
    *,
    depth: int | None = None,
    around: Any = None,
    hops: int = 1,
    structure: Any = None,
    fold: bool = True,
) -> None:
    """Write the graph as a picture in the DOT language, for Graphviz and whatever else reads it.

    >>> graph.save_dot("model.dot", depth=2)

    The arguments are those of `save_svg`. Nothing but Python is needed, and the same graph gives the same text.
    """
    check_ending(path, "dot", "gv", "txt")
    write_whole(path, dot(graph, depth=depth, around=around, hops=hops, structure=structure, fold=fold).encode())


def save_svg(
    graph: Nodes,
    path: str | os.PathLike[str],
    *,
    depth: int | None = None,
    around: Any = None,
    hops: int = 1,
    structure: Any = None,
    fold: bool = True,
) -> None:
    """Write the graph as an SVG picture whose tooltips hold full IDs, arguments and call sites.

    >>> graph.save_svg("model.svg", depth=2)
    >>> graph.save_svg("attention.svg", around="transformer.h.0.attn", structure=fmr.locate(run))

    `depth` is the number of levels of called modules that are open, so that a large model fits a screen: deeper ones
    become a box each, and the ops that no parameter reaches (masks, positions) one box where they hang together; None
    opens all. `fold` draws equal closed modules in a row as one. `around` is an ID, a node or the path of a module
    call: only what lies within `hops` edges of it is drawn, and the modules that hold it are open. `structure` colours
    and names values by their role: what `fmr.locate` returns, or a mapping from IDs to names.

    Without Graphviz's program `dot` this is a `DrawError` that says how to get it; `save_dot` needs no program.
    """
    check_ending(path, "svg")
    write_whole(path, svg(graph, depth=depth, around=around, hops=hops, structure=structure, fold=fold))


def dot(graph: Nodes, *, structure: Any = None, **view: Any) -> str:
    """The text that `save_dot` writes."""
    return str(_sheet(graph, _view(structure, view)).source)


def svg(graph: Nodes, *, structure: Any = None, **view: Any) -> bytes:
    """The bytes that `save_svg` writes."""
    import graphviz

    try:
        return bytes(_sheet(graph, _view(structure, view)).pipe(format="svg", quiet=True))
    except graphviz.ExecutableNotFound:
        raise DrawError(
            "An SVG picture needs Graphviz's program 'dot', and there is none on the PATH. Get it with `apt-get install "
            "graphviz`, `brew install graphviz` or `conda install -c conda-forge graphviz`. Expected nothing else: "
            "graph.save_dot(path) works without it."
        ) from None
    except graphviz.CalledProcessError as error:
        raise DrawError(
            f"Graphviz's program 'dot' ended with status {error.returncode} on a picture of {graph.model}. Expected 0. "
            f"Draw less of it, with depth= or around=, or write the text with graph.save_dot(path) and draw it elsewhere."
        ) from error


def _view(structure: Any, view: dict[str, Any]) -> View:
    return View(roles=roles_of(structure), notes=notes_of(structure), **view)


def _sheet(graph: Nodes, view: View) -> graphviz.Digraph:
    shown = picture(graph, view)
    return _Sheet(shown, Captions(graph, shown, view.roles, view.notes)).draw(graph.model)


class _Sheet:
    """One picture on its way to DOT."""

    def __init__(self, shown: Picture, words: Captions) -> None:
        self.shown, self.words = shown, words
        self.colours = {role: ROLES[n % len(ROLES)] for n, role in enumerate(dict.fromkeys(words.roles.values()))}
        self.contents = _contents(shown)
        self.fed = {head for tail, head in shown.edges if shown.boxes[tail].is_weight}
        self.readers = Counter(tail for tail, _ in shown.edges)
        self.entrances: dict[str | None, str] = {}
        self.frames = 0

    def draw(self, name: str) -> graphviz.Digraph:
        """The whole picture."""
        import graphviz

        limit = {"nslimit": "0.5"} if len(self.shown.boxes) > MANY_BOXES else {}
        attributes = {**SHEET, **limit, "label": self._legend(), "tooltip": _plain([name])}
        sheet = graphviz.Digraph(name, graph_attr=attributes, node_attr=NODE, edge_attr=EDGE)
        self._fill(sheet, None, 0)
        inputs = [f"n{number}" for number, box in enumerate(self.shown.boxes) if box.look == "input"]
        if 1 < len(inputs) <= TOP_INPUTS:
            with sheet.subgraph(graph_attr={"rank": "same"}) as top:
                for each in inputs:
                    top.node(each)
        for tail, head in self.shown.edges:
            sheet.edge(f"n{tail}", f"n{head}", tooltip=_plain(self.words.about_edge(tail, head)), **self._edge(tail, head))
        for tail, head in dict.fromkeys((*_below_inputs(self.shown), *_in_turn(self.shown))):
            sheet.edge(f"n{tail}", f"n{head}", style="invis", weight="0")
        return sheet

    def _fill(self, sheet: graphviz.Digraph, place: str | None, level: int) -> None:
        """Draw the boxes of a module call, and the module calls in it as frames."""
        for item in self.contents[place]:
            if isinstance(item, int):
                sheet.node(f"n{item}", **self._node(self.shown.boxes[item]))
                continue
            self.frames += 1
            name = f"cluster_{self.frames}"
            if self._has_one_entrance(item):
                self.entrances[item] = name
            with sheet.subgraph(name=name, graph_attr=self._frame(item, level)) as inner:
                self._fill(inner, item, level + 1)

    def _has_one_entrance(self, place: str) -> bool:
        """Whether a frame holds a single op: arrows then end at the frame and leave its caption legible."""
        items = self.contents[place]
        boxes = [self.shown.boxes[item] for item in items if isinstance(item, int)]
        return len(boxes) == len(items) and sum(not box.is_weight and box.look != "cut" for box in boxes) == 1

    def _frame(self, path: str, level: int) -> dict[str, str]:
        scope = self.shown.scopes[path]
        look = {"style": "rounded,filled", "fillcolor": FRAMES[level % len(FRAMES)], "color": PALE, "margin": "9"}
        return {
            "label": f"<{_html(self.words.frame(scope), INK, GREY)}>",
            "tooltip": _plain([self.words.about_call(scope)]),
            **look,
        }

    def _node(self, box: Box) -> dict[str, str]:
        look, role = LOOKS[box.look], self.words.role(box)
        fill, ink = self.colours[role] if role else (look.fill, look.ink)
        line = RED if any(node.op == OPAQUE for node in box.nodes) and box.look != "output" else look.line
        text = "<BR/>".join(_html(each, ink, SOFT if ink == INK and not role else ink) for each in self.words.lines(box))
        shape = {"shape": look.shape, "style": look.style, "peripheries": str(look.sides), "fillcolor": fill, "color": line}
        return {"label": f"<{text}>", "tooltip": _plain(self.words.about(box)), **shape}

    def _edge(self, tail: int, head: int) -> dict[str, str]:
        source, target = self.shown.boxes[tail], self.shown.boxes[head]
        entering = source.place != target.place
        look = {"lhead": self.entrances[target.place]} if entering and target.place in self.entrances else {}
        if "cut" in (source.look, target.look):
            return {"style": "dashed", "color": PALE}
        if target.look != "output" and all(
            parent.startswith(("param:", "buffer:")) for parent, _ in self.shown.flow(tail, head)
        ):
            return {**look, "color": "#7FA8C9", "penwidth": "0.7"}
        if entering and head in self.fed:
            look["minlen"] = "2"  # leaves a rank for the parameters, inside the frame
        return {**look, "color": "#A5A5A5"} if self.readers[tail] > MANY_READERS else {**look, "weight": "2"}

    def _legend(self) -> str:
        """Title and legend as one HTML table, with what this picture has."""
        title = self.words.title()
        looks = [(look, look.fill, look.ink, look.legend) for name, look in LOOKS.items() if self._has(name)]
        shown = {self.words.role(box) for box in self.shown.boxes}
        roles = [(LOOKS["op"], fill, ink, role) for role, (fill, ink) in self.colours.items() if role in shown]
        rows = [*_even_rows(looks, 6), *_even_rows(roles, 10)]
        widths = [sum(11 + 0.55 * SMALL * len(sample[3]) for sample in row) for row in rows]
        widest = max([0.6 * TITLE * len("".join(map(str, title[:3]))), *widths])
        tables = [_row(row, widest - width) for row, width in zip(rows, widths, strict=True)]
        lines = "".join(f'<TR><TD ALIGN="LEFT">{line}</TD></TR>' for line in (_html(title, INK, GREY, TITLE), *tables))
        return f'<<TABLE BORDER="0" CELLSPACING="0" CELLPADDING="2">{lines}</TABLE>>'

    def _has(self, look: str) -> bool:
        return any(box.look == look for box in self.shown.boxes)


def _contents(shown: Picture) -> dict[str | None, list[int | str]]:
    """What each module call holds directly, in execution order: numbers of boxes, and paths of module calls."""
    contents: dict[str | None, list[int | str]] = {None: []}
    for number, box in enumerate(shown.boxes):
        place: str | None = box.place
        item: int | str = number
        while place is not None and place not in contents:
            contents[place] = [item]
            item, place = place, shown.scopes[place].parent
        contents[place].append(item)
    return contents


# ---- hints for the layout: edges that are not drawn, each from what shall stand above to what shall stand below


def _below_inputs(shown: Picture) -> Iterator[tuple[int, int]]:
    """Inputs stand at the top: above what reads nothing and is read first."""
    heads = {head for _, head in shown.edges}
    later = {head for tail, head in shown.edges if tail in heads}
    first = next((number for number, box in enumerate(shown.boxes) if box.look == "input"), None)
    for tail, head in shown.edges:
        if first is not None and tail not in heads and head not in later and shown.boxes[tail].look not in ("input", "cut"):
            yield first, tail


def _in_turn(shown: Picture) -> Iterator[tuple[int, int]]:
    """What hangs together with nothing else, such as the counter of a batch norm, stands below what ran before it."""
    group = list(range(len(shown.boxes)))

    def root(number: int) -> int:
        while group[number] != number:
            group[number] = number = group[group[number]]
        return number

    for tail, head in shown.edges:
        if not shown.boxes[tail].is_weight:
            group[root(head)] = root(tail)
    inner = [n for n, box in enumerate(shown.boxes) if not box.is_weight and box.look not in ("input", "output", "cut")]
    main = Counter(map(root, inner)).most_common(1)[0][0] if inner else None
    before, placed = None, {main}
    for number in inner:
        if root(number) == main:
            before = number
        elif root(number) not in placed and before is not None:
            placed.add(root(number))
            yield before, number


# ---- text


Sample = tuple[Look, str, str, str]
"""One sample of the legend: look, fill, ink and text."""


def _even_rows(cells: list[Sample], most: int) -> Iterator[list[Sample]]:
    rows = -(-len(cells) // most)
    yield from (cells[len(cells) * n // rows : len(cells) * (n + 1) // rows] for n in range(rows))


def _row(samples: list[Sample], rest: float) -> str:
    """A row of the legend; `rest` points are left over beside it, which Graphviz would give to the samples."""
    cells = "".join(_cell(*sample) for sample in samples) + (f'<TD WIDTH="{rest:.0f}"></TD>' if rest >= 1 else "")
    return f'<TABLE BORDER="0" CELLSPACING="5" CELLPADDING="3"><TR>{cells}</TR></TABLE>'


def _cell(look: Look, fill: str, ink: str, text: str) -> str:
    """One sample of the legend."""
    kept = [part for part in look.style.split(",") if part not in ("filled", "")]
    border = f'BORDER="{look.sides}" COLOR="{look.line}"' + (f' STYLE="{",".join(kept)}"' if kept else "")
    return f'<TD BGCOLOR="{fill}" {border}>{_html(Line(plain=text, small=True), ink, ink)}</TD>'


def _html(line: Line, ink: str, pale: str, large: float = LARGE) -> str:
    """A line as an HTML-like label of Graphviz."""
    size = SMALL if line.small else large
    parts = [(f"<B>{_marked(line.strong)}</B>", ink)] if line.strong else []
    parts += [(_marked(text), colour) for text, colour in ((line.plain, ink), (line.pale, pale)) if text]
    return "".join(f'<FONT POINT-SIZE="{size}" COLOR="{colour}">{text}</FONT>' for text, colour in parts)


def _marked(text: str) -> str:
    """Text for an HTML-like label; spaces at its end count."""
    body = text.rstrip(" ")
    return html.escape(_visible(body).replace("\n", " ")) + "&#160;" * (len(text) - len(body))


def _plain(lines: Iterable[str]) -> str:
    """Text for any other attribute: backslashes are no escapes, angle brackets no markup, ampersands no entities."""
    import graphviz

    text: str = graphviz.escape(_visible("\n".join(lines)).replace("&", "&amp;"))
    return text


def _visible(text: str) -> str:
    """The text with what XML does not allow written out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
