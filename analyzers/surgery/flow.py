"""The way of the stream through the layers of an operated model, read off the graph of a run."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import fmr
from analyzers.protocol import AnalyzerError
from analyzers.surgery.operate import Running
from analyzers.surgery.places import Place, as_it_is, given_to, returned_by
from fmr.graph.graph import Graph
from fmr.ids import TensorId


def flow_of(
    model: nn.Module,
    places: Sequence[Place | str],
    running: Sequence[Running],
    args: tuple[Any, ...],
    inputs: Mapping[str, Any],
) -> tuple[int, ...]:
    """The layers that run, if each is given what the one before it made, and the first what the first was given before."""
    takes = inspect.signature(model.forward).parameters
    given = {name: value for name, value in inputs.items() if name != "use_cache" or name in takes}
    graph = fmr.run(model, *args, keep="none", **given).graph
    starts = {place.stream: place.before for place in reversed(places) if isinstance(place, Place)}
    last: dict[int, tuple[TensorId, str]] = {stream: (name, "the stream's start") for stream, name in starts.items()}
    for one in running:
        place = places[one.layer]
        assert isinstance(place, Place)
        before, after = _ends(graph, one, place)
        made, by = last[one.stream]
        if before != made:
            raise AnalyzerError(
                f"Layer {one.layer} at {one.path!r} was given {before}, expected {made} of {by}: the code does not run the "
                "layers one after the other as its modules lie."
            )
        last[one.stream] = after, f"layer {one.layer}"
    return tuple(one.layer for one in running)


def _ends(graph: Graph, one: Running, place: Place) -> tuple[TensorId, TensorId]:
    """What a layer was given of the stream, and what it made of it."""
    call = graph.calls.get(one.path)
    if call is None:
        raise AnalyzerError(
            f"Layer {one.layer} at {one.path!r} was not called: the code does not run the modules that it registers there."
        )
    ends = given_to(call, place.given), returned_by(call, place.returned)
    if not all(isinstance(end, TensorId) for end in ends):
        raise AnalyzerError(f"Layer {one.layer} at {one.path!r} was called in another way than where it was located.")
    return as_it_is(graph, ends[0]), as_it_is(graph, ends[1])
