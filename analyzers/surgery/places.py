"""Which module call is a layer: the one that holds what the layer writes and nothing else, from stream to stream."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nests import Nest, ids_in
from fmr.nodes import Scope
from fmr.structure.layer import Layer
from fmr.structure.normal.match import strip_views
from fmr.structure.normal.vocabulary import SAME
from fmr.structure.parts import Structure
from fmr.structure.streams.stream import Stream, Write

_AS_IT_IS = SAME | {"view", "reshape", "flatten", "dropout"}
"""Ops that hand a value of the stream on as it is; dropout is idle where a structure is certified."""

Ties = Mapping[int, Mapping[int | None, frozenset[TensorId]]]
"""By layer, for each that reads what it makes beside the stream, these values."""


@dataclass(frozen=True)
class Place:
    """Where a layer runs: the module that is called, and where the stream goes in and comes out of the call.

    given: the position or the name of the argument that holds the stream. returned: its place in the tuple that comes back,
    None where the stream comes back alone. others: for each place of that tuple the argument that is handed on there, None
    for a value that the call makes. beside: the values that are given beside the stream.
    """

    layer: int
    stream: int
    module: str
    given: int | str
    returned: int | None
    others: tuple[int | str | None, ...]
    beside: frozenset[TensorId]
    before: TensorId
    after: TensorId
    shape: tuple[int, ...]


def places_of(structure: Structure) -> list[Place | str]:
    """For each layer of a structure its place, or why it has none.

    >>> places_of(structure)[2].module
    'transformer.h.2'
    """
    graph = structure.graph
    found = [_place(graph, structure, number, layer) for number, layer in enumerate(structure.layers)]
    calls = [one.module for one in found if isinstance(one, Place)]
    return [
        f"{one.module} is called for several layers, so that its calls have one place"
        if isinstance(one, Place) and calls.count(one.module) > 1
        else one
        for one in found
    ]


def as_it_is(graph: Graph, name: TensorId) -> TensorId:
    """The value that one was before it was only handed on."""
    return strip_views(graph, name, _AS_IT_IS)


def given_to(call: Scope, at: int | str) -> Nest:
    """What a call was given as one of its arguments; None where that holds no tensor."""
    args, kwargs = call.inputs
    if isinstance(at, int):
        return args[at] if isinstance(args, tuple) and at < len(args) else None
    return (kwargs or {}).get(at)


def returned_by(call: Scope, at: int | None) -> Nest:
    """What a call returned, or what is at one place of it."""
    if at is None:
        return call.output
    return call.output[at] if isinstance(call.output, tuple) and at < len(call.output) else None


def ties(structure: Structure, places: Sequence[Place | str]) -> Ties:
    """For each layer that makes more than the stream for others, by the layers that read it what they read.

    None is what is in no layer. What a layer only hands on is another's.
    """
    graph = structure.graph
    known = {place.module: place for place in places if isinstance(place, Place)}

    @cache
    def owner(module: str) -> Place | None:
        parts = module.partition("@")[0].split(".")
        return next((known[p] for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in known), None)

    found: dict[int, dict[int | None, frozenset[TensorId]]] = {}
    for node in graph.nodes:
        reader = owner(node.module)
        for parent in node.parents:
            made = _same(graph, parent.id)
            maker = owner(graph[made].module)
            if maker is None or maker is reader or as_it_is(graph, made) == maker.after:
                continue
            at = reader.layer if reader else None
            read = found.setdefault(maker.layer, {})
            read[at] = read.get(at, frozenset()) | {made}
    return found


def _same(graph: Graph, name: TensorId) -> TensorId:
    """The value that one is, number by number in the same places."""
    node = graph[name]
    while node.op in SAME and len(node.parents) == 1 and graph[node.parents[0].id].shape == node.shape:
        node = graph[node.parents[0].id]
    return node.id


def _place(graph: Graph, structure: Structure, number: int, layer: Layer) -> Place | str:
    """The place of one layer, or why it has none."""
    at, stream = stream_of(structure, layer)
    before, ends = as_it_is(graph, layer.resid_pre.id), _ends(graph, stream, layer)
    own = [write.after for write in writes_of(stream, layer)]
    others = [write.after for write in stream.writes if write.after not in own]
    inside = [
        call
        for call in graph.scopes
        if call.path
        and all(_within(graph, name, call) for name in own)
        and not any(_within(graph, name, call) for name in others)
    ]
    if not inside:
        return "no module call holds what it writes and nothing else"
    reason = ""
    for call in sorted(inside, key=lambda call: -len(call.path)):
        answer = _opened(graph, call, before, ends)
        if not isinstance(answer, str):
            given, returned, more, beside, after = answer
            return Place(number, at, call.module, given, returned, more, beside, before, after, graph[after].shape)
        reason = reason or f"{call.path} {answer}"
    return reason


def _opened(
    graph: Graph, call: Scope, before: TensorId, ends: frozenset[TensorId]
) -> tuple[int | str, int | None, tuple[int | str | None, ...], frozenset[TensorId], TensorId] | str:
    """Where the stream goes in and out of a call, what else comes back, what else is given, and what is made of it."""
    taken = dict(_arguments(call))
    given = [at for at, nest in taken.items() if _is_one_of(graph, nest, {before})]
    if len(given) != 1:
        return f"is given the stream as {len(given)} of its arguments, expected one"
    output = call.output if isinstance(call.output, tuple) else (call.output,)
    returned = [at for at, nest in enumerate(output) if _is_one_of(graph, nest, ends)]
    if len(returned) != 1:
        return f"returns the stream at {len(returned)} places of a tuple, expected one"
    if graph[taken[given[0]]].shape != graph[output[returned[0]]].shape:
        return "returns the stream in another shape than it was given"
    held = {at: nest for at, nest in taken.items() if any(True for _ in ids_in(nest))}
    others = tuple(next((at for at, nest in held.items() if _are_one(graph, nest, one)), None) for one in output)
    beside = frozenset(_same(graph, name) for at, nest in taken.items() if at != given[0] for name in _plain_ids(nest))
    at = returned[0] if isinstance(call.output, tuple) else None
    return given[0], at, others, beside, as_it_is(graph, output[returned[0]])


def _arguments(call: Scope) -> Iterator[tuple[int | str, Nest]]:
    args, kwargs = call.inputs
    yield from enumerate(args if isinstance(args, tuple) else ())
    yield from (kwargs or {}).items()


def _plain_ids(nest: Nest) -> Iterator[TensorId]:
    """The values in a nest but for those that an object holds, as a cache does what earlier layers left there."""
    if isinstance(nest, tuple):
        for item in nest:
            yield from _plain_ids(item)
    elif isinstance(nest, TensorId):
        yield nest


def _are_one(graph: Graph, given: Nest, returned: Nest) -> bool:
    """Whether what a call was given is what it returned."""
    if isinstance(given, TensorId) and isinstance(returned, TensorId):
        return _same(graph, given) == _same(graph, returned)
    return given == returned and returned is not None


def _is_one_of(graph: Graph, nest: Any, names: Collection[TensorId]) -> bool:
    return isinstance(nest, TensorId) and nest in graph and as_it_is(graph, nest) in names


def _ends(graph: Graph, stream: Stream, layer: Layer) -> frozenset[TensorId]:
    """The values of the stream that a layer may end with: its last sum, and what follows it up to the next layer."""
    own = writes_of(stream, layer)
    first = graph.place(own[-1].after)
    later = [graph.place(write.before) for write in stream.writes if graph.place(write.after) > first]
    last = max([*later[:1], graph.place(layer.resid_post.id)])
    every = {*stream.points, own[-1].after, layer.resid_post.id}
    return frozenset(as_it_is(graph, name) for name in every if first <= graph.place(name) <= last)


def _within(graph: Graph, name: TensorId, call: Scope) -> bool:
    module = graph[name].module
    return module == call.path or module.startswith(call.path + ".")


def stream_of(structure: Structure, layer: Layer) -> tuple[int, Stream]:
    """The stream that a layer writes to, with its number."""
    for number, stream in enumerate(structure.streams):
        if any(write.before == layer.resid_pre.id for write in stream.writes):
            return number, stream
    raise AssertionError(f"{layer.resid_pre.id} is in no stream")


def writes_of(stream: Stream, layer: Layer) -> tuple[Write, ...]:
    """What a layer writes to its stream.

    >>> len(writes_of(structure.residual, structure.layers[0]))
    2
    """
    before = [write.before for write in stream.writes]
    start = before.index(layer.resid_pre.id)
    end = before.index(layer.resid_post.id) if layer.resid_post.id in before[start:] else len(before)
    return stream.writes[start:end]
