"""What differs between two versions, told leaf by leaf."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from analyzers.lab.picture import Picture
from analyzers.lab.summary import brief
from analyzers.lab.values import pack
from analyzers.lab.version import Version
from analyzers.results import Stored

if TYPE_CHECKING:
    from pandas import DataFrame

ABSENT, MOST = "-", 20


@dataclass(frozen=True)
class Difference:
    """What differs between two versions; empty where nothing does.

    changes: (part, place, before, after, by) of each difference, `by` the largest |after - before| of numbers. source: the
    lines of the code that differ, as a unified diff.
    """

    a: Version
    b: Version
    changes: tuple[tuple[str, str, str, str, float], ...]
    source: str

    def __bool__(self) -> bool:
        return bool(self.changes or self.source)

    def table(self) -> DataFrame:
        """One row a difference."""
        import pandas as pd

        return pd.DataFrame(list(self.changes), columns=["part", "place", "before", "after", "by"])

    def __repr__(self) -> str:
        head = f"{self.a.name} {self.a.version} -> {self.b.name} {self.b.version}"
        lines = [
            f"  {' '.join(filter(None, (part, place)))}: {before} -> {after}" + (f", by {by:.4g}" if by == by else "")
            for part, place, before, after, by in self.changes[:MOST]
        ]
        if len(self.changes) > MOST:
            lines.append(f"  and {len(self.changes) - MOST} more, in .table()")
        code = ["  code:", *(f"    {line}" for line in self.source.splitlines())] if self.source else []
        return "\n".join([head, *lines, *code]) if self else f"{head}: no difference"


def difference(a: Version, b: Version) -> Difference:
    """Compare two versions part by part; the results are read."""
    changes: list[tuple[str, str, str, str, float]] = []
    parts = [
        ("name", a.name, b.name),
        ("seed", a.seed, b.seed),
        ("model", a.model, b.model),
        ("environment", a.environment, b.environment),
        ("arguments", a.arguments, b.arguments),
        ("result", a.result, b.result),
    ]
    for part, one, other in parts:
        changes += [(part, *change) for change in _changes(one, other, "")]
    lines = difflib.unified_diff(a.code.text.splitlines(), b.code.text.splitlines(), a.version, b.version, lineterm="", n=1)
    return Difference(a, b, tuple(changes), "\n".join(lines))


Change = tuple[str, str, str, float]


def _changes(a: Any, b: Any, at: str) -> Iterator[Change]:
    """The leaves of two nests that differ."""
    if isinstance(a, Stored) and type(a) is type(b):
        a, b = vars(a), vars(b)
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            where = f"{at}[{key!r}]" if at else str(key)
            if key not in a or key not in b:
                before, after = (_brief(one[key]) if key in one else ABSENT for one in (a, b))
                yield where, before, after, float("nan")
            else:
                yield from _changes(a[key], b[key], where)
    elif isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        for n, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _changes(one, other, f"{at}[{n}]")
    elif not _same(a, b):
        yield at, _brief(a), _brief(b), _by(a, b)


def _numbers(value: Any) -> Tensor | None:
    if isinstance(value, Picture):
        value = value.pixels
    if isinstance(value, bool) or not isinstance(value, (int, float, complex, Tensor, np.ndarray)):
        return None
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        return None
    found = torch.as_tensor(value)
    return found.to(torch.complex128 if found.is_complex() else torch.float64)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (Tensor, np.ndarray)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        x, y = _numbers(a), _numbers(b)
        return (
            bool(np.array_equal(a, b))
            if x is None or y is None
            else bool(torch.equal(x.nan_to_num(1e308), y.nan_to_num(1e308)))
        )
    if hasattr(a, "equals"):
        return bool(a.equals(b))
    return bool(a == b or (a != a and b != b))


def _by(a: Any, b: Any) -> float:
    """The largest |b - a| of numbers of one shape."""
    x, y = _numbers(a), _numbers(b)
    if x is None or y is None or x.shape != y.shape or not x.numel():
        return float("nan")
    return float((y - x).abs().max())


def _brief(value: Any) -> str:
    return brief(pack(value, "value", repr).told)
