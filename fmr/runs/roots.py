"""What a pass may be a call of, besides a module: one of its methods, or a function that calls modules."""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, cast

from torch import Tensor, nn

from fmr.errors import TrackError, nearest
from fmr.watching.mode import RootWatcher


def method_of(model: nn.Module, name: str) -> Callable[..., Any]:
    """The method of a model by its name."""
    if not isinstance(name, str):
        own = getattr(name, "__name__", "")
        given = f"the function {own!r}" if own else type(name).__name__
        hint = f"method={own!r}" if own and hasattr(model, own) else "the name of one, as 'forward'"
        raise TrackError(f"method is {given}, expected the name of a method of {type(model).__name__}: {hint}.")
    found = getattr(model, name, None)
    if not callable(found) or isinstance(found, nn.Module):
        close = nearest(str(name), [key for key in dir(type(model)) if not key.startswith("_")])
        raise TrackError(f"{type(model).__name__} has no method {name!r}. Expected the name of one, as 'forward'.{close}")
    inner = inspect.unwrap(found)
    if any(told(inner) for told in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
        raise TrackError(
            f"{type(model).__name__}.{name} is a coroutine or a generator: its call only makes one, which runs later. "
            "Expected a method that computes when called; without method= the calls of the model inside it are the passes."
        )
    return cast("Callable[..., Any]", found)


def unbound(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A call of `functools.partial(model, ...)`, or of one of a method of a model, as a call of what was bound."""
    if isinstance(model, functools.partial) and (isinstance(model.func, nn.Module) or _owner(model.func) is not None):
        return model.func, (*model.args, *args), {**model.keywords, **kwargs}
    return model, args, kwargs


def _owner(function: Any) -> nn.Module | None:
    """The module whose method a function is, under whatever wrappers such as `torch.no_grad()`."""
    inner = inspect.unwrap(function, stop=lambda one: isinstance(one, MethodType))
    owner = getattr(inner, "__self__", None)
    return owner if isinstance(inner, MethodType) and isinstance(owner, nn.Module) else None


def called(
    model: Any, method: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[nn.Module, Callable[..., Any] | None]:
    """The root of a call, and the function that is called in its place; None where it is the module itself."""
    if isinstance(model, nn.Module):
        return model, None if method is None else method_of(model, method)
    if method is not None:
        raise TrackError(f"fmr.run got method={method!r} and a {type(model).__name__}. Expected a torch.nn.Module with it.")
    if not callable(model):
        held = next((name for name, value in getattr(model, "__dict__", {}).items() if isinstance(value, nn.Module)), None)
        raise TrackError(
            f"fmr.run got {type(model).__name__}, expected a torch.nn.Module or a function that calls modules"
            f"{(held and f', such as its attribute .{held}') or ''}."
        )
    return root_of(model, args, kwargs), model


# ---- calls of a method as passes, wherever the model is called


_NOTHING = object()


class Entry:
    """Stands in a model for one of its methods while blocks track it, and begins a pass in those of this thread."""

    def __init__(self, method: Callable[..., Any], before: Any) -> None:
        self.method, self.before = method, before
        self.watchers: list[tuple[int, RootWatcher]] = []
        functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, as a pass of each block that tracks it."""
        call = self.method
        for thread, watcher in tuple(self.watchers):
            if thread == threading.get_ident():
                call = functools.partial(watcher.enter, call)
        return call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model has its own method in this place."""
        return copy.deepcopy(self.method, memo)


@contextmanager
def entered(model: nn.Module, name: str, watchers: Iterable[RootWatcher]) -> Iterator[None]:
    """Let the calls of a method, and no others, begin passes of these; the last block that ends leaves all as it was."""
    own, method = vars(model), method_of(model, name)
    before = own.get(name, _NOTHING)
    entry = before if isinstance(before, Entry) else Entry(method, before)
    own[name] = entry
    mine = [(threading.get_ident(), watcher) for watcher in watchers]
    for _, watcher in mine:
        watcher.by_entry = True
    entry.watchers += mine
    try:
        yield
    finally:
        for one in mine:
            entry.watchers.remove(one)
        if not entry.watchers and own.get(name) is entry:
            del own[name]
            if entry.before is not _NOTHING:
                own[name] = entry.before


# ---- a function as a root


def root_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> nn.Module:
    """The module whose names the IDs of a call of this function have.

    That of a method is its module. For another function it is a module that registers what the function knows by name:
    modules and tensors among its arguments, in its closure, in the object that it belongs to, and those global names
    that it uses.
    """
    owner = _owner(function)
    if owner is not None:
        return owner
    name = getattr(function, "__name__", type(function).__name__)
    root: nn.Module = type(name.strip("<>"), (nn.Module,), {})()
    given = [*zip(_names(function), args, strict=False), *kwargs.items()]
    known = [item for item in given if not isinstance(item[1], Tensor)]  # tensors that are given are inputs
    for key, value in (*known, *_known_to(function)):
        _register(root, key, value)
    return root


def _known_to(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function knows by name besides its arguments: what was bound, its object's attributes, closure and globals."""
    while isinstance(function, functools.partial):
        yield from zip(_names(function.func), function.args, strict=False)
        yield from function.keywords.items()
        function = function.func
    if isinstance(function, MethodType):
        yield from getattr(function.__self__, "__dict__", {}).items()
        function = function.__func__
    elif not isinstance(function, FunctionType):
        yield from getattr(function, "__dict__", {}).items()
        function = vars(type(function)).get("__call__")
    function = inspect.unwrap(function)
    if isinstance(function, FunctionType):
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            yield from _content(name, cell)
        yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)


def _content(name: str, cell: Any) -> Iterator[tuple[str, Any]]:
    try:
        yield name, cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return


def _names(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of C, which tells no signature
        return []


def _register(root: nn.Module, name: str, value: Any) -> None:
    """Register a module or a tensor, or those in a list or a dict, under the first name that leads to it."""
    if isinstance(value, nn.Module):
        root._modules.setdefault(name, value)
    elif isinstance(value, nn.Parameter):
        root._parameters.setdefault(name, value)
    elif isinstance(value, Tensor):
        root._buffers.setdefault(name, value)
    elif isinstance(value, (list, tuple, dict)) and name not in root._modules:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        modules = {str(key): item for key, item in items if isinstance(item, nn.Module)}
        if modules:
            root._modules[name] = holder = nn.Module()
            holder._modules.update(modules)
