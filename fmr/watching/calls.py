"""How module calls reach the watchers, while any block tracks: through the body of `nn.Module.__call__`, with no hook.

The function object stays what it is; only its code is exchanged, and put back. Setting an attribute of `nn.Module`
instead would cost a tenth of a small model's forward, since Python then forgets what it cached about every module class.
torch.compile neither traces nor compiles what stands in for that code: a frame of it is skipped, as torch's own is.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import CodeType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fmr.errors import TrackError
from fmr.watching import capsules, swaps
from fmr.watching.stack import is_on, modes, set_modes

Proceed = Callable[..., Any]
T = TypeVar("T")


class Noted:
    """How many module calls were noted, the class of the first module, and that module while it lives."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""
        self.module: Callable[[], nn.Module | None] = lambda: None

    def note(self, module: nn.Module) -> None:
        """Note one call."""
        if not self.count:
            self.first, self.module = type(module).__name__, weakref.ref(module)
        self.count += 1


class Watcher(Protocol):
    """What takes part in module calls on its own thread, in the context that it was opened in."""

    foreign: Noted
    ended: bool

    def call(self, proceed: Proceed, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run the module call `proceed(*args, **kwargs)` and return what it returned."""

    def swap(self, first: Tensor, second: Tensor) -> None:
        """Be told that two tensor objects are about to become each other."""

    def hand_out(self, tensor: Tensor) -> None:
        """Be told that the memory of a tensor is about to be handed out."""

    def end_before(self, others: tuple["Watcher", ...]) -> None:
        """Be told at the end of the block which blocks began later, here too, and are still open."""


class WatcherMode(TorchFunctionMode):
    """A mode of fmr: to a model that asks whether it is overridden, it does not count. `ended`: its block is over."""

    ended = False


class _Seat:
    """The watchers of one thread in one context, the innermost last, and the call that they make of a module's call."""

    __slots__ = ("call", "thread", "watchers")

    def __init__(self, watchers: tuple[Watcher, ...]) -> None:
        self.thread = threading.get_ident()
        self.sit(watchers)

    def sit(self, watchers: tuple[Watcher, ...]) -> None:
        """Let these watch."""
        self.watchers = watchers
        self.call: Proceed = watchers[0].call if len(watchers) == 1 else partial(_in_turn, watchers) if watchers else _alone


_entry: Any = nn.Module._wrapped_call_impl
_code: CodeType = _entry.__code__
_has_torch_function = torch.overrides.has_torch_function
_lock = threading.RLock()  # a block may end inside another's entry, by the garbage collector or a signal
_everywhere: dict[Watcher, list[_Seat]] = {}
_seats: ContextVar[_Seat | None] = ContextVar("fmr watchers", default=None)
_frames = torch._C._dynamo.eval_frame


def _body(self, *args, **kwargs):  # type: ignore[no-untyped-def]
    if not torch.compiler.is_dynamo_compiling():
        called: Any = "what stands here is put in its place below"
        here, this_thread, compiling, under_compiler, note = called
        seat = here()
        if seat is None or seat.thread != this_thread():
            note(self)
        else:
            compiled = self._compiled_call_impl
            call = seat.call if compiling() is None else under_compiler(seat.call)
            return call(self._call_impl if compiled is None else compiled, self, args, kwargs)
    if self._compiled_call_impl is not None:
        return self._compiled_call_impl(*args, **kwargs)
    return self._call_impl(*args, **kwargs)


def _note(module: nn.Module) -> None:
    """A call on a thread or in a context in which nobody watches."""
    for watcher in tuple(_everywhere):
        watcher.foreign.note(module)


def _alone(proceed: Proceed, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return proceed(*args, **kwargs)


def _in_turn(watchers: tuple[Watcher, ...], proceed: Proceed, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The call as the innermost watcher makes it: each one's `proceed` is the call of the one outside it."""
    for watcher in watchers[:-1]:
        proceed = _step(watcher, proceed, module)
    return watchers[-1].call(proceed, module, args, kwargs)


def _step(watcher: Watcher, proceed: Proceed, module: nn.Module) -> Proceed:
    return lambda *args, **kwargs: watcher.call(proceed, module, args, kwargs)


def _under_compiler(call: Proceed) -> Proceed:
    """The call where torch.compile takes each frame on this thread: it takes those of the model and none of fmr's."""
    compiler = _frames.get_eval_frame_callback()

    def around(proceed: Proceed, module: nn.Module, args: Any, kwargs: Any) -> Any:
        def resume(*args: Any, **kwargs: Any) -> Any:
            _frames.set_eval_frame(compiler)
            try:
                return proceed(*args, **kwargs)
            finally:
                _frames.set_eval_frame(None)

        _skip(resume.__code__)
        _frames.set_eval_frame(None)
        try:
            return call(resume, module, args, kwargs)
        finally:
            _frames.set_eval_frame(compiler)

    _skip(around.__code__)
    return around


def _overridden(args: Any) -> bool:
    """torch's question "is any of these overridden?", asked as if the watching modes were not there.

    Fused kernels of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` are left when the answer is yes.
    """
    if torch.compiler.is_dynamo_compiling():
        return bool(_has_torch_function(args))
    before = modes()
    try:
        set_modes([mode for mode in before if not isinstance(mode, WatcherMode)])
        return bool(_has_torch_function(args))
    finally:
        try:
            set_modes(before)
        except BaseException:
            set_modes(before)
            raise


def _watching_here() -> tuple[Watcher, ...]:
    """The watchers of this thread in this context."""
    seat = _seats.get()
    return seat.watchers if seat is not None and seat.thread == threading.get_ident() else ()


def _hand_out(tensor: Tensor) -> None:
    for watcher in _watching_here():
        watcher.hand_out(tensor)


def _swap(first: Any, second: Any) -> None:
    """torch's swap of two tensors, of which the watchers of this thread are told; one that fails is undone for them."""
    both = isinstance(first, Tensor) and isinstance(second, Tensor) and first is not second
    watchers = _watching_here() if both else ()
    done: list[Watcher] = []
    try:
        for watcher in watchers:
            done.append(watcher)
            watcher.swap(first, second)
        swaps.torchs_own(first, second)
    except BaseException:
        for watcher in done:
            watcher.swap(first, second)
        raise


def _skip(code: CodeType) -> None:
    """Have torch.compile run the frames of this code as they are, and go on with those that they call."""
    skip, default = _frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT
    _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(skip, default))


def _with_constants(code: CodeType) -> CodeType:
    """The body with its one text replaced by what it calls: it runs with the globals of another file."""
    called = (_seats.get, threading.get_ident, _frames.get_eval_frame_callback, _under_compiler, _note)
    return code.replace(co_consts=tuple(called if isinstance(one, str) else one for one in code.co_consts))


_watched_code = _with_constants(_body.__code__)
_swap_code = swaps.code_that_calls(_swap)
for _one in (
    _watched_code,
    _swap_code,
    _swap.__code__,
    _note.__code__,
    Noted.note.__code__,
    _under_compiler.__code__,
    _overridden.__code__,
    _skip.__code__,
):
    _skip(_one)


def _let_compiler_know() -> None:
    """Have torch.compile note torch's own question, by which it knows a traced one, before another stands in its place."""
    loaded = sys.modules.get("torch._dynamo.variables.torch")
    if loaded is not None:
        loaded.TorchInGraphFunctionVariable._get_handlers()


def _settle() -> None:
    """Have `nn.Module.__call__` and torch's question as they must be while these watch, whatever they were."""
    if torch.overrides.has_torch_function is _has_torch_function:
        _let_compiler_know()
    code, question = (_watched_code, _overridden) if _everywhere else (_code, _has_torch_function)
    if _entry.__code__ is not code:
        _entry.__code__ = code
    torch.overrides.has_torch_function = question
    swaps.settle(_swap_code if _everywhere else None)
    capsules.settle(_hand_out if _everywhere else None)


def _enter(watcher: Watcher) -> None:
    seat = _seats.get()
    with _lock:
        before = seat.watchers if seat is not None and seat.thread == threading.get_ident() else ()
        _everywhere[watcher], watcher.ended = [], False
        seat = _Seat((*before, watcher))
        for one in seat.watchers:
            _everywhere.setdefault(one, []).append(seat)
        _settle()
    _seats.set(seat)


def _leave(watcher: Watcher, before: list[TorchFunctionMode] | None) -> None:
    """Undo what was done of `_enter`, however much that is; done twice, it does no harm."""
    with _lock:
        for seat in _everywhere.get(watcher, ()):
            seat.sit(tuple(one for one in seat.watchers if one is not watcher))
        _everywhere.pop(watcher, None)
        watcher.ended = True
        _settle()
    here = _seats.get()
    if here is not None and not here.watchers:
        _seats.set(None)
    now = modes()
    stack = _still_open(now)
    if before is not None:
        still = _still_open(before)
        stack = still + [mode for mode in stack if mode not in still]
    if stack != now:
        set_modes(stack)


def _later(watcher: Watcher) -> tuple[Watcher, ...]:
    """The watchers that began after this one, in this context."""
    seat = _seats.get()
    watchers = seat.watchers if seat is not None else ()
    return watchers[watchers.index(watcher) + 1 :] if watcher in watchers else ()


def _still_open(stack: list[TorchFunctionMode]) -> list[TorchFunctionMode]:
    """Modes without those of blocks that have ended: torch may put one back late where Ctrl-C came while it was off."""
    return [mode for mode in stack if not (isinstance(mode, WatcherMode) and mode.ended)]


@contextmanager
def watching(watcher: Watcher, mode: TorchFunctionMode | None = None) -> Iterator[None]:
    """Let a watcher see the module calls of this thread inside the block, and of this context: not those of another task.

    With `mode`, which is the watcher itself, it is a mode of the block, too. After the block that mode is off and no
    other: blocks need not end in the order in which they began. Where the block ends in an exception, such as Ctrl-C, the
    modes that were on before it are on again. A mode of the user's that is left while this one lies above it takes this
    one off in place of itself, since torch takes off the uppermost; that is an error.
    """
    before: list[TorchFunctionMode] | None = _still_open(modes())
    lost = False
    try:
        _enter(watcher)
        set_modes([*(before or ()), mode] if mode is not None else before or ())
        yield
        before, lost = None, mode is not None and not is_on(mode)
        watcher.end_before(_later(watcher))
    except GeneratorExit:  # it hung where it was, and other blocks have begun and ended since
        before = None
        watcher.end_before(_later(watcher))
        raise
    finally:
        try:
            _leave(watcher, before)
        except BaseException:
            _leave(watcher, before)
            raise
    if lost:
        set_modes(modes()[:-1])
        raise TrackError(
            "A TorchFunctionMode that was entered before the block was left inside it, and took fmr's mode off in place of "
            "its own: torch takes off the uppermost. Ops after that were not recorded. Leave the block before the mode."
        )


def apart(work: Callable[[], T], mode: TorchFunctionMode | None = None) -> T:
    """Do tensor work of fmr's own unseen by the watchers of this thread and by the user's modes, under `mode` alone."""
    before, seat = modes(), _seats.get()
    try:
        _seats.set(_Seat(()))
        set_modes([] if mode is None else [mode])
        return work()
    finally:
        _seats.set(seat)
        try:
            set_modes(before)
        except BaseException:
            set_modes(before)
            raise


@contextmanager
def unwatched() -> Iterator[None]:
    """The same for a block of work, outside any tracked one."""
    before, seat = modes(), _seats.get()
    try:
        _seats.set(_Seat(()))
        set_modes([])
        yield
    finally:
        _seats.set(seat)
        try:
            set_modes(before)
        except BaseException:
            set_modes(before)
            raise
