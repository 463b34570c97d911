"""The variables of a causal model: what each may be, what it is computed from, and in which order."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from analyzers.protocol import AnalyzerError
from fmr.errors import nearest

Column = NDArray[Any]
"""A variable in many settings: numbers of its values where these are known, else the values themselves as objects."""

Columns = dict[str, Column]
Function = Callable[..., Any]

MOST = 1 << 20
"""How many values a variable may have, and how many settings of its parents are gone through one by one."""

SHOWN = 4
"""Up to so many values are printed one by one."""


@dataclass(frozen=True, eq=False)
class Variable:
    """A variable: its parents and its function, or a sampler; `values` is None where they are not known one by one."""

    name: str
    parents: tuple[str, ...] = ()
    function: Function | None = None
    values: tuple[Any, ...] | None = None
    sampler: Function | None = None

    @cached_property
    def numbers(self) -> Mapping[Any, int] | None:
        """The place of each value among all; None where they are not known."""
        return None if self.values is None else {value: number for number, value in enumerate(self.values)}

    def column(self, values: Sequence[Any]) -> Column:
        """Values as a column; a KeyError or TypeError where one is none of this variable's."""
        if self.numbers is None:
            return objects(values)
        try:
            found = [self.numbers[value] for value in values]
        except (KeyError, TypeError):
            found = [self.numbers[plain(value)] for value in values]
        return np.array(found, np.int64)

    def told(self, column: Column) -> list[Any]:
        """The values of a column."""
        found: list[Any] = (column if self.values is None else objects(self.values)[column]).tolist()
        return found

    def drawn(self, n: int, rng: np.random.Generator) -> Column:
        """So many values of an input, each as likely as the others."""
        if self.values is not None:
            return rng.integers(len(self.values), size=n)
        assert self.sampler is not None
        return objects([self.sampler(rng) for _ in range(n)])

    @property
    def range(self) -> str:
        """What it may be, in words."""
        if self.values is None:
            return "drawn" if self.sampler else "any value"
        if len(self.values) <= SHOWN:
            return ", ".join(map(repr, self.values))
        return f"{len(self.values)} values {self.values[0]!r} … {self.values[-1]!r}"


def objects(values: Iterable[Any]) -> Column:
    """Values of any kind as a column of objects."""
    held = list(values)
    column = np.empty(len(held), object)
    for row, value in enumerate(held):
        column[row] = value
    return column


def plain(value: Any) -> Any:
    """A value of NumPy or torch without dimensions as Python's own, which it is looked up by."""
    return value.item() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0 else value


def variables_of(
    values: Mapping[str, Any], functions: Mapping[str, Function], parents: Mapping[str, Sequence[str]] | None
) -> dict[str, Variable]:
    """The variables, each behind its parents, checked."""
    for name, given in (("values", values), ("functions", functions), ("parents", parents or {})):
        if not isinstance(given, Mapping) or not all(isinstance(one, str) and one for one in given):
            raise AnalyzerError(f"{name}={given!r}: expected a mapping from names of variables, as {name}={{'a': ...}}.")
    if not functions:
        raise AnalyzerError(
            "functions={}: expected at least one, that of the output: functions={'out': lambda a, b: a == b}."
        )
    if orphans := [name for name in parents or {} if name not in functions]:
        raise AnalyzerError(
            f"{orphans[0]!r} has parents and no function. Expected functions={{{orphans[0]!r}: ...}} as well."
        )
    reads = {name: _parents(name, function, (parents or {}).get(name)) for name, function in functions.items()}
    for name, read in reads.items():
        for parent in read:
            if parent not in values and parent not in functions:
                known = [*dict.fromkeys([*values, *functions])]
                raise AnalyzerError(
                    f"{name!r} reads {parent!r}, which has neither values nor a function. Expected some of "
                    f"{', '.join(known)}; or values={{{parent!r}: ...}} for an input, functions={{{parent!r}: ...}} for "
                    f"what is computed, a default in a signature for neither.{nearest(parent, known)}"
                )
    order = _ordered([*(name for name in values if name not in functions), *functions], reads)
    return {name: _variable(name, reads.get(name, ()), functions.get(name), values.get(name)) for name in order}


def _parents(name: str, function: Any, given: Sequence[str] | None) -> tuple[str, ...]:
    """What a function reads: the names given, or those of its arguments without a default."""
    if not callable(function):
        raise AnalyzerError(
            f"The function of {name!r} is {function!r}: expected what is called with the values of its parents. A variable "
            f"that is computed from nothing is an input: values={{{name!r}: ...}}."
        )
    if given is None:
        try:
            found = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            found = {}.values()
        needed = [one for one in found if one.default is one.empty]
        if not needed or not all(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in needed):
            told = f"({', '.join(map(str, found))})" if found else "without a readable signature"
            raise AnalyzerError(
                f"The parents of {name!r} cannot be read from its function {told}: expected plain arguments named after "
                f"variables, as lambda a, b: a == b. Or say them: parents={{{name!r}: ['a', 'b']}}."
            )
        return tuple(one.name for one in needed)
    if isinstance(given, str) or not given or len(set(given)) < len(given) or not all(isinstance(one, str) for one in given):
        raise AnalyzerError(f"The parents of {name!r} are {given!r}: expected names of variables, each once, as ['a', 'b'].")
    return tuple(given)


def _ordered(names: Sequence[str], reads: Mapping[str, Sequence[str]]) -> list[str]:
    """The names, each behind its parents."""
    done: dict[str, None] = {}
    while left := [name for name in names if name not in done]:
        free = [name for name in left if all(parent in done for parent in reads.get(name, ()))]
        if not free:
            way = [left[0]]
            while way[-1] not in way[:-1]:
                way.append(next(parent for parent in reads[way[-1]] if parent not in done))
            circle = " -> ".join(reversed(way[way.index(way[-1]) :]))
            raise AnalyzerError(
                f"The variables go round in a circle: {circle}. Expected each to be computed from those before it. Take an "
                f"argument out of a function, or make the steps variables of their own, as {way[-1]}_0 and {way[-1]}_1."
            )
        done |= dict.fromkeys(free[:1])
    return list(done)


def _variable(name: str, parents: tuple[str, ...], function: Function | None, values: Any) -> Variable:
    if callable(values):
        if function is not None:
            raise AnalyzerError(
                f"{name!r} has a function and a sampler. Expected values={{{name!r}: [...]}}, all that the function may "
                "return, or none: only inputs are drawn."
            )
        return Variable(name, sampler=values)
    return Variable(name, parents, function, None if values is None else _values(name, values))


def _values(name: str, given: Any) -> tuple[Any, ...]:
    """Values as they are given, each once and such that it can be looked up."""
    if not isinstance(given, Iterable):
        raise AnalyzerError(
            f"The values of {name!r} are {given!r}: expected all of them, as range(10) or [False, True], or of an input a "
            "function that draws one: lambda rng: rng.normal()."
        )
    found = tuple(map(plain, islice(given, MOST + 1)))
    if not found or len(found) > MOST:
        told = "none" if not found else f"more than {MOST:,}"
        raise AnalyzerError(
            f"The values of {name!r} are {told}: expected 1 to {MOST:,}. An input with more is drawn: "
            f"values={{{name!r}: lambda rng: rng.integers(10**9)}}."
        )
    try:
        seen: dict[Any, None] = {}
        for value in found:
            if isinstance(value, torch.Tensor):
                raise TypeError
            if value in seen or value != value:
                raise AnalyzerError(
                    f"The values of {name!r} hold {value!r} " + ("twice" if value in seen else "which equals nothing")
                    + ": expected each once, and equal to itself. (True equals 1, and 1.0 does.)"
                )  # fmt: skip
            seen[value] = None
    except (TypeError, ValueError, RuntimeError):
        raise AnalyzerError(
            f"The values of {name!r} cannot be looked up: {type(found[0]).__name__} has no hash. Expected numbers, strings "
            f"or tuples: numbers of rows, as range({len(found)}), and let encode= look the rows up."
        ) from None
    return found
