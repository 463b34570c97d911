"""Mixers by dataflow: what a write adds, if it is made of other positions: by states, products, windows or transforms."""

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.structure.axes import Axes
from fmr.structure.mixers.mixer import SUMMED, Mixer
from fmr.structure.normal.dims import dims_of
from fmr.structure.normal.einsum import is_depthwise, window
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import below, between, data_inputs, depends_on, is_constant, settled
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import CELLS, CONVOLUTIONS, MOVES
from fmr.structure.normal.walks import walk
from fmr.structure.streams.stream import Stream

_BETWEEN = frozenset("move join affine norm gate sum statistic".split())
"""What may lie between two products of a linear attention: nothing that bends."""


@dataclass(frozen=True)
class Term:
    """What one part adds in a write: the values that may be its output, the nearest first, and the dimension along which it
    may mix, which is `told` to count positions or only may; `readings` are mixers that it may be, the likelier first, of
    which a stack of convolutions over all units has none."""

    write: TensorId
    outputs: tuple[TensorId, ...]
    reads: tuple[TensorId, ...]
    axis: int
    told: bool
    readings: tuple[Mixer, ...]
    stacked: bool


def find_mixers(graph: Graph, streams: Sequence[Stream], known: Iterable[TensorId], axes: Axes) -> Iterator[list[Term]]:
    """What each write adds, if no attention or memory is in it, once for each dimension that may count positions.

    `known` are the values of attentions and memories: what is made of them is theirs.
    """
    form = form_of(graph)
    streams = [one for one in streams if one.writes and not is_constant(graph, one.points[0])]  # others are states of loops
    taken, stream_of = {form[name] for name in known}, {form[name] for stream in streams for name in stream.points}
    for write in (one for stream in streams for one in stream.writes):
        shape = graph[write.after].shape
        for term, way in _terms(form[write.added], stream_of) if len(shape) in (2, 3) else ():
            every = list(term.above(lambda one: one not in stream_of))
            outputs = tuple(name for name in _outputs(graph, term, way) if graph[name].shape == shape)
            if not outputs or any(one in taken for one in every):
                continue
            found = list[Term]()
            for axis, told in _positions(axes, write.after, len(shape), every):
                region = _Region(graph, every, stream_of, outputs[0], write.after, axis)
                if any(graph[name].shape == shape for name in region.reads):
                    readings = tuple(region.mixers())
                    stacked = not readings and any(window(graph, one.node) for one in region.mixing)
                    found.append(Term(write.after, outputs, region.reads, axis, told, readings, stacked))
            yield found


def _positions(axes: Axes, name: TensorId, rank: int, every: Sequence[Value]) -> list[tuple[int, bool]]:
    """The dimensions of a state of the stream that may count positions, the likelier first, each with whether they are known
    to: attentions or a recurrent layer say so, or it is the second of three. Examples, too, may be mixed."""
    usual = ("examples", "positions", "units")[-rank:]
    layout = axes.site(Site(name)).layout or usual
    said = [n for n in range(rank) if axes.are_positions(name, n)]
    steps = any(one.node.op in CELLS and not one.node.op.endswith("cell") for one in every)
    named = [n for n, what in enumerate(layout) if what == "positions"] or [
        n for n, what in reversed([*enumerate(layout)]) if what != "units"
    ]
    said += [1] if said == [0] and layout[1:] == ("axis 1", "units") else []  # nor does that count examples
    return [(n, n in said or steps or (rank == 3 and n == 1 and not said)) for n in said or named]


def _terms(value: Value, stop: Container[Value], way: tuple[Value, ...] = ()) -> Iterator[tuple[Value, tuple[Value, ...]]]:
    """The addends of what a write adds, each before it was scaled, moved or normed, and what was done to it, last first."""
    while value.kind in ("move", "affine", "norm") and value not in stop:
        value, way = value.inputs[0], (*way, value)
    for one in value.inputs if value.kind == "sum" and value not in stop else ():
        yield from _terms(one, stop)
    if value.kind != "sum" and value not in stop:
        yield value, way


def _outputs(graph: Graph, term: Value, way: Sequence[Value]) -> Iterator[TensorId]:
    """An addend as it is made, and after each step on its way to the sum."""
    yield settled(graph, term.node).id
    for value in reversed(way):
        yield from (node.id for node in (*(value.folded or (value.node,)), *value.views))


_Place = tuple[str, ...]
"""A place in the program."""

_Kind = tuple[str, list[TensorId], TensorId | None, list[TensorId], Sequence[Value]]


class _Region:
    """What a value is made of since it was read off the stream."""

    def __init__(
        self, graph: Graph, values: Sequence[Value], stop: Container[Value], output: TensorId, write: TensorId, axis: int
    ) -> None:
        self.graph, self.form, self.end, self.axis = graph, form_of(graph), values[0], axis
        self.output, self.write, self.length = output, write, graph[write].shape[axis]
        every = sorted(values, key=lambda one: graph.place(one.id))
        self.reads = tuple(one.id for one in every if one in stop)
        own: set[Value] = set()
        for one in every:
            if one not in stop and one.is_data:
                own |= {one} if any(part in own or part in stop for part in one.inputs) else set()
        self.own, self.values = own, [one for one in every if one in own]
        first = min(self.reads, key=graph.place, default=self.end.id)
        self.inside = {node.id: node for node in between(graph, first, self.end.id)}
        self.mixing = [one for one in self.values if self._mixes(one)]
        self.made: set[Value] = set()  # of projections, or of other positions
        for one in self.values:
            higher = {*one.inputs} & own
            if one in self.mixing or any(part in self.made or part.kind == "projection" for part in higher):
                self.made.add(one)

    def _mixes(self, value: Value) -> bool:
        summed = value.kind == "product" or value.node.op in CELLS | SUMMED
        return summed or bool(window(self.graph, value.node)) or self._is_fixed(value)

    def _is_fixed(self, value: Value) -> bool:
        """Whether a value is a transform, or a projection that sums over positions."""
        if value.kind != "projection" or value.node.op in CONVOLUTIONS:
            return value.node.op.startswith("fft")
        dims, words, data = dims_of(self.graph), value.subscripts, value.operands[0]
        (positions,) = dims.of(self.write, len(self.graph[self.write].shape))[self.axis :][:1]
        read = dims.of(data, len(self.graph[data].shape))
        return any(read[words.left.index(one)] == positions for one in words.contracted)

    def mixers(self) -> Iterator[Mixer]:
        """The ways in which what happens here may be read."""
        inputs = self._inputs()
        for kind, states, product, leaves, mixed in self._kinds():
            mixing = {*(one.id for one in self.mixing), *states}
            gates = [one for one in inputs if self._passes(one, mixing)]
            if kind == "convolution" and not gates and not all(is_depthwise(self.graph, one.node) for one in mixed):
                continue
            yield Mixer(
                graph=self.graph,
                kind=kind,
                reads=self.reads,
                inputs=tuple(Site(one) for one in inputs),
                gates=tuple(Site(one) for one in gates),
                states=tuple(states),
                output=Site(self.output),
                operands=tuple(leaves),
                product=product,
                mixed=tuple(one.id for one in mixed) if not states else (),
                axis=self.axis,
                write=self.write,
            )

    def _inputs(self) -> list[TensorId]:
        """The parts of the first projections, or what is read without one."""

        def onward(here: Value) -> list[Value]:
            return [one for one in here.inputs if one in self.own or one.id in self.reads] if here in self.made else []

        ends = (here for here in walk([self.end], onward) if here not in self.made)
        return sorted({part for here in ends for part in self._parts(here)}, key=self.graph.place)

    def _parts(self, value: Value) -> list[TensorId]:
        """What is cut out of a projection, where it is read in parts alone."""
        size, length = prod(value.node.shape), self.length
        users = (user.folded for user in value.users if user in self.own)
        cuts = [next((one.id for one in way if prod(one.shape) < size and length in one.shape), None) for way in users]
        if cuts and None not in cuts:
            return [one for one in cuts if one is not None]
        whole = settled(self.graph, value.node)
        return [(whole if whole.shape == value.node.shape else value.node).id]

    def _passes(self, name: TensorId, mixing: Container[TensorId]) -> bool:
        """Whether nothing that brings positions together lies below a value."""
        lower = below(self.graph, self.graph[name], lambda node: node.id in self.inside and node.id not in mixing)
        return not any(node.id in mixing for node, way in lower if way)

    def _kinds(self) -> Iterator[_Kind]:
        """The kinds of mixing that the ops allow, each with the states that it carries, the product that is made of others
        and what these multiply, and the values in which positions come together."""
        for states in filter(None, (self._carried(place) for place in (_line, _spot))):
            yield "recurrence", states, None, [], []
        products = [one for one in self.mixing if one.kind == "product"]
        product, leaves, bend = self._operands(products)
        weighed = [one for one in self.values if one.kind == "softmax" and self._is_of(one, products)]
        product = None if product is not None and self._is_of(self.form[product], weighed) else product
        straight = (product, leaves) if not bend else (None, [])
        kind = "linear attention" if not bend else f"{bend} attention"
        summed = [one.id for one in self.mixing if one.node.op in SUMMED]
        if summed:
            last = [one for one in summed if product is not None and depends_on(self.graph, product, one)]
            states = [*(one for one in summed if one not in last), *last]
            if product is not None:
                yield kind, states, *straight, []
            yield "recurrence", states, None, [], []
        if product is not None:
            yield kind, [], *straight, self.mixing
        for kind, mixed in self._alone().items():
            if mixed:
                yield kind, [], None, [], mixed

    def _alone(self) -> dict[str, list[Value]]:
        """What mixes by itself, by kind."""
        products = [one for one in self.mixing if one.kind == "product"]
        fixed = [one for one in self.mixing if self._is_fixed(one) and not self._is_of(one, products)]
        projected = [one for one in fixed if one.kind == "projection"]
        lower = projected[0].below(lambda one: one in self.own and one.kind != "projection") if projected else ()
        bent = any(one.kind == "bend" and one in self.own for one in lower)
        return {
            "recurrence": [one for one in self.mixing if one.node.op in CELLS],
            "convolution": [one for one in self.mixing if window(self.graph, one.node)],
            "network" if bent else "fixed": fixed,
        }

    def _is_of(self, value: Value, others: Iterable[Value]) -> bool:
        """Whether a value is made of one of some others."""
        return any(one is not value and depends_on(self.graph, value.id, one.id) for one in others)

    def _operands(self, products: Sequence[Value]) -> tuple[TensorId | None, list[TensorId], str]:
        """The product that is made of another one or of sums so far, the largest of several; what it and those above it
        multiply, as far as no product lies above; and what bends every such product before it is multiplied again. None
        where no product is made of another."""
        leaves, ways = list[TensorId](), dict[TensorId, str]()
        for one in products:
            for name in one.operands:
                way, more = self._operand(name)
                leaves += more
                ways |= {one.id: way} if way is not None and ways.get(one.id) != "" else {}
        if not ways:
            return None, [], ""
        straight = [name for name, way in ways.items() if not way]
        product = max(straight or ways, key=lambda name: (prod(self.graph[name].shape), self.graph.place(name)))
        above = [name for name in dict.fromkeys(leaves) if depends_on(self.graph, product, name)]
        return product, above, "" if straight else ways[product]

    def _operand(self, name: TensorId) -> tuple[str | None, list[TensorId]]:
        """What bends a product above an operand, None where there is none; and what is multiplied there first."""
        straight, bent = (self._above(self.form[name], kinds) for kinds in (_BETWEEN, _BETWEEN | {"bend"}))
        gates = [one for one in straight if one.kind == "gate"] if any(one.node.op in SUMMED for one in straight) else []
        if gates or any(one.kind == "product" for one in straight):
            return "", [part.id for one in gates[-1:] for part in one.inputs]
        if any(one.kind == "product" for one in bent):
            return next(one.op for one in bent if one.kind == "bend"), []
        return None, [name] if self.form[name].is_data else []

    def _above(self, value: Value, kinds: Container[str]) -> list[Value]:
        """What a value is made of here through values of some kinds, and sums so far."""
        return list(value.above(lambda one: one in self.own and (one.kind in kinds or one.node.op in SUMMED)))

    def _carried(self, place: Callable[[Node], _Place]) -> list[TensorId]:
        """The values that each step of a loop hands to the next one, where there is a step for each position."""
        steps, users = _steps(self.graph, self.inside.values(), place)
        longest: dict[_Place, int] = {}
        for node, n in steps.items():
            longest[place(node)] = max(n, longest.get(place(node), 0))
        least = max(1, self.length - 2)
        looped = {node for node in steps if longest[place(node)] >= least}
        handed = [one for one in looped if any(user in looped and steps[user] == steps[one] + 1 for user in users[one])]
        often = Counter(map(place, handed))
        places = {one for one, n in often.items() if n >= least}
        last = {one for one in looped if place(one) in places and steps[one] == longest[place(one)]}
        found = {one for one in handed if place(one) in places} | last
        data = (one.id for one in found if not is_constant(self.graph, one.id))
        return sorted(data, key=self.graph.place)


def _line(node: Node) -> _Place:
    """The place in the program where a value is made: the same in each step of a loop."""
    return node.op, re.sub(r"[@#]\d+", "", node.scope), node.where


def _spot(node: Node) -> _Place:
    """The same of several in one line: that which reads what such an op makes first."""
    return *_line(node), *(re.sub(r".*/|[@#:].*", "", one.id) for one in node.parents[:1])


def _steps(
    graph: Graph, nodes: Iterable[Node], place: Callable[[Node], _Place]
) -> tuple[dict[Node, int], dict[Node, set[Node]]]:
    """For each value how many made in the same place it follows on, and who reads it, moved or not."""
    steps, users = dict[Node, int](), dict[Node, set[Node]]()
    before, met = dict[TensorId, dict[Node, None]](), dict[Node, dict[_Place, int]]()
    for node in nodes:
        read = {one: None for name in data_inputs(graph, node) for one in before.get(name, ())}
        if node.op in MOVES:
            before[node.id] = read
            continue
        known: dict[_Place, int] = {}
        for one in read:
            users[one].add(node)
            known |= {at: n for at, n in met[one].items() if n > known.get(at, -1)}
        steps[node] = known.get(place(node), 0)
        met[node], users[node], before[node.id] = known | {place(node): steps[node] + 1}, set(), {node: None}
    return steps, users
