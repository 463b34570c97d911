"""What a model returned, cut off from the autograd history: to keep an output is not to keep all that it was made of."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Sequence
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fmr.ids import TensorId
from fmr.nests import Nest, ids_in, leaves, taken
from fmr.watching.own import like, unseen, without_grad

_DEEPEST = 12
"""How far into an output its tensors are looked for."""

_CLOSED = (
    *(str, bytes, int, float, complex, type(None), torch.Size, torch.dtype, torch.device, torch.Generator),
    *(type, nn.Module, ModuleType, FunctionType, MethodType, BuiltinFunctionType),
)
"""What holds no tensor that a model returned."""

_HEAP = 1 << 9  # the flag of a class that was made in Python
_RAW: dict[type, Callable[[Any], Iterable[tuple[Any, Any]]]] = {
    dict: dict.items,
    OrderedDict: OrderedDict.items,
    defaultdict: dict.items,
    tuple: lambda value: enumerate(tuple.__iter__(value)),
    list: lambda value: enumerate(list.__iter__(value)),
    object: lambda value: (),
}
"""How the contents of an object are read past its own class, by the builtin type that it is of."""


def without_history(out: Nest) -> Nest:
    """An output whose tensors are cut off from the history and lie on the same memory.

    An object that holds one with history, also among its attributes, is made anew of its class, without running code of it;
    all others stay what they are, and so does what can only be made by its own code.
    """
    with unseen():
        if torch.is_grad_enabled() or any(has_history(tensor) for _, tensor in leaves(out)):
            return detached(out)
    return out


def detached(out: Nest) -> Nest:
    """The same, whether or not history is recorded now."""
    with unseen():
        return without_grad(lambda: _changed(out, _cut_off, {}, _DEEPEST))()


def exchanged(out: Nest, names: Nest, value: Callable[[TensorId], Tensor | None]) -> Nest:
    """An output with other tensors for those that `value` gives one, `names` being their IDs as they stand in it."""
    found = dict(zip((id(tensor) for _, tensor in leaves(taken(out))), ids_in(names), strict=True))

    def change(tensor: Tensor) -> Tensor:
        new = value(found[id(tensor)]) if id(tensor) in found else None
        return tensor if new is None else new

    with unseen():
        return _changed(out, change, {}, _DEEPEST)


def with_tensors(out: Nest, tensors: Sequence[Tensor]) -> Nest:
    """An output with these tensors in place of its own, in the order of `leaves`."""
    found = dict(zip((id(tensor) for _, tensor in leaves(taken(out))), tensors, strict=True))
    with unseen():
        return _changed(out, lambda tensor: found.get(id(tensor), tensor), {}, _DEEPEST)


def _cut_off(tensor: Tensor) -> Tensor:
    return like(tensor.detach(), tensor) if has_history(tensor) else tensor


def has_history(tensor: Tensor) -> bool:
    """Whether autograd knows what made a tensor."""
    try:
        return tensor.grad_fn is not None
    except RuntimeError:  # torch refuses a view of a base that was overwritten with history
        return True


def _changed(value: Any, change: Callable[[Tensor], Tensor], known: dict[int, Any], deep: int) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = change(value)
    elif id(value) not in known:
        if deep == 0 or isinstance(value, _CLOSED) or hasattr(type(value), "__del__"):
            return value
        known[id(value)] = value  # to what holds itself
        known[id(value)] = _rebuilt(value, change, known, deep - 1)
    return known[id(value)]


def _rebuilt(value: Any, change: Callable[[Tensor], Tensor], known: dict[int, Any], deep: int) -> Any:
    """An object around changed contents; itself where nothing in it changes."""
    kind = type(value)
    base: Any = next(c for c in kind.__mro__ if not c.__flags__ & _HEAP or c in _RAW)
    is_row = issubclass(kind, tuple) and hasattr(kind, "n_sequence_fields")  # a named result of torch
    base = tuple if is_row else base
    if base not in _RAW:
        return value
    parts = [(key, item, _changed(item, change, known, deep)) for key, item in _RAW[base](value)]
    held = [(key, item, _changed(item, change, known, deep)) for key, item in getattr(value, "__dict__", {}).items()]
    slots = [(slot, item, _changed(item, change, known, deep)) for slot, item in _slots(value)]
    if all(item is new for _, item, new in (*parts, *held, *slots)):
        return value
    if is_row:
        return kind([new for _, _, new in parts])
    made = tuple.__new__(kind, [new for _, _, new in parts]) if base is tuple else base.__new__(kind)
    for key, _, new in parts:
        if base is list:
            list.append(made, new)
        elif base is not tuple:
            base.__setitem__(made, key, new)
    if isinstance(made, defaultdict):
        made.default_factory = value.default_factory
    for slot, _, new in slots:
        slot.__set__(made, new)
    if held:
        made.__dict__.update({key: new for key, _, new in held})
    return made


def _slots(value: Any) -> list[tuple[Any, Any]]:
    """The slots of an object's classes that are filled, each with what it holds."""
    found = []
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items() if kind.__flags__ & _HEAP else ():
            if isinstance(slot, MemberDescriptorType) and name not in ("__dict__", "__weakref__"):
                try:
                    found.append((slot, slot.__get__(value)))
                except AttributeError:  # never assigned
                    continue
    return found
