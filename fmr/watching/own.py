"""fmr's own tensor work while a model runs: no mode, tracer or tensor class of the user sees it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from fmr.watching.calls import apart

T = TypeVar("T")
_C: Any = torch._C
_FAKE = _C._TorchDispatchModeKey.FAKE


def unseen() -> AbstractContextManager[Any]:
    """A block in which tensors are asked and copied unseen; no mode can be put on inside it."""
    return _unseen() if _followed() else torch._C.DisableTorchFunction()


def like(copy: Tensor, tensor: Tensor) -> Tensor:
    """A copy made unseen, in the class of the tensor: one that only answers to functions is lost while they are off."""
    kept = copy.__class__ is not Tensor or tensor.__class__ in (Tensor, nn.Parameter)
    return copy if kept else copy.as_subclass(tensor.__class__)


def alone(work: Callable[[], T], mode: TorchFunctionMode | None = None) -> T:
    """Do work of fmr's own under `mode` alone: the user's modes and the watchers of this thread are off."""
    if not _followed():
        return apart(work, mode)

    def untraced() -> T:
        with _untraced():
            return work()

    return apart(untraced, mode)


def without_grad(work: Callable[[], T]) -> Callable[[], T]:
    """The same work with no history made; Ctrl-C at any function's entry leaves gradients as they were."""

    def quiet() -> T:
        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return work()
        finally:
            try:
                torch._C._set_grad_enabled(before)
            except BaseException:
                torch._C._set_grad_enabled(before)
                raise

    return quiet


def _followed() -> bool:
    """Whether anything sees what is dispatched: a dispatch mode, as tracers and counters are, or `torch.jit.trace`."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


@contextmanager
def _unseen() -> Iterator[None]:
    with torch._C.DisableTorchFunction(), _untraced():
        yield


@contextmanager
def _untraced() -> Iterator[None]:
    """Take off all dispatch modes but that of fake tensors, which is what they are made by."""
    state, fake = torch._C._get_tracing_state(), torch._C._get_dispatch_mode(_FAKE)
    _C._set_tracing_state(None)
    try:
        with _disable_current_modes(), fake or nullcontext():
            yield
    finally:
        _C._set_tracing_state(state)
