"""What a picture of a graph shows: boxes, the clusters that hold them, the edges between them, and what was cut off."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fmr.build import ids_in
from fmr.errors import DrawError, IdError, nearest
from fmr.ids import OPAQUE, Site
from fmr.inner import is_fused, scope_of
from fmr.nodes import Node, Scope

if TYPE_CHECKING:
    from fmr.graph import Graph, ModuleCall

Around = "str | Node | Site | ModuleCall | None"
OUTSIDE = None
"""The place of inputs and outputs: they stand outside of every module."""


@dataclass(frozen=True)
class View:
    """How much of a graph to show.

    `depth` counts called modules from the root down; deeper ones become one box. `around` and `hops` keep only a
    neighbourhood. `fold` puts equal neighbouring boxes into one. `roles` names values by ID and keeps them apart.
    """

    depth: int | None = None
    around: Any = None
    hops: int = 2
    fold: bool = True
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.depth is not None and not (isinstance(self.depth, int) and self.depth >= 0):
            raise DrawError(f"depth={self.depth!r} is no depth. Expected 0 for one box, 1, 2, ... for levels, None for everything.")
        if not (isinstance(self.hops, int) and self.hops >= 0):
            raise DrawError(f"hops={self.hops!r} is no distance. Expected 0 for what around= names alone, 1, 2, ... for edges.")


@dataclass(frozen=True)
class Box:
    """One thing in a picture: a value, a module call as a whole, several equal calls, a run of ops, or an end.

    `look` says which of these; `place` is the path of the module call that it is drawn in; `nodes` are the values and
    `scopes` the module calls that it stands for; `hidden` counts the boxes beyond a cut.
    """

    look: str
    place: str | None
    nodes: tuple[Node, ...] = ()
    scopes: tuple[Scope, ...] = ()
    hidden: int = 0

    @property
    def ops(self) -> tuple[Node, ...]:
        """The values in it that some op made."""
        return tuple(node for node in self.nodes if not node.id.is_source)


@dataclass(frozen=True)
class Picture:
    """Boxes in execution order, and edges as pairs of their numbers."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


def picture(graph: "Graph", view: View) -> Picture:
    """The picture of a graph under a view.

    >>> [box.look for box in picture(graph, View(depth=1)).boxes]
    ['input', 'module', 'op', 'module', 'output']
    """
    tree = _Tree(graph, view)
    groups = _fold(tree, _runs(tree, _groups(tree)))
    found = Picture(tuple(tree.box(group) for group in groups), _edges(groups))
    return _cut(_with_output(tree, found), tree)


class _Tree:
    """The nesting of module calls in a graph, which of them are open, and what the picture is about."""

    def __init__(self, graph: "Graph", view: View) -> None:
        self.graph, self.view = graph, view
        self.scopes = {scope.path: scope for scope in graph.scopes}
        self.first: dict[str, Node] = {}
        for node in graph.nodes:
            for parent in node.parents:
                self.first.setdefault(parent, node)
        self.focus_node, focus_path = self._focus(view.around)
        self.focus_path = focus_path if self.focus_node is None else None
        opened = focus_path if self.focus_node is None else self.home(self.focus_node)
        self.opened = {scope.path for scope in self.above(opened)} if view.around is not None and opened is not None else set()

    def _focus(self, around: Any) -> tuple[Node | None, str | None]:
        """The node, or the path of the module call, that `around` names."""
        if around is None or isinstance(around, Node):
            return around, None
        scope = getattr(around, "scope", None)
        if isinstance(scope, Scope):
            return None, scope.path
        name = str(around.id if isinstance(around, Site) else around)
        if name in self.scopes:
            return None, name
        node = next((n for n in self.graph.nodes if n.id == name or (is_fused(n) and name.startswith(scope_of(n) + "/"))), None)
        if node is None:
            known = [*self.scopes, *(node.id for node in self.graph.nodes)]
            raise IdError(
                f"{self.graph.model} has no value and no module call {name!r} to draw around. Expected an ID, a node or the "
                f"path of a module call.{nearest(name, known)}"
            )
        return node, None

    def above(self, path: str | None) -> list[Scope]:
        """The module calls around a place, from the root down to the place itself."""
        chain: list[Scope] = []
        while path is not None and path in self.scopes:
            chain.append(self.scopes[path])
            path = self.scopes[path].parent
        return chain[::-1]

    def home(self, node: Node) -> str | None:
        """The module call that a value is drawn in: its own, or that of its first reader for parameters and buffers."""
        if not node.id.is_source:
            return node.scope
        if node.op == "input":
            return OUTSIDE
        return self.first[node.id].scope if node.id in self.first else ""

    def closed(self, node: Node) -> Scope | None:
        """The outermost module call around a value that is drawn as one box; None where all are open."""
        if self.view.depth is None:
            return None
        chain = self.above(self.home(node))
        return next((s for level, s in enumerate(chain) if level >= self.view.depth and s.path not in self.opened), None)

    def box(self, group: "_Group") -> Box:
        """The box that stands for a group."""
        if group.scopes:
            return Box("fold" if len(group.scopes) > 1 else "module", group.scopes[0].parent, tuple(group.nodes), tuple(group.scopes))
        if len(group.nodes) > 1:
            return Box("run", group.nodes[0].scope, tuple(group.nodes))
        node = group.nodes[0]
        look = node.op if node.id.is_source or node.op == OPAQUE else "fused" if is_fused(node) else "op"
        return Box(look, self.home(node), (node,))

    def in_focus(self, box: Box) -> bool:
        """Whether a box belongs to what `around` names."""
        if self.focus_node is not None:
            return self.focus_node.id in {node.id for node in box.nodes}
        places = [scope.path for scope in box.scopes] or [box.place]
        return any(scope.path == self.focus_path for place in places for scope in self.above(place))


@dataclass
class _Group:
    """Values that become one box: those of some module calls, or one, or a run."""

    nodes: list[Node]
    scopes: list[Scope] = field(default_factory=list)


def _groups(tree: _Tree) -> list[_Group]:
    """Each value alone, or with the others of the module call that is drawn as one box."""
    groups: list[_Group] = []
    at: dict[str, _Group] = {}
    for node in tree.graph.nodes:
        scope = tree.closed(node)
        if scope is None:
            groups.append(_Group([node]))
        elif scope.path in at:
            at[scope.path].nodes.append(node)
        else:
            at[scope.path] = _Group([node], [scope])
            groups.append(at[scope.path])
    return groups


def _runs(tree: _Tree, groups: list[_Group]) -> list[_Group]:
    """Put the ops that lead to a mask or to positions together: uninterrupted, in one module call, from no parameter."""
    if tree.view.depth is None:
        return groups
    free = _free_of_parameters(tree.graph)
    result: list[_Group] = []
    run: list[_Group] = []
    for group in groups:
        node = group.nodes[0]
        if not group.scopes and node.id.is_source:
            result.append(group)
            continue
        plain = not group.scopes and node.id in free and node.op != OPAQUE and node.id not in tree.view.roles
        if run and not (plain and node.scope == run[0].nodes[0].scope):
            run = []
        if not plain or node is tree.focus_node:
            run = []
            result.append(group)
        elif not _join(run, node, result):
            run.append(group)
            result.append(group)
    return result


def _join(run: list[_Group], node: Node, result: list[_Group]) -> bool:
    """Add a node to the groups of a run that it reads, made one; False where it reads none."""
    read = [group for group in run if {n.id for n in group.nodes} & set(node.parents)]
    for group in read[1:]:
        read[0].nodes += group.nodes
        run.remove(group)
        result.remove(group)
    if read:
        read[0].nodes.append(node)
    return bool(read)


def _free_of_parameters(graph: "Graph") -> set[str]:
    """The values that depend on no parameter."""
    free: set[str] = set()
    for node in graph.nodes:
        if node.op != "param" and all(parent in free for parent in node.parents):
            free.add(node.id)
    return free


def _fold(tree: _Tree, groups: list[_Group]) -> list[_Group]:
    """Put module calls that are equal inside, follow each other at once and feed each other, into one group."""
    result: list[_Group] = []
    for group in groups:
        last = next((g for g in reversed(result) if not g.nodes[0].id.is_source or g.scopes), None)
        if tree.view.fold and last is not None and _chained(last, group) and not _focused(tree, last, group):
            last.nodes += group.nodes
            last.scopes += group.scopes
        else:
            result.append(group)
    return result


def _focused(tree: _Tree, *groups: _Group) -> bool:
    return tree.view.around is not None and any(tree.in_focus(tree.box(group)) for group in groups)


def _chained(last: _Group, group: _Group) -> bool:
    if not (last.scopes and group.scopes) or last.scopes[-1].parent != group.scopes[0].parent:
        return False
    ids = {node.id for node in last.nodes}
    feeds = any(parent in ids for node in group.nodes for parent in node.parents)
    return feeds and _plan(last, last.scopes[0]) == _plan(group, group.scopes[0])


def _plan(group: _Group, scope: Scope) -> tuple[str, list[Any]]:
    """What a module call does inside, whatever its place: classes aside, its ops in order with their shapes."""
    below = scope.path + "."
    inside = [n for n in group.nodes if not n.id.is_source and (n.scope == scope.path or n.scope.startswith(below))]
    return scope.kind, [(n.scope[len(scope.path) :], n.op, n.shape, n.kind) for n in inside]


def _edges(groups: Sequence[_Group]) -> tuple[tuple[int, int], ...]:
    at = {node.id: place for place, group in enumerate(groups) for node in group.nodes}
    pairs = ((at[parent.id], at[node.id]) for group in groups for node in group.nodes for parent in node.parents)
    return tuple(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))


def _with_output(tree: _Tree, found: Picture) -> Picture:
    """The picture with the model's output as a box below."""
    names = set(ids_in(tree.graph.scopes[0].output)) if tree.graph.scopes else set()
    makers = [place for place, box in enumerate(found.boxes) if any(node.id in names for node in box.nodes)]
    if not makers:
        return found
    nodes = tuple(node for node in tree.graph.nodes if node.id in names)
    end = len(found.boxes)
    return Picture((*found.boxes, Box("output", OUTSIDE, nodes)), found.edges + tuple((maker, end) for maker in makers))


def _cut(found: Picture, tree: _Tree) -> Picture:
    """Only what lies within `hops` edges of what `around` names, with a stub where edges were cut."""
    if tree.view.around is None:
        return found
    kept = {place for place, box in enumerate(found.boxes) if box.look != "output" and tree.in_focus(box)}
    for _ in range(tree.view.hops):
        kept |= {b for a, b in found.edges if a in kept} | {a for a, b in found.edges if b in kept}
    order = sorted(kept)
    number = {place: n for n, place in enumerate(order)}
    boxes = [found.boxes[place] for place in order]
    edges = [(number[a], number[b]) for a, b in found.edges if a in kept and b in kept]
    for place in order:
        for stub, pair in _stubs(found, kept, place):
            edges.append((len(boxes), number[place]) if pair else (number[place], len(boxes)))
            boxes.append(stub)
    return Picture(tuple(boxes), tuple(edges))


def _stubs(found: Picture, kept: set[int], place: int) -> Iterator[tuple[Box, bool]]:
    """What stands for the cut neighbours of a box: those it reads (True), those that read it (False)."""
    above = sum(1 for a, b in found.edges if b == place and a not in kept)
    below = sum(1 for a, b in found.edges if a == place and b not in kept)
    box = found.boxes[place]
    if above:
        yield replace(box, look="cut", nodes=(), scopes=(), hidden=above), True
    if below:
        yield replace(box, look="cut", nodes=(), scopes=(), hidden=below), False


def paths(boxes: Iterable[Box]) -> set[str]:
    """The places that boxes are drawn in."""
    return {box.place for box in boxes if box.place is not None}
