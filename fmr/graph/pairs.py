"""Which joint of one graph is which of another: proposed where it is the only one that may be, kept where data flows alike.

A joint is known by its op, the weights that it reads (by name, else by the sizes before and after), the nearest pairs that
it is made of, argument by argument, and the nearest pairs that are made of it. What is proposed is then proven: what flows
into both and what comes of both are the same pairs, and no other joint could take the place of one of them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fmr.graph.joints import UNORDERED, Joint, Joints

DISPUTED = 1
"""The bit of what is reached through weights without a partner, though the other graph has such weights."""

_OFTEN = 3
"""So often a pair that reads the same pairs on both sides is dropped before it is refused, whatever is wrong above it."""

Pair = tuple[Joint, Joint]
Color = Callable[[Joint], Hashable]


@dataclass
class Near:
    """What surrounds the joints of one graph: the nearest pairs above, for each argument, and below, and all of them."""

    above: dict[int, tuple[int, ...]] = field(default_factory=dict)
    every: dict[int, int] = field(default_factory=dict)
    below: dict[int, frozenset[tuple[int, int]]] = field(default_factory=dict)
    later: dict[int, int] = field(default_factory=dict)


def surroundings(joints: Sequence[Joint], pairs: dict[int, Pair], side: int) -> Near:
    """For each joint the nearest pairs above and below it, as bits of their numbers."""
    near = Near()
    over: dict[int, int] = {}
    for joint in joints:
        every, reads = 0, []
        for read in joint.reads:
            here = 1 << read.pair if read.pair > 0 else _nearest(near.above[read.place], over) | read.doubtful
            reads.append(here)
            every |= near.every[read.place] | here
        near.above[joint.place], near.every[joint.place] = tuple(reads), every
        if joint.pair > 0:
            over[joint.pair] = every
    under: dict[int, int] = {}
    for joint in reversed(joints):
        later = 0
        nearest: set[tuple[int, int]] = set()
        for at, user in joint.users:
            later |= near.later[user.place] | (1 << user.pair if user.pair > 0 else 0)
            nearest |= {(user.pair, at)} if user.pair > 0 else near.below[user.place]
        hidden = 0
        for number, _ in nearest:
            hidden |= under[number]
        near.below[joint.place] = frozenset(one for one in nearest if not hidden >> one[0] & 1)
        near.later[joint.place] = later
        if joint.pair > 0:
            under[joint.pair] = later
    return near


def _nearest(reads: Sequence[int], over: dict[int, int]) -> int:
    """The pairs that are reached through something unpaired, without those above another of them."""
    found = 0
    for one in reads:
        found |= one
    hidden = 0
    for number in _bits(found & ~DISPUTED):
        hidden |= over[number]
    return found & (~hidden | DISPUTED)


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Pairing:
    """The pairs of joints of two graphs, by number, and why a joint has none."""

    def __init__(self, ours: Joints, theirs: Joints) -> None:
        self.sides = ours, theirs
        self.pairs: dict[int, Pair] = {}
        self.why: dict[str, str] = {}
        self.count = 0
        self.likenesses = tuple(Counter(joint.likeness for joint in side.joints) for side in self.sides)
        self.refused: set[tuple[int, int]] = set()
        self.against: Counter[tuple[int, int]] = Counter()
        self._refuse_crossed()
        self._pair_in_order()
        while True:
            while self._propose():
                pass
            if not self._prove():
                break

    def is_around(self, a: Joint, b: Joint) -> bool:
        """Whether the same sure pairs come before two joints and after them."""
        (one, other), sure = self.near, self.sure
        before = (one.every[a.place] ^ other.every[b.place]) & sure
        return not before and not (one.later[a.place] ^ other.later[b.place]) & sure

    def alone(self, joint: Joint) -> str:
        """Why nothing was ever proposed for a joint."""
        like = [other for other in self.sides[1].joints if other.likeness == joint.likeness and other.pair < 0]
        if not like:
            return "nothing in the other graph has its op, its sizes and its weights"
        names = ", ".join(other.node.id for other in like[:3])
        told = "which" if len(like) > 1 else "that it is"
        return f"it could be {names}{' ...' * (len(like) > 3)}: nothing that is sure tells {told}"

    def _refuse_crossed(self) -> None:
        """Refuse what is called alike in two graphs and computed in another order: names or places are exchanged."""
        both = [_called(side.joints) for side in self.sides]
        shared = [(joint, both[1][name]) for name, joint in both[0].items() if name in both[1]]
        over = [_over(side.joints, [pair[n] for pair in shared]) for n, side in enumerate(self.sides)]
        for later, earlier in ((n, k) for n, bits in enumerate(over[0]) for k in _bits(bits)):
            if over[1][earlier] >> later & 1:
                for (a, b), (_, other), order in (
                    (shared[later], shared[earlier], "after"),
                    (shared[earlier], shared[later], "before"),
                ):
                    self.refused.add((a.place, b.place))
                    self.why[a.node.id] = f"{other.node.id} comes {order} it there, against the order here"

    def _pair_in_order(self) -> None:
        """Pair those that read the same weights again, each after the one before, where both graphs do so as often."""
        groups = [_groups(side.joints) for side in self.sides]
        for name, ours in groups[0].items():
            theirs = groups[1].get(name, [])
            if len(ours) == len(theirs) > 1 and all(
                _is_chain(side.joints, group) for side, group in zip(self.sides, (ours, theirs), strict=True)
            ):
                self._note(zip(ours, theirs, strict=True))

    # ---- proposing

    def _propose(self) -> bool:
        """Pair what is alike and alone on both sides, by the strongest likeness that finds any."""
        self.near = self._surroundings()
        both, reads, read_by = (True, True), (True, False), (False, True)
        for color, (up, down) in (
            (self._placed, both), (self._fed, reads), (self._read, read_by), (self._made, reads),
        ):  # fmt: skip
            colors = [
                {j.place: j.pair if j.pair > 0 else color(j, near) for j in side.joints}
                for side, near in zip(self.sides, self.near, strict=True)
            ]
            for _ in range(4):
                if self._pair(colors):
                    return True
                colors = [_refined(side.joints, known, up, down) for side, known in zip(self.sides, colors, strict=True)]
        return False

    def _placed(self, joint: Joint, near: Near) -> Hashable:
        return joint.likeness, joint.sides, _reads(joint, near), near.below[joint.place]

    def _fed(self, joint: Joint, near: Near) -> Hashable:
        return joint.likeness, joint.sides, _reads(joint, near)

    def _made(self, joint: Joint, near: Near) -> Hashable:
        """What is known by its weights or by what it reads: the last layer of one graph may be followed by others there."""
        return joint.likeness, joint.sides if joint.weighs and not joint.named else (), _reads(joint, near)

    def _read(self, joint: Joint, near: Near) -> Hashable:
        return joint.likeness, joint.sides, near.below[joint.place]

    def _pair(self, colors: Sequence[dict[int, Hashable]]) -> bool:
        ours, theirs = (_alone(side.joints, known) for side, known in zip(self.sides, colors, strict=True))
        found = [(a, b) for color, a in ours.items() if a is not None and (b := theirs.get(color)) is not None]
        return self._note((a, b) for a, b in found if (a.place, b.place) not in self.refused and _enter_alike(a, b))

    def _note(self, found: Iterable[Pair]) -> bool:
        before = self.count
        for a, b in found:
            self.count += 1
            self.pairs[self.count] = a, b
            a.pair = b.pair = self.count
        return self.count > before

    # ---- proving

    def _prove(self) -> bool:
        """Drop what does not hold, until all does; whether anything was dropped."""
        dropped = False
        while True:
            self._look()
            rivals = self._rivals()
            wrong = [(number, why) for number, pair in self.pairs.items() if (why := self._objection(*pair, rivals))]
            if not wrong:
                return dropped
            every = sum(1 << number for number, _ in wrong)
            for number, why in wrong:
                a, b = self.pairs.pop(number)
                a.pair = b.pair = -1
                self.why[a.node.id] = why
                self.against[a.place, b.place] += _reads(a, self.near[0]) == _reads(b, self.near[1])
                first = not self.near[0].every[a.place] & every
                if first or self.against[a.place, b.place] == _OFTEN:  # the reason may go with what was wrong above
                    self.refused.add((a.place, b.place))
            dropped = True

    def _unique(self, joint: Joint) -> bool:
        """Whether weights are the only ones of their sizes in both graphs."""
        return joint.weighs and all(count[joint.likeness] == 1 for count in self.likenesses)

    def _look(self) -> None:
        """See what surrounds each joint, and mark where weights have no partner though they may be those of some there."""
        self.sure = sum(1 << number for number, (a, _) in self.pairs.items() if a.named or a.node.op in ("output", "input"))
        joints = [joint for side in self.sides for joint in side.joints]
        for joint in joints:
            joint.doubtful = joint.twin = False
        self.near = self._surroundings()
        left = [[joint for joint in side.joints if joint.pair < 0 and joint.weighs] for side in self.sides]
        self.left = {joint.likeness for side in left for joint in side}
        names = set.intersection(*({name for joint in side for name in joint.named} for side in left))
        both = list(zip(left, self.near, strict=True))
        alike = set.intersection(*({self._region(joint, near) for joint in side} for side, near in both))
        twins = self._twins(both)
        for side, near in both:
            for joint in side:
                joint.twin = self._placed(joint, near) in twins
                like = self._region(joint, near) in alike or not names.isdisjoint(joint.named)
                joint.doubtful = like and not joint.twin
        self.near = self._surroundings()

    def _twins(self, both: Sequence[tuple[Sequence[Joint], Near]]) -> set[Hashable]:
        """Places that several weights take, as many in both graphs: which is which is not known, and matters to no other."""
        first, second = (Counter(self._placed(joint, near) for joint in side) for side, near in both)
        refused = {
            self._placed(joint, near)
            for n, (side, near) in enumerate(both)
            for joint in side
            if any(pair[n] == joint.place for pair in self.refused)
        }
        return {place for place, count in first.items() if count == second[place] > 1} - refused

    def _surroundings(self) -> tuple[Near, Near]:
        first, second = (surroundings(side.joints, self.pairs, n) for n, side in enumerate(self.sides))
        return first, second

    def _rivals(self) -> dict[Hashable, Joint]:
        """The joints without a partner, by their likeness and by what is sure above and below them."""
        return {
            self._region(joint, near): joint
            for side, near in zip(self.sides, self.near, strict=True)
            for joint in side.joints
            if joint.pair < 0 and not joint.twin
        }

    def _region(self, joint: Joint, near: Near) -> Hashable:
        """What a joint must have in common with another one to take its place: what is made of data alone reads the same."""
        reads = () if joint.weighs else _reads(joint, near)
        return joint.likeness, reads, near.every[joint.place] & self.sure, near.later[joint.place] & self.sure

    def _objection(self, a: Joint, b: Joint, rivals: dict[Hashable, Joint]) -> str:
        """Why two joints are not surely the same; empty where they are."""
        ours, theirs = self.near
        if _reads(a, ours) != _reads(b, theirs):
            return f"{b.node.id} has its likeness and reads other values"
        closed = all(one.pair > 0 for one in (*a.reads, *b.reads))
        if (a.named and (closed or a.likeness not in self.left)) or a.node.op in ("input", "output"):
            return ""
        if a.named:
            return f"its weights are read elsewhere too, and what {b.node.id} reads is not made alike"
        if not self._unique(a) and any(one & DISPUTED for one in (*ours.above[a.place], *theirs.above[b.place])):
            return f"{b.node.id} is in its place, and what both read is not surely the same"
        if not a.weighs and closed:
            return "" if a.scaled == b.scaled else f"{b.node.id} has its likeness and reads the same values scaled otherwise"
        below = ours.below[a.place]
        if not below or below != theirs.below[b.place]:
            return f"{b.node.id} is in its place, and what reads it is not surely the same"
        for joint, near in ((a, ours), (b, theirs)):
            rival = rivals.get(self._region(joint, near))
            if rival is not None:
                return f"{rival.node.id} could be in its place as well as {b.node.id}"
        return ""


def _alone(joints: Sequence[Joint], colors: dict[int, Hashable]) -> dict[Hashable, Joint | None]:
    """The joint without a partner that alone has a color; None for a color that several have."""
    found: dict[Hashable, Joint | None] = {}
    for joint in joints:
        if joint.pair < 0:
            color = colors[joint.place]
            found[color] = None if color in found else joint
    return found


def _enter_alike(a: Joint, b: Joint) -> bool:
    """Whether two joints come into products on the same sides, where any follow both."""
    return a.sides == b.sides or not (a.sides and b.sides)


def _reads(joint: Joint, near: Near) -> tuple[int, ...]:
    """The pairs that a joint reads, argument by argument."""
    found = tuple(one & ~DISPUTED for one in near.above[joint.place])
    return tuple(sorted(found)) if joint.node.op in UNORDERED else found


def _refined(joints: Sequence[Joint], colors: dict[int, Hashable], up: bool, down: bool) -> dict[int, Hashable]:
    """Colors that tell joints apart by what they read, by what reads them, or by both."""
    found: dict[int, Hashable] = {}
    for joint in joints:
        if joint.pair > 0:
            found[joint.place] = joint.pair
            continue
        reads = tuple(colors[read.place] for read in joint.reads) if up else ()
        users = tuple(sorted(hash((at, colors[user.place])) for at, user in joint.users)) if down else ()
        found[joint.place] = hash((colors[joint.place], reads, users))
    return found


def _groups(joints: Sequence[Joint]) -> dict[Hashable, list[Joint]]:
    """The joints that read weights of the same names."""
    found: dict[Hashable, list[Joint]] = defaultdict(list)
    for joint in joints:
        if joint.named:
            found[joint.likeness].append(joint)
    return found


def _called(joints: Sequence[Joint]) -> dict[Hashable, Joint]:
    """The joints that alone read weights of their names."""
    return {name: same[0] for name, same in _groups(joints).items() if len(same) == 1}


def _is_chain(joints: Sequence[Joint], group: Sequence[Joint]) -> bool:
    """Whether each of some joints is made of the one before."""
    return all(over >> n & 1 for n, over in enumerate(_over(joints, group)[1:]))


def _over(joints: Sequence[Joint], known: Sequence[Joint]) -> list[int]:
    """For each of some joints those of them that come before it along the data, as bits."""
    numbers = {joint.place: n for n, joint in enumerate(known)}
    over: list[int] = []
    for joint in joints:
        above = 0
        for read in joint.reads:
            above |= over[read.place] | (1 << numbers[read.place] if read.place in numbers else 0)
        over.append(above)
    return [over[joint.place] for joint in known]
