"""Tests against a null: equal to scipy's, calibrated, with effect sizes and corrections by hand, and what they refuse."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from scipy import stats

import analyzers
from analyzers.lab.comparisons import TESTS, compared, corrected, effect_size, interval
from analyzers.lab.errors import LabError
from analyzers.lab.outcome import judged

matplotlib.use("Agg")


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_p_values_are_those_of_scipy(alternative: str) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.4, 1, 12), rng.normal(0, 1, 12)
    paired = stats.ttest_rel(x, y, alternative=alternative)
    assert compared(x, y, "paired", alternative, 0)[:2] == (paired.statistic, paired.pvalue)
    ranks = stats.wilcoxon(x, y, alternative=alternative)
    assert compared(x, y, "wilcoxon", alternative, 0)[:2] == (ranks.statistic, ranks.pvalue)

    def mean(a: Any, b: Any) -> Any:
        return np.mean(a - b)

    exact = stats.permutation_test((x, y), mean, permutation_type="samples", alternative=alternative, n_resamples=9999)
    assert compared(x, y, "permutation", alternative, 0)[:2] == pytest.approx((exact.statistic, exact.pvalue), rel=1e-12)
    own = compared(x, y, stats.ttest_ind, alternative, 0)
    assert own.p == stats.ttest_ind(x, y).pvalue


def test_a_permutation_of_few_pairs_is_counted_by_hand() -> None:
    x = np.array([1.0, 2.0, 3.0, -0.5])
    sums = [sum((1 - 2 * bit) * v for bit, v in zip(signs, x, strict=True)) for signs in np.ndindex(2, 2, 2, 2)]
    found = compared(x, np.zeros(4), "permutation", "greater", 0)
    assert found.p == sum(one >= x.sum() for one in sums) / 16 == 2 / 16
    assert found.least == 1 / 16


def test_the_bootstrap_is_of_t_of_centred_differences_by_hand() -> None:
    d = np.random.default_rng(3).normal(0.5, 1, 10)
    rows = np.random.default_rng(4).integers(10, size=(20000, 10))
    drawn = (d - d.mean())[rows]
    t = drawn.mean(1) / (drawn.std(1, ddof=1) / np.sqrt(10))
    here = d.mean() / (d.std(ddof=1) / np.sqrt(10))
    by_hand = float((np.abs(t) >= abs(here)).mean())
    found = compared(d, np.zeros(10), "bootstrap", "two-sided", 0)
    assert found.statistic == pytest.approx(here)
    assert found.p == pytest.approx(by_hand, abs=0.02)
    assert found == compared(d, np.zeros(10), "bootstrap", "two-sided", 0)


@pytest.mark.parametrize("test", TESTS)
def test_under_a_true_null_about_alpha_reject(test: str) -> None:
    rng, trials, alpha, n = np.random.default_rng(7), 400, 0.05, 8
    p = np.array([compared(rng.normal(size=n), rng.normal(size=n), test, "two-sided", 0).p for _ in range(trials)])
    share = float((p <= alpha).mean())
    spread = float(np.sqrt(alpha * (1 - alpha) / trials))  # 0.011
    assert alpha - 3 * spread < share < alpha + 3 * spread, share
    assert abs(float((p <= 0.5).mean()) - 0.5) < 0.08


def test_a_true_effect_is_found_and_its_size_is_right() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 1.0, 4000)
    assert effect_size(x) == pytest.approx(1.0, abs=0.06)
    assert all(compared(x[:30], np.zeros(30), test, "two-sided", 0).p < 0.01 for test in TESTS)


def test_corrections_by_hand() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert corrected(p, "holm") == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert corrected(p, "bh") == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert corrected(p, "bonferroni") == pytest.approx([0.04, 0.16, 0.12, 0.02])
    assert corrected(p, "none") is p
    assert corrected(np.array([0.9, 0.8]), "holm") == pytest.approx([1.0, 1.0])


def test_holm_keeps_the_error_over_many_true_nulls() -> None:
    rng = np.random.default_rng(5)
    families = [corrected(rng.uniform(size=20), "holm").min() <= 0.05 for _ in range(400)]
    plain = [rng.uniform(size=20).min() <= 0.05 for _ in range(400)]
    assert np.mean(families) < 0.09
    assert np.mean(plain) > 0.5


def test_every_run_is_kept_and_pairs_share_their_seed(lab: analyzers.Lab) -> None:
    def nothing(scale: float) -> float:
        return torch.rand(1).item()

    @lab.hypothesis(null=nothing, test="permutation", alternative="greater")
    def more(scale: float) -> float:
        return torch.rand(1).item() + scale * (1 + torch.rand(1).item())

    outcome = more.over(seeds=range(6), scale=0.5)
    assert outcome.null == "more.null"
    assert outcome.p == [1 / 64]
    assert ((outcome.differences >= 0.5) & (outcome.differences < 1)).all()
    assert len(lab.versions("more")) == len(lab.versions("more.null")) == 6
    assert outcome.versions[0] == lab.versions("more")[0].version
    kept = lab.versions("more.outcome")[0]
    assert repr(kept.result) == repr(outcome)
    assert kept.arguments["versions"] == outcome.versions
    assert more.over(seeds=range(6), scale=0.5).p == outcome.p
    assert len(lab.versions("more.outcome")) == 1


def test_inputs_and_many_comparisons(lab: analyzers.Lab, tmp_path: Path) -> None:
    @lab.hypothesis(null=0, correction="bh")
    def parts(x: float) -> dict[str, Any]:
        return {"up": 1 + x, "noise": (-1) ** round(10 * x) * (1 + x), "t": torch.tensor(x)}

    outcome = parts.over(inputs=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert outcome.names == ("up", "noise", "t")
    assert outcome.values[0] == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5, 1.6])
    assert outcome.rejected() == ["up", "t"]
    assert list(outcome.table()["corrected"]) == pytest.approx(list(corrected(outcome.p, "bh")))
    assert "corrected by bh for 3" in repr(outcome)
    outcome.plot().savefig(tmp_path / "outcome.png")
    both = analyzers.Outcome.together([outcome, outcome])
    assert both.corrected == pytest.approx(corrected(np.tile(outcome.p, 2), "holm"))
    assert both.names[0] == "parts: up"


@pytest.mark.parametrize("pairs", [2, 3, 6, 40])
def test_the_interval_holds_zero_just_where_the_t_test_keeps_the_null(pairs: int) -> None:
    draw = np.random.default_rng(pairs)
    x = draw.normal(size=(300, pairs)) + draw.choice([0.0, 1.0], size=(300, 1))
    low, high = interval(x)
    told = [stats.ttest_rel(row, np.zeros(pairs)) for row in x]
    assert np.array_equal((low <= 0) & (high >= 0), [one.pvalue > 0.05 for one in told])
    assert low == pytest.approx([one.confidence_interval().low for one in told])
    assert high == pytest.approx([one.confidence_interval().high for one in told])


def test_too_few_pairs_to_reject_are_told(lab: analyzers.Lab) -> None:
    @lab.hypothesis(null=0, test="permutation")
    def up(seed: int) -> float:
        return 1.0 + seed

    assert repr(up.over(seeds=range(3))).endswith("3 pairs cannot give a p below 0.25: give more seeds or inputs")


def steady(seed: int) -> float:
    return 0.25


def text(seed: int) -> str:
    return "a"


def changing(seed: int) -> dict[str, float]:
    return {f"n{seed}": 1.0}


def broken(seed: int) -> float:
    return float("nan")


def huge(seed: int) -> int:
    return 10**400


def fine(seed: int) -> float:
    return float(seed)


@pytest.mark.parametrize(
    ("function", "given", "over", "message"),
    [
        (
            steady,
            {"null": 0.5},
            {"seeds": range(4)},
            "steady: all 4 differences from the null are -0.25, and no test",
        ),
        (steady, {"null": steady}, {"seeds": range(4)}, "all 4 differences from the null are 0, and no test can judge"),
        (fine, {"null": 0.5}, {"seeds": [1]}, "1 pair of numbers: expected two at least"),
        (fine, {"null": 0.5}, {"seeds": []}, "0 pair of numbers: expected two at least"),
        (text, {"null": 0.5}, {"seeds": range(4)}, "text returned a str that is no number and no dict or vector of numbers"),
        (broken, {"null": 0.5}, {"seeds": range(4)}, "broken is not finite in some run"),
        (changing, {"null": 0.5}, {"seeds": range(4)}, r"returned \['n1'\] in one run and \['n0'\] in another"),
        (fine, {"null": 0.5}, {}, "fine.over got no seeds and inputs, expected one of them"),
        (fine, {"null": 0.5, "test": "z"}, {}, "test='z': expected one of paired, wilcoxon, permutation, bootstrap"),
        (fine, {"null": 0.5, "alternative": "both"}, {}, "alternative='both': expected one of two-sided"),
        (fine, {"null": 0.5, "correction": "fdr"}, {}, "correction='fdr': expected one of holm"),
        (
            huge,
            {"null": 0.5},
            {"seeds": range(3)},
            "huge returned a number of more than 60 digits, expected one that is below",
        ),
        (fine, {"null": 0.5}, {"seeds": [3, 1, 3]}, r"fine: seed 3 and seed 3 are one run, \w+, and a test would count it"),
        (fine, {"null": fine}, {"inputs": [2, 1, 1]}, r"fine: input 1 and input 2 are one run"),
        (fine, {"null": 0.5}, {"seeds": 4}, r"fine.over got seeds=4, expected several: seeds=range\(10\)"),
        (fine, {"null": 0.5}, {"inputs": 4}, r"fine.over got inputs=4, expected several: inputs=range\(10\)"),
        (fine, {"null": float("nan")}, {}, "null=nan: expected a function that is called as fine is, or a number that is"),
        (fine, {"null": 10**400}, {}, "null=a number of more than 60 digits: expected a function that is called as fine"),
        (fine, {"null": "chance"}, {}, "null='chance': expected a function that is called as fine is, or a number"),
    ],
)
def test_misuse(function: Any, given: Any, over: Any, message: str, lab: analyzers.Lab) -> None:
    with pytest.raises(LabError, match=message):
        lab.hypothesis(**given)(function).over(**over)


@pytest.mark.parametrize("scale", [1e-300, 1e308])
def test_numbers_without_a_square_are_refused(scale: float) -> None:
    with pytest.raises(LabError, match=r"sum differs from the null by 1e[-+]30\d, of which floats hold no square"):
        judged(
            scale * np.array([[0.2, 0.5, 1.0]]), np.zeros((1, 3)), ["sum"], "paired", "two-sided", "holm", 0, "", "0", (), ()
        )


def test_numbers_that_differ_by_rounding_alone_have_no_variance() -> None:
    x = np.array([[0.1 + 0.2, 0.3, 0.15 + 0.15, 0.3]])
    with pytest.raises(LabError, match="no test can judge numbers without variance"):
        judged(x, np.zeros((1, 4)), ["sum"], "paired", "two-sided", "holm", 0, "sum", "0", (), ())
