"""The operated model as a plain module: its lists of layers written anew, and its outputs compared bit by bit."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.protocol import AnalyzerError
from analyzers.surgery.numbers import counters, number
from analyzers.surgery.operate import Order
from analyzers.surgery.places import Place
from analyzers.surgery.settings import rebuilt
from fmr.sweeps.metrics import logits_of

Args = tuple[Any, ...]


def exported(
    model: nn.Module, places: Sequence[Place | str], order: Order, expected: Tensor, args: Args, inputs: Mapping[str, Any]
) -> nn.Module:
    """A plain copy that answers as the operated model does, to the bit, or a reason why there is none.

    Its layers count themselves anew, as where a cache keeps what they leave, if that changes no bit; else they keep their
    numbers.
    """
    refused: AnalyzerError | None = None
    for anew in (True, False):
        copied = plain_copy(model, places, order, anew)
        try:
            return certified(copied, runs(places, order), expected, args, inputs)
        except AnalyzerError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def plain_copy(model: nn.Module, places: Sequence[Place | str], order: Order, anew: bool = True) -> nn.Module:
    """A copy of a model with other layers in the places of its own, each with weights of its own.

    Where the layers of a stream are the entries of one list, the list gets as many as run; where they are attributes, each
    has its place, and none or several stand there as `nn.Identity` or `nn.Sequential`. anew: whether layers are numbered by
    the order in which they run.
    """
    copied = copy.deepcopy(model)
    known = [place for place in places if isinstance(place, Place)]
    for stream in dict.fromkeys(place.stream for place in known):
        own = [place for place in known if place.stream == stream]
        if any(order[place.layer] != (place.layer,) for place in own):
            _write(copied, own, order, anew)
    return copied


def certified(
    copied: nn.Module, ran: Mapping[int, tuple[int, ...]], expected: Tensor, args: Args, inputs: Mapping[str, Any]
) -> nn.Module:
    """A copy that answers as the operated model does, to the bit.

    Settings of which the copy could be built anew are put first. Code that reads from a setting how many layers there are
    gets the new number: the first setting that held the old one with which the copy answers so. ran: by how many layers a
    stream had, which of them run.
    """
    for put in rebuilt(copied, ran):
        back = put()
        if not _difference(copied, expected, args, inputs):
            return copied
        back()
    why = _difference(copied, expected, args, inputs)
    if not why:
        return copied
    for put in _settings(copied, {before: len(own) for before, own in ran.items() if len(own) != before}):
        back = put()
        if not _difference(copied, expected, args, inputs):
            return copied
        back()
    raise AnalyzerError(
        f"No plain module answers as the operated model does: {why}. Expected code that runs the layers that are in its "
        "list; the operated model itself is there inside the block."
    )


def runs(places: Sequence[Place | str], order: Order) -> dict[int, tuple[int, ...]]:
    """By how many layers a stream has that was changed, which of them run, counted within the stream."""
    found = {}
    known = [place for place in places if isinstance(place, Place)]
    for stream in dict.fromkeys(place.stream for place in known):
        own = [place.layer for place in known if place.stream == stream]
        ran = tuple(own.index(one) for layer in own for one in order[layer])
        if ran != tuple(range(len(own))):
            found[len(own)] = ran
    return found


def called(model: nn.Module, args: Args, inputs: Mapping[str, Any]) -> Tensor:
    """What a model answers without a cache."""
    takes = inspect.signature(model.forward).parameters
    more = {"use_cache": False} if "use_cache" in takes else {}
    with torch.no_grad():
        return logits_of(model(*args, **{**inputs, **more}))


def _write(model: nn.Module, places: Sequence[Place], order: Order, anew: bool) -> None:
    """Put the layers of one stream into their places in a copy, each module once."""
    modules = {place.layer: model.get_submodule(place.module) for place in places}
    counted, used = counters(list(modules.values())) if anew else [], set[int]()

    def taken(layer: int) -> nn.Module:
        if layer not in used:
            used.add(layer)
            return modules[layer]
        return copy.deepcopy(modules[layer])

    made = {place.layer: [taken(layer) for layer in order[place.layer]] for place in places}
    for rank, module in enumerate(module for several in made.values() for module in several):
        number(module, counted, rank)
    parents = {place.module.rpartition(".")[0] for place in places}
    parent = model.get_submodule(next(iter(parents)))
    if len(parents) == 1 and isinstance(parent, (nn.ModuleList, nn.Sequential)):
        at = {id(modules[layer]): several for layer, several in made.items()}
        entries = [one for entry in parent for one in at.get(id(entry), [entry])]
        parent._modules = {str(n): module for n, module in enumerate(entries)}
        return
    for place in places:
        path, _, name = place.module.rpartition(".")
        model.get_submodule(path)._modules[name] = _one(place, made[place.layer])


def _one(place: Place, members: list[nn.Module]) -> nn.Module:
    """One module for those that run at a place."""
    if len(members) == 1:
        return members[0]
    if place.given != 0 or place.returned is not None or place.beside:
        raise AnalyzerError(
            f"{len(members)} layers run as {place.module}, which is given more than the stream: no plain module does that. "
            "Expected layers in a list."
        )
    return nn.Sequential(*members) if members else nn.Identity()


def _difference(copied: nn.Module, expected: Tensor, args: Args, inputs: Mapping[str, Any]) -> str:
    """What a copy answers else; empty where it is the same to the bit, with a cache and without."""
    try:
        with torch.no_grad():
            found = [called(copied, args, inputs), logits_of(copied(*args, **inputs))]
    except Exception as error:  # whatever code raises that finds fewer or more layers than it counts on
        return f"it raises {type(error).__name__} ({str(error)[:80]})"
    if all(torch.equal(one, expected) for one in found):
        return ""
    return f"its answers differ by {max(float((one - expected).abs().max()) for one in found):.1e}"


def _settings(model: nn.Module, counts: Mapping[int, int]) -> Iterator[Callable[[], Callable[[], None]]]:
    """What sets to the new number of layers a setting that holds the old one, and hands back what undoes that."""
    every = (one for module in model.modules() for one in (module, *vars(module).values()))
    for owner in {id(one): one for one in every if hasattr(one, "__dict__")}.values():
        for name, value in list(vars(owner).items()):
            if type(value) is int and value in counts:

                def put(owner: Any = owner, name: str = name, value: int = value) -> Callable[[], None]:
                    setattr(owner, name, counts[value])
                    return lambda: setattr(owner, name, value)

                yield put
