"""The code of a function as text: its source, and that of what it uses from the user's own files."""

from __future__ import annotations

import dis
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from analyzers.lab.errors import LabError
from analyzers.lab.identity import Moment
from analyzers.lab.source import is_own, source_of
from analyzers.lab.summary import brief
from analyzers.lab.values import pack, renamed
from fmr.disk.files import digest

_READS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
CONSTANTS = (type(None), bool, int, float, complex, str)


class Code(NamedTuple):
    """The source of a function, and by name what it uses: source of functions and classes beside it, values, constants.

    A value, such as a list or a tensor, stands there in a few words with its checksum when the function was called; of one
    that a lab cannot keep it is said that a change of it shows nowhere. models: those among them, as they were.
    """

    source: str
    uses: dict[str, str]
    models: tuple[Moment, ...] = ()

    @property
    def text(self) -> str:
        """All of it as one text."""
        return "\n".join([self.source, *(f"# {name}\n{told}" for name, told in self.uses.items())])

    def called(self, words: Mapping[str, str]) -> Code:
        """The same with other words for models."""
        uses = dict(self.uses)
        for one, other in words.items():
            uses = {name: told.replace(one, other) for name, told in uses.items()}
        return self._replace(uses=uses)


def code_of(function: Any, moment: Callable[[nn.Module], Moment] = Moment) -> Code:
    """The source of a function with all that it uses of the user's own files, and the values that it reads.

    moment: tells a model as it is now.
    """
    uses = _Uses(moment)
    inner = uses.opened("itself", function)
    if isinstance(inner, FunctionType):
        uses.follow(inner)
    else:
        uses.take("itself", inner)
    return Code(source_of(inner), dict(sorted(uses.found.items())), tuple(uses.models))


class _Uses:
    """What a function uses, by name, as it is found on the way through what it calls."""

    def __init__(self, moment: Callable[[nn.Module], Moment]) -> None:
        self.moment, self.models = moment, list[Moment]()
        self.found: dict[str, str] = {}
        self._seen: set[int] = set()

    def opened(self, name: str, value: Any) -> Any:
        """The function that a callable calls; what a partial or a method brings along is noted."""
        while isinstance(value, partial):
            self._note(f"{name}, given", self._told(name, [list(value.args), dict(value.keywords)]))
            value = value.func
        if inspect.ismethod(value):
            self.take(f"{name}, of", value.__self__)
            value = value.__func__
        return _function(value)

    def follow(self, function: FunctionType) -> None:
        """Note all that a function reads from around it."""
        self._seen.add(id(function))
        steps = dis.get_instructions(function.__code__)
        stored = {step.argval for step in steps if step.opname in ("STORE_GLOBAL", "STORE_DEREF")}
        for name, value in _read_by(function):
            if name not in stored:
                self.take(name, value, function)

    def take(self, name: str, value: Any, by: FunctionType | None = None) -> None:
        """Note one thing that is read: a value, or code of the user's own with all that it uses."""
        if _is_constant(value):
            return self._note(name, repr(value), by)
        inner = self.opened(name, value)
        ours = is_own(inner) or (by is not None and getattr(inner, "__module__", None) == by.__module__)
        if not _is_code(inner):
            if ours and not isinstance(inner, nn.Module):
                self.take(type(inner).__name__, type(inner), by)
            return self._note(name, self._told(name, inner), by)
        if not ours:
            return None
        self._note(name, source_of(inner), by)
        if id(inner) in self._seen:
            return None
        self._seen.add(id(inner))
        if isinstance(inner, FunctionType):
            for part, default in _defaults(inner):
                self.take(f"{name}({part})", default, inner)
            self.follow(inner)
        elif isinstance(inner, type):
            self._take_class(name, inner)
        return None

    def _take_class(self, name: str, kind: type) -> None:
        """Note what a class is made of now, which its source does not tell, and what its methods use."""
        text = _flush(source_of(kind))
        for base in kind.__bases__:
            self.take(base.__name__, base)
        for part, value in vars(kind).items():
            inner = _function(next((getattr(value, way) for way in ("fget", "func") if hasattr(value, way)), value))
            if isinstance(inner, FunctionType):
                told = source_of(inner)
                if _flush(told) not in text and not (part.startswith("__") and told.startswith("# No source")):
                    self._note(f"{name}.{part}", told)
                self.follow(inner)
            elif not (part.endswith("_") or part.startswith("_abc") or isinstance(inner, kind) or _is_code(inner)) and (
                not inspect.isdatadescriptor(inner)
            ):
                self.take(f"{name}.{part}", inner)

    def _told(self, name: str, value: Any) -> str:
        """A value that a function reads, in a few words with its checksum, and the models in it, in words of their own."""

        def source(one: Any) -> str:
            if not _is_code(inner := _function(one)):
                raise LabError(f"{name} holds a {type(one).__name__}.")
            return source_of(inner)

        try:
            plain = is_own(value) and not _is_code(value) and not isinstance(value, nn.Module) and hasattr(value, "__dict__")
            packed = pack(vars(value) if plain else value, name, source, self.moment)
        except Exception:  # whatever an object of any kind does when it is looked at
            kind = type(value)
            return f"not covered: a {kind.__module__}.{kind.__qualname__}, which a lab cannot keep; its changes show nowhere"
        self.models += packed.models
        words = [one.word for one in packed.models]
        told = renamed(packed.told, {word: word.partition(" ")[0] for word in words})
        sum_ = digest(canonical(told).encode("utf-8", "surrogatepass"))[:16]
        return "\n# ".join([f"{brief(told)}  # {sum_}", *words])

    def _note(self, name: str, told: str, by: FunctionType | None = None) -> None:
        """Keep words under a name; where another value has this name, under that of its function too."""
        if self.found.setdefault(name, told) != told and by is not None:
            self.found[f"{by.__qualname__}: {name}"] = told


def _function(value: Any) -> Any:
    """The function that a callable calls, as far as there is one."""
    while isinstance(value, partial):
        value = value.func
    return inspect.unwrap(inner) if callable(inner := getattr(value, "__func__", value)) else inner


def _flush(text: str) -> str:
    """A text without what its lines are indented by."""
    return "\n".join(line.strip() for line in text.splitlines())


def _is_constant(value: Any) -> bool:
    return isinstance(value, CONSTANTS) or (isinstance(value, tuple) and all(isinstance(item, CONSTANTS) for item in value))


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The defaults of a function's parameters, by name."""
    yield from ((n, p.default) for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty)


def _is_code(value: Any) -> bool:
    """Whether it is code of a library or of this file, and no value that code reads."""
    return inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, partial)


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
    inner = _function(function)
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
