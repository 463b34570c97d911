"""What passes leave on the modules of a model by name, as `self.last = hidden`: under an edit it must not stay there."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from operator import is_not
from typing import Any, NamedTuple

from torch import nn

from fmr.nests import leaves
from fmr.watching.mode import fills_parameters

Held = dict[Any, Any] | list[Any]
"""What lies in a module: its attributes, or a list or a dictionary that is one of them."""


class Change(NamedTuple):
    """What lay in a place before a pass changed it, and after the last that did; a list is one place."""

    held: Held
    name: Any
    before: Any
    after: Any

    @property
    def leaves_tensors(self) -> bool:
        """Whether a tensor was left that was not there before."""
        known = set(map(id, self.before)) if isinstance(self.held, list) else ()
        left = self.after if isinstance(self.held, list) else [self.after]
        return any(next(leaves(one), None) is not None for one in left if id(one) not in known)

    def put_back(self) -> None:
        """Undo it, if nobody has changed it since."""
        held, name, before, after = self
        if isinstance(held, list):
            if not _differs(held, after):
                held[:] = before
        elif held.get(name, _NOTHING) is not after:
            return
        elif before is _NOTHING:
            del held[name]
        else:
            held[name] = before


class Left:
    """What the passes of a block changed in the modules of a model; buffers and parameters are the model's own state."""

    def __init__(self) -> None:
        self._changes: dict[tuple[int, Any], Change] = {}

    @contextmanager
    def noting(self, root: nn.Module) -> Iterator[None]:
        """Note what a pass changes."""
        held = _held(root)
        views, before = [*map(_values, held)], [one.copy() for one in held]
        then = [*chain.from_iterable(views)]
        try:
            yield
        finally:
            if len(now := [*chain.from_iterable(views)]) != len(then) or any(map(is_not, now, then)):
                for one, copy in zip(held, before, strict=True):
                    self._note(one, copy)

    def _note(self, held: Held, copy: Held) -> None:
        if isinstance(held, list):
            if _differs(held, copy):
                self._changed(held, None, copy, held.copy())
            return
        assert isinstance(copy, dict)
        for name in {**copy, **held}:
            before, after = copy.get(name, _NOTHING), held.get(name, _NOTHING)
            if before is not after:
                self._changed(held, name, before, after)

    def _changed(self, held: Held, name: Any, before: Any, after: Any) -> None:
        known = self._changes.get((id(held), name))
        if known is not None and (known.after is before or (name is None and not _differs(known.after, before))):
            before = known.before  # nobody else has changed it in between
        self._changes[id(held), name] = Change(held, name, before, after)

    def put_back(self) -> None:
        """Where a tensor was left, undo all that the passes changed: what belongs together changes together."""
        changes, self._changes = self._changes, {}
        if any(change.leaves_tensors for change in changes.values()):
            for change in changes.values():
                change.put_back()


_NOTHING = object()
_CONTAINERS = {list, dict}
_torchs = {one for one in vars(nn).values() if isinstance(one, type) and issubclass(one, nn.Module)}
_OWN = len(vars(nn.Module()))
"""How many attributes every module has before its own."""


def _held(root: nn.Module) -> list[Held]:
    """The attributes of the modules of a tree, and the lists and dictionaries among them; torch's own keep nothing."""
    found: list[Held] = []
    modules, seen = [root], {root}
    for module in modules:
        held = module.__dict__
        for child in held["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                modules.append(child)
        if type(module) not in _torchs and not fills_parameters(module):
            found.append(held)
            found += [one for one in islice(held.values(), _OWN, None) if type(one) in _CONTAINERS]
    return found


def _values(held: Held) -> Collection[Any]:
    return held.values() if type(held) is not list else held  # type: ignore[union-attr]


def _differs(held: Held, other: Held) -> bool:
    """Whether they hold other objects."""
    return len(held) != len(other) or any(map(is_not, _values(held), _values(other)))
