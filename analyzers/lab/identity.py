"""Which model an experiment was made of: its weights, bit by bit, and how it is set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from analyzers.lab.source import is_own, source_of
from fmr.weights import fingerprint

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype)


def identity(model: nn.Module | None) -> dict[str, str]:
    """Which model: its class, its fingerprint, its settings, and name and revision where its config has them.

    >>> identity(torch.nn.Dropout(0.1))["settings"] == identity(torch.nn.Dropout(0.2))["settings"]
    False

    The fingerprint is of every bit of parameters and buffers. The settings are a hash of what else a model is: the classes
    of its modules, with the source of the user's own; numbers, words and functions that these hold; training or not; hooks;
    and what its config holds.
    """
    return {} if model is None else Moment(model).told


class Moment:
    """A model as it is at this moment, before a run.

    Whole numbers and lists that a run itself changes in modules, as a counter of calls, make no other model: they are left
    out of the settings and told as `changed`, all that runs of the experiment of this `name` have changed so far. Flags,
    words, parameters and buffers count, so that a run that changes these, as running statistics, leaves another model.
    """

    def __init__(self, model: nn.Module, name: str = "") -> None:
        self.model, self.fingerprint, self._lines = model, fingerprint(model), [*_lines(model)]
        self.changed = _CHANGED.setdefault(name, WeakKeyDictionary()).setdefault(model, set()) if name else set[str]()

    def compare(self) -> None:
        """Note what has changed since then."""
        now = dict(line for line in _lines(self.model) if line[0])
        before = dict(line for line in self._lines if line[0])
        self.changed.update(place for place in {**before, **now} if before.get(place) != now.get(place))

    @property
    def told(self) -> dict[str, str]:
        """Its identity."""
        model = self.model
        lines = (f"{place} {word}" for place, word in self._lines if place not in self.changed)
        told = {
            "class": type(model).__name__,
            "fingerprint": self.fingerprint,
            "settings": hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(),
        }
        config = _config(model)
        for name, key in (("name", "_name_or_path"), ("revision", "_commit_hash")):
            value = config.get(key)
            if isinstance(value, str) and value:
                told[name] = value
        return told | ({"changed": ", ".join(sorted(self.changed))} if self.changed else {})

    @property
    def word(self) -> str:
        """Its identity in a word."""
        told = self.told
        return f"{told['class']} {told['fingerprint']} {told['settings']}"


def _config(module: nn.Module) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


_CHANGED: dict[str, WeakKeyDictionary[nn.Module, set[str]]] = {}
"""By experiment and model the attributes that runs have changed."""


def _lines(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What modules are and hold, but for tensors and other modules: what may count runs has its place, the rest has none."""
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        yield "", f"{path} {kind.__qualname__} {source_of(kind) if is_own(kind) else ''}"
        for name, value in sorted(vars(module).items()):
            if _is_setting(value) and not name.startswith("_"):
                place = f"{path}.{name}".lstrip(".")
                yield (place, _word(value)) if _may_count(value) else ("", f"{place} {_word(value)}")
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            yield from (("", f"{path}.{hooks} {_word(hook)}") for hook in vars(module).get(hooks, {}).values())
        yield from (("", f"{path}.config.{name} {_word(one)}") for name, one in _config(module).items() if _is_setting(one))


def _is_setting(value: Any) -> bool:
    items = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(item, _PLAIN) or hasattr(item, "__qualname__") for item in items)


def _may_count(value: Any) -> bool:
    return isinstance(value, (int, tuple, list)) and not isinstance(value, bool)


def _word(value: Any) -> str:
    """A value in a word that is the same in every process."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_word, value))})"
    if isinstance(value, _PLAIN):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))
