"""How module calls reach the watchers: one wrapped method of `nn.Module` while any block tracks, and no hook."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


_call_impl = nn.Module._call_impl
_has_torch_function = torch.overrides.has_torch_function
_lock = threading.Lock()
_everywhere: list[Watcher] = []
_here = threading.local()


def _watched_call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    watchers = _here.__dict__.get("watchers")
    if not watchers:
        for watcher in tuple(_everywhere):
            watcher.foreign.append(module)
        return _call_impl(module, *args, **kwargs)
    if len(watchers) == 1:
        return watchers[0].call(_call_impl, module, args, kwargs)
    return _nested(watchers)(module, *args, **kwargs)


def _nested(watchers: Sequence[Watcher]) -> Callable[..., Any]:
    """The call as the innermost watcher makes it: each one's `proceed` is the call of the one outside it."""
    proceed: Callable[..., Any] = _call_impl
    for watcher in watchers:
        proceed = _step(watcher, proceed)
    return proceed


def _step(watcher: Watcher, proceed: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *args, **kwargs: watcher.call(proceed, module, args, kwargs)


def _overridden(args: Any) -> bool:
    """torch's question "is any of these overridden?", asked as if the watching modes were not there.

    Fused kernels of `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` are left when the answer is yes.
    """
    with _without_modes():
        return bool(_has_torch_function(args))


@contextmanager
def _without_modes() -> Iterator[None]:
    """Take fmr's modes off this thread's stack inside the block and leave the others on."""
    modes = [_pop_mode() for _ in range(_len_torch_function_stack())]
    others = [mode for mode in reversed(modes) if not isinstance(mode, WatcherMode)]
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
        nn.Module._call_impl = _watched_call  # type: ignore[method-assign, assignment]
        torch.overrides.has_torch_function = _overridden  # type: ignore[assignment]
    watchers.append(watcher)
    try:
        yield
    finally:
        watchers.remove(watcher)
        with _lock:
            _everywhere.remove(watcher)
            if not _everywhere:
                nn.Module._call_impl = _call_impl  # type: ignore[method-assign]
                torch.overrides.has_torch_function = _has_torch_function


@contextmanager
def unwatched() -> Iterator[None]:
    """Run fmr's own tensor work inside a tracked block without being seen by any watcher of this thread."""
    watchers = _here.__dict__.get("watchers", [])
    _here.watchers = []
    try:
        with _without_modes():
            yield
    finally:
        _here.watchers = watchers
