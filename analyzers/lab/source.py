"""The text of a function or a class, and whether it is the user's own."""

from __future__ import annotations

import dis
import inspect
import os
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any


def source_of(function: Any) -> str:
    """The source of a function or class; its bytecode in words where it was typed at a prompt that keeps no text.

    >>> source_of(exec("def f(): return 1", names := {}) or names["f"]).splitlines()[0]
    '# No source: it was typed where Python keeps no text. Its bytecode, Python 3...:'

    Of one function without a name among several on a line the bytecode says which.
    """
    code = getattr(function, "__code__", None)
    version = ".".join(map(str, sys.version_info[:2]))
    try:
        text = textwrap.dedent(inspect.getsource(function)).rstrip() + "\n"
    except (OSError, TypeError, SyntaxError, IndexError):
        if code is None:
            return f"# No source: {getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}\n"
        head = f"# No source: it was typed where Python keeps no text. Its bytecode, Python {version}:"
        return "\n".join([head, *_steps(code), ""])
    if code is None or code.co_name != "<lambda>" or text.count("lambda") < 2:
        return text
    return "\n".join([f"{text}# One of several on these lines. Its bytecode, Python {version}:", *_steps(code), ""])


def _steps(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        yield f"{step.opname} {re.sub(r' at 0x[0-9a-fA-F]+|, file .*?, line [0-9]+', '', step.argrepr)}".rstrip()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield f"# {inner.co_name}"
            yield from _steps(inner)


def is_own(value: Any) -> bool:
    """Whether a module, or what is defined in one, is the user's own, and of no library that has a version."""
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
    module = sys.modules.get(name) if isinstance(name, str) else None
    if module is None or not isinstance(name, str) or name.partition(".")[0] in ("fmr", "analyzers"):
        return False
    file = getattr(module, "__file__", None)
    return name == "__main__" or (file is not None and not file.startswith(_libraries()))


@cache
def _libraries() -> tuple[str, ...]:
    """The folders in which Python and packages are installed."""
    return tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})
