"""What was given to a run as arguments of the model, and is none: a misspelt option, edits, text, a batch as a whole."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from torch import nn

from fmr.edits.frames import held
from fmr.errors import TrackError
from fmr.ids import Site
from fmr.nodes import Node

OPTIONS = ("method", "keep", "dtype", "grad", "stop", "edits", "optional")
"""The options of a run that a longer name may be meant for."""

_TOKENS = "input_ids"


def check_given(called: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise for arguments that are meant for the run, or are no input, where the model names none like them."""
    _check_options(called, kwargs)
    for value in args:
        if isinstance(called, nn.Module) and _is_asked(value):
            raise TrackError("fmr.run got edits among the inputs of the model. Expected them by name: edits={site: edit}.")
        names = [name for name, _ in held(value)]
        if names and all(name in _parameters(called) for name in names):
            raise TrackError(
                f"fmr.run got {type(value).__name__} as one argument, whose keys {', '.join(map(str, names))} are arguments "
                f"of the model. Expected them by name: fmr.run(model, **inputs)."
            )
    text = any(map(_is_text, (*args, *kwargs.values())))
    given = {**dict(zip(_parameters(called), args, strict=False)), **kwargs} if text else {}
    if _is_text(given.get(_TOKENS)):
        raise TrackError(
            f"fmr.run got text as {_TOKENS}, {str(given[_TOKENS])[:40]!r}. Expected tokens: "
            f'fmr.run(model, **tokenizer(text, return_tensors="pt")).'
        )


def _check_options(called: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        meant = "edits" if _is_asked(value) else _option(name)
        if meant is not None and name not in _parameters(called):
            raise TrackError(
                f"fmr.run has no option {name!r}, and the model names no such argument. Expected {meant}=... An argument "
                f"that the model does take is bound before: fmr.run(functools.partial(model, {name}=...), ...)."
            )


@lru_cache(maxsize=256)
def _option(name: str) -> str | None:
    """The option that a name is a misspelling of."""
    return next(iter(get_close_matches(name, OPTIONS, n=1, cutoff=0.8)), None)


def _is_asked(value: Any) -> bool:
    """Whether it is a mapping of sites to edits, or part of one."""
    if type(value) in (list, tuple):
        return any(map(_is_asked, value))
    if any(_is_asked(key) or _is_edit(edit) for key, edit in held(value)):
        return True
    return _is_edit(value) or issubclass(type(value), (Site, Node))


def _is_edit(value: Any) -> bool:
    return type(value).__module__.startswith("fmr.edits.")


def _is_text(value: Any) -> bool:
    several = value if type(value) in (list, tuple) and value else (value,)
    return all(issubclass(type(one), str) for one in several)


def _parameters(called: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments that a model or a function names."""
    try:
        return tuple(inspect.signature(getattr(called, "forward", called)).parameters)
    except (TypeError, ValueError):
        return ()
