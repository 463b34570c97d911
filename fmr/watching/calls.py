"""How module calls reach the watchers, while any block tracks: through the body of `nn.Module.__call__`, with no hook.

The function object stays what it is; only its code is exchanged, and put back. Setting an attribute of `nn.Module`
instead would cost a tenth of a small model's forward, since Python then forgets what it cached about every module class.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _len_torch_function_stack, _pop_mode, _push_mode


class Watcher(Protocol):
    """What takes part in module calls on its own thread."""

    foreign: list[nn.Module]

    def call(self, proceed: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run the module call `proceed(module, *args, **kwargs)` and return what it returned."""


class WatcherMode(TorchFunctionMode):
    """A mode of fmr: to a model that asks whether it is overridden, it does not count."""


_entry: Any = nn.Module._wrapped_call_impl
_code = _entry.__code__
_call = FunctionType(_code, _entry.__globals__, _entry.__name__)
_has_torch_function = torch.overrides.has_torch_function
_lock = threading.Lock()
_everywhere: list[Watcher] = []
_here = threading.local()


def _body(self, /, *args, _fmr=None, **kwargs):  # type: ignore[no-untyped-def]
    return _fmr(self, args, kwargs)


def _watched_call(module: nn.Module, args: Any, kwargs: Any) -> Any:
    watchers = _here.__dict__.get("watchers")
    if not watchers:
        for watcher in tuple(_everywhere):
            watcher.foreign.append(module)
        return _call(module, *args, **kwargs)
    if len(watchers) == 1:
        return watchers[0].call(_call, module, args, kwargs)
    return _nested(watchers)(module, *args, **kwargs)


def _exchange(code: CodeType) -> None:
    """Give `nn.Module.__call__` this body; while it is `_body`, its default argument is there for any other thread."""
    _entry.__kwdefaults__ = {"_fmr": _watched_call}
    _entry.__code__ = code
    if code is _code:
        _entry.__kwdefaults__ = None


def _nested(watchers: Sequence[Watcher]) -> Callable[..., Any]:
    """The call as the innermost watcher makes it: each one's `proceed` is the call of the one outside it."""
    proceed: Callable[..., Any] = _call
    for watcher in watchers:
        proceed = _step(watcher, proceed)
    return proceed


def _step(watcher: Watcher, proceed: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *args, **kwargs: watcher.call(proceed, module, args, kwargs)


def _overridden(args: Any) -> bool:
    """torch's question "is any of these overridden?", asked as if the watching modes were not there.

    Fused kernels of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` are left when the answer is yes.
    """
    with _without_modes(WatcherMode):
        return bool(_has_torch_function(args))


@contextmanager
def _without_modes(kind: type[TorchFunctionMode]) -> Iterator[None]:
    """Take the modes of a class off this thread's stack inside the block and leave the others on."""
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    others = [mode for mode in reversed(modes) if not isinstance(mode, kind)]
    for mode in others:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in others:
            _pop_mode()
        for mode in reversed(modes):
            _push_mode(mode)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Let a watcher see this thread's module calls inside the block."""
    watchers = _here.__dict__.setdefault("watchers", [])
    with _lock:
        _everywhere.append(watcher)
        _exchange(_body.__code__)
        torch.overrides.has_torch_function = _overridden
    watchers.append(watcher)
    try:
        yield
    finally:
        watchers.remove(watcher)
        with _lock:
            _everywhere.remove(watcher)
            if not _everywhere:
                _exchange(_code)
                torch.overrides.has_torch_function = _has_torch_function


@contextmanager
def unwatched() -> Iterator[None]:
    """Run fmr's own tensor work inside a tracked block unseen: by the watchers of this thread and by the user's modes."""
    watchers = _here.__dict__.get("watchers", [])
    _here.watchers = []
    try:
        with _without_modes(TorchFunctionMode):
            yield
    finally:
        _here.watchers = watchers
