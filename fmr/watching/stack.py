"""The function modes of this thread: put on, and taken off wherever they lie.

Ctrl-C may come at the entry of any function. What puts state back is therefore called inside a `try`, and once more where it
was interrupted; doing it twice does no harm.
"""

from collections.abc import Sequence

from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch._C import _pop_torch_function_stack as _pop
from torch._C import _push_on_torch_function_stack as _push
from torch.overrides import TorchFunctionMode


def modes() -> list[TorchFunctionMode]:
    """The modes of this thread, the innermost last."""
    return [_get_function_stack_at(k) for k in range(_len_torch_function_stack())]


def set_modes(stack: Sequence[TorchFunctionMode]) -> None:
    """Make these the modes of this thread."""
    while _len_torch_function_stack():
        _pop()
    for mode in stack:
        _push(mode)


def is_on(mode: object) -> bool:
    """Whether a mode is on."""
    return any(other is mode for other in modes())


def take_off(mode: object) -> None:
    """Take a mode off, wherever it lies by now; one that is not on is no error."""
    count = _len_torch_function_stack()
    if count and _get_function_stack_at(count - 1) is mode:
        _pop()
    elif is_on(mode):
        set_modes([other for other in modes() if other is not mode])


def put_on(mode: TorchFunctionMode, depth: int) -> None:
    """Put a mode on above the outermost `depth` others: those that began since stay inside it."""
    if _len_torch_function_stack() <= depth:
        _push(mode)
    else:
        before = modes()
        set_modes([*before[:depth], mode, *before[depth:]])
