"""Tests of paired numbers, all of them scipy's; effect sizes; p values corrected for how many there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from analyzers.lab.errors import LabError
from analyzers.numbers.embed import Floats

DRAWS = 9999
TESTS = ("paired", "wilcoxon", "permutation", "bootstrap")
ALTERNATIVES = ("two-sided", "greater", "less")
CORRECTIONS = ("holm", "bh", "bonferroni", "none")

Test = str | Callable[[Floats, Floats], Any]


class Tested(NamedTuple):
    """A statistic, its p value, and the least p that so many pairs can give: 0 where there is no such limit."""

    statistic: float
    p: float
    least: float


def compared(values: Floats, nulls: Floats, test: Test, alternative: str, seed: int) -> Tested:
    """Whether paired numbers differ.

    >>> compared(np.array([2.0, 3, 5, 4]), np.zeros(4), "permutation", "two-sided", 0).p
    0.125

    values, nulls: (pairs,). test: "paired" (t), "wilcoxon" (signed ranks), "permutation" (of the signs, all of them where
    they are at most 9999, on the mean), "bootstrap" (of t, the differences centred), or a function of both that returns
    something with `statistic` and `pvalue`, as those of scipy do.

    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, algorithm 16.2 for one sample.
    """
    from scipy import stats

    n = len(values)
    flips = 2.0**-n * (2 if alternative == "two-sided" else 1)
    if not isinstance(test, str):
        found = test(values, nulls)
        return Tested(float(found.statistic), float(found.pvalue), 0.0)
    if test == "paired":
        found = stats.ttest_rel(values, nulls, alternative=alternative)
        return Tested(float(found.statistic), float(found.pvalue), 0.0)
    if test == "wilcoxon":
        found = stats.wilcoxon(values - nulls, alternative=alternative)
        return Tested(float(found.statistic), float(found.pvalue), flips)
    if test == "permutation":
        found = stats.permutation_test(
            (values, nulls), _mean_difference, permutation_type="samples", vectorized=True, n_resamples=DRAWS,
            alternative=alternative, rng=np.random.default_rng(seed),
        )  # fmt: skip
        return Tested(float(found.statistic), float(found.pvalue), max(flips, 1 / (DRAWS + 1)))
    return _bootstrapped(values - nulls, alternative, seed)


def _mean_difference(x: Floats, y: Floats, axis: int) -> Floats:
    found: Floats = np.mean(x - y, axis=axis)
    return found


def _t(differences: Floats, axis: int = -1) -> Floats:
    """Mean over standard error; without any spread it is as large as it can be, or 0."""
    n = differences.shape[axis]
    mean, spread = differences.mean(axis), differences.std(axis, ddof=1) / np.sqrt(n)
    flat = spread <= 1e-12 * np.abs(differences).max(axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.where(flat, np.where(np.abs(mean) > 0, np.inf * np.sign(mean), 0.0), mean / spread)
    return found


def _bootstrapped(differences: Floats, alternative: str, seed: int) -> Tested:
    from scipy import stats

    here = float(_t(differences))
    drawn = stats.bootstrap(
        (differences - differences.mean(),), _t, n_resamples=DRAWS, vectorized=True, method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution  # fmt: skip
    beyond = {"two-sided": np.abs(drawn) >= abs(here), "greater": drawn >= here, "less": drawn <= here}[alternative]
    return Tested(here, float((beyond.sum() + 1) / (DRAWS + 1)), 1 / (DRAWS + 1))


def interval(differences: Floats) -> tuple[Floats, Floats]:
    """The ends of the 95 % interval of each mean difference, by Student's t; (comparisons, pairs).

    >>> low, high = interval(np.array([[1.0, 2.0, 3.0]]))
    >>> low.round(3), high.round(3)
    (array([-0.484]), array([4.484]))

    It holds zero just where the paired t test on two sides has p above 0.05. A bootstrap of few pairs would be too narrow.
    """
    from scipy import stats

    n = differences.shape[1]
    reach = stats.t.ppf(0.975, n - 1) * differences.std(1, ddof=1) / np.sqrt(n)
    return differences.mean(1) - reach, differences.mean(1) + reach


def effect_size(differences: Floats) -> float:
    """Cohen's d of paired numbers: their mean difference in standard deviations of the differences.

    >>> effect_size(np.array([1.0, 2.0, 3.0]))
    2.0
    """
    return float(differences.mean() / differences.std(ddof=1))


def corrected(p: Floats, how: str) -> Floats:
    """p values so that those below alpha are right all together: Holm and Bonferroni for any error, bh for their share.

    >>> corrected(np.array([0.01, 0.04, 0.03]), "holm")
    array([0.03, 0.06, 0.06])
    """
    if how == "none":
        return p
    if how == "bonferroni":
        return np.minimum(p * len(p), 1.0)
    if how == "bh":
        from scipy.stats import false_discovery_control

        rates: Floats = false_discovery_control(p, method="bh")
        return rates
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    found = np.empty_like(p)
    found[order] = np.minimum(steps, 1.0)
    return found


def check_choices(test: Any, alternative: Any, correction: Any) -> None:
    """Raise for a test, an alternative or a correction that there is not."""
    if not (callable(test) or test in TESTS):
        raise LabError(f"test={test!r}: expected one of {', '.join(TESTS)}, or a function of scipy.stats of two samples.")
    if alternative not in ALTERNATIVES:
        raise LabError(f"alternative={alternative!r}: expected one of {', '.join(ALTERNATIVES)}.")
    if correction not in CORRECTIONS:
        raise LabError(f"correction={correction!r}: expected one of {', '.join(CORRECTIONS)}.")


def check_spread(names: list[str], differences: Floats) -> None:
    """Raise for comparisons that no test can judge: too few pairs, numbers that are none, no variance."""
    n = differences.shape[1]
    if n < 2:
        raise LabError(f"{n} pair of numbers: expected two at least. Give more seeds or inputs.")
    if not np.isfinite(differences).all():
        which = names[int(np.argwhere(~np.isfinite(differences))[0, 0])]
        raise LabError(f"{which} is not finite in some run: expected numbers. Find the run in lab.versions().")
    largest = np.abs(differences).max(1)
    if (odd := (largest > 1e150) | ((largest > 0) & (largest < 1e-150))).any():
        first = int(np.flatnonzero(odd)[0])
        raise LabError(
            f"{names[first]} differs from the null by {largest[first]:.3g}, of which floats hold no square: expected "
            "numbers between 1e-150 and 1e150. Return them in another unit."
        )
    scale = np.maximum(largest, 1e-300)
    flat = [name for name, one in zip(names, differences.std(1) <= 1e-12 * scale, strict=True) if one]
    if flat:
        value = differences[names.index(flat[0])][0]
        raise LabError(
            f"{', '.join(flat[:4])}: all {n} differences from the null are {value:.6g}, and no test can judge numbers "
            "without variance. Give seeds or inputs that change the result, or leave it out."
        )
