"""Tools by name: every method of analyzers that needs a model alone, and the user's own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from analyzers.lab.code import code_of
from analyzers.lab.errors import LabError
from analyzers.protocol import Method

GIVEN = ("model", "tokenizer")


def known() -> dict[str, Callable[..., Any]]:
    """The methods of analyzers that can be made of a model, and of a tokenizer at most, by their names in small letters."""
    found: dict[str, Callable[..., Any]] = {}
    for one in _leaves(Method):
        taken = list(inspect.signature(one.__init__).parameters.values())[1:]
        needed = {p.name for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        if "model" in {p.name for p in taken} and needed <= {*GIVEN}:
            found[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", one.__name__).lower()] = one
    return dict(sorted(found.items()))


def _leaves(kind: type[Method]) -> Iterator[type[Method]]:
    """The classes of this library that others of it are not made of."""
    below = [one for one in kind.__subclasses__() if one.__module__.startswith("analyzers.")]
    for one in below:
        yield from _leaves(one)
    if not below:
        yield kind


def made_of(tool: Any, name: str, given: Callable[[str], Any], tokenizer: bool) -> Any:
    """A tool for a model: made with those of its parameters that are the model and, where there is one, the tokenizer."""
    if not callable(tool):
        raise LabError(
            f"lab.tools[{name!r}] is a {type(tool).__name__}, expected a class or a function of the model: "
            f"lab.tools[{name!r}] = lambda model: ..."
        )
    taken = [p.name for p in inspect.signature(tool).parameters.values()]
    by_name = {one: given(one) for one in GIVEN if one in taken and (one == "model" or tokenizer)}
    return tool(**by_name) if "model" in by_name or not taken else tool(given("model"), **by_name)


def code_of_tool(tool: Any) -> str:
    """Which tool it was: the name of one of this library, the code of the user's own."""
    module, name = getattr(tool, "__module__", ""), getattr(tool, "__qualname__", type(tool).__name__)
    return f"{module}.{name}" if module.split(".")[0] == "analyzers" else code_of(tool).text
