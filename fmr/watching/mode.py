"""What both watchers share: where a pass begins, and what a call overwrites."""

import contextlib
import inspect
import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fmr.errors import TrackError
from fmr.nests import Nest, leaves
from fmr.ops.names import Op
from fmr.watching.calls import Noted, Watcher, WatcherMode
from fmr.watching.scopes import refuse_transformed

_HERE = __file__.removesuffix("watching/mode.py")
is_traced = torch.compiler.is_dynamo_compiling


functorch_level = torch._C._functorch.peek_interpreter_stack


class RootWatcher(WatcherMode):
    """A mode that knows where a pass begins: at each outermost call of `root`, or of any module where none is given."""

    def __init__(self, root: nn.Module | None) -> None:
        super().__init__()
        self.root = root
        self.missed, self.foreign = Noted(), Noted()
        self.by_generator = _is_opened_by_generator()

    def begins_pass(self, module: nn.Module) -> bool:
        """Whether this call, made outside any pass, begins one. Recomputation during backward begins none."""
        if torch._C._current_graph_task_id() != -1:
            return False
        if self.root is None or module is self.root:
            if functorch_level() is not None:
                refuse_transformed(module)
            return True
        self.missed.note(module)
        return False

    def end_before(self, others: tuple[Watcher, ...]) -> None:
        """Refuse to hold the passes of another generator that tracks the same model: nothing tells whose they are."""
        if any(self._shares_passes(other) for other in others):
            raise TrackError(
                "Two generators that track the same model ran in turns: each block saw the passes of both, since generators "
                "share the context of their caller. Expected blocks that end in the reverse order, or a context for each: "
                "context = contextvars.copy_context(), then context.run(next, generator)."
            )

    def _shares_passes(self, other: Watcher) -> bool:
        if not (isinstance(other, RootWatcher) and self.by_generator and other.by_generator):
            return False
        return self.root is None or other.root is None or self.root is other.root


def _is_opened_by_generator() -> bool:
    """Whether the function that opens this block is a generator that hands on values, not one that is a context manager."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_HERE, contextlib.__file__)):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_flags & inspect.CO_GENERATOR:
        return False
    return frame.f_back is None or frame.f_back.f_code.co_filename != contextlib.__file__


def written_by(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call overwrites."""
    written = op.writes(args, kwargs) if op.writes else []
    return written + [tensor for _, tensor in leaves(kwargs["out"])] if "out" in kwargs else written


def made_by_writing(written: list[Tensor]) -> Nest:
    """What a function that returns no tensor (`__setitem__`) made: the new value of what it overwrote."""
    return None if not written else written[0] if len(written) == 1 else tuple(written)
