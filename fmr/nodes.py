"""What a graph is made of: a node for each value, a scope for each module call."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.ids import Parent, TensorId

Nest = Any
"""A value, or a nest of tuples and dicts of values."""


class Node(NamedTuple):
    """One value of a pass and the op that made it.

    `parents` are the IDs of the tensors that the op read, each with the argument it fills (`parent.at`);
    `args` are its other arguments by position ("0", "dim", "1.2"); `where` is the call site, `file:line`.
    """

    id: TensorId
    op: str
    scope: str
    parents: tuple[Parent, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    args: Mapping[str, Any]
    where: str

    def __hash__(self) -> int:
        return hash(self.id)

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """A non-tensor argument by its name or its position, whichever the call used."""
        return self.args.get(name, self.args.get(str(position), default))

    def parent(self, name: str, position: int | None = None) -> Parent | None:
        """The tensor given for an argument, by its name or its position; None where none was."""
        at = (name, None if position is None else str(position))
        return next((parent for parent in self.parents if parent.at in at), None)

    @property
    def module(self) -> str:
        """The module call that it ran in, by its dynamic path: its scope without the fused ops."""
        return self.scope.partition("/")[0]

    @property
    def kind(self) -> str:
        """The dtype's short name, as `float32`."""
        return str(self.dtype).removeprefix("torch.")

    def __repr__(self) -> str:
        reads = ", ".join(self.parents)
        place = f"  at {self.where}" if self.where else ""
        return f"{self.id} {self.kind}{list(self.shape)}" + (f" <- {reads}" if reads else "") + place


class Scope(NamedTuple):
    """One call of a module: its place, and the IDs that went in and came out.

    `path` is the dynamic path (`cell@2`), `module` the registered one (`cell`), `kind` the class's name for display.
    """

    path: str
    module: str
    kind: str
    parent: str | None
    inputs: Nest
    output: Nest


def leaves(value: Nest, at: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nest of tuples, lists, dicts and dataclasses, with its position: "0", "1.2", "mask".

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
    if is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name, None)) for field in fields(value))
    return iter(())


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


_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size})


def shape_of(value: Tensor) -> tuple[int, ...]:
    """The shape as plain ints; a ragged dimension of a nested tensor is -1."""
    if value.is_nested:
        return (value.size(0),) + (-1,) * (value.dim() - 1)
    return tuple(value.shape)


def map_ids(function: Callable[[Any], Any], nest: Nest) -> Nest:
    """A nest of IDs with each replaced by what a function makes of it."""
    if isinstance(nest, str):
        return function(nest)
    if isinstance(nest, dict):
        return {key: map_ids(function, item) for key, item in nest.items()}
    return tuple(map_ids(function, item) for item in nest) if nest is not None else None
