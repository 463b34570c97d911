"""Layers put into the places of others, and back: module by module, with what each keeps of its own number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from torch import nn

from analyzers.protocol import AnalyzerError
from analyzers.surgery.calls import State, watch
from analyzers.surgery.numbers import counters, numbers, why_shared
from analyzers.surgery.places import Place, Ties
from analyzers.surgery.stand_ins import Chain, Passing, twin
from fmr.graph.graph import Graph
from fmr.ids import TensorId

Order = Mapping[int, tuple[int, ...]]
"""By the layer whose place it is, the layers that run there."""


class Running(NamedTuple):
    """A layer that runs: its number, that of its stream, and the path that it has in the operated model."""

    layer: int
    stream: int
    path: str


def operate(
    model: nn.Module,
    graph: Graph,
    places: Sequence[Place | str],
    order: Order,
    ties: Ties,
    undo: ExitStack,
) -> tuple[Running, ...]:
    """Put layers into their places; `undo` puts back what was there. The layers that run, stream by stream.

    graph: of the run in which the places were found.
    """
    check(places, order, ties)
    found: list[Running] = []
    known = [place for place in places if isinstance(place, Place)]
    for stream in dict.fromkeys(place.stream for place in known):
        found += _stream(model, graph, [place for place in known if place.stream == stream], order, undo)
    return tuple(found)


def changed(order: Order) -> set[int]:
    """The layers that do not run once, and those whose place among the others is another."""
    run = [layer for several in order.values() for layer in several]
    moved = {layer for n, layer in enumerate(run) if any(other > layer for other in run[:n])}
    moved |= {layer for n, layer in enumerate(run) if any(other < layer for other in run[n + 1 :])}
    return moved | {layer for layer in order if run.count(layer) != 1}


def check(places: Sequence[Place | str], order: Order, ties: Ties) -> None:
    """Raise for layers that need more than the stream of one another, and for places where a layer is not called alike."""
    touched, run = changed(order), {layer for several in order.values() for layer in several}
    for maker, readers in ties.items():
        moved = [
            (places[reader], read) for reader, read in readers.items() if reader is not None and reader in touched & run
        ]
        if maker in touched or any(isinstance(place, str) or read - place.beside for place, read in moved):
            others = ", ".join("what is in no layer" if one is None else f"layer {one}" for one in readers)
            raise AnalyzerError(
                f"Layer {maker} makes more than the stream, which {others} read. Expected an operation that leaves it as it "
                "is, and these where they are given it."
            )
    for at, several in order.items():
        own = places[at]
        for layer in several if several != (at,) else ():
            other = places[layer]
            assert isinstance(own, Place)
            assert isinstance(other, Place)
            if (own.given, own.returned, own.shape) != (other.given, other.returned, other.shape):
                raise AnalyzerError(
                    f"Layer {layer} is called in another way, or on a stream of another shape, than layer {at}, in whose "
                    "place it would run. Expected layers that are called alike."
                )
            if own.beside != other.beside:
                raise AnalyzerError(
                    f"Layer {layer} is given other values beside the stream than layer {at}, in whose place it would run: "
                    f"{_one_of(other.beside - own.beside)} and {_one_of(own.beside - other.beside)}. Expected layers that "
                    "are given the same."
                )


def _one_of(names: frozenset[TensorId]) -> str:
    return min(names, default="nothing")


def _stream(model: nn.Module, graph: Graph, places: list[Place], order: Order, undo: ExitStack) -> list[Running]:
    """Put the layers of one stream into their places."""
    run = [(place, layer) for place in places for layer in order[place.layer]]
    paths = {place.layer: place.module for place in places}
    modules = {layer: model.get_submodule(path) for layer, path in paths.items()}
    if any(isinstance(module, (Chain, Passing)) for module in modules.values()):
        raise AnalyzerError("The model is being operated on already. Expected one surgery at a time, with all operations.")
    for place in places:
        _check_named(model, place)
    if all(order[place.layer] == (place.layer,) for place in places):
        return [Running(layer, place.stream, place.module) for place, layer in run]
    layers, rank = list(modules.values()), {layer: n for n, layer in enumerate(paths)}
    counted = counters(layers)
    ranks = [rank[layer] for _, layer in run]
    given = numbers(ranks, len(layers))
    made = _members(model, run, modules)
    found = [one for place in places for one in _put(model, place, order, modules, made, undo)]
    placed = {path: model.get_submodule(path) for path in paths.values()}
    new = [path for layer, path in paths.items() if placed[path] is not modules[layer]]
    asked = [(module, to) for (_, module), to, own in zip(made, given, ranks, strict=True) if to != own]
    watch(
        model,
        placed,
        new,
        _above(graph, list(placed)),
        State(why_shared(ranks, given, layers, counted), asked, counted),
        undo,
    )
    return found


def _above(graph: Graph, paths: Sequence[str]) -> list[str]:
    """The modules above all these, the model among them, that were called once."""
    steps = [path.split(".")[:-1] for path in paths]
    common = next((n for n, own in enumerate(zip(*steps, strict=False)) if len(set(own)) > 1), min(map(len, steps)))
    parents = [".".join(steps[0][:n]) for n in range(common + 1)]
    called = [call.module for call in graph.scopes]
    return [path for path in parents if not path or called.count(path) == 1]


def _members(
    model: nn.Module, run: list[tuple[Place, int]], modules: Mapping[int, nn.Module]
) -> list[tuple[Place, nn.Module]]:
    """For each layer that runs the module: its own where it runs in its own place, or first; else a twin."""
    at_home = {layer for place, layer in run if place.layer == layer}
    used: set[int] = set()
    found = []
    for place, layer in run:
        own = layer not in used and (layer not in at_home or place.layer == layer)
        used |= {layer} if own else set()
        found.append((place, modules[layer] if own else twin(modules[layer], model)))
    return found


def _put(
    model: nn.Module,
    place: Place,
    order: Order,
    modules: Mapping[int, nn.Module],
    made: list[tuple[Place, nn.Module]],
    undo: ExitStack,
) -> list[Running]:
    """Put what runs in one place there."""
    members, layers = [module for at, module in made if at is place], order[place.layer]
    stands = Chain if members else Passing
    own = modules[place.layer]
    new = members[0] if len(members) == 1 else stands(place, own, members)
    path, _, name = place.module.rpartition(".")
    parent = model.get_submodule(path)
    if new is not own:
        undo.callback(parent._modules.__setitem__, name, own)
        parent._modules[name] = new
    names = [place.module] if len(members) == 1 else [f"{place.module}.{n}" for n in range(len(members))]
    return [Running(layer, place.stream, one) for layer, one in zip(layers, names, strict=True)]


def _check_named(model: nn.Module, place: Place) -> None:
    """Raise where the module of a layer is registered at other places too, which would keep it."""
    own = model.get_submodule(place.module)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is own]
    if len(names) > 1:
        raise AnalyzerError(
            f"Layer {place.layer} is registered as {' and as '.join(names)}. Expected one place for each layer's module."
        )
