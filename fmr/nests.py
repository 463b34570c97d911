"""Walks over nests: whatever holds tensors, or the IDs of tensors."""

from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fmr.ids import TensorId

Nest = Any
"""A value, or a nest of tuples and dicts of values."""

_DEEPEST, _MOST = 64, 1000


class Opened(dict[str, Any]):
    """What an object held, by attribute; it stands apart from a dict, since an object may hold more than it is given for."""


# ---- what holds tensors, as it is at this moment


def taken(value: Any) -> Nest:
    """The tensors that a value holds now, as a nest of tuples, dicts and `Opened`; None where it holds none.

    Sequences and sets are opened by place, mappings by key, other objects by the attributes that lie in them. Each is read
    once, nothing in it is compared, and no property is asked. Modules, types and functions are not opened; neither is what
    holds itself, what lies deeper than 64 levels, nor more than 1000 objects; an object met twice stands at its first place.
    """
    return _Walk().take(value)


def taken_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Nest, Nest]:
    """The same for the arguments of a call; those that hold nothing but tensors and numbers are their own nests."""
    return (
        args if _FLAT.issuperset(map(type, args)) else taken(args),
        kwargs if not kwargs or _FLAT.issuperset(map(type, kwargs.values())) else taken(kwargs),
    )


class _Way(NamedTuple):
    """How values of one type are read: what they become, and what gives their parts. What is not opened has no form."""

    form: type | None
    parts: Callable[[Any], Iterable[Any]]


class _Walk:
    """One walk: the containers on the way to where it stands, and the objects that it has opened."""

    __slots__ = ("above", "opened")

    def __init__(self) -> None:
        self.above: list[int] = []
        self.opened: dict[int, Any] = {}

    def take(self, value: Any) -> Nest:
        kind: Any = type(value)
        if kind is Tensor:
            return value
        form, parts = _way(kind)
        if form is None:
            return None
        if form is Tensor:
            return value
        above, key = self.above, id(value)
        if key in above or len(above) == _DEEPEST:
            return None
        if form is Opened:
            if key in self.opened or len(self.opened) == _MOST:
                return None
            self.opened[key] = value
        above.append(key)
        nest = self._sequence(parts(value)) if form is tuple else self._mapping(form, parts(value))
        above.pop()
        return nest

    def _sequence(self, items: Iterable[Any]) -> Nest:
        held = tuple(items)
        kinds = set(map(type, held))
        if kinds <= _FLAT:
            return held if kinds <= _TENSORS and held else None if kinds <= _ATOMS else tuple(map(_tensor_or_none, held))
        nests = tuple([None if type(item) in _ATOMS else self.take(item) for item in held])
        return nests if any(item is not None for item in nests) else None

    def _mapping(self, form: type, items: Iterable[tuple[Any, Any]]) -> Nest:
        nests = form()
        for key, item in items:
            if type(item) not in _ATOMS:
                nest = self.take(item)
                if nest is not None:
                    nests[str(key)] = nest
        return nests or None


def _tensor_or_none(value: Any) -> Tensor | None:
    return value if type(value) in _TENSORS else None


_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
_TENSORS = frozenset({Tensor, nn.Parameter})
_FLAT = _ATOMS | _TENSORS
OF_SLICE = ("start", "stop", "step")
"""What a slice is made of, in order."""

_CLOSED = (str, bytes, torch.Size, nn.Module, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
_SEQUENCES: tuple[type[Any], ...] = (tuple, list, deque, set, frozenset, type({}.values()))


@lru_cache(maxsize=1024)
def _way(kind: type) -> _Way:
    """How to read a type. A subclass is read as its base is, so that nothing runs that it wrote itself."""
    if issubclass(kind, Tensor):
        return _Way(Tensor, iter)
    if issubclass(kind, _CLOSED):
        return _Way(None, iter)
    if kind is tuple or kind is list:
        return _Way(tuple, tuple)
    for base in _SEQUENCES:
        if issubclass(kind, base):
            return _Way(tuple, base.__iter__)
    if issubclass(kind, dict):
        return _Way(dict, _items)
    if issubclass(kind, UserDict):
        return _Way(dict, lambda value: _items(vars(value)["data"]))
    if issubclass(kind, UserList):
        return _Way(tuple, lambda value: list.__iter__(vars(value)["data"]))
    if kind is slice:
        return _Way(dict, lambda value: [(name, getattr(value, name)) for name in OF_SLICE])
    if issubclass(kind, Mapping):
        return _Way(dict, _computed)
    return _attributes(kind)


def _attributes(kind: type) -> _Way:
    """How to read the attributes that lie in an object: its dict, and the slots of its classes."""
    own = (vars(base).get("__dict__") for base in kind.__mro__)
    home: Any = next((found for found in own if isinstance(found, (GetSetDescriptorType, MemberDescriptorType))), None)
    slots = [
        (name, slot)
        for base in reversed(kind.__mro__)
        if "__slots__" in vars(base)
        for name, slot in vars(base).items()
        if isinstance(slot, MemberDescriptorType)
    ]

    def filled(value: Any) -> Iterator[tuple[str, Any]]:
        yield from _items(home.__get__(value)) if home is not None else ()
        for name, slot in slots:
            try:
                yield name, slot.__get__(value)
            except AttributeError:  # a slot that was never filled
                continue

    form = None if home is None and not slots else dict if is_dataclass(kind) else Opened
    return _Way(form, filled if slots else lambda value: _items(home.__get__(value)))


def _items(held: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    return tuple(dict.items(held))


def _computed(value: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """What a mapping of a class of its own gives, asked once; one that cannot tell holds nothing."""
    try:
        return tuple(value.items())
    except Exception:
        return ()


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a value holds, with its position: "0", "1.2", "mask", "cache.keys.0"; see `taken` for the way in."""
    return _positions(taken(value), at)


def _positions(nest: Nest, at: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(nest, (tuple, dict)):
        for key, item in nest.items() if isinstance(nest, dict) else enumerate(nest):
            yield from _positions(item, f"{at}.{key}" if at else str(key))
    elif nest is not None:
        yield at, nest


# ---- plain nests


def tree_map(function: Callable[[Tensor], Any], nest: Nest, inside: Callable[[Tensor], Any] | None = None) -> Nest:
    """What `taken` gave, with each tensor replaced (by `inside` in what was an object) and the rest dropped.

    A nest of which nothing is left is None; a tuple keeps its places.
    """
    kind = type(nest)
    if kind is Opened:
        function = inside or function
    if kind is tuple:
        items = tuple([tree_map(function, item, inside) for item in nest])
        return items if any(item is not None for item in items) else None
    if kind is dict or kind is Opened:
        mapped = {key: tree_map(function, item, inside) for key, item in nest.items()}
        return {key: item for key, item in mapped.items() if item is not None} or None
    return function(nest) if isinstance(nest, Tensor) else None


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
    text = repr(args)
    if "array(" in text:
        return repr(replaced(args, np.ndarray, lambda array: (array.dtype.str, array.shape, array.tobytes())))
    return text


def ids_in(nest: Nest) -> Iterator[TensorId]:
    """Every ID in a nest of them."""
    if isinstance(nest, str):
        yield TensorId(nest)
    elif nest is not None:
        for item in nest.values() if isinstance(nest, dict) else nest:
            yield from ids_in(item)


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


def mapped(nest: Nest, function: Callable[[Tensor], Tensor]) -> Nest:
    """A copy of a nest with each tensor replaced, in the order of `leaves`; what is no tensor stays, kinds are kept."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, tuple) and type(nest) is not torch.Size:
        return _refilled(nest, [mapped(item, function) for item in nest])
    if isinstance(nest, list):
        made: Any = [] if type(nest) is list else copy(nest)
        made[:] = [mapped(item, function) for item in nest]
        return made
    if isinstance(nest, MutableMapping):
        made = copy(nest)
        for key, item in nest.items():
            made[key] = mapped(item, function)
        return made
    if is_dataclass(nest) and not isinstance(nest, type):
        twin: Any = copy(nest)
        for field in fields(nest):
            object.__setattr__(twin, field.name, mapped(getattr(nest, field.name, None), function))
        return twin
    return nest


def _refilled(nest: Any, items: list[Any]) -> Any:
    """A tuple of the same class with other items, and with what it holds besides; nothing runs that the class wrote."""
    if hasattr(nest, "n_sequence_fields"):  # of C, which are made of a sequence
        return type(nest)(items)
    made = tuple.__new__(type(nest), items)
    vars(made).update(vars(nest)) if hasattr(nest, "__dict__") else None
    return made


_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size})


def map_ids(function: Callable[[Any], Any], nest: Nest) -> Nest:
    """A nest of IDs with each replaced by what a function makes of it."""
    if isinstance(nest, str):
        return function(nest)
    if isinstance(nest, dict):
        return {key: map_ids(function, item) for key, item in nest.items()}
    return tuple(map_ids(function, item) for item in nest) if nest is not None else None
