"""Where a call takes place: registered names of modules and tensors, and the dynamic path of each module call."""

import inspect
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmr.errors import TrackError
from fmr.ids import spelled, unspelled
from fmr.nests import leaves


class Paths:
    """The registered paths of those modules of a tree that a few dynamic paths lead through, with every path above them.

    `complete` tells that each of these is registered under one path alone; then no other path has to be known.
    """

    def __init__(self, root: nn.Module, wanted: tuple[str, ...]) -> None:
        paths = sorted(wanted, key=lambda path: path.count(".") + bool(path))
        places = {path: place for place, path in enumerate(paths)}
        self._steps = [(places[above], unspelled(name)) for above, _, name in (path.rpartition(".") for path in paths[1:])]
        self.found = self._modules(root)
        self.paths = {module: [path] for module, path in zip(self.found, paths, strict=False)}
        registered = len(self.found) == len(self.paths) == len(paths)
        self.complete = registered and not self._met_twice(root)

    def fit(self, root: nn.Module) -> bool:
        """Whether the same modules still stand at these paths."""
        return self.complete and self._modules(root) == self.found

    def _modules(self, root: nn.Module) -> list[int]:
        """The identities of the modules on the paths, a caller before what it calls, up to the first that is missing."""
        found = [root]
        for above, name in self._steps:
            children = found[above]._modules
            child = children[name] if name in children else None  # noqa: SIM401 - a scripted module's has no get
            if child is None:
                break
            found.append(child)
        return [id(module) for module in found]

    def _met_twice(self, root: nn.Module) -> bool:
        """Whether any of the modules is registered a second time somewhere in the tree."""
        seen, waiting = {id(root)}, [root]
        while waiting:
            for child in waiting.pop()._modules.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)
                elif child is not None and id(child) in self.paths:
                    return True
        return False


class Names:
    """The names that a module tree gives to its modules, parameters and buffers, read once at the start of a pass.

    A module registered in several places keeps all its paths, a tensor its first, in order of registration.
    """

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(walk(root))
        self.paths: dict[int, list[str]] = {}
        self._tied: dict[str, list[str]] = {}
        for path, module in self.modules:
            if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
                _refuse_compiled(root, path, module)
            known = self.paths.get(id(module))
            if known is None:
                self.paths[id(module)] = [path]
            else:
                known.append(path)

    @cached_property
    def tensors(self) -> dict[int, tuple[str, Tensor]]:
        """Parameters and buffers by identity, each with its name; the tensor stands beside it to check the identity."""
        found: dict[int, tuple[str, Tensor]] = {}
        for path, module in self.modules:
            dot = f"{path}." if path else ""
            for kind, tensors in (("param", module._parameters), ("buffer", module._buffers)):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        name = f"{kind}:{dot}{spelled(key)}"
                        known = found.setdefault(id(tensor), (name, tensor))[0]
                        if known != name:
                            self._tied.setdefault(known, [known]).append(name)
        return found

    @property
    def same(self) -> tuple[tuple[str, ...], ...]:
        """The names of each module and of each tensor that is registered under several."""
        _ = self.tensors
        modules = (paths for paths in self.paths.values() if len(paths) > 1)
        return tuple(map(tuple, (*modules, *self._tied.values())))


def walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every registered path of a module tree, in order; a module registered inside itself is not entered again."""
    waiting: list[tuple[str, nn.Module, tuple[int, ...]]] = [("", root, ())]
    while waiting:
        path, module, above = waiting.pop()
        yield path, module
        children = module._modules
        if children:
            above = (*above, id(module))
            dot = f"{path}." if path else ""
            for name, child in reversed(list(children.items())):
                if child is not None and id(child) not in above:
                    waiting.append((dot + spelled(name), child, above))


class Start(NamedTuple):
    """Where a pass begins: a call of the root itself, of a module registered below it, or of a function in its place."""

    module: nn.Module
    path: str = ""
    function: Callable[..., Any] | None = None

    @property
    def called(self) -> Callable[..., Any]:
        """What has the signature."""
        return self.function or self.module


class Call:
    """A module call under way: its dynamic path, and how often each op has run inside it.

    `entered` counts the calls of each path and is shared by all calls of a pass.
    """

    __slots__ = ("entered", "module", "ops", "path", "static")

    def __init__(self, module: nn.Module, path: str = "", static: str = "", entered: dict[str, int] | None = None) -> None:
        self.module, self.path, self.static = module, path, static
        self.ops: dict[str, int] = {}
        self.entered: dict[str, int] = {} if entered is None else entered

    def number(self, op: str) -> int:
        """The running number of the next op of this name."""
        k = self.ops.get(op, 0)
        self.ops[op] = k + 1
        return k

    def enter(self, module: nn.Module, names: Names | Paths) -> "Call":
        """The call of a module inside this one; the second of a path is called `@1`."""
        relative, static = self._locate(module, names)
        path = f"{self.path}.{relative}" if self.path else relative
        k = self.entered.get(path, 0)
        self.entered[path] = k + 1
        return Call(module, f"{path}@{k}" if k else path, static, self.entered)

    def _locate(self, module: nn.Module, names: Names | Paths) -> tuple[str, str]:
        """The path from here, and the registered path: under this call's own path where the module has several."""
        paths = names.paths.get(id(module), [])
        prefix = f"{self.static}." if self.static else ""
        for path in paths:
            if path.startswith(prefix) and path != self.static:
                return path[len(prefix) :], path
        if paths:
            return paths[0] or "root", paths[0]
        relative = _unregistered(self.module, module)
        return relative, prefix + relative


def _unregistered(parent: nn.Module, module: nn.Module) -> str:
    """A name for a module that its root does not register: the attribute of the caller that leads to it."""
    for path, child in walk(parent):
        if child is module and path:
            return path
    for name, value in vars(parent).items():
        if value is module:
            return spelled(name)
        if isinstance(value, (list, tuple)) and any(item is module for item in value):
            return f"{spelled(name)}.{[item is module for item in value].index(True)}"
    return spelled(type(module).__name__.lower())


def _refuse_compiled(root: nn.Module, path: str, module: nn.Module) -> None:
    """Raise for a compiled module: compiled code never meets the tracker."""
    wrapped = type(module).__module__.startswith("torch._dynamo")
    if wrapped or module._compiled_call_impl is not None:
        place = f"its module {path!r}" if path else "it"
        remedy = "track the module underneath, `model._orig_mod`" if wrapped else "track a model that was not compiled"
        raise TrackError(
            f"fmr cannot track {type(root).__name__}: {place} is compiled ({type(module).__name__}), and compiled "
            f"code runs outside the Python that fmr watches. Expected a plain module; {remedy}."
        )


def refuse_transformed(root: nn.Module) -> None:
    """Raise for a model that is called inside a functorch transform: its values are wrappers that mean nothing outside."""
    raise TrackError(
        f"{type(root).__name__} was called inside a torch.func transform (vmap, grad, jvp), whose tensors are only "
        f"stand-ins. Expected a plain call; track the function of the transform from outside, as a module that calls it."
    )


@lru_cache(maxsize=128)
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds)


def argument_names(called: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the positional arguments of a forward or a function; those of a scripted forward stand in its schema."""
    if isinstance(called, torch.jit.ScriptModule):
        forward: Any = called.forward
        return tuple(argument.name for argument in forward.schema.arguments[1:])
    if isinstance(called, nn.Module):
        return _positional(type(called).forward)[1:]
    try:
        return _positional.__wrapped__(called)
    except ValueError:  # a function of C, which tells no signature
        return ()


_PLAIN = str.maketrans({sign: spelled(sign) for sign in "*?[]"})
"""The signs that make a glob of an ID; the keys of a nest of inputs may have any others."""


def name_inputs(called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors given to a call of a module or a function, each under its name in the signature, nested by key."""
    return [(f"input:{at.translate(_PLAIN)}", tensor) for at, tensor in leaves(named_arguments(called, args, kwargs))]


def named_arguments(called: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, each under its name in the signature."""
    names = argument_names(called) if args else ()
    given = {names[i] if i < len(names) else f"args.{i - len(names)}": value for i, value in enumerate(args)}
    return {**given, **kwargs}
