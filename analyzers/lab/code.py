"""The code of a function as text: its source, and that of what it uses from the same file."""

from __future__ import annotations

import dis
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from analyzers.lab.errors import LabError
from analyzers.lab.summary import brief
from analyzers.lab.values import pack
from fmr.disk.files import digest

_READS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
CONSTANTS = (type(None), bool, int, float, complex, str)


class Code(NamedTuple):
    """The source of a function, and by name what it uses: source of functions and classes beside it, values, constants.

    A value, such as a list or a tensor, stands there in a few words with its checksum when the function was called; of one
    that a lab cannot keep it is said that a change of it shows nowhere.
    """

    source: str
    uses: dict[str, str]

    @property
    def text(self) -> str:
        """All of it as one text."""
        return "\n".join([self.source, *(f"# {name}\n{told}" for name, told in self.uses.items())])


def source_of(function: Any) -> str:
    """The source of a function or class; its bytecode in words where it was typed at a prompt that keeps no text.

    >>> source_of(exec("def f(): return 1", names := {}) or names["f"]).splitlines()[0]
    '# No source: it was typed where Python keeps no text. Its bytecode, Python 3...:'
    """
    try:
        return textwrap.dedent(inspect.getsource(function)).rstrip() + "\n"
    except (OSError, TypeError, SyntaxError, IndexError):
        code = getattr(function, "__code__", None)
        if code is None:
            return f"# No source: {getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}\n"
        version = ".".join(map(str, sys.version_info[:2]))
        head = f"# No source: it was typed where Python keeps no text. Its bytecode, Python {version}:"
        return "\n".join([head, *_steps(code), ""])


def _steps(code: CodeType) -> Iterator[str]:
    for step in dis.get_instructions(code):
        yield f"{step.opname} {re.sub(r' at 0x[0-9a-fA-F]+|, file .*?, line [0-9]+', '', step.argrepr)}".rstrip()
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield f"# {inner.co_name}"
            yield from _steps(inner)


def code_of(function: Any) -> Code:
    """The source of a function with all that it uses of the same file, and the constants that it reads."""
    inner = inspect.unwrap(_function(function))
    uses: dict[str, str] = {}
    if isinstance(inner, FunctionType):
        _follow(inner, uses, {inner})
    return Code(source_of(inner), dict(sorted(uses.items())))


def _function(value: Any) -> Any:
    """The function that a callable calls, as far as there is one."""
    while isinstance(value, partial):
        value = value.func
    return getattr(value, "__func__", value)


def _follow(function: FunctionType, uses: dict[str, str], seen: set[Any]) -> None:
    stored = {
        step.argval for step in dis.get_instructions(function.__code__) if step.opname in ("STORE_GLOBAL", "STORE_DEREF")
    }
    for name, value in _read_by(function):
        if name in stored or name in uses:
            continue
        if isinstance(value, CONSTANTS) or (isinstance(value, tuple) and all(isinstance(item, CONSTANTS) for item in value)):
            uses[name] = repr(value)
            continue
        inner = inspect.unwrap(value) if callable(value) else value
        ours = getattr(inner, "__module__", None) == function.__module__ and isinstance(inner, (FunctionType, type))
        if ours and inner not in seen:
            seen.add(inner)
            uses[name] = source_of(inner)
            for part in [inner] if isinstance(inner, FunctionType) else vars(inner).values():
                if isinstance(part, FunctionType):
                    _follow(part, uses, seen)
        elif not _is_code(inner):
            uses[name] = _told(name, value)


def _is_code(value: Any) -> bool:
    """Whether it is code of a library or of this file, and no value that code reads."""
    return inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, partial)


def _told(name: str, value: Any) -> str:
    """A value that a function reads, in a few words with its checksum."""

    def source(one: Any) -> str:
        if not _is_code(inner := inspect.unwrap(_function(one))):
            raise LabError(f"{name} holds a {type(one).__name__}.")
        return source_of(inner)

    try:
        told = pack(value, name, source).told
    except Exception:  # whatever an object of any kind does when it is looked at
        kind = type(value)
        return f"not covered: a {kind.__module__}.{kind.__qualname__}, which a lab cannot keep; its changes show nowhere"
    return f"{brief(told)}  # {digest(canonical(told).encode('utf-8', 'surrogatepass'))[:16]}"


def _read_by(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function, and those inside it, read from around it."""
    names = dict.fromkeys(_names(function.__code__))
    yield from ((name, function.__globals__[name]) for name in names if name in function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a name that is still to be given
            continue


def _names(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname in _READS)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def check_function(function: Any, name: str | None) -> str:
    """The name under which a function is kept; what is no plain function with a name is an error."""
    if not callable(function):
        raise LabError(
            f"lab.experiment got a {type(function).__name__}, expected a function: @lab.experiment above its def."
        )
    inner = inspect.unwrap(_function(function))
    if inspect.iscoroutinefunction(inner) or inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise LabError(f"{inner.__name__} is a coroutine or a generator, expected a function that returns its result.")
    found = name if name is not None else getattr(inner, "__name__", "")
    if not isinstance(found, str) or not re.fullmatch(r"[^\W\d][\w.-]{0,99}", found):
        raise LabError(
            f"name={found!r} is no name for an experiment, expected letters, digits, '_', '-' and '.': "
            "@lab.experiment(name='probe')."
        )
    return found


def canonical(told: Any) -> str:
    """JSON that is the same for the same content."""
    return json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
