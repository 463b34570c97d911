"""From pairs of joints to pairs of values: the steps between them, the weights that they read, and what comes of these."""

from collections import defaultdict
from collections.abc import Hashable, Iterator
from difflib import SequenceMatcher
from types import MappingProxyType

from fmr.graph.joints import SHIFTS, Joint, Joints, Unfused
from fmr.graph.likeness import Same, liken
from fmr.graph.pairs import DISPUTED, Pairing
from fmr.ids import TensorId
from fmr.nests import exact
from fmr.nodes import Node

_MAKES = frozenset("arange full ones zeros eye linspace".split())
"""Ops that make the same numbers of the same arguments, and of nothing else."""


class Matching:
    """The values of two graphs that are the same, by ID."""

    def __init__(self, first: Unfused, second: Unfused, same: Same = MappingProxyType({})) -> None:
        self.ours, self.theirs = Joints(first, same.keys()), Joints(second, frozenset(same.values()))
        liken(self.ours, self.theirs, same)
        self.pairing = Pairing(self.ours, self.theirs)
        self.pairs = sorted(self.pairing.pairs.values(), key=lambda pair: pair[0].place)
        self.matched: dict[TensorId, TensorId] = {}
        self.taken: set[TensorId] = set()
        for a, b in self.pairs:
            if a.node.op != "output":
                self._match(a.whole.id, b.whole.id)
                if (a.whole is a.node) == (b.whole is b.node):
                    self._match(a.node.id, b.node.id)
        for a, b in self.pairs:
            self._weights(a, b)
        self._sources()
        self._computed_alike()
        for here, there in [way for a, b in self.pairs for way in self._ways(a, b)]:
            self._on_the_way(here, there)
        self._computed_alike()

    def _match(self, a: TensorId, b: TensorId) -> None:
        if a not in self.matched and b not in self.taken:
            self.matched[a] = b
            self.taken.add(b)

    def _weights(self, a: Joint, b: Joint) -> None:
        """The weights of two values, a bias that is added later too."""
        if (a.whole is a.node) == (b.whole is b.node):
            self._beside(a.node, b.node)
            self._beside(a.whole, b.whole)

    def _beside(self, a: Node, b: Node) -> None:
        """The weights of two steps: those that fill the same place and have the same shape."""
        ours, theirs = _own_weights(a, self.ours), _own_weights(b, self.theirs)
        for at, node in ours.items():
            other = theirs.get(at)
            if other is not None and node.shape == other.shape:
                self._match(node.id, other.id)

    def _sources(self) -> None:
        """Inputs and weights of the same name and shape, but for weights whose readers have no partner."""
        disputed = {name for joint in self.ours.joints if joint.pair < 0 for name in joint.named}
        there = {called: self.theirs.nodes[TensorId(name)] for name, called in self.theirs.called.items()}
        inputs = self._inputs()
        for node in self.ours.graph.sources:
            called = self.ours.called.get(node.id, "")
            other = inputs.get(node.id) if node.op == "input" else there.get(called)
            if other is not None and called not in disputed and (other.shape == node.shape or node.op == "input"):
                self._match(node.id, other.id)

    def _inputs(self) -> dict[TensorId, Node]:
        """The inputs of the same name; of others the only ones of their shape and dtype."""
        ours, theirs = ([node for node in side.graph.sources if node.op == "input"] for side in (self.ours, self.theirs))
        found = {node.id: node for node in theirs}
        left = [[n for n in one if n.id not in {m.id for m in two}] for one, two in ((ours, theirs), (theirs, ours))]
        for node in left[0]:
            like = [[n for n in side if (n.shape, n.dtype) == (node.shape, node.dtype)] for side in left]
            if len(like[0]) == len(like[1]) == 1:
                found[node.id] = like[1][0]
        return found

    def _ways(self, a: Joint, b: Joint) -> Iterator[tuple[list[Node], list[Node]]]:
        """For each argument of a pair the steps by which its value came there from the joint that made it, that first."""
        near = self.pairing.near
        above, others = near[0].above[a.place], near[1].above[b.place]
        for at, mask in enumerate(above):
            if mask & DISPUTED or (above.count(mask) > 1 and above != others):
                continue
            if mask in others:
                there = at if others[at] == mask else others.index(mask)
                yield _from_whole(self.ours, a.ends[at]), _from_whole(self.theirs, b.ends[there])

    def _on_the_way(self, ours: list[Node], theirs: list[Node]) -> None:
        """The steps by which a pair reads a value: of the same joint, or where one graph has more in between."""
        known = self.matched.get(ours[0].id) == theirs[0].id
        direct = [not any(map(side.is_joint, way[1:])) for side, way in ((self.ours, ours), (self.theirs, theirs))]
        if known and all(direct):
            if len(ours) > 1 and len(theirs) > 1:
                self._match(ours[-1].id, theirs[-1].id)
            self._between(ours, theirs)
        elif known and any(direct):
            self._embedded(ours[1:], theirs[1:])
        elif (ours[0].id in self.matched) != (theirs[0].id in self.taken):
            for a, b in zip(reversed(ours[1:]), reversed(theirs[1:]), strict=False):
                if _step(a) != _step(b):
                    break
                self._match(a.id, b.id)

    def _embedded(self, ours: list[Node], theirs: list[Node]) -> None:
        """Steps of which one graph has more than the other: those of the shorter way, where they fit in one place only."""
        short, long = ([_step(node) for node in way] for way in sorted((ours, theirs), key=len))
        places = _places(short, long)
        if places and places == [len(long) - 1 - n for n in reversed(_places(short[::-1], long[::-1]))]:
            for n, place in enumerate(places):
                a, b = (ours[n], theirs[place]) if len(ours) < len(theirs) else (ours[place], theirs[n])
                self._match(a.id, b.id)

    def _between(self, first: list[Node], second: list[Node]) -> None:
        """The same shifts in the same order, and between them the same moves."""
        for ours, theirs in zip(_runs(first), _runs(second), strict=False):
            if ours[0] is not first[0]:
                if self._shift(ours[0], self.ours, self.matched) != self._shift(theirs[0], self.theirs, {}):
                    return
                self._match(ours[0].id, theirs[0].id)
                self._beside(ours[0], theirs[0])
            self._moves(ours[1:], theirs[1:])

    def _shift(self, node: Node, side: Joints, names: dict[TensorId, TensorId]) -> Hashable:
        """What a step makes of a value: by the names there of what is matched, and the shapes of weights that are not."""
        beside: list[Hashable] = []
        for parent in (p for p in node.parents if side.kinds[p.id] != "data"):
            name = names.get(parent.id, parent.id)
            unknown = side.nodes[parent.id].shape if side.kinds[parent.id] == "weight" else node.id
            beside.append(name if name in self.taken else unknown)
        return node.op, exact(node.args), tuple(beside)

    def _moves(self, ours: list[Node], theirs: list[Node]) -> None:
        """Steps that move the same numbers: those of the same op in order, then those that alone have a shape."""
        ops = [[(node.op, len(node.shape)) for node in run] for run in (ours, theirs)]
        for block in SequenceMatcher(None, ops[0], ops[1], autojunk=False).get_matching_blocks():
            for n in range(block.size):
                self._match(ours[block.a + n].id, theirs[block.b + n].id)
        for node in ours:
            left = [other for other in theirs if other.shape == node.shape and other.id not in self.taken]
            alone = [other for other in ours if other.shape == node.shape and other.id not in self.matched]
            if len(left) == len(alone) == 1:
                self._match(alone[0].id, left[0].id)

    def _computed_alike(self) -> None:
        """What is computed in the same way of the same values, in order."""
        waiting: dict[Hashable, list[Node]] = defaultdict(list)
        for node in self.theirs.graph.nodes:
            if node.id not in self.taken and not node.id.is_source:
                waiting[_made(node, {})].append(node)
        for node in self.ours.graph.nodes:
            if node.id in self.matched or node.id.is_source or any(p.id not in self.matched for p in node.parents):
                continue
            found = waiting.get(_made(node, self.matched))
            if found:
                self._match(node.id, found.pop(0).id)

    @property
    def copies(self) -> dict[TensorId, TensorId]:
        """What hands on a matched value as it is, in a step that the other graph has not, with what that is there."""
        found: dict[TensorId, TensorId] = {}
        for node in self.ours.graph.nodes:
            read = node.parents[0].id if node.parents else node.id
            here = self.matched.get(read) or found.get(read)
            if here and node.id not in self.matched and _is_idle(node, self.ours.nodes[read]):
                found[node.id] = here
        return found

    def reason(self, name: TensorId) -> str:
        """Why a value of the first graph has no partner."""
        head = self.ours.head.get(name)
        if head is None:
            return (
                "nothing in the other graph has its name" if name.is_source else "no values of the same kind make it there"
            )
        if head.node.id in self.matched:
            return f"it hands on {head.node.id}, which is {self.matched[head.node.id]}, in a step that the other has not"
        return self.pairing.why.get(head.node.id) or self.pairing.alone(head)


def _from_whole(side: Joints, end: TensorId) -> list[Node]:
    """The way to a value from where it has its bias and its scale."""
    way = side.way(end)
    whole = side.head[way[0].id].whole
    return way[way.index(whole) :] if whole in way else way


def _own_weights(node: Node, side: Joints) -> dict[str, Node]:
    """The sources that a value is made with, by argument, where each is made of one."""
    found = {}
    for parent in node.parents:
        sources = side.sources.get(parent.id, frozenset())
        if len(sources) == 1:
            found[parent.at] = side.nodes[TensorId(next(iter(sources)))]
    return found


def _is_idle(node: Node, read: Node) -> bool:
    """Whether a node hands on the very numbers that it reads, where they lie."""
    drops = node.op == "dropout" and node.argument("training", 2, True) and node.argument("p", 1, 0.5) > 0
    same = (node.shape, node.dtype) == (read.shape, read.dtype)
    return same and not drops and node.op in ("result", "to", "contiguous", "clone", "detach", "data", "dropout")


def _step(node: Node) -> Hashable:
    """What a step does."""
    return node.op, node.id.parts.output, exact(node.args)


def _places(short: list[Hashable], long: list[Hashable]) -> list[int]:
    """Where the entries of a sequence first stand in a longer one, in order; nothing where they do not."""
    found: list[int] = []
    for one in short:
        start = found[-1] + 1 if found else 0
        if one not in long[start:]:
            return []
        found.append(long.index(one, start))
    return found


def _runs(way: list[Node]) -> list[list[Node]]:
    """A way cut before each step that changes the numbers: its joint with moves, then each shift with moves."""
    runs = [[way[0]]]
    for node in way[1:]:
        if node.op in SHIFTS:
            runs.append([])
        runs[-1].append(node)
    return runs


def _made(node: Node, names: dict[TensorId, TensorId]) -> Hashable:
    """How a node is made: op, arguments and what it reads, by the names in the second graph; what reads nothing, where."""
    reads = tuple((parent.at, names.get(parent.id, parent.id)) for parent in node.parents)
    where = "" if reads or node.op in _MAKES else node.id
    return node.op, node.id.parts.output, reads, exact(node.args), where
