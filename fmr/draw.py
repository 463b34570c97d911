"""How a picture of a graph looks, as DOT for Graphviz and as SVG."""

import html
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmr.build import ids_in
from fmr.errors import DrawError
from fmr.files import write_whole
from fmr.inner import is_fused, scope_of
from fmr.nodes import Nest, Node, Scope
from fmr.picture import Box, Picture, View, paths, picture

if TYPE_CHECKING:
    import graphviz

    from fmr.graph import Graph

FONT = "Helvetica,Arial,sans-serif"
INK, GREY, PALE, BLUE, RED = "#222222", "#767676", "#B8B8B8", "#0072B2", "#B34700"
_LONGEST = 160
_LISTED = 12
_TOP = 4


@dataclass(frozen=True)
class Look:
    """How a kind of box is drawn, and what the legend says of it."""

    legend: str
    fill: str
    line: str
    shape: str = "box"
    style: str = "rounded,filled"
    ink: str = INK
    sides: int = 1


LOOKS = {
    "input": Look("input", "#3D3D3D", "#3D3D3D", ink="#FFFFFF"),
    "param": Look("parameter", "#DCEAF6", BLUE, style="filled"),
    "buffer": Look("buffer", "#FFFFFF", BLUE, style="filled,dashed"),
    "op": Look("op", "#FFFFFF", "#6E6E6E"),
    "fused": Look("fused op", "#FFF3D6", "#8A6100", sides=2),
    "opaque": Look("opaque: producer not seen", "#FDE7DC", RED, style="rounded,filled,dashed"),
    "module": Look("module call, closed", "#E4E1EC", "#5A5470", style="filled"),
    "fold": Look("equal module calls in a row", "#E4E1EC", "#5A5470", style="filled", sides=2),
    "run": Look("ops that no parameter reaches", "#F2F2F2", "#6E6E6E", style="rounded,filled,dotted"),
    "output": Look("output", "#3D3D3D", "#3D3D3D", ink="#FFFFFF"),
    "cut": Look("more beyond the cut", "#FFFFFF", "#FFFFFF", shape="plaintext", style="", ink=GREY, sides=0),
}
ROLES = (
    ("#56B4E9", INK),
    ("#E69F00", INK),
    ("#3DB48C", INK),
    ("#F0E442", INK),
    ("#DD8FB8", INK),
    ("#0072B2", "#FFFFFF"),
    ("#D55E00", "#FFFFFF"),
    ("#999999", INK),
)
"""Fill and ink of roles, after Okabe and Ito: told apart with any colour vision. A role's name stands in its box as well."""


def dot(graph: "Graph", **view: Any) -> str:
    """The picture of a graph in the DOT language.

    >>> dot(graph, depth=1).startswith("digraph")
    True

    The arguments are those of `Graph.save_dot`. The same graph and arguments give the same text.
    """
    return str(_drawing(graph, **view).source)


def svg(graph: "Graph", **view: Any) -> bytes:
    """The picture of a graph as SVG; without Graphviz's program `dot` a `DrawError` that says how to get it."""
    import graphviz

    try:
        return bytes(_drawing(graph, **view).pipe(format="svg", quiet=True))
    except graphviz.ExecutableNotFound:
        raise DrawError(
            "Drawing SVG needs Graphviz's program 'dot', which is not on the PATH. Expected it from `apt-get install graphviz`, "
            "`brew install graphviz` or `conda install -c conda-forge graphviz`. graph.save_dot(path) works without it."
        ) from None
    except graphviz.CalledProcessError as error:
        raise DrawError(
            f"Graphviz's 'dot' could not draw this picture: {error}. Expected it to end with status 0. Draw less, with depth= or "
            f"around=, or write the text with graph.save_dot(path) and draw it elsewhere."
        ) from error


def save_dot(graph: "Graph", path: str | os.PathLike[str], **view: Any) -> None:
    """Write the picture in the DOT language, whole or not at all."""
    write_whole(path, dot(graph, **view).encode())


def save_svg(graph: "Graph", path: str | os.PathLike[str], **view: Any) -> None:
    """Write the picture as SVG, whole or not at all."""
    write_whole(path, svg(graph, **view))


def roles_of(structure: Any) -> Mapping[str, str]:
    """The roles by ID that a structure has, or a mapping that was given itself."""
    if structure is None:
        return {}
    roles = getattr(structure, "roles", structure)
    if not isinstance(roles, Mapping):
        raise DrawError(
            f"structure={structure!r} names no roles. Expected what fmr.locate returns, or a mapping from IDs to roles as "
            f"{{'h.0.attn/softmax#0': 'pattern'}}."
        )
    return {str(name): str(role) for name, role in roles.items()}


# ---- the drawing


def _drawing(graph: "Graph", structure: Any = None, **options: Any) -> "graphviz.Digraph":
    view = View(roles=roles_of(structure), **options)
    return _Drawing(graph, picture(graph, view), view.roles).draw()


class _Drawing:
    """One picture on its way to DOT."""

    def __init__(self, graph: "Graph", shown: Picture, roles: Mapping[str, str]) -> None:
        self.graph, self.shown, self.roles = graph, shown, roles
        self.scopes = {scope.path: scope for scope in graph.scopes}
        self.names = dict.fromkeys(self._role(box) for box in shown.boxes)
        self.colours = {name: ROLES[n % len(ROLES)] for n, name in enumerate(name for name in self.names if name)}
        self.clusters = 0
        self.frames: dict[str | None, str] = {}
        sources = {place for place, box in enumerate(shown.boxes) if box.look in ("param", "buffer")}
        self.parametric = {head for tail, head in shown.edges if tail in sources}
        count = Counter(box.place for box in shown.boxes if box.look not in ("param", "buffer", "cut"))
        self.single = {place for place, times in count.items() if times == 1}

    def draw(self) -> "graphviz.Digraph":
        import graphviz

        heavy = len(self.shown.boxes) > 3000
        sheet = graphviz.Digraph(
            self.graph.model,
            graph_attr={
                **{"rankdir": "TB", "ranksep": "0.3", "nodesep": "0.24", "pad": "0.3", "fontname": FONT, "fontsize": "11"},
                **{"labelloc": "t", "labeljust": "l", "label": self._title(), "tooltip": _safe(self.graph.model)},
                **{"splines": "polyline" if heavy else "true", "bgcolor": "#FFFFFF", "compound": "true", "newrank": "true", "outputorder": "edgesfirst"},
            },
            node_attr={"fontname": FONT, "fontsize": "10", "margin": "0.11,0.045", "height": "0.2", "width": "0.3", "penwidth": "0.9"},
            edge_attr={"color": "#5A5A5A", "arrowsize": "0.55", "penwidth": "0.9"},
        )
        self._fill(sheet, None, self._contents())
        inputs = [number for number, box in enumerate(self.shown.boxes) if box.look == "input"]
        if inputs and len(inputs) <= _TOP:
            with sheet.subgraph(graph_attr={"rank": "same"}) as top:
                for number in inputs:
                    top.node(f"n{number}")
        for tail, head in self.shown.edges:
            self._edge(sheet, tail, head)
        for tail, head in dict.fromkeys((*_early(self.shown), *_loose(self.shown))):
            sheet.edge(f"n{tail}", f"n{head}", style="invis", weight="0")
        return sheet

    def _contents(self) -> dict[str | None, list[str | int]]:
        """For each place its boxes and the clusters right inside it, in the order of the boxes."""
        contents: dict[str | None, dict[str | int, None]] = {None: {}}
        for number, box in enumerate(self.shown.boxes):
            place, item = box.place, number  # type: str | None, str | int
            while True:
                known = place in contents
                contents.setdefault(place, {})[item] = None
                if place is None or known:
                    break
                place, item = (self.scopes[place].parent if place in self.scopes else None), place
        return {place: list(items) for place, items in contents.items()}

    def _fill(self, sheet: "graphviz.Digraph", place: str | None, contents: dict[str | None, list[str | int]], level: int = 0) -> None:
        for item in contents[place]:
            if isinstance(item, int):
                self._node(sheet, item)
                continue
            self.clusters += 1
            name = f"cluster_{self.clusters}"
            if item in self.single and all(isinstance(inner, int) for inner in contents[item]):
                self.frames[item] = name
            with sheet.subgraph(name=name, graph_attr=self._cluster(item, level)) as inner:
                self._fill(inner, item, contents, level + 1)

    def _cluster(self, path: str, level: int) -> dict[str, str]:
        scope = self.scopes.get(path, Scope(path, path, "", None, None, None))
        name = _line([(f"{self._relative(scope)} ", INK, True), (f"· {scope.kind}", GREY, False)] if scope.path else [(scope.kind, GREY, False)], 12)
        return {
            "label": f"<{name}>",
            "tooltip": _safe(self._about_scope(scope)),
            "style": "rounded,filled",
            "fillcolor": ("#FCFCFC", "#F5F5F5", "#EEEEEE", "#F8F8F8")[level % 4],
            "color": PALE,
            "margin": "9",
        }

    def _node(self, sheet: "graphviz.Digraph", number: int) -> None:
        box = self.shown.boxes[number]
        look, role = LOOKS[box.look], self._role(box)
        fill, ink = self.colours[role] if role else (look.fill, look.ink)
        sheet.node(
            f"n{number}",
            label=f"<{'<BR/>'.join(self._lines(box, ink))}>",
            tooltip=_safe("\n".join(self._about(box))),
            **{"shape": look.shape, "style": look.style, "fillcolor": fill, "color": look.line, "peripheries": str(look.sides)},
        )

    def _edge(self, sheet: "graphviz.Digraph", tail: int, head: int) -> None:
        boxes = self.shown.boxes
        style = {"weight": "2"}
        if "cut" in (boxes[tail].look, boxes[head].look):
            style = {"style": "dashed", "color": PALE}
        elif _carries_sources(boxes[tail], boxes[head]):
            style = {"color": "#7FA8C9", "penwidth": "0.7"}
        elif head in self.parametric and boxes[tail].place != boxes[head].place:
            style |= {"minlen": "2"}
        if boxes[tail].place != boxes[head].place and (frame := self.frames.get(boxes[head].place)):
            style |= {"lhead": frame}
        sheet.edge(f"n{tail}", f"n{head}", tooltip=_safe("\n".join(_reads(boxes[tail], boxes[head]))), **style)

    # ---- words

    def _role(self, box: Box) -> str | None:
        return self.roles.get(box.nodes[0].id) if len(box.nodes) == 1 and not box.scopes and box.look != "output" else None

    def _relative(self, scope: Scope) -> str:
        """The path of a module call as seen from the one around it."""
        above = f"{scope.parent}." if scope.parent else ""
        return scope.path.removeprefix(above)

    def _lines(self, box: Box, ink: str) -> Iterator[str]:
        """The lines of a box, as HTML."""
        pale = ink if ink != INK else "#555555"
        if role := self._role(box):
            yield _line([(role, ink, True)], 12)
        match box.look:
            case "cut":
                yield _line([(f"… {box.hidden} more", ink, False)], 9.5)
            case "output":
                yield _line([("output", ink, True)], 12)
                yield from _shortened([_line([(text, ink, False)], 9.5) for text in self._returned()])
            case "module" | "fold":
                yield from self._call_lines(box, pale)
            case "run":
                names = list(dict.fromkeys(node.op for node in box.nodes))
                yield _line([(f"{len(box.nodes)} ops ", ink, True), ("without parameters", pale, False)], 12)
                yield _line([(", ".join(names[:3]) + (", …" if len(names) > 3 else ""), pale, False)], 9.5)
                yield _line([(_size(box.nodes[-1]), pale, False)], 9.5)
            case _:
                yield _line([(self._name(box), ink, False)], 12)
                yield _line([(_size(box.nodes[0]), pale, False)], 9.5)
        if held := self._held(box):
            yield _line([("holds " + ", ".join(held), ink, True)], 11)

    def _call_lines(self, box: Box, pale: str) -> Iterator[str]:
        names = [self._relative(scope) for scope in (box.scopes[0], box.scopes[-1])]
        times, count = len(box.scopes), len(box.ops) // len(box.scopes)
        yield _line([(" … ".join(dict.fromkeys(names)) + (f"  × {times}" if times > 1 else "") or self.graph.model, INK, True)], 12)
        ops = f"{count} op{'s' * (count != 1)}" + (" each" if times > 1 else "")
        yield _line([(f"{box.scopes[0].kind} · {ops}", pale, False)], 9.5)
        opaque = sum(node.op == "opaque" for node in box.nodes)
        if opaque:
            yield _line([(f"{opaque} opaque inside", RED, True)], 9.5)
        sizes = [_size(self.graph[name]) for name in ids_in(box.scopes[-1].output)]
        if sizes:
            yield _line([("→ " + ", ".join(sizes[:2]) + (f", … {len(sizes) - 2} more" if len(sizes) > 2 else ""), pale, False)], 9.5)

    def _name(self, box: Box) -> str:
        """A value's name inside its cluster: the end of its ID, or the registered name of a source."""
        node = box.nodes[0]
        if not node.id.is_source:
            return node.id.rpartition("/")[2]
        name = node.id.partition(":")[2]
        module = self.scopes[box.place].module if box.place in self.scopes else ""
        return name.removeprefix(f"{module}.") if module else name

    def _held(self, box: Box) -> list[str]:
        """The roles of values that have no box of their own: inside a closed module call or a fused op."""
        if not self.roles or box.look in ("output", "cut"):
            return []
        inside = {str(node.id) for node in box.nodes} if len(box.nodes) > 1 or box.scopes else set()
        fused = tuple(scope_of(node) + "/" for node in box.nodes if is_fused(node))
        names = [role for name, role in self.roles.items() if name in inside or (fused and name.startswith(fused))]
        return list(dict.fromkeys(names))

    def _returned(self) -> list[str]:
        return [f"{at} {_size(self.graph[name])}".strip() for at, name in _named(self.graph.scopes[0].output)]

    def _about(self, box: Box) -> Iterator[str]:
        """The tooltip of a box."""
        if box.look == "output":
            yield from _shortened([f"{at} = {name}" if at else name for at, name in _named(self.graph.scopes[0].output)])
        elif box.look == "cut":
            yield f"{box.hidden} neighbours are not shown: raise hops="
        elif box.scopes:
            yield from _shortened([self._about_scope(scope) for scope in box.scopes])
        elif len(box.nodes) > 1:
            yield from _shortened([node.id for node in box.nodes], 40)
        else:
            yield from _about_node(box.nodes[0])

    def _about_scope(self, scope: Scope) -> str:
        out = ", ".join(list(ids_in(scope.output))[:3])
        return f"{scope.path or 'root'} ({scope.kind})" + (f" -> {out}" if out else "")

    # ---- title and legend

    def _title(self) -> str:
        """Title and legend as one HTML table: only what the picture has."""
        ops = sum(not node.id.is_source for node in self.graph.nodes)
        size = f"{ops} ops in {len(self.graph.scopes)} module calls"
        head = _line([(f"{self.graph.model}   ", INK, True)], 15) + _line([(size, GREY, False)], 11)
        cells = [_cell(look.legend, look.fill, look.line, look.ink, look) for name, look in LOOKS.items() if self._has(name)]
        cells += [_cell(role, fill, GREY, ink, LOOKS["op"]) for role, (fill, ink) in self.colours.items()]
        rows = "".join(f"<TR>{''.join(cells[n : n + 6])}</TR>" for n in range(0, len(cells), 6))
        table = f'<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="5" CELLPADDING="3">{rows}</TABLE>'
        return f'<<TABLE BORDER="0" CELLSPACING="2"><TR><TD ALIGN="LEFT">{head}</TD></TR><TR><TD ALIGN="LEFT">{table}</TD></TR></TABLE>>'

    def _has(self, look: str) -> bool:
        return any(box.look == look for box in self.shown.boxes)


def _cell(text: str, fill: str, line: str, ink: str, look: Look) -> str:
    style = ",".join(part for part in look.style.split(",") if part != "filled") or "radial"
    style = f' STYLE="{style}"' if style != "radial" else ""
    return f'<TD BGCOLOR="{fill}" COLOR="{line}"{style}>{_line([(text, ink, False)], 9.5)}</TD>'


def _about_node(node: Node) -> Iterator[str]:
    yield node.id
    yield f"{node.kind} {list(node.shape)} on {node.device}"
    for parent in node.parents:
        yield f"{parent.at or 'reads'} = {parent}"
    for at, value in node.args.items():
        yield f"{at} = {_printed(value)}"
    if node.where:
        yield node.where


def _reads(tail: Box, head: Box) -> list[str]:
    """The values that flow along an edge, each with the argument that it fills."""
    if head.look == "output":
        return [node.id for node in tail.nodes if node in head.nodes]
    given = {node.id for node in tail.nodes}
    found = [f"{p} -> {node.id} ({p.at})" for node in head.nodes for p in node.parents if p in given]
    return _shortened(found) or [""]


def _early(shown: Picture) -> Iterator[tuple[int, int]]:
    """Pairs that keep the inputs above everything: (first input, what nothing else keeps down)."""
    heads = {head for _, head in shown.edges}
    low = {head for tail, head in shown.edges if tail in heads}
    first = next((place for place, box in enumerate(shown.boxes) if box.look == "input"), None)
    for tail, head in shown.edges:
        if first is not None and tail not in heads and head not in low and shown.boxes[tail].look != "input":
            yield first, tail


def _loose(shown: Picture) -> Iterator[tuple[int, int]]:
    """Pairs that keep what hangs together with nothing else near the box that ran before it: (before, loose)."""
    group = list(range(len(shown.boxes)))

    def root(place: int) -> int:
        while group[place] != place:
            group[place] = place = group[group[place]]
        return place

    for tail, head in shown.edges:
        if shown.boxes[tail].look not in ("param", "buffer"):
            group[root(head)] = root(tail)
    firm = [place for place, box in enumerate(shown.boxes) if box.look not in ("param", "buffer", "input", "output", "cut")]
    main, _ = Counter(root(place) for place in firm).most_common(1)[0] if firm else (0, 0)
    done = {main}
    before = None
    for place in firm:
        if root(place) == main:
            before = place
        elif root(place) not in done and before is not None:
            done.add(root(place))
            yield before, place


def _carries_sources(tail: Box, head: Box) -> bool:
    """Whether only parameters and buffers flow along an edge."""
    read = {parent for node in head.nodes for parent in node.parents}
    return head.look != "output" and all(node.op in ("param", "buffer") for node in tail.nodes if node.id in read)


def _shortened(lines: list[str], most: int = _LISTED) -> list[str]:
    return lines if len(lines) <= most else [*lines[: most - 1], f"… {len(lines) - most + 1} more"]


def _named(nest: Nest, at: str = "") -> Iterator[tuple[str, str]]:
    """Every ID in a nest of them, with its position."""
    if isinstance(nest, str):
        yield at, nest
    elif nest is not None:
        for key, item in nest.items() if isinstance(nest, dict) else enumerate(nest):
            yield from _named(item, f"{at}.{key}" if at else str(key))


def _size(node: Node) -> str:
    """A shape as 1×16×64, with the dtype where it is not a floating one."""
    size = "×".join(str(length) for length in node.shape) or "scalar"
    return size if node.dtype.is_floating_point else f"{size} {node.kind}"


def _printed(value: Any) -> str:
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _visible(text: str) -> str:
    """The text with characters that XML does not allow written out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _safe(text: str) -> str:
    """Text for a plain DOT attribute: backslashes are no escapes and angle brackets no markup."""
    import graphviz

    return graphviz.escape(_visible(text))


def _line(parts: Iterable[tuple[str, str, bool]], size: float) -> str:
    """One line of an HTML label, from texts with their colour and weight."""
    texts = [(html.escape(_visible(text).replace("\n", " ")), ink, bold) for text, ink, bold in parts if text]
    texts = [(text.rstrip() + "&#160;" * (len(text) - len(text.rstrip())), ink, bold) for text, ink, bold in texts]
    return "".join(
        f'<FONT POINT-SIZE="{size}" COLOR="{ink}">{f"<B>{text}</B>" if bold else text}</FONT>' for text, ink, bold in texts
    )
