"""What is written in the boxes of a picture, and in the tooltips behind them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fmr.disk.files import printed
from fmr.errors import number_of
from fmr.ids import OPAQUE, relative, within
from fmr.nests import Nest, ids_in
from fmr.nodes import Node, Nodes, Scope, scope_of
from fmr.ops.fused import is_fused
from fmr.pictures.picture import Box, Picture

TIMES = "\N{MULTIPLICATION SIGN}"


class Line(NamedTuple):
    """One line of a caption: a part that stands out, then a plain one, then a pale one."""

    strong: str = ""
    plain: str = ""
    pale: str = ""
    small: bool = False


class Captions:
    """The captions and tooltips of one picture."""

    def __init__(self, graph: Nodes, shown: Picture, roles: Mapping[str, str], notes: Mapping[str, str]) -> None:
        self.graph, self.shown, self.roles, self.notes = graph, shown, roles, notes

    def role(self, box: Box) -> str | None:
        """The role of the one value that a box stands for."""
        alone = len(box.nodes) == 1 and not box.scopes and box.look != "output"
        return self.roles.get(box.nodes[0].id) if alone else None

    def title(self) -> Line:
        """The headline of the picture."""
        ops, calls = sum(not node.id.is_source for node in self.graph.nodes), len(self.graph.scopes)
        return Line(strong=f"{self.graph.model}   ", pale=f"{number_of(ops, 'op')} in {number_of(calls, 'module call')}")

    def frame(self, scope: Scope) -> Line:
        """The caption of a module call that is open: its place in the one around it, its class, what was found in it."""
        name = self._relative(scope)
        told = " · ".join((scope.kind, *filter(None, [self.notes.get(scope.path)])))
        return Line(strong=f"{name} ", pale=f"· {told}") if name else Line(pale=told)

    def lines(self, box: Box) -> Iterator[Line]:
        """The caption of a box."""
        if role := self.role(box):
            yield Line(strong=role)
        match box.look:
            case "cut":
                yield Line(pale=f"… {box.hidden} more", small=True)
            case "output":
                yield Line(strong="output")
                sizes = [f"{at} {size(self.graph[name])}".strip() for at, name in _named(self._output())]
                yield from (Line(pale=text, small=True) for text in shortened(sizes, 6))
            case "module" | "fold":
                yield from self._call(box)
            case "run":
                yield Line(strong=f"{number_of(len(box.nodes), 'op')} ", pale="without parameters")
                yield Line(pale=", ".join(_few(list(dict.fromkeys(node.op for node in box.nodes)), 3)), small=True)
                yield Line(pale=f"→ {size(box.nodes[-1])}", small=True)
            case _:
                yield Line(plain=name_in(box.nodes[0], self.shown.scopes.get(box.place or "")))
                yield Line(pale=size(box.nodes[0]), small=True)
        if held := self._held(box):
            yield Line(plain="holds " + ", ".join(held), small=True)
        if found := self._found(box):
            yield Line(plain=", ".join(_few(found, 3)), small=True)

    def _call(self, box: Box) -> Iterator[Line]:
        """The caption of closed module calls: path, class, ops in each, what comes out."""
        times = len(box.scopes)
        ends = dict.fromkeys(self._relative(scope) for scope in (box.scopes[0], box.scopes[-1]))
        yield Line(strong=(" … ".join(ends) or self.graph.model) + (f"  {TIMES} {times}" if times > 1 else ""))
        count = number_of(len(box.ops) // times, "op")
        yield Line(pale=f"{box.scopes[0].kind} · {count}" + (" each" if times > 1 else ""), small=True)
        unseen = sum(node.op == OPAQUE for node in box.nodes)
        if unseen:
            yield Line(plain=f"{unseen} opaque inside", small=True)
        sizes = [size(self.graph[name]) for name in ids_in(box.scopes[-1].output)]
        if sizes:
            yield Line(pale="→ " + ", ".join(_few(sizes, 2)), small=True)

    def _output(self) -> Nest:
        return self.graph.scopes[0].output

    def _relative(self, scope: Scope) -> str:
        """The path of a module call as seen from the one around it."""
        return relative(scope.path, scope.parent or "")

    def _held(self, box: Box) -> list[str]:
        """The roles of values that have no box of their own: inside a closed module call or a fused op."""
        if not self.roles or box.look == "output":
            return []
        inside = {str(node.id) for node in box.nodes} if len(box.nodes) > 1 or box.scopes else set()
        fused = tuple(scope_of(node) + "/" for node in box.ops if is_fused(node))
        own = {str(node.id) for other in self.shown.boxes if self.role(other) for node in other.nodes}
        held = (role for name, role in self.roles.items() if name in inside or (name.startswith(fused) and name not in own))
        return list(dict.fromkeys(held))

    def _found(self, box: Box) -> list[str]:
        """The notes on a closed module call and on what is in it, each once, with how often it is said."""
        if not box.scopes:
            return []
        path = box.scopes[0].path
        inside = Counter(note for scope, note in self.notes.items() if within(scope, path))
        return [note + (f" {TIMES} {times}" if times > 1 else "") for note, times in inside.items()]

    # ---- tooltips

    def about(self, box: Box) -> list[str]:
        """The tooltip of a box: full IDs, arguments, call sites."""
        if box.look == "cut":
            return [f"{number_of(box.hidden, 'neighbour')} not shown; a larger hops= shows more"]
        if box.look == "output":
            return shortened([f"{at} = {name}" if at else name for at, name in _named(self._output())], 40)
        if box.scopes:
            return shortened([self.about_call(scope) for scope in box.scopes], 40)
        if len(box.nodes) > 1:
            return shortened([str(node.id) for node in box.nodes], 40)
        return list(_about(box.nodes[0]))

    def about_call(self, scope: Scope) -> str:
        """The tooltip of a module call."""
        made = list(ids_in(scope.output))
        return f"{scope.path or 'root'} ({scope.kind})" + (f" -> {', '.join(_few(made, 3))}" if made else "")

    def about_edge(self, tail: int, head: int) -> list[str]:
        """The tooltip of an edge: the values that flow, each with its reader and the argument that it fills."""
        boxes = self.shown.boxes
        if boxes[head].look == "output":
            return shortened([f"{node.id} -> output" for node in boxes[tail].nodes if node in boxes[head].nodes])
        flow = self.shown.flow(tail, head)
        return shortened([f"{parent} -> {node.id} ({parent.at})" for parent, node in flow]) or ["not shown"]


def _about(node: Node) -> Iterator[str]:
    yield node.id
    yield f"{node.kind} {list(node.shape)} on {node.device}"
    yield from (f"{parent.at or 'reads'} = {parent}" for parent in node.parents)
    yield from (f"{at} = {printed(value)}" for at, value in node.args.items())
    if node.where:
        yield node.where


def name_in(node: Node, scope: Scope | None) -> str:
    """What a module call that a value is drawn in calls it: the end of its ID, or the module's own name for a weight."""
    if not node.id.is_source:
        return node.id.rpartition("/")[2]
    module = scope.module if scope is not None else ""
    return node.id.partition(":")[2].removeprefix(f"{module}." if module else "")


def size(node: Node) -> str:
    """A shape as 1x16x64 with times signs, with the dtype where it is not a floating one."""
    text = TIMES.join("?" if length < 0 else str(length) for length in node.shape) or "scalar"
    return text if node.dtype.is_floating_point else f"{text} {node.kind}"


def shortened(lines: list[str], most: int = 12) -> list[str]:
    """The first lines, and how many more there are."""
    return lines if len(lines) <= most else [*lines[: most - 1], f"… {len(lines) - most + 1} more"]


def _few(items: Sequence[str], most: int) -> list[str]:
    return [*items[:most], *(["…"] if len(items) > most else [])]


def _named(nest: Nest, at: str = "") -> Iterator[tuple[str, str]]:
    """Every ID in a nest of them, with its position."""
    if isinstance(nest, str):
        yield at, nest
    elif nest is not None:
        for key, item in nest.items() if isinstance(nest, dict) else enumerate(nest):
            yield from _named(item, f"{at}.{key}" if at else str(key))
