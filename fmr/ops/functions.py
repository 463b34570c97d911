"""torch's functions by a name that tells them apart, so that the one that was called can be called again."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_HOMES: dict[str, Any] = {
    "Tensor": Tensor,
    "torch": torch,
    "F": F,
    "nn": torch._C._nn,
    **{name: getattr(torch._C, f"_{name}") for name in ("linalg", "special", "fft", "nested")},
}
"""Where torch keeps its functions. `F.layer_norm` and `torch.layer_norm` differ in their arguments."""

_PLACES = frozenset(home.__name__ for home in _HOMES.values()) - {"torch", "Tensor"} | {"torch._tensor", "torch.functional"}
"""The modules whose every function computes."""

_NOT = frozenset({"from_file", "__setstate__", "__reduce_ex__", "__deepcopy__"})
"""Functions on tensors that open files or take objects apart."""


def spelling_of(func: Callable[..., Any]) -> str:
    """The name of one of torch's functions with its home, as `Tensor.add_`; empty for any other function.

    >>> spelling_of(torch.nn.functional.layer_norm), spelling_of(torch.ops.aten.add.Tensor)
    ('F.layer_norm', 'ops.aten.add.Tensor')
    """
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        spelling = f"ops.{func}"
        return spelling if function_of(spelling) is func else ""
    name = getattr(func, "__name__", "")
    operators = (f"Tensor.__{name}__", f"Tensor.__i{name.rstrip('_')}__")  # `**` is a function that is called `pow`
    spellings = (*(f"{home}.{name}" for home in _HOMES), *operators)
    return next((spelling for spelling in spellings if function_of(spelling) == func), "")


@cache
def function_of(spelling: str) -> Callable[..., Any] | None:
    """The function of torch with this name; None where torch has none, or one that computes nothing on tensors.

    What torch does not let others override, `torch.load` among them, is never found: a name may come from a file.
    """
    home, _, name = spelling.partition(".")
    found: Callable[..., Any] | None = _registered(name) if home == "ops" else getattr(_HOMES.get(home), name, None)
    return found if home == "ops" or _computes(found) else None


def _computes(func: Any) -> bool:
    """Whether a function makes tensors: one in C, one of those for networks, or one that torch lets others override."""
    name, place = getattr(func, "__qualname__", ""), getattr(func, "__module__", "")
    if name.rpartition(".")[2] in _NOT:
        return False
    built_in = name.startswith("_VariableFunctionsClass.") or getattr(func, "__objclass__", None) is torch._C.TensorBase
    return callable(func) and (built_in or place in _PLACES or func in torch.overrides.get_testing_overrides())


def _registered(name: str) -> Any:
    """An operator by its name, `aten.add.Tensor`, if one of its arguments is a tensor."""
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, torch._ops.OpOverloadPacket):
        schemas = [getattr(found, overload)._schema for overload in found.overloads()]
    else:
        schemas = [found._schema] if isinstance(found, torch._ops.OpOverload) else []
    reads = bool(schemas) and all(any("Tensor" in str(one.type) for one in schema.arguments) for schema in schemas)
    return found if reads else None
