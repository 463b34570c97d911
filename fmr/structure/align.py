"""Which part of one structure is which of another: of another release, another kernel, with an adapter, in other numbers.

Two parts are the same where the data says so (`fmr.graph.align`): the same softmax, the same projections. Experts that lie
in a list in one model and in one tensor in the other are told apart by their weights, number by number.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from fmr.errors import StructureError
from fmr.graph.align import Alignment, aligned
from fmr.graph.graph import Graph
from fmr.graph.joints import Joint
from fmr.graph.matching import Matching
from fmr.ids import Site, TensorId
from fmr.structure.attention.attention import Attention
from fmr.structure.layer import Layer
from fmr.structure.memories.memory import Memory
from fmr.structure.normal.form import form_of
from fmr.structure.prints import Prints, numbers_of, same_weights
from fmr.structure.streams.stream import Stream

_ROLES = ("q", "k", "v", "scores", "pattern", "z", "pre", "post", "out")
_SIZES = ("kind", "n_heads", "n_kv_heads", "head_dim", "n")
"""What two parts must have in common beside their values."""

Part = TypeVar("Part", Attention, Memory)


class Located(Protocol):
    """What is compared of a structure."""

    @property
    def attention(self) -> tuple[Attention, ...]:
        """The attentions."""

    @property
    def mlps(self) -> tuple[Memory, ...]:
        """The memories."""

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers."""

    @property
    def roles(self) -> dict[TensorId, str]:
        """The role of each value that has one."""

    @property
    def graph(self) -> Graph:
        """The graph where they were found."""

    @property
    def prints(self) -> Prints:
        """A few numbers of each weight, where there was a run."""


class Expert(NamedTuple):
    """A memory, or one expert of those that it holds."""

    memory: Memory
    expert: int | None = None

    def __repr__(self) -> str:
        return self.memory.scope + ("" if self.expert is None else f", expert {self.expert}")


@dataclass(frozen=True)
class PartAlignment:
    """The parts that two structures share, each with its like; of what has none, `why` says what stood against it.

    `attention`, `mlps`, `layers` and `streams` are pairs of parts; `values` maps the ID of each value that has a role in
    the first to that of the value with the same role in the second, and `within` those of single experts to the values that
    hold all of them. `why` is by the scope of a part or the ID of a value. `graph` is the alignment of all values.
    """

    attention: tuple[tuple[Attention, Attention], ...]
    mlps: tuple[tuple[Expert, Expert], ...]
    streams: tuple[tuple[Stream, Stream], ...]
    layers: tuple[tuple[Layer, Layer], ...]
    values: dict[TensorId, TensorId]
    within: dict[TensorId, TensorId]
    why: dict[str, str]
    graph: Alignment = field(repr=False)

    def __repr__(self) -> str:
        parts = f"{len(self.attention)} attentions, {len(self.mlps)} memories, {len(self.streams)} streams"
        rows = [f"PartAlignment: {parts}, {len(self.layers)} layers, {len(self.values)} values, {len(self.why)} unmatched"]
        rows += [f"  {name}: {why}" for name, why in list(self.why.items())[:8]]
        return "\n".join(rows + ["  ..."] * (len(self.why) > 8))


def align(first: Located, second: Located) -> PartAlignment:
    """Which part of this structure is which of another: attentions, memories, streams and layers, each with its like.

    >>> found = structure.align(fmr.locate(adapted))
    >>> found.values[structure.attention[3].pattern.id]  # the ID of the same pattern there

    second: of another release of the code, another kernel, with an adapter, in other numbers. What is not surely the same
    has no partner, and `found.why` says what stood against it. Where both were located from runs, weights are known by
    their numbers too: where layers were removed or exchanged, and experts in a list from those in one tensor.
    """
    if not hasattr(second, "roles"):
        raise StructureError(f"A structure cannot be compared with {type(second).__name__}: expected fmr.locate(other).")
    return _Parts(first, second).alignment()


class _Parts:
    """Two structures, and which values of their graphs are the same."""

    def __init__(self, first: Located, second: Located) -> None:
        self.first, self.second = first, second
        self.found = Matching(first.graph, second.graph, same_weights(first.prints, second.prints))
        self.graph = aligned(self.found, first.graph, second.graph)
        self.same = {**self.found.matched, **self.found.copies}
        self.values: dict[TensorId, TensorId] = {}
        self.within: dict[TensorId, TensorId] = {}
        self.why: dict[str, str] = {}

    def alignment(self) -> PartAlignment:
        attention = tuple(self._parts(self.first.attention, self.second.attention))
        whole = tuple(self._parts(self.first.mlps, self.second.mlps))
        mlps = [(Expert(a), Expert(b)) for a, b in whole] + list(self._experts(whole))
        streams, roles = tuple(self._streams()), self.second.roles
        for name, role in self.first.roles.items():
            there = self.same.get(name)
            if name in self.values or name in self.within:
                continue
            if there is not None and roles.get(there, role) == role:
                self.values[name] = there
            else:
                other = f"it is {there} there, which is {roles[there]}" if there in roles else ""
                self.why.setdefault(name, self.graph.why.get(name) or other)
        layers = tuple(self._layers([*attention, *((a.memory, b.memory) for a, b in mlps)]))
        return PartAlignment(attention, tuple(mlps), streams, layers, self.values, self.within, self.why, self.graph)

    # ---- values

    def _joint(self, side: int, name: TensorId) -> Joint | None:
        return (self.found.ours, self.found.theirs)[side].head.get(name)

    def _is_same(self, a: TensorId, b: TensorId) -> bool:
        """Whether two values hand on what the same op made."""
        one, two = self._joint(0, a), self._joint(1, b)
        return self.same.get(a) == b or (one is not None and two is not None and one.pair == two.pair > 0)

    def _differs(self, a: Site | None, b: Site | None) -> bool:
        """Whether two values are known to be made by different ops."""
        if a is None or b is None:
            return False
        one, two = self._joint(0, a.id), self._joint(1, b.id)
        return one is not None and two is not None and one.pair != two.pair and min(one.pair, two.pair) > 0

    # ---- parts

    def _parts(self, ours: Sequence[Part], theirs: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
        """The parts with the same core, of the same sizes, of which no value is known to be made by something else."""
        for part in ours:
            like = [other for other in theirs if any(map(self._is_same, _cores(part), _cores(other)))]
            if len(like) != 1:
                self.why[part.scope] = self._unlike(part)
                continue
            (other,) = like
            values = [(role, getattr(part, role), getattr(other, role)) for role in _ROLES if hasattr(part, role)]
            against = [role for role, a, b in values if self._differs(a, b)]
            against += [size for size in _SIZES if getattr(part, size, None) != getattr(other, size, None)]
            if against:
                self.why[part.scope] = f"{other.scope} is in its place, and has another {', '.join(against)}"
                continue
            self.values |= {a.id: b.id for _, a, b in values if a is not None and b is not None}
            yield part, other

    def _unlike(self, part: Attention | Memory) -> str:
        core = _cores(part)[0]
        return self.graph.why.get(core) or f"{core} is {self.same[core]} there, which is in no such part"

    def _experts(self, whole: Iterable[tuple[Memory, Memory]]) -> Iterator[tuple[Expert, Expert]]:
        """The memories of one that are single experts of the other, by their weights."""
        known = {id(memory) for pair in whole for memory in pair}
        ours, theirs = ([one for one in side.mlps if id(one) not in known] for side in (self.first, self.second))
        told = list(_told(ours, theirs))
        times = Counter(id(a.memory) for a, _ in told)
        for a, b in told:
            one, two = self._joint(0, a.memory.down), self._joint(1, b.memory.down)
            if one is None or two is None or not self.found.pairing.is_around(one, two):
                self.why[a.memory.scope] = f"{b!r} has its weights, and lies elsewhere"
                continue
            self.why.pop(a.memory.scope, None)
            values = {role: getattr(a.memory, role).id for role in ("pre", "post", "out")}
            if a.expert is None and times[id(a.memory)] == 1:
                self.within |= {name: getattr(b.memory, role).id for role, name in values.items()}
            else:
                self.why |= dict.fromkeys(values.values(), f"it holds experts that are {times[id(a.memory)]} memories there")
            yield a, b

    # ---- streams and layers

    def _streams(self) -> Iterator[tuple[Stream, Stream]]:
        """The streams that have the most points in common, as far as they have any; some share a few with others."""
        for stream in self.first.streams:
            found = []
            for other in self.second.streams:
                same = {a: b for a in stream.points if (b := self._point(a, other)) is not None}
                found += [(same, other)] if same else []
            most = max((len(same) for same, _ in found), default=0)
            best = [(same, other) for same, other in found if len(same) == most]
            if len(best) == 1:
                ((points, other),) = best
                self.values |= points | self._norm(stream, other, points)
                yield stream, other
            else:
                several = f"its points lie in {len(found)} streams there"
                self.why[stream.points[0]] = several if found else "none of its points is surely one of a stream there"

    def _norm(self, ours: Stream, theirs: Stream, points: Mapping[TensorId, TensorId]) -> dict[TensorId, TensorId]:
        """The norms of the same last state, whichever way they are written."""
        ends = [side.points[-2:] for side in (ours, theirs) if len(side.points) > 1]
        if len(ends) < 2 or ends[0][1] in points or points.get(ends[0][0]) != ends[1][0]:
            return {}
        graphs = self.first.graph, self.second.graph
        are_norms = all(form_of(graph)[end[1]].kind == "norm" for graph, end in zip(graphs, ends, strict=True))
        return {ends[0][1]: ends[1][1]} if are_norms else {}

    def _point(self, name: TensorId, other: Stream) -> TensorId | None:
        """The point of another stream that is the same: the very value, or the only one that hands it on."""
        like = [point for point in other.points if self._is_same(name, point)]
        exact = [point for point in like if self.same.get(name) == point]
        return (exact or like)[0] if len(exact) == 1 or len(like) == 1 else None

    def _layers(self, pairs: Sequence[tuple[Attention | Memory, Attention | Memory]]) -> Iterator[tuple[Layer, Layer]]:
        """The layers whose parts are the same, all of them."""
        like: dict[int, set[int]] = {}
        for a, b in pairs:
            like.setdefault(id(a), set()).add(id(b))
        there = [({id(one) for one in _parts_of(layer)}, layer) for layer in self.second.layers]
        for layer in self.first.layers:
            ours = {id(one) for one in _parts_of(layer)}
            theirs = set().union(*(like.get(one, set()) for one in ours))
            whole = next((other for parts, other in there if parts == theirs), None)
            if whole is not None and all(one in like for one in ours):
                yield layer, whole
            else:
                self.why[layer.resid_post.id] = "no layer there has the same parts"


def _parts_of(layer: Layer) -> tuple[Attention | Memory, ...]:
    return (*layer.attentions, *layer.mlps)


def _cores(part: Attention | Memory) -> tuple[TensorId, ...]:
    """The values that make a part what it is, each of which is enough to know it by."""
    return (part.softmax, part.pattern.id) if isinstance(part, Attention) else (part.post.id, part.down)


# ---- weights


def _told(ours: Sequence[Memory], theirs: Sequence[Memory]) -> Iterator[tuple[Expert, Expert]]:
    """Memories of one and experts of the other with the same keys and values, each the only one that has them.

    Calls that each read one of several experts, by a number that data tells, are in the only one that reads them all.
    """
    first, second = ({}, {})  # type: tuple[dict[bytes, list[Expert]], dict[bytes, list[Expert]]]
    for side, found in ((ours, first), (theirs, second)):
        for expert in (one for memory in side for one in _experts_of(memory)):
            found.setdefault(_numbers(expert), []).append(expert)
    for key, same in first.items():
        other = second.get(key, [])
        if len(same) == len(other) == 1 and (same[0].expert is None) != (other[0].expert is None):
            yield same[0], other[0]
        elif min(len(same), len(other)) == 1 and same[0].expert == other[0].expert == 0:
            yield from ((Expert(a.memory), Expert(b.memory)) for a in same for b in other)


def _experts_of(memory: Memory) -> Iterator[Expert]:
    """A memory as experts, where its weights hold several; nothing where they cannot be told apart."""
    keys = memory.weights.get(memory.keys)
    if keys is None:
        return
    numbers: Iterable[int | None] = range(len(keys)) if keys.dim() == 3 else [None]
    for number in numbers:
        try:
            memory.memory(0, number)
        except StructureError:
            return
        yield Expert(memory, number)


def _numbers(expert: Expert) -> bytes:
    """Keys and values of the first, the middle and the last memory of an expert."""
    memory, number = expert
    some = sorted({0, memory.n // 2, memory.n - 1})
    return b"".join(numbers_of(vector) for index in some for vector in memory.memory(index, number))
