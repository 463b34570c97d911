"""What to keep of a run, and where: every argument is checked before the model runs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fmr.errors import TrackError
from fmr.ids import SOURCES, Site, TensorId
from fmr.nodes import Key, Node, id_of, is_key, no_key
from fmr.watching.plan import Plan, is_plannable
from fmr.watching.scopes import walk

Keep = str | Key | Iterable[Key] | Callable[[Node], bool]


@dataclass(frozen=True, eq=False)
class Wanted:
    """What to keep: exact IDs and paths, globs, the predicate they make (None: everything), a plan where one is enough."""

    ids: tuple[TensorId, ...]
    globs: tuple[str, ...]
    predicate: Callable[[Node], bool] | None
    plan: Plan | None
    _of_call: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def of_call(self, path: str) -> tuple[str, ...]:
        """The positions that are wanted of what a module call returned; the empty one is all of it."""
        found = self._of_call.get(path)
        if found is None:
            exact = [at for name in self.ids if name.is_path for read, at in name.readings if read == path]
            matched = [""] if any(fnmatchcase(path, glob) for glob in self.globs) else []
            found = self._of_call[path] = (*exact, *matched)
        return found


def parse(keep: Keep, model: nn.Module | None) -> Wanted:
    """What a `keep` says."""
    if isinstance(keep, str) and keep in ("all", "none"):
        return Wanted((), (), None if keep == "all" else nothing, None)
    if isinstance(keep, str):
        return _named((keep,), ())
    if isinstance(keep, list) and keep and all(isinstance(key, str) for key in keep):
        return _named(tuple(keep), ())
    if callable(keep) and not isinstance(keep, nn.Module):
        return Wanted((), (), keep, None)
    keys = _keys(keep)
    for key in keys:
        if isinstance(key, nn.Module):
            raise TrackError(_module(key, model))
    for key in keys:
        if is_dataclass(key) and not is_key(key):
            raise TrackError(f"keep got what is no key. {no_key(key)}")
    if not keys or not all(is_key(key) for key in keys):
        what = "empty" if isinstance(keep, Iterable) and not isinstance(keep, torch.Tensor) and not keys else repr(keep)
        raise TrackError(
            f"keep is {what}. Expected 'all', 'none', IDs, paths of modules, nodes, sites, globs or a predicate on nodes."
        )
    return _named(tuple(id_of(key) for key in keys), tuple(key.id for key in keys if isinstance(key, Site) and key.where))


def parse_with_edits(keep: Keep, model: nn.Module | None) -> Wanted:
    """The same beside edits, which may be all that a run is for: then nothing is kept."""
    empty = isinstance(keep, (tuple, list)) and not keep
    return Wanted((), (), nothing, Plan(())) if empty else parse(keep, model)


def nothing(node: Node) -> bool:
    """The predicate that wants no value, and so no look into any fused op."""
    return False


def _keys(keep: Any) -> list[Any]:
    """The keys in what was given: one, some, or the nest of nodes that a module call returned."""
    if is_key(keep) or isinstance(keep, nn.Module):
        return [keep]
    if isinstance(keep, Mapping) and any(isinstance(item, Node) for item in keep.values()):
        keep = keep.values()
    if not isinstance(keep, Iterable) or isinstance(keep, torch.Tensor):
        return [keep] if is_dataclass(keep) else []
    nested = isinstance(keep, tuple) and any(isinstance(item, Node) for item in keep)
    return [key for item in keep if not (nested and item is None) for key in (_keys(item) if _is_nest(item) else [item])]


def _is_nest(item: Any) -> bool:
    return isinstance(item, (tuple, Mapping)) and not is_key(item)


def _module(module: nn.Module, model: nn.Module | None) -> str:
    """The message for a module that was given as a key."""
    path = next((path for path, one in walk(model) if one is module), None) if model is not None else None
    what = f"keep got a module, {type(module).__name__}"
    if path is not None:
        return f"{what}. Expected its path, for what its call returns: keep={path!r}."
    where = f", which the tracked {type(model).__name__} does not register" if model is not None else ""
    return f"{what}{where}. Expected the path of a module as in model.named_modules(), for what its call returns."


@lru_cache(maxsize=64)
def _named(names: tuple[str, ...], placed: tuple[str, ...]) -> Wanted:
    """The IDs and globs of a keep list; the same list in a later run needs no second thought.

    `placed` are the IDs of which it is to be known where their ops are called.
    """
    globs = tuple(str(name) for name in names if any(character in name for character in "*?["))
    ids = tuple(dict.fromkeys(TensorId(name) for name in names if name not in globs))
    for name in ids:
        _ = name.is_source or name.is_path or name.parts
    planned = not any(may_name_values(glob) for glob in globs) and all(is_plannable(name) for name in ids)
    exact = frozenset(ids)
    return Wanted(
        ids,
        globs,
        lambda node: node.id in exact or any(fnmatchcase(node.id, glob) for glob in globs),
        Plan(ids, globs, placed) if planned else None,
    )


_STEPS: dict[str, dict[str, tuple[str, ...]]] = {
    "scope": {"/": ("scope", "slash"), "": ("scope",)},
    "slash": {"/": (), "#": (), ":": (), "": ("op",)},
    "op": {"/": (), ":": (), "#": ("hash",), "": ("op",)},
    "hash": {"0": ("k",)},
    "k": {"0": ("k",), ":": ("colon",)},
    "colon": {"0": ("i",)},
    "i": {"0": ("i",)},
}
"""The form `scope/op#k:i` as an automaton: where each kind of character leads, `0` for any digit, the empty for others."""


def may_name_values(glob: str) -> bool:
    """Whether a glob can match the ID of a value; one that can not names module calls alone.

    >>> may_name_values("*softmax*"), may_name_values("h.*.mlp"), may_name_values("h.??")
    (True, False, False)
    """
    head = glob[: min(glob.find(wild) for wild in "*?[" if wild in glob)]
    if any(head.startswith(source) or source.startswith(head) for source in SOURCES):
        return True
    states, rest = {"scope"}, glob
    while rest:
        token, rest = rest[0], rest[1:]
        if token == "[" and "]" in rest[1:]:
            token, rest = "?", rest[rest.index("]", 1) + 1 :]
        states = _star(states) if token == "*" else _after(states, "/#:0a" if token == "?" else token)
    return bool(states & {"k", "i"})


def _after(states: set[str], characters: str) -> set[str]:
    kinds = {"0" if one.isdigit() else one if one in "/#:" else "" for one in characters}
    steps = ((_STEPS[state], kind) for state in states for kind in kinds)
    return {after for step, kind in steps for after in step.get(kind, step.get("", ()))}


def _star(states: set[str]) -> set[str]:
    """The states after any text."""
    while not (more := _after(states, "/#:0a")) <= states:
        states = states | more
    return states


def check_place(to: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise for a device that is not there and for what is no dtype, before a model runs for nothing."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        named = getattr(torch, str(getattr(dtype, "__name__", dtype)).removeprefix("torch."), None)
        remedy = named if isinstance(named, torch.dtype) else "torch.float32 for example"
        raise TrackError(f"dtype={dtype!r} is a {type(dtype).__name__}, expected a torch.dtype: pass {remedy}.")
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        raise TrackError(f"dtype={dtype} has no fractions, expected a type for floating-point values: pass torch.float32.")
    if to is None:
        return
    try:
        device = torch.device(to)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TrackError(f"to={to!r} names no device ({str(error)[:80]}). Expected one such as 'cpu' or 'cuda:0'.") from None
    backend: Any = getattr(torch, device.type, None)
    count = backend.device_count() if hasattr(backend, "device_count") and device.type != "cpu" else None
    if count is not None and (device.index or 0) >= count:
        raise TrackError(f"to={str(to)!r}: torch finds {count} {device.type} devices here. Expected one of these, or 'cpu'.")
