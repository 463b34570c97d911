"""An experiment beside its null, over seeds or inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from analyzers.lab.bench import Bench
from analyzers.lab.comparisons import Test, check_choices
from analyzers.lab.errors import LabError
from analyzers.lab.experiment import Experiment
from analyzers.lab.measure import checked_seed
from analyzers.lab.outcome import Outcome, judged
from fmr.sweeps.bars import hidden

R = TypeVar("R")


class Hypothesis(Experiment[R]):
    """An experiment whose numbers are compared with those of a null; every run of both is kept.

    >>> @lab.hypothesis(null=0.5)
    ... def longer(seed):
    ...     return torch.rand(20).mean().item() + 0.2
    >>> longer.over(seeds=range(8))
    Outcome of longer beside 0.5: paired, two-sided, 8 pairs
      longer: 0.7... beside 0.5, difference 95 % in [0.1..., 0.2...], d ..., p ...
    """

    def __init__(
        self,
        lab: Bench,
        function: Callable[..., R],
        null: Callable[..., Any] | float,
        test: Test = "paired",
        alternative: str = "two-sided",
        correction: str = "holm",
        name: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(lab, function, name, seed)
        check_choices(test, alternative, correction)
        self.test, self.alternative, self.correction = test, alternative, correction
        self.null: Experiment[Any] | float
        if isinstance(null, Experiment):
            self.null = null
        elif callable(null):
            self.null = Experiment(lab, null, f"{self.name}.null", seed)
        elif (number := finite(null)) is not None:
            self.null = number
        else:
            raise LabError(
                f"null={brief_of(null)}: expected a function that is called as {self.name} is, or a number that is finite."
            )

    def over(
        self,
        *,
        seeds: Iterable[int] | None = None,
        inputs: Iterable[Any] | None = None,
        progress: bool | None = None,
        **given: Any,
    ) -> Outcome:
        """Run it and its null for each seed, or for each input as the first argument, and test their differences.

        >>> outcome = longer.over(seeds=range(8))
        >>> outcome.values.shape
        (1, 8)

        given: further arguments of both. A function that returns a dict or a vector of numbers makes a comparison of each.
        The outcome is kept as an experiment, too: `lab.versions("longer.outcome")`.
        """
        if (seeds is None) == (inputs is None):
            told = "no" if seeds is None else "both"
            raise LabError(f"{self.name}.over got {told} seeds and inputs, expected one of them: seeds=range(10).")
        for what, one in (("seeds", seeds), ("inputs", inputs)):
            if one is not None and not isinstance(one, Iterable):
                raise LabError(f"{self.name}.over got {what}={brief_of(one)}, expected several: {what}=range(10).")
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
        if seeds is not None:
            calls = [((), {**given, "seed": checked_seed(seed)}) for seed in seeds]
            labels = [f"seed {call['seed']}" for _, call in calls]
        else:
            calls = [((one,), dict(given)) for one in inputs or ()]
            labels = [f"input {n}" for n in range(len(calls))]
        values, nulls, versions = self._runs(calls, progress)
        self._check_apart(labels, versions)
        names = list(values[0]) if values else []
        table, beside = (self._table(rows, names) for rows in (values, nulls))
        null = self.null.name if isinstance(self.null, Experiment) else f"{self.null:g}"
        judge = Experiment(self.lab, judged, f"{self.name}.outcome", self.seed)
        return judge(
            table, beside, names, self.test, self.alternative, self.correction, self.seed,
            self.name, null, tuple(labels), tuple(versions),
        )  # fmt: skip

    def _check_apart(self, labels: list[str], versions: list[str]) -> None:
        """Raise for a pair that is there twice, which no test may count as two."""
        own = versions[:: len(versions) // max(1, len(labels)) or 1]
        first = dict[str, str]()
        for label, version in zip(labels, own, strict=True):
            if version in first:
                raise LabError(
                    f"{self.name}: {first[version]} and {label} are one run, {version}, and a test would count it twice. "
                    "Expected each seed and each input once."
                )
            first[version] = label

    def _runs(self, calls: Any, progress: bool | None) -> tuple[list[dict[str, float]], list[dict[str, float]], list[str]]:
        from tqdm import tqdm

        values, nulls, versions = [], [], []
        for args, kwargs in tqdm(calls, desc=self.name, unit="pair", disable=hidden(progress)):
            value, version = self._run(args, kwargs)
            values.append(numbers(value, self.name))
            versions.append(version)
            if isinstance(self.null, Experiment):
                beside, version = self.null._run(args, kwargs)
                nulls.append(numbers(beside, self.null.name, self.name))
                versions.append(version)
            else:
                nulls.append(dict.fromkeys(values[-1], self.null))
        return values, nulls, versions

    def _table(self, rows: list[dict[str, float]], names: list[str]) -> Any:
        """(comparisons, pairs)."""
        for row in rows:
            if row.keys() != {*names}:
                raise LabError(
                    f"{self.name} or its null returned {sorted(row)[:6]} in one run and {sorted(names)[:6]} in another, "
                    "expected the same names in each."
                )
        return np.array([[row[name] for row in rows] for name in names]).reshape(len(names), len(rows))


def finite(value: Any) -> float | None:
    """A number as a float; None for what is none, for NaN, infinity, and what is too large."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    with suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def brief_of(value: Any) -> str:
    """A value in an error, no longer than a line."""
    told = repr(value) if not isinstance(value, int) or abs(value) < 10**60 else "a number of more than 60 digits"
    return told if len(told) <= 80 else f"{told[:80]}..."


def numbers(value: Any, name: str, called: str | None = None) -> dict[str, float]:
    """What was returned as numbers by name."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.item() if value.ndim == 0 else value.tolist()
    if isinstance(value, (int, float)):
        return {called or name: _float(value, name)}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = {str(key): one.item() if hasattr(one, "item") and getattr(one, "ndim", 0) == 0 else one for key, one in pairs}
    if not found or not all(isinstance(one, (int, float)) for one in found.values()):
        raise LabError(
            f"{name} returned a {type(value).__name__} that is no number and no dict or vector of numbers, "
            "expected what can be compared with a null."
        )
    return {key: _float(one, name) for key, one in found.items()}


def _float(value: float, name: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise LabError(f"{name} returned {brief_of(value)}, expected one that is below 1e308.") from None
