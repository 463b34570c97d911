"""What both watchers share: where a pass begins, and what a call overwrites."""

import contextlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fmr.errors import TrackError
from fmr.nests import Nest, leaves
from fmr.ops.names import Op
from fmr.watching.calls import Noted, Watcher, WatcherMode
from fmr.watching.scopes import Start, refuse_transformed, walk
from fmr.watching.stack import modes, put_on, take_off

_HERE = __file__.removesuffix("watching/mode.py")
is_traced = torch.compiler.is_dynamo_compiling


functorch_level = torch._C._functorch.peek_interpreter_stack


def fills_parameters(module: nn.Module) -> bool:
    """Whether a lazy layer still gives its parameters shapes and first values: that is no part of its forward."""
    return "_initialize_hook" in module.__dict__


class RootWatcher(WatcherMode):
    """A mode that knows where a pass begins: at each outermost call of `root`, or of any module where none is given.

    A module that `root` registers begins one, too, when it is called outside. With `by_entry`, only `enter` does.
    """

    def __init__(self, root: nn.Module | None) -> None:
        super().__init__()
        self.root = root
        self.by_entry = False
        self.every, self.calls, self.resting = 1, 0, False
        self._below: dict[int, tuple[str, nn.Module]] | None = None
        self.missed, self.foreign = Noted(), Noted()
        self.by_generator = _is_opened_by_generator()

    def begins_pass(self, module: nn.Module) -> Start | None:
        """The pass that this call begins, made outside any. Recomputation during backward begins none."""
        if self.resting or torch._C._current_graph_task_id() != -1:
            return None
        path = "" if self.root is None or module is self.root else self._registered(module)
        if path is None or self.by_entry:
            self.missed.note(module)
            return None
        if functorch_level() is not None:
            refuse_transformed(module)
        if not path:
            self._below = None  # the tree may change while the root runs
        return Start(module, path)

    def _registered(self, module: nn.Module) -> str | None:
        """The first path of a module below the root, as the tree was at the first such call after one of the root."""
        if self._below is None:
            assert self.root is not None
            self._below = {id(below): (path, below) for path, below in reversed(list(walk(self.root)))}
        path, below = self._below.get(id(module), (None, None))
        return path if below is module else None

    def enter(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function as a pass of the root; inside a pass it is a call like any other."""
        if self.in_pass or self.resting or torch._C._current_graph_task_id() != -1:
            return function(*args, **kwargs)
        assert self.root is not None
        if functorch_level() is not None:
            refuse_transformed(self.root)
        return self.record(function, Start(self.root, "", _entered(function)), args, kwargs)

    def rests(self) -> bool:
        """Count a call that would be a pass; whether it is one of those that are let by."""
        self.calls += 1
        return (self.calls - 1) % self.every != 0

    def let_by(self, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a call of which nothing is seen, with this mode off, if it was on."""
        place = next((place for place, mode in enumerate(modes()) if mode is self), None)
        self.resting = True
        try:
            take_off(self)
            return proceed(*args, **kwargs)
        finally:
            self.resting = False
            if place is not None:
                put_on(self, place)

    def swap(self, first: Tensor, second: Tensor) -> None:
        """Two tensor objects are about to become each other, which is nothing to one that keeps copies."""

    def hand_out(self, tensor: Tensor) -> None:
        """The memory of a tensor is about to be handed out, which is nothing to one that keeps copies."""

    @property
    def in_pass(self) -> bool:
        """Whether a pass is under way."""
        raise NotImplementedError

    def record(self, proceed: Callable[..., Any], start: Start, args: Any, kwargs: Any) -> Any:
        """Run `proceed(*args, **kwargs)` as a pass."""
        raise NotImplementedError

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


def _entered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself of a call by which other watchers begin a pass, too."""
    while isinstance(function, partial) and getattr(function.func, "__func__", None) is RootWatcher.enter:
        function = function.args[0]
    return function


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
