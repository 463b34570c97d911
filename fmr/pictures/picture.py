"""What a picture of a graph shows: boxes, the module calls that hold them, the edges between them, and what was cut off."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fmr.errors import DrawError, IdError, nearest
from fmr.ids import OPAQUE, Parent, TensorId, relative, within
from fmr.nests import ids_in
from fmr.nodes import Node, Nodes, Scope, id_of, is_key, no_key, scope_of
from fmr.ops.fused import is_fused


@dataclass(frozen=True)
class View:
    """How much of a graph to show.

    `depth` counts called modules from the root down; deeper ones become one box each. `around` and `hops` keep only a
    neighbourhood. `fold` puts equal module calls in a row into one box. `roles` names values by ID, `notes` says more
    of module calls by path.
    """

    depth: int | None = None
    around: Any = None
    hops: int = 1
    fold: bool = True
    roles: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.depth is not None and not (isinstance(self.depth, int) and self.depth >= 0):
            raise DrawError(
                f"depth={self.depth!r} is no depth. Expected 0 for one box, 1, 2, ... for levels, None for every op."
            )
        if not (isinstance(self.hops, int) and self.hops >= 0):
            raise DrawError(
                f"hops={self.hops!r} is no distance. Expected 0 for what around= names alone, 1, 2, ... for edges."
            )


def roles_of(structure: Any) -> Mapping[str, str]:
    """The roles by ID that a structure has, or a mapping that was given itself."""
    roles = {} if structure is None else getattr(structure, "roles", structure)
    if not isinstance(roles, Mapping):
        given = f"{type(structure).__name__}" if isinstance(structure, nn.Module) else repr(structure)
        raise DrawError(
            f"structure={given} names no roles. Expected what fmr.locate returns, or a mapping from IDs to roles, as "
            f"{{'h.0.attn/softmax#0': 'pattern'}}."
        )
    return {str(name): str(role) for name, role in roles.items()}


def notes_of(structure: Any) -> Mapping[str, str]:
    """What a structure says of module calls, by path; nothing where it says nothing."""
    notes = getattr(structure, "notes", {})
    return notes if isinstance(notes, Mapping) else {}


@dataclass(frozen=True)
class Box:
    """One thing in a picture: a value, a module call as a whole, several equal calls, a run of ops, or an end.

    `look` says which of these; `place` is the path of the module call that it is drawn in, None outside of the model;
    `nodes` are the values and `scopes` the module calls that it stands for; `hidden` counts the boxes beyond a cut.
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

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter or a buffer."""
        return self.look in ("param", "buffer")


@dataclass(frozen=True)
class Picture:
    """Boxes in execution order, edges as pairs of their numbers, and the module calls that hold boxes by path."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]
    scopes: Mapping[str, Scope]

    def flow(self, tail: int, head: int) -> list[tuple[Parent, Node]]:
        """The values that an edge stands for, each with the node that reads it."""
        given = {node.id for node in self.boxes[tail].nodes}
        return [(parent, node) for node in self.boxes[head].nodes for parent in node.parents if parent in given]


def picture(graph: Nodes, view: View) -> Picture:
    """The picture of a graph under a view.

    >>> [box.look for box in picture(graph, View(depth=1)).boxes]
    ['input', 'input', 'module', 'op', 'module', 'output']
    """
    tree = _Tree(graph, view)
    groups = _fold(tree, _runs(tree, _groups(tree)))
    return _cut(_with_output(Picture(tuple(map(tree.box, groups)), _edges(groups), tree.scopes), graph), tree)


@dataclass
class _Group:
    """Values that become one box: those of some module calls, or one, or a run."""

    nodes: list[Node]
    scopes: list[Scope] = field(default_factory=list)


class _Tree:
    """The nesting of module calls in a graph, which of them are open, and what the picture is about."""

    def __init__(self, graph: Nodes, view: View) -> None:
        self.graph, self.view = graph, view
        self.scopes = _scopes(graph)
        self.homes = homes(graph)
        self.focus: Node | Scope | None = None if view.around is None else self._focus(view.around)
        place = self.homes[self.focus.id] if isinstance(self.focus, Node) else self.focus.path if self.focus else None
        self.opened = {scope.path for scope in self.above(place)}

    def _focus(self, around: Any) -> Node | Scope:
        """The value, or the module call, that `around` names; for a value inside a fused op the op."""
        if isinstance(getattr(around, "scope", None), Scope):
            return self.scopes[around.scope.path]
        if not is_key(around):
            raise IdError(no_key(around))
        name = str(id_of(around))
        if name in self.scopes:
            return self.scopes[name]
        node = next((node for node in self.graph.nodes if node.id == name or name.startswith(_inside(node))), None)
        if node is None:
            known = [*self.scopes, *(node.id for node in self.graph.nodes)]
            raise IdError(
                f"{self.graph.model} has no value and no module call {name!r} to draw around. Expected an ID, a node or the "
                f"path of a module call.{nearest(name, known)}"
            )
        return node

    def above(self, path: str | None) -> list[Scope]:
        """The module calls around a place, from the root down to the place itself."""
        chain: list[Scope] = []
        while path is not None:
            chain.append(self.scopes[path])
            path = self.scopes[path].parent
        return chain[::-1]

    def closed(self, node: Node) -> Scope | None:
        """The outermost module call around a value that is drawn as one box; None where all are open."""
        if self.view.depth is None:
            return None
        chain = self.above(self.homes[node.id])
        return next((s for level, s in enumerate(chain) if level >= self.view.depth and s.path not in self.opened), None)

    def box(self, group: _Group) -> Box:
        """The box that stands for a group."""
        first, scopes = group.nodes[0], tuple(group.scopes)
        if scopes:
            return Box("fold" if len(scopes) > 1 else "module", scopes[0].parent, tuple(group.nodes), scopes)
        if len(group.nodes) > 1:
            return Box("run", first.scope, tuple(group.nodes))
        look = first.op if first.id.is_source or first.op == OPAQUE else "fused" if is_fused(first) else "op"
        return Box(look, self.homes[first.id], (first,))

    def in_focus(self, box: Box) -> bool:
        """Whether a box belongs to what `around` names."""
        if self.focus is None or isinstance(self.focus, Node):
            return self.focus is not None and any(node.id == self.focus.id for node in box.nodes)
        return self.focus in self.above(box.place) or self.focus in box.scopes


def homes(graph: Nodes) -> dict[TensorId, str | None]:
    """The module call that each value is drawn in: its own, for a weight that of its first reader, for an input none."""
    first: dict[TensorId, str] = {}
    for node in graph.nodes:
        for parent in node.parents:
            first.setdefault(parent.id, node.scope)
    sources = {node.id: None if node.op == "input" else first.get(node.id, "") for node in graph.sources}
    return {node.id: sources[node.id] if node.id.is_source else node.scope for node in graph.nodes}


def _scopes(graph: Nodes) -> dict[str, Scope]:
    """The module calls by path, and the scopes of fused ops that were written out."""
    scopes = {scope.path: scope for scope in graph.scopes} or {"": Scope("", "", graph.model, None, None, None)}
    for node in graph.nodes:
        path = node.scope
        while path not in scopes:
            above = path.rpartition("/")[0]
            scopes[path] = Scope(path, path, "fused op, written out", above, None, None)
            path = above
    return scopes


def _inside(node: Node) -> tuple[str, ...]:
    """What the IDs of the values inside a fused op begin with; nothing for any other op."""
    return (scope_of(node) + "/",) if not node.id.is_source and is_fused(node) else ()


# ---- which values share a box


def _groups(tree: _Tree) -> list[_Group]:
    """Each value alone, or with the others of the module call that is drawn as one box."""
    groups: list[_Group] = []
    at: dict[str, _Group] = {}
    for node in tree.graph.nodes:
        scope = tree.closed(node)
        if scope is not None and scope.path in at:
            at[scope.path].nodes.append(node)
            continue
        groups.append(_Group([node], [] if scope is None else [scope]))
        if scope is not None:
            at[scope.path] = groups[-1]
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
        own_box = node.op == OPAQUE or node.id in tree.view.roles or node == tree.focus
        plain = not group.scopes and node.id in free and not own_box
        if not plain or (run and run[0].nodes[0].scope != node.scope):
            run = []
        if not (plain and _join(run, node, result)):
            result.append(group)
            run += [group] if plain else []
    return result


def _join(run: list[_Group], node: Node, result: list[_Group]) -> bool:
    """Add a node to the groups of a run that it reads, made one; False where it reads none."""
    read = [group for group in run if any(other.id in node.parents for other in group.nodes)]
    for group in read[1:]:
        read[0].nodes += group.nodes
        run.remove(group)
        result.remove(group)
    if read:
        read[0].nodes.append(node)
    return bool(read)


def _free_of_parameters(graph: Nodes) -> set[str]:
    """The values that depend on no parameter."""
    free: set[str] = set()
    for node in graph.nodes:
        if node.op != "param" and all(parent in free for parent in node.parents):
            free.add(node.id)
    return free


def _fold(tree: _Tree, groups: list[_Group]) -> list[_Group]:
    """Put module calls that are equal inside, follow each other at once and feed each other, into one group."""
    result: list[_Group] = []
    last: _Group | None = None
    for group in groups:
        if tree.view.fold and last is not None and _chained(last, group) and not _focused(tree, last, group):
            last.nodes += group.nodes
            last.scopes += group.scopes
            continue
        result.append(group)
        last = group if group.scopes or not group.nodes[0].id.is_source else last
    return result


def _focused(tree: _Tree, *groups: _Group) -> bool:
    return any(tree.in_focus(tree.box(group)) for group in groups)


def _chained(last: _Group, group: _Group) -> bool:
    """Whether a module call follows another one that is equal inside, and reads from it."""
    if not (last.scopes and group.scopes) or last.scopes[0].parent != group.scopes[0].parent:
        return False
    ids = {node.id for node in last.nodes}
    feeds = any(parent in ids for node in group.nodes for parent in node.parents)
    return feeds and _plan(last) == _plan(group)


def _plan(group: _Group) -> tuple[str, list[Any]]:
    """What the first module call of a group does inside, whatever its place: its ops in order, with their shapes."""
    path = group.scopes[0].path
    inside = (node for node in group.nodes if within(node.scope, path))
    return group.scopes[0].kind, [(relative(node.scope, path), node.op, node.shape, node.dtype) for node in inside]


# ---- edges and cuts


def _edges(groups: Sequence[_Group]) -> tuple[tuple[int, int], ...]:
    at = {node.id: place for place, group in enumerate(groups) for node in group.nodes}
    pairs = ((at[parent.id], at[node.id]) for group in groups for node in group.nodes for parent in node.parents)
    return tuple(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))


def _with_output(found: Picture, graph: Nodes) -> Picture:
    """The picture with the model's output as a box below."""
    names = set(ids_in(graph.scopes[0].output)) if graph.scopes else set()
    makers = [place for place, box in enumerate(found.boxes) if any(node.id in names for node in box.nodes)]
    if not makers:
        return found
    end = Box("output", None, tuple(node for node in graph.nodes if node.id in names))
    return replace(found, boxes=(*found.boxes, end), edges=(*found.edges, *((maker, len(found.boxes)) for maker in makers)))


def _cut(found: Picture, tree: _Tree) -> Picture:
    """Only what lies within `hops` edges of what `around` names, with a stub where edges were cut."""
    if tree.focus is None:
        return found
    kept = {place for place, box in enumerate(found.boxes) if box.look != "output" and tree.in_focus(box)}
    for _ in range(tree.view.hops):
        kept |= {b for a, b in found.edges if a in kept} | {a for a, b in found.edges if b in kept}
    number = {place: n for n, place in enumerate(sorted(kept))}
    boxes = [found.boxes[place] for place in number]
    edges = [(number[a], number[b]) for a, b in found.edges if a in kept and b in kept]
    for place, new in number.items():
        for hidden, above in _beyond(found, kept, place):
            edges.append((len(boxes), new) if above else (new, len(boxes)))
            boxes.append(Box("cut", found.boxes[place].place, hidden=hidden))
    return replace(found, boxes=tuple(boxes), edges=tuple(edges))


def _beyond(found: Picture, kept: set[int], place: int) -> Iterator[tuple[int, bool]]:
    """How many neighbours of a box were cut off: those that it reads (True), those that read it (False)."""
    above = sum(b == place and a not in kept for a, b in found.edges)
    below = sum(a == place and b not in kept for a, b in found.edges)
    yield from ((count, is_above) for count, is_above in ((above, True), (below, False)) if count)
