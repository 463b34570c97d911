"""Which model an experiment was made of: its weights, bit by bit, and how it is set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.lab.source import is_own, source_of
from fmr.weights import fingerprint

_PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, torch.dtype, torch.device)

_DEEPEST = 8
"""How many levels deep a setting may lie in others."""


def identity(model: nn.Module | None) -> dict[str, str]:
    """Which model: its class, its fingerprint, its settings, and name and revision where its config has them.

    >>> identity(torch.nn.Dropout(0.1))["settings"] == identity(torch.nn.Dropout(0.2))["settings"]
    False

    The fingerprint is of every bit of parameters and buffers. The settings are a hash of what else a model is: the classes
    of its modules, with the source of the user's own; numbers, words, functions and tensors that these hold, in lists, dicts
    and plain records too; training or not; hooks; and what its config holds.
    """
    return {} if model is None else Moment(model).told


class Moment:
    """A model as it is at this moment, before a run.

    What a run itself counts or caches in modules, as a number of calls, a list, a dict or a tensor that is no buffer, makes
    no other model: it is left out of the settings and told as `changed`, all that runs of the experiment of this `name` have
    changed so far. Flags, words, fractions, parameters and buffers count, so that a run that changes these, as running
    statistics, leaves another model.
    """

    def __init__(self, model: nn.Module, name: str = "") -> None:
        self.model, self.fingerprint, self._lines = model, fingerprint(model), [*_lines(model)]
        self.changed = _CHANGED.setdefault(name, WeakKeyDictionary()).setdefault(model, set()) if name else set[str]()

    def compare(self) -> None:
        """Note what has changed since then."""
        before, now = ({place: rest for place, *rest in lines if place} for lines in (self._lines, _lines(self.model)))
        for place in {**before, **now}:
            one, other = before.get(place, _NOTHING), now.get(place, _NOTHING)
            if one != other and one[1] and other[1]:
                self.changed.add(place)

    @property
    def told(self) -> dict[str, str]:
        """Its identity."""
        model = self.model
        lines = (f"{place} {word}" for place, word, _ in self._lines if place not in self.changed)
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


_NOTHING = ["None", True]
"""What stands for an attribute that there is not, and where it may become."""


def _lines(model: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """What modules are and hold but for other modules: the place of an attribute, its word, whether it may count runs."""
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        yield "", f"{path} {kind.__qualname__} {source_of(kind) if is_own(kind) else ''}", False
        for name, value in sorted(vars(module).items()):
            if not name.startswith("_") and _is_setting(value):
                yield f"{path}.{name}".lstrip("."), _word(value), _may_count(value)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            yield from (("", f"{path}.{hooks} {_word(hook)}", False) for hook in vars(module).get(hooks, {}).values())
        for name, one in _config(module).items():
            if _is_setting(one):
                yield "", f"{path}.config.{name} {_word(one)}", False


def _is_setting(value: Any, deep: int = _DEEPEST) -> bool:
    """Whether a value has a word that is the same in every process."""
    if isinstance(value, (np.generic, np.ndarray)):
        return not value.dtype.hasobject
    if isinstance(value, (*_PLAIN, Enum, Tensor)) or hasattr(value, "__qualname__"):
        return True
    parts = _parts(value)
    return parts is not None and deep > 0 and all(_is_setting(part, deep - 1) for part in parts)


def _parts(value: Any) -> list[Any] | None:
    """What a list, a set, a dict, a partial or a plain record is made of; None for anything else."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and hasattr(value, "__dict__")):
        return [vars(value)]
    return list(value) if isinstance(value, (tuple, list, set, frozenset)) else None


def _may_count(value: Any) -> bool:
    """Whether a run may change a value and leave the same model: what counts or caches, and what is not there yet."""
    if isinstance(value, np.generic):
        return value.dtype.kind in "iu"
    many = (int, tuple, list, set, Mapping, Tensor, np.ndarray, type(None))
    return isinstance(value, many) and not isinstance(value, (bool, Enum))


def _word(value: Any) -> str:
    """A value in a word that is the same in every process."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, Tensor):
        (held := nn.Module()).register_buffer("value", value)
        return fingerprint(held)
    if isinstance(value, (np.generic, np.ndarray)):
        return f"{value.dtype} {value.shape} {hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__qualname__} {source_of(value) if is_own(value) else ''}".rstrip()
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_word(key)}: {_word(one)}' for key, one in value.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_word, value)))}}}"
    parts = _parts(value)
    return type(value).__qualname__ if parts is None else f"({', '.join(map(_word, parts))})"
