"""The settings that a model is built from, as those of a copy with other layers: put where it could be built of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.surgery.numbers import kind

Ran = Mapping[int, tuple[int, ...]]
"""By how many layers a stream had, which of them run."""


def rebuilt(model: nn.Module, ran: Ran) -> Iterator[Callable[[], Callable[[], None]]]:
    """What puts the settings of which the class of a model builds the same modules, and hands back what undoes that.

    A setting that counts the layers holds the old number, and lists of as many entries have one for each; which number it is
    among equal ones is told by building: the same parameters with the same shapes, and modules with the same attributes.
    """
    for settings in [one for one in vars(model).values() if _holds(one)]:
        for name, value in list(vars(settings).items()):
            if type(value) is int and value in ran:
                changes = _changes(settings, name, ran[value])
                if _builds(model, settings, changes):
                    yield _putting(settings, changes)


def _holds(one: Any) -> bool:
    return hasattr(one, "__dict__") and not isinstance(one, nn.Module | Tensor | type) and not callable(one)


def _changes(settings: Any, name: str, layers: tuple[int, ...]) -> dict[str, Any]:
    """The settings that are others for these layers."""
    lists = {key: held for key, held in vars(settings).items() if isinstance(held, list)}
    before = vars(settings)[name]
    return {name: len(layers)} | {key: [own[n] for n in layers] for key, own in lists.items() if len(own) == before}


def _builds(model: nn.Module, settings: Any, changes: Mapping[str, Any]) -> bool:
    """Whether a model that is built of these settings has the modules of this one."""
    try:
        changed = copy.deepcopy(settings)
        vars(changed).update(changes)
        with torch.random.fork_rng([]), torch.device("meta"):
            built = type(model)(changed).train(model.training)
    except Exception:  # whatever a class raises that is built in another way, or not of these numbers
        return False
    return _shape(built) == _shape(model)


def _shape(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], list[tuple[Any, ...]]]:
    """The shapes of all parameters and buffers, and the plain attributes of all modules."""
    plain = [one for one in kind(model, ()) if not one[2].startswith("_")]
    return {name: tuple(one.shape) for name, one in model.state_dict().items()}, plain


def _putting(settings: Any, changes: Mapping[str, Any]) -> Callable[[], Callable[[], None]]:
    def put() -> Callable[[], None]:
        before = {name: vars(settings)[name] for name in changes}
        vars(settings).update(changes)
        return lambda: vars(settings).update(before)

    return put
