"""Mixers by dataflow: what a write adds, if it is made of other positions: by states, products, windows or transforms."""

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from math import prod

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.structure.axes import Axes
from fmr.structure.mixers.mixer import Mixer
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import CONVOLUTIONS, MOVES, below, between, data_inputs, depends_on, is_constant, settled
from fmr.structure.normal.value import Value
from fmr.structure.streams.stream import Stream

_CELLS = frozenset("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())
"""Recurrent layers, and steps of them, that are one op."""

_EMPTY = frozenset("zeros_like new_zeros".split())
"""Ops that take a shape alone."""

_SUMMED = frozenset("cumsum cumprod logcumsumexp cummax".split())
"""What is told of all places so far."""

_BETWEEN = frozenset("move join affine norm gate sum statistic".split())
"""What may lie between two products of a linear attention: nothing that bends."""


def find_mixers(
    graph: Graph, streams: Sequence[Stream], known: Iterable[TensorId], axes: Axes | None
) -> Iterator[list[Mixer]]:
    """What each write adds that brings positions together, as it may be read, the likelier first.

    `known` are the values of attentions and memories: what is made of them is theirs.
    """
    form = form_of(graph)
    streams = [one for one in streams if one.writes and not is_constant(graph, one.points[0])]  # others are states of loops
    taken, stream_of = {form[name] for name in known}, {form[name] for stream in streams for name in stream.points}
    for write in (one for stream in streams for one in stream.writes):
        shape = graph[write.after].shape
        for term in _terms(form[write.added], stream_of) if len(shape) in (2, 3) else ():
            output, found = settled(graph, term.node), list[Mixer]()
            every = list(term.above(lambda one: one not in stream_of))
            if output.shape != shape or any(one in taken for one in every):
                continue
            for axis in _positions(axes.site(Site(write.after)) if axes else Site(write.after), len(shape)):
                region = _Region(graph, every, stream_of, axis)
                if any(graph[name].shape == shape for name in region.reads):
                    found += region.mixers(output.id, write.after)
            yield found


def _positions(site: Site, rank: int) -> list[int]:
    """The dimensions of a state of the stream that may count positions, the likelier first."""
    layout = site.layout or ("examples", "positions", "units")[-rank:]
    told = [n for n, name in enumerate(layout) if name == "positions"]
    return told or [n for n, name in reversed([*enumerate(layout)]) if name != "units"]


def _terms(value: Value, stop: Container[Value]) -> Iterator[Value]:
    """The addends of what a write adds, each before it was scaled, moved or normed."""
    while value.kind in ("move", "affine", "norm") and value not in stop:
        value = value.inputs[0]
    for one in value.inputs if value.kind == "sum" and value not in stop else ():
        yield from _terms(one, stop)
    if value.kind != "sum" and value not in stop:
        yield value


class _Region:
    """What a value is made of since it was read off the stream."""

    def __init__(self, graph: Graph, values: Sequence[Value], stop: Container[Value], axis: int) -> None:
        self.graph, self.form, self.end, self.axis = graph, form_of(graph), values[0], axis
        every = sorted(values, key=lambda one: graph.place(one.id))
        self.reads = tuple(one.id for one in every if one in stop)
        own: set[Value] = set()
        for one in every:
            if one not in stop and one.is_data and _EMPTY.isdisjoint(node.op for node in one.folded):
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
        op = value.node.op
        window = op in CONVOLUTIONS and max(self.graph[value.operands[1]].shape[2:], default=1) > 1
        return window or value.kind == "product" or op in _CELLS | _SUMMED or op.startswith("fft")

    def mixers(self, output: TensorId, write: TensorId) -> Iterator[Mixer]:
        """The ways in which what happens here may be read."""
        inputs = self._inputs()
        for kind, states, leaves in self._kinds():
            mixing = {*(one.id for one in self.mixing), *states}
            product = [one.id for one in self.mixing if one.kind == "product"][-1:] if leaves else []
            gates = [one for one in inputs if self._passes(one, mixing)]
            if kind == "convolution" and not gates:
                continue  # a stack of convolutions
            yield Mixer(
                graph=self.graph,
                kind=kind,
                reads=self.reads,
                inputs=tuple(Site(one) for one in inputs),
                gates=tuple(Site(one) for one in gates),
                states=tuple(states),
                output=Site(output),
                operands=tuple(one for one in leaves if depends_on(self.graph, product[0], one)),
                mixed=product[0] if product else None,
                axis=self.axis,
                write=write,
            )

    def _inputs(self) -> list[TensorId]:
        """The parts of the first projections, or what is read without one."""
        found: dict[TensorId, None] = {}
        waiting, seen = [self.end], {self.end}
        for here in waiting:
            if here in self.made:
                new = [one for one in here.inputs if one not in seen and (one in self.own or one.id in self.reads)]
                seen.update(new)
                waiting += new
            else:
                found |= dict.fromkeys(self._parts(here))
        return sorted(found, key=self.graph.place)

    def _parts(self, value: Value) -> list[TensorId]:
        """What is cut out of a projection, where it is read in parts alone."""
        size, length = prod(value.node.shape), self.graph[self.end.id].shape[self.axis]
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

    def _kinds(self) -> Iterator[tuple[str, list[TensorId], list[TensorId]]]:
        """The kinds of mixing that the ops allow, each with the states that it carries and what its products multiply."""
        if states := self._carried():
            yield "recurrence", states, []
        products = [one for one in self.mixing if one.kind == "product"]
        leaves, bend = self._leaves(products)
        kind = "linear attention" if not bend else f"{bend} attention"
        summed = [one.id for one in self.mixing if one.node.op in _SUMMED]
        if summed and all(any(self._follow(one.id, name) for name in summed) for one in products):
            yield (kind if leaves else "recurrence"), summed, ([] if bend else leaves)
        if leaves:
            yield kind, [], ([] if bend else leaves)
        ops = {one.node.op for one in self.mixing if one.kind != "product"}
        if ops & _CELLS:
            yield "recurrence", [], []
        if ops & CONVOLUTIONS:
            yield "convolution", [], []
        if any(op.startswith("fft") for op in ops):
            yield "fixed", [], []

    def _follow(self, one: TensorId, other: TensorId) -> bool:
        """Whether one of two values is made of the other."""
        lower, higher = (one, other) if self.graph.place(one) > self.graph.place(other) else (other, one)
        return depends_on(self.graph, lower, higher)

    def _leaves(self, products: Sequence[Value]) -> tuple[list[TensorId], str]:
        """The operands of products of which one is made of another, as far as no product lies above them, and what bends
        every such product before it is multiplied again; none where no product is made of another."""
        leaves, ways = [], set()
        for name in (name for one in products for name in one.operands):
            straight, bent = (self._above(self.form[name], kinds) for kinds in (_BETWEEN, _BETWEEN | {"bend"}))
            outer = (
                [one for one in straight if one.kind == "gate"] if any(one.node.op in _SUMMED for one in straight) else []
            )
            if outer or any(one.kind == "product" for one in straight):
                ways.add("")
                leaves += [part.id for one in outer[-1:] for part in one.inputs]
            elif any(one.kind == "product" for one in bent):
                ways.add(next(one.op for one in bent if one.kind == "bend"))
            elif self.form[name].is_data:
                leaves.append(name)
        return (leaves, "" if "" in ways else min(ways)) if ways else ([], "")

    def _above(self, value: Value, kinds: Container[str]) -> list[Value]:
        """What a value is made of here through values of some kinds, and sums so far."""
        return list(value.above(lambda one: one in self.own and (one.kind in kinds or one.node.op in _SUMMED)))

    def _carried(self) -> list[TensorId]:
        """The values that each step of a loop hands to the next one, where there is a step for each position."""
        steps, users = _steps(self.graph, self.inside.values())
        longest: dict[_Place, int] = {}
        for node, n in steps.items():
            longest[_place(node)] = max(n, longest.get(_place(node), 0))
        least = max(1, self.graph[self.end.id].shape[self.axis] - 2)
        looped = {node for node in steps if longest[_place(node)] >= least}
        handed = [one for one in looped if any(user in looped and steps[user] == steps[one] + 1 for user in users[one])]
        often = Counter(map(_place, handed))
        places = {place for place, n in often.items() if n >= least}
        last = {one for one in looped if _place(one) in places and steps[one] == longest[_place(one)]}
        found = {one for one in handed if _place(one) in places} | last
        data = (one.id for one in found if not is_constant(self.graph, one.id))
        return sorted(data, key=self.graph.place)


_Place = tuple[str, str, str]


def _place(node: Node) -> _Place:
    """The place in the program where a value is made: the same in each step of a loop."""
    return node.op, re.sub(r"@\d+", "", node.scope), node.where


def _steps(graph: Graph, nodes: Iterable[Node]) -> tuple[dict[Node, int], dict[Node, set[Node]]]:
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
            known |= {place: n for place, n in met[one].items() if n > known.get(place, -1)}
        steps[node] = known.get(_place(node), 0)
        met[node], users[node], before[node.id] = known | {_place(node): steps[node] + 1}, set(), {node: None}
    return steps, users
