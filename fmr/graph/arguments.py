"""The arguments of an op, as a graph keeps them: as they were given, with a hole where a tensor stood."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Size, Tensor, device, dtype

from fmr.ids import Parent, TensorId
from fmr.nests import OF_SLICE, Hole

SCALARS = frozenset({int, float, bool, type(None), str, dtype, device})
"""The types of arguments that are kept as they are."""

parent_at = lru_cache(maxsize=1 << 15)(Parent)
"""The parent of this ID that fills the argument at a position; the same in every layer's op of a later run."""

_hole = lru_cache(maxsize=1 << 12)(Hole)
_POSITIONS = tuple(str(position) for position in range(256))


def sorted_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any] | None, id_of: Callable[[Tensor], TensorId]
) -> tuple[tuple[Parent, ...], dict[str, Any]]:
    """The arguments of an op in two: tensors are parents, all else stays, with holes for the tensors in it."""
    parents: list[Parent] = []
    plain: dict[str, Any] = {}
    for at, arg in zip(_POSITIONS if len(args) <= len(_POSITIONS) else map(str, range(len(args))), args, strict=False):
        if isinstance(arg, Tensor):
            parents.append(parent_at(id_of(arg), at))
        else:
            plain[at] = arg if arg.__class__ in SCALARS else _hollow(arg, at, parents, id_of)
    if kwargs:
        for name, arg in kwargs.items():
            if isinstance(arg, Tensor):
                parents.append(parent_at(id_of(arg), name))
            else:
                plain[name] = arg if arg.__class__ in SCALARS else _hollow(arg, name, parents, id_of)
    return tuple(parents), plain


def _hollow(arg: Any, at: str, parents: list[Parent], id_of: Callable[[Tensor], TensorId]) -> Any:
    """An argument as it was given, with a hole where a tensor stood, which is a parent; numpy's numbers are Python's."""
    if isinstance(arg, Tensor):
        parents.append(parent_at(id_of(arg), at))
        return _hole(at)
    kind = arg.__class__
    if kind in SCALARS:
        return arg
    if isinstance(arg, (tuple, list)) and kind is not Size:
        if SCALARS.issuperset(map(type, arg)):
            return arg
        items = [_hollow(item, f"{at}.{n}", parents, id_of) for n, item in enumerate(arg)]
        return items if isinstance(arg, list) else tuple(items)
    if isinstance(arg, dict):
        return {key: _hollow(item, f"{at}.{key}", parents, id_of) for key, item in arg.items()}
    if kind is slice:
        bounds = (arg.start, arg.stop, arg.step)
        if SCALARS.issuperset(map(type, bounds)):
            return arg
        return slice(*(_hollow(bound, f"{at}.{n}", parents, id_of) for n, bound in zip(OF_SLICE, bounds, strict=True)))
    return arg.item() if isinstance(arg, np.generic) else arg
