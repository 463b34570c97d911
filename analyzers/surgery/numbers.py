"""The numbers that layers have of their own, as where a cache keeps what they leave: which attributes count the layers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn


class Counter(NamedTuple):
    """An attribute of a module within each layer that is `base` and the number of the layer."""

    path: str
    name: str
    base: int


def counters(layers: Sequence[nn.Module]) -> list[Counter]:
    """The attributes that count the layers: whole numbers that go up by one from each to the next, in two layers at least.

    >>> counters(list(model.transformer.h))[0].name
    'layer_idx'
    """
    seen: dict[tuple[str, str], list[int]] = {}
    for number, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    seen.setdefault((path, name), []).append(value - number)
    return [Counter(*at, bases[0]) for at, bases in seen.items() if len(bases) > 1 and len(set(bases)) == 1]


def number(layer: nn.Module, counted: Sequence[Counter], to: int) -> list[tuple[nn.Module, str, int]]:
    """Give a layer a number; returns what its attributes were."""
    before = []
    for path, name, base in counted:
        module = dict(layer.named_modules()).get(path)
        if module is not None and name in vars(module):
            before.append((module, name, vars(module)[name]))
            setattr(module, name, base + to)
    return before


def numbers(order: Sequence[int], n: int) -> list[int]:
    """A number for each layer that runs: its own where it has that alone, else one that is free, the first always there.

    >>> numbers([0, 1, 1, 3], 4), numbers([1, 2, 3], 4), numbers([0, 0, 1], 2)
    ([0, 1, 2, 3], [0, 2, 3], [0, 2, 1])

    Caches ask what they hold of layer 0 how far a text is.
    """
    free = [one for one in range(n) if one not in order] + list(range(n, n + len(order)))
    met: set[int] = set()
    found = [free.pop(0) if one in met or met.add(one) else one for one in order]  # type: ignore[func-returns-value]
    return found if 0 in found or not found else [0, *found[1:]]


def kind(layer: nn.Module, counted: Sequence[Counter]) -> list[tuple[Any, ...]]:
    """What tells layers apart that compute in different ways: plain attributes of their modules, but for their numbers."""
    known = {(path, name) for path, name, _ in counted}
    return [
        (path, type(module), name, value)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (int, float, str, type(None))) and (path, name) not in known
    ]


def why_shared(order: Sequence[int], given: Sequence[int], layers: Sequence[nn.Module], counted: Sequence[Counter]) -> str:
    """Why layers in a new order may not keep state by their numbers; empty where each has a place of its own kind."""
    if list(order) == sorted(set(order)) and 0 in order and counted:
        return ""
    if not counted:
        return "nothing in them says which layer each is"
    if max(given, default=0) >= len(layers):
        return f"{len(order)} layers run where the model has places for {len(layers)}"
    kinds = [kind(layer, counted) for layer in layers]
    other = next((layer for layer, own in zip(order, given, strict=True) if kinds[layer] != kinds[own]), None)
    return "" if other is None else f"layer {other} is of another kind than the one whose place it has"
