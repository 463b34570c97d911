"""Walks over nests: tuples, lists, dicts and dataclasses that hold tensors or the IDs of tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmr.ids import TensorId

Nest = Any
"""A value, or a nest of tuples and dicts of values."""


@dataclass(frozen=True, slots=True)
class Hole:
    """The place of a tensor in a nest of arguments: the position that it has among them."""

    at: str

    def __repr__(self) -> str:
        return f"<{self.at}>"


def replaced(nest: Nest, kind: type | tuple[type, ...], function: Callable[[Any], Any]) -> Nest:
    """A nest of arguments, of tuples, lists, dicts and slices, with everything of a kind replaced by what is made of it."""
    if isinstance(nest, kind):
        return function(nest)
    form = nest.__class__
    if form is tuple or form is list:
        return form([replaced(item, kind, function) for item in nest])
    if form is dict:
        return {key: replaced(item, kind, function) for key, item in nest.items()}
    if form is slice:
        return slice(*(replaced(getattr(nest, name), kind, function) for name in OF_SLICE))
    return nest


def exact(args: Any) -> str:
    """A text that is the same for equal arguments and for no others: numpy prints only the ends of a long array."""
    return repr(replaced(args, np.ndarray, lambda array: (array.dtype.str, array.shape, array.tobytes())))


def ids_in(nest: Nest) -> Iterator[TensorId]:
    """Every ID in a nest of them."""
    if isinstance(nest, str):
        yield TensorId(nest)
    elif nest is not None:
        for item in nest.values() if isinstance(nest, dict) else nest:
            yield from ids_in(item)


def leaves(value: Nest, at: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nest of tuples, lists, dicts, slices and dataclasses, with its position: "0", "1.2", "mask".

    The way in is by position and by key alone: other objects are not opened.
    """
    if isinstance(value, Tensor):
        yield at, value
    else:
        for key, item in _items(value):
            yield from leaves(item, f"{at}.{key}" if at else key)


def _items(value: Nest) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return ((str(key), item) for key, item in value.items())
    if isinstance(value, (tuple, list)) and type(value) is not torch.Size:
        return ((str(index), item) for index, item in enumerate(value))
    if isinstance(value, slice):
        return ((name, getattr(value, name)) for name in OF_SLICE)
    if is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name, None)) for field in fields(value))
    return iter(())


OF_SLICE = ("start", "stop", "step")
"""What a slice is made of, in order."""


def outputs(value: Nest) -> Iterator[tuple[int | None, Tensor]]:
    """The tensors that an op returned: the only one under None, those of a tuple under their place in it.

    A nest is numbered in depth-first order, and what is no tensor takes a number too.
    """
    if isinstance(value, Tensor):
        yield None, value
    else:
        for index, item in enumerate(_flat(value)):
            if isinstance(item, Tensor):
                yield index, item


def _flat(value: Nest) -> Iterator[Any]:
    for item in value:
        if isinstance(item, (tuple, list)) and type(item) is not torch.Size:
            yield from _flat(item)
        else:
            yield item


def tree_map(function: Callable[[Tensor], Any], value: Nest) -> Nest:
    """The nest with each tensor replaced and everything that is no tensor dropped; one without tensors is None."""
    kind = value.__class__
    if kind is Tensor or isinstance(value, Tensor):
        return function(value)
    if kind in _PLAIN or not value:
        return None
    if kind is tuple or kind is list:
        items = tuple([tree_map(function, item) for item in value])
    elif isinstance(value, Mapping) or is_dataclass(value):
        mapped = {key: tree_map(function, item) for key, item in _items(value)}
        return {key: item for key, item in mapped.items() if item is not None} or None
    else:
        items = tuple([tree_map(function, item) for _, item in _items(value)])
    return items if items.count(None) < len(items) else None


def map_at(function: Callable[[str, Any], Any], nest: Nest, at: str = "") -> Nest:
    """A nest of tuples and dicts with each leaf replaced by what a function makes of its position and of it."""
    if nest is None:
        return None
    if isinstance(nest, dict):
        return {key: map_at(function, item, f"{at}.{key}" if at else key) for key, item in nest.items()}
    if isinstance(nest, tuple):
        return tuple([map_at(function, item, f"{at}.{place}" if at else str(place)) for place, item in enumerate(nest)])
    return function(at, nest)


def item_at(nest: Nest, at: str) -> Nest:
    """The part of a nest of tuples and dicts at a position; None where nothing is."""
    if not at or nest is None:
        return nest
    if not isinstance(nest, (tuple, dict)):
        return None
    items = nest.items() if isinstance(nest, dict) else ((str(place), item) for place, item in enumerate(nest))
    parts = ((item, at[len(key) + 1 :]) for key, item in items if at == key or at.startswith(f"{key}."))
    return next((found for found in (item_at(item, rest) for item, rest in parts) if found is not None), None)


_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size})


def map_ids(function: Callable[[Any], Any], nest: Nest) -> Nest:
    """A nest of IDs with each replaced by what a function makes of it."""
    if isinstance(nest, str):
        return function(nest)
    if isinstance(nest, dict):
        return {key: map_ids(function, item) for key, item in nest.items()}
    return tuple(map_ids(function, item) for item in nest) if nest is not None else None
