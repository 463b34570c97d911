"""What functions of variables return: for many settings at once, and turned round, from a value to what leads to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from analyzers.alignment.variables import MOST, Column, Columns, Variable, objects, plain
from analyzers.circuits.choice import Bools
from analyzers.numbers.embed import Ints
from analyzers.protocol import AnalyzerError

K = TypeVar("K")

Kind = Literal["numpy", "torch"] | None
"""What functions are called with: a value of each parent, or a column of values as an array or a tensor."""

SAMPLED = 1 << 16
"""Of how many settings of parents the values are looked at where there are too many for all."""

TRIES, IDLE = 64, 100
"""How many rows are drawn at once at least, and how often none may fit before it is given up."""


@dataclass(frozen=True, eq=False)
class Table:
    """A function as a table: settings (m, parents), numbers of the parents' values, and what comes of each, results (m,).

    sizes: how many values each parent has. whole: whether all settings are there, counted up with the last parent fastest.
    """

    parents: tuple[str, ...]
    sizes: tuple[int, ...]
    settings: Ints
    results: Ints
    whole: bool
    sorted: dict[tuple[str, ...], tuple[Ints, Ints]] = field(default_factory=dict)

    def look_up(self, columns: Columns) -> Ints:
        """What comes of settings, where all are there."""
        found: Ints = self.results[np.ravel_multi_index([columns[name] for name in self.parents], self.sizes)]
        return found

    def choose(self, results: Ints, known: Columns, rng: np.random.Generator) -> Ints:
        """For each result a setting that leads to it, all as likely, given what is known of the setting; -1 for none."""
        names = tuple(name for name in self.parents if name in known)
        if prod(self.sizes) > (1 << 62) // (int(self.results.max()) + 1):
            names = ()  # what does not agree is drawn again
        sizes = [self.sizes[self.parents.index(name)] for name in names]
        if names not in self.sorted:
            own = [self.settings[:, self.parents.index(name)] for name in names]
            keys = _mixed([self.results, *own], sizes)
            order = np.argsort(keys, kind="stable")
            self.sorted[names] = order, keys[order]
        order, keys = self.sorted[names]
        asked = _mixed([results, *(known[name] for name in names)], sizes)
        low, high = np.searchsorted(keys, asked, "left"), np.searchsorted(keys, asked, "right")
        picked = np.minimum(low + (rng.random(len(asked)) * (high - low)).astype(np.int64), len(keys) - 1)
        return np.where(high > low, order[picked], -1)


def _mixed(digits: Sequence[Ints], sizes: Sequence[int]) -> Ints:
    """Digits as one number; sizes are those of all but the first."""
    number = digits[0].astype(np.int64)
    for digit, size in zip(digits[1:], sizes, strict=True):
        number = number * size + digit
    return number


def table_of(variable: Variable, parents: Sequence[Variable], kind: Kind) -> tuple[Variable, Table | None]:
    """A variable with all that it can be, and its table; None where the values of a parent, or its own, are not known.

    Its function is called for all settings of its parents, or for 65,536 of them where there are over a million.
    """
    sizes = tuple(len(parent.values or ()) for parent in parents)
    whole = prod(sizes) <= MOST
    if not all(sizes) or not (whole or variable.values):
        return variable, None
    if whole:
        places = np.unravel_index(np.arange(prod(sizes)), sizes)
    else:
        rng = np.random.default_rng(0)
        places = tuple(rng.integers(size, size=SAMPLED) for size in sizes)
    settings = np.stack(places, 1).astype(np.int64)
    columns = {parent.name: settings[:, n] for n, parent in enumerate(parents)}
    returned = called(variable, parents, columns, kind)
    if variable.values is None:
        variable = Variable(variable.name, variable.parents, variable.function, _in_order(variable.name, returned))
    results = checked(variable, parents, columns, returned)
    return variable, Table(variable.parents, sizes, settings, results, whole)


def computed(variable: Variable, parents: Sequence[Variable], columns: Columns, kind: Kind) -> Column:
    """What comes of settings by calling the function."""
    return checked(variable, parents, columns, called(variable, parents, columns, kind))


def called(variable: Variable, parents: Sequence[Variable], columns: Columns, kind: Kind) -> list[Any]:
    """What a function returns for each row of its parents' columns."""
    assert variable.function is not None
    given = [parent.told(columns[parent.name]) for parent in parents]
    rows = len(given[0])
    try:
        if kind is None:
            return list(map(variable.function, *given))
        found = variable.function(*(array(values, kind) for values in given))
        found = found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    except Exception as error:
        row = next((row for row in range(rows) if kind is None and _fails(variable, given, row)), 0)
        at = _at(parents, given, row) if kind is None else f"columns of {rows} values"
        remedy = "a column of as many" if kind else "a value for all that its parents can be"
        raise AnalyzerError(
            f"The function of {variable.name!r} failed at {at}: {type(error).__name__}: {error}. Expected {remedy}."
        ) from error
    if found.shape[:1] != (rows,):
        raise AnalyzerError(
            f"The function of {variable.name!r} returned shape {found.shape} for columns of {rows} values, expected "
            f"({rows},). Compute it row by row, or leave columns={kind!r} out for functions of single values."
        )
    return found.tolist() if found.ndim == 1 else [tuple(row) for row in found.tolist()] if found.ndim == 2 else list(found)


def checked(variable: Variable, parents: Sequence[Variable], columns: Columns, returned: list[Any]) -> Column:
    """What a function returned as a column; refused where it is none of the variable's values."""
    try:
        return variable.column(returned)
    except (KeyError, TypeError):
        row = next(row for row, value in enumerate(returned) if not known(variable, value))
        at = _at(parents, [parent.told(columns[parent.name][row : row + 1]) for parent in parents], 0)
        raise AnalyzerError(
            f"{variable.name!r} is {returned[row]!r} at {at}, expected one of its values: {variable.range}. Put it into "
            f"values={{{variable.name!r}: [...]}}, or mend the function."
        ) from None


def known(variable: Variable, value: Any) -> bool:
    """Whether a variable can be this."""
    try:
        return variable.numbers is None or plain(value) in variable.numbers
    except TypeError:
        return False


def _fails(variable: Variable, given: Sequence[Sequence[Any]], row: int) -> bool:
    try:
        variable.function(*(values[row] for values in given))  # type: ignore[misc]
    except Exception:
        return True
    return False


def _at(parents: Sequence[Variable], given: Sequence[Sequence[Any]], row: int) -> str:
    return ", ".join(f"{parent.name}={values[row]!r}" for parent, values in zip(parents, given, strict=True))


def array(values: list[Any], kind: Kind) -> Any:
    """Values as functions of columns take them."""
    stacked = (
        np.stack([np.asarray(value) for value in values]) if isinstance(values[0], torch.Tensor) else np.asarray(values)
    )
    return torch.from_numpy(stacked) if kind == "torch" else stacked


def _in_order(name: str, returned: list[Any]) -> tuple[Any, ...]:
    """All that a function returned, each once: smallest first, or as they came where they have no order."""
    try:
        found = list(dict.fromkeys(map(plain, returned)))
        if any(isinstance(value, torch.Tensor) for value in found):
            raise TypeError
    except TypeError:
        raise AnalyzerError(
            f"The function of {name!r} returned a {type(returned[0]).__name__}, which has no hash, so that equal ones "
            "cannot be told. Expected a number, a string or a tuple."
        ) from None
    try:
        return tuple(sorted(found))
    except TypeError:
        return tuple(found)


def kept(n: int, attempt: Callable[[Ints], tuple[dict[K, Column], Bools]], wanted: str) -> dict[K, Column]:
    """Columns of n rows, each drawn again until it is good.

    attempt: draws the rows of these numbers, which may repeat, and says which are good. wanted: what good is, for the error.
    """
    columns: dict[K, Column] = {}
    left, idle, drawn = np.arange(n), 0, 0
    while left.size:
        rows = np.resize(left, max(len(left), TRIES))
        found, good = attempt(rows)
        done, first = np.unique(rows[good], return_index=True)
        for name, column in found.items():
            columns.setdefault(name, np.empty(n, column.dtype))[done] = column[good][first]
        left = np.setdiff1d(left, done, assume_unique=True)
        idle, drawn = (0, drawn) if done.size else (idle + 1, drawn + len(rows))
        if idle > IDLE:
            raise AnalyzerError(f"{wanted}: none such for {len(left)} of {n} in {drawn:,} draws.")
    return columns


def by_value(variable: Variable, parents: Sequence[Variable], table: Table) -> Mapping[Any, list[tuple[Any, ...]]]:
    """The settings of the parents that lead to each value."""
    assert variable.values is not None
    told = [objects(parent.values or ())[table.settings[:, n]] for n, parent in enumerate(parents)]
    return {
        value: list(zip(*(column[table.results == number].tolist() for column in told), strict=True))
        for number, value in enumerate(variable.values)
    }
