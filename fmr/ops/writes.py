"""What a torch function overwrites: read off its schema, its signature or its name, once for each function."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

Writes = Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]
"""Finds the tensors that a call with these arguments overwrites."""

_STATISTICS = "running_mean", "running_var"
_FLAGS = "training", "use_input_stats"


class Argument(NamedTuple):
    """An argument of a function: its name, its position (none for one by name alone), its default."""

    name: str
    position: int | None
    default: Any = None

    def of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a call gives for it."""
        if self.position is not None and self.position < len(args):
            return args[self.position]
        if self.name == "self" and "input" in kwargs:  # as `torch.relu_(input=x)` calls it
            return kwargs["input"]
        return kwargs.get(self.name, self.default)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a tensor, a sequence of tensors, or nothing."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (tuple, list)) else []


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The first argument of a call, whatever its name."""
    return tensors(args[0]) if args else tensors(next((kwargs[n] for n in ("input", "self", "tensor") if n in kwargs), None))


def written_by_schema(func: Any) -> Writes | None:
    """How to find what a call overwrites as the schemas of a torch function, an overload or a custom op mark it.

    Running statistics are written where a flag says so, also by those functions whose schema does not mark them.
    """
    found = _schemas(func)
    arguments = _marked(found, isinstance(func, (OpOverload, OpOverloadPacket)))
    statistics = tuple(a for a in _statistics(found) if not any(a.name == b.name for b in arguments))
    flag = next((a for schema in found for a in _arguments(schema) if a.name in _FLAGS), None)
    if flag is not None and (statistics or any(a.name in _STATISTICS for a in arguments)):
        always = tuple(a for a in arguments if a.name not in _STATISTICS)
        return _when(flag, (*arguments, *statistics), always)
    return _of((*arguments, *statistics)) if arguments or statistics else None


def written_when_asked(func: Any) -> Writes | None:
    """The same for a Python function of torch, which writes when an argument says so: `inplace=True`, running statistics."""
    try:
        parameters = inspect.signature(func).parameters
    except (TypeError, ValueError):
        return None
    places = {name: Argument(name, place, parameters[name].default) for place, name in enumerate(parameters)}
    if "inplace" in places:
        flag = places["inplace"]
        return lambda args, kwargs: first(args, kwargs) if flag.of(args, kwargs) else []
    if "running_mean" in places:
        flag = next(places[name] for name in _FLAGS if name in places)
        return _when(flag, tuple(places[name] for name in _STATISTICS), ())
    if "max_norm" in places and "weight" in places:
        limit, weight = places["max_norm"], places["weight"]
        return lambda args, kwargs: tensors(weight.of(args, kwargs)) if limit.of(args, kwargs) is not None else []
    return None


def moves(func: Any) -> bool:
    """Whether torch says of a function that it changes the shape, the strides or the memory of a tensor in place."""
    found = (overload for overload in _overloads(func) if overload._schema.name != "aten::detach_")
    return any(torch.Tag.inplace_view in overload.tags for overload in found)


def _of(arguments: Iterable[Argument]) -> Writes:
    return lambda args, kwargs: [t for argument in arguments for t in tensors(argument.of(args, kwargs))]


def _when(flag: Argument, then: Iterable[Argument], otherwise: Iterable[Argument]) -> Writes:
    yes, no = _of(then), _of(otherwise)
    return lambda args, kwargs: yes(args, kwargs) if flag.of(args, kwargs) else no(args, kwargs)


def _overloads(func: Any) -> list[OpOverload]:
    packet = func
    if isinstance(func, OpOverload):
        return [func]
    if isinstance(func, (BuiltinFunctionType, MethodDescriptorType)):
        packet = getattr(torch.ops.aten, func.__name__, None)
    return [getattr(packet, name) for name in packet.overloads()] if isinstance(packet, OpOverloadPacket) else []


def _schemas(func: Any) -> list[Any]:
    if isinstance(func, (BuiltinFunctionType, MethodDescriptorType)):
        return list(torch._C._jit_get_schemas_for_operator(f"aten::{func.__name__}"))
    return [overload._schema for overload in _overloads(func)]


def _arguments(schema: Any) -> list[Argument]:
    return [
        Argument(argument.name, None if argument.kwarg_only else place) for place, argument in enumerate(schema.arguments)
    ]


def _marked(schemas: list[Any], by_name: bool) -> tuple[Argument, ...]:
    """The arguments that a schema marks as written; `out` is found in every call, other names alone where asked for."""
    found: dict[Argument, None] = {}
    for schema in schemas:
        for argument, one in zip(_arguments(schema), schema.arguments, strict=True):
            info, kind = one.alias_info, str(one.type)
            written = info is not None and info.is_write and "Tensor" in kind
            written = written and not (kind == "List[Tensor]" and info.before_set)  # TorchScript's own, of lists in order
            if written and argument.name != "out" and (argument.position is not None or by_name):
                found[argument] = None
    return tuple(found)


def _statistics(schemas: list[Any]) -> tuple[Argument, ...]:
    """Running statistics that a function updates although its schema does not mark them."""
    found = {
        argument: None
        for schema in schemas
        if "backward" not in schema.name and "no_update" not in schema.name
        for argument in _arguments(schema)
        if argument.name in _STATISTICS
    }
    return tuple(found)
