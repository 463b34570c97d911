"""Plain stacks: layers without a shortcut, one behind the other. Their states are the values that all data comes through.

Convolution networks without residual adds are such stacks, and so are the stems, the stage changes and the necks of
those that have streams. That nothing goes past a state is proven by the dominator tree of the dataflow.
"""

from collections.abc import Iterable, Iterator
from functools import partial

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nests import ids_in
from fmr.structure.normal.form import form_of
from fmr.structure.normal.walks import walk
from fmr.structure.streams.dominators import Flow, flow_of
from fmr.structure.streams.identity import POOLS, base, handed
from fmr.structure.streams.stream import Stream

LAYERS = 3
"""How many plain layers make a stack: two with a nonlinearity between them are a memory or a head."""


def find_stacks(graph: Graph, streams: Iterable[Stream]) -> Iterator[Stream]:
    """The plain stacks of an unfused graph, each as a stream without writes; what lies in a residual stream is none."""
    flow, taken = flow_of(graph), _taken(graph, streams)
    layers = form_of(graph).of_kind("projection")
    read = {name for layer in layers for name in _pooled(graph, layer.operands[0])}
    returned = {one for name in ids_in(graph.scopes[0].output) for one in _pooled(graph, name)} if graph.scopes else set()
    chains = list(_chains(graph, flow))
    for chain in chains:
        plain = [name for name in chain if name not in taken]
        if len(read.intersection(plain)) >= LAYERS:
            points = {name for name in plain if name in read or name in returned}
            for branch in _beside(graph, flow, chain, chains):
                points |= {*read.intersection(branch), handed(graph, branch[-1])}
            yield Stream((), tuple(sorted(points, key=graph.place)), None)


def _beside(graph: Graph, flow: Flow, chain: list[TensorId], chains: list[list[TensorId]]) -> Iterator[list[TensorId]]:
    """The branches that hang off a stack, where it and they end in values that nothing reads, with as many channels."""
    whole, end = set(chain), graph[chain[-1]]
    for branch in chains:
        last = graph[branch[-1]]
        alike = last.shape[:2] == end.shape[:2] and len(last.shape) == len(end.shape)
        if alike and flow.higher[branch[0]] in whole and not graph.readers(last.id) and not graph.readers(end.id):
            yield branch


def _pooled(graph: Graph, name: TensorId) -> Iterator[TensorId]:
    """The value of which one is a view and, where that one was pooled, those that it was pooled from."""
    name = handed(graph, name)
    yield name
    while graph[name].op in POOLS:
        name = handed(graph, graph[name].parents[0].id)
        yield name


def _taken(graph: Graph, streams: Iterable[Stream]) -> set[TensorId]:
    """The values on the streams and in the branches that write to them."""
    taken, flow = set[TensorId](), flow_of(graph)

    def higher(first: int, name: TensorId) -> list[TensorId]:
        read = (parent.id for parent in graph[name].parents if parent not in taken and parent in flow)
        return [one for one in read if graph.place(one) > first]

    for stream in streams:
        taken.update(stream.points)
        for start, write in zip([stream.points[0], *(write.after for write in stream.writes)], stream.writes, strict=False):
            taken |= {base(graph, write.before), *walk([write.after], partial(higher, graph.place(start)))}
    return taken


def _chains(graph: Graph, flow: Flow) -> Iterator[list[TensorId]]:
    """The dominator tree in chains: each value is followed by that value below it under which the pass goes on longest."""
    latest = {name: graph.place(name) for name in flow.higher}
    for name in reversed(list(flow.higher)):
        nearest = flow.higher[name]
        if nearest is not None:
            latest[nearest] = max(latest[nearest], latest[name])
    following = {name: max(lower, key=latest.__getitem__) for name, lower in flow.lower.items() if name is not None}
    later = set(following.values())
    for name in flow.higher:
        if name not in later:
            yield [*walk([name], lambda one: [following[one]] if one in following else [])]
