"""Which model an experiment was made of: its weights, bit by bit, and how it is set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

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
    if model is None:
        return {}
    lines = (line for path, module in model.named_modules(remove_duplicate=False) for line in _settings(path, module))
    told = {
        "class": type(model).__name__,
        "fingerprint": fingerprint(model),
        "settings": hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(),
    }
    config = _config(model)
    for name, key in (("name", "_name_or_path"), ("revision", "_commit_hash")):
        value = config.get(key)
        if isinstance(value, str) and value:
            told[name] = value
    return told


def _config(module: nn.Module) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def _settings(path: str, module: nn.Module) -> Iterator[str]:
    """A line for each thing that a module is or holds, but for tensors and other modules."""
    kind = type(module)
    yield f"{path} {kind.__qualname__} {source_of(kind) if is_own(kind) else ''}"
    for name, value in sorted(vars(module).items()):
        if _is_setting(value) and not name.startswith("_"):
            yield f"{path}.{name} {_word(value)}"
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        yield from (f"{path}.{hooks} {_word(hook)}" for hook in vars(module).get(hooks, {}).values())
    yield from (f"{path}.config.{name} {_word(one)}" for name, one in _config(module).items() if _is_setting(one))


def _is_setting(value: Any) -> bool:
    items = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(item, _PLAIN) or hasattr(item, "__qualname__") for item in items)


def _word(value: Any) -> str:
    """A value in a word that is the same in every process."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_word, value))})"
    if isinstance(value, _PLAIN):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))
