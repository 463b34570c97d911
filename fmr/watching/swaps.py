"""`torch.utils.swap_tensors` while any block tracks: two tensor objects become each other, and fmr knows objects.

The function object stays what it is; its code is exchanged, and put back. torch swaps no tensor that is weakly referenced;
the references of fmr, which are `Ref`s, do not count, since each stands for its object and not for what it holds.
"""

import weakref
from collections.abc import Callable
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Swap = Callable[[Tensor, Tensor], None]


class Ref(weakref.ref[Tensor]):
    """A weak reference to a tensor, of fmr's own."""

    __slots__ = ()


def _of_others(tensor: Any) -> list[Any]:
    return [ref for ref in weakref.getweakrefs(tensor) if ref.__class__ is not Ref]


def _body(t1, t2):  # type: ignore[no-untyped-def]
    called: Any = "what stands here is put in its place below"
    return called(t1, t2)


_entry: Any = torch.utils.swap_tensors
_code: CodeType = _entry.__code__
torchs_own: Swap = FunctionType(_code, {**_entry.__globals__, "weakref": SimpleNamespace(getweakrefs=_of_others)})


def code_that_calls(swap: Swap) -> CodeType:
    """Code for torch's function by which it calls this one."""
    code: CodeType = _body.__code__
    return code.replace(co_consts=tuple(swap if isinstance(one, str) else one for one in code.co_consts))


def settle(code: CodeType | None) -> None:
    """Have torch's function run this code, or its own again."""
    if _entry.__code__ is not (code or _code):
        _entry.__code__ = code or _code
