"""What measures say where it is known: turns and scales, other formulas for the same, and nothing in common."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from analyzers.compare.measures import MEASURES, similarity


def drawn(rows: int, wide: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, wide, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_turn_a_scale_and_a_shift_change_nothing(measure: str) -> None:
    values = drawn(60, 9)
    turn = torch.linalg.qr(drawn(9, 9, 1)).Q
    shift = 0 if measure == "rsa" else 3.0
    moved = 4 * (values - (values.mean(1, keepdim=True) if measure == "rsa" else 0)) + shift
    assert similarity(values, moved, measure) == pytest.approx(1, abs=1e-9)
    if measure != "rsa":  # whose correlations are of the numbers as they are
        assert similarity(values, moved @ turn, measure) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_it_is_the_same_either_way_and_less_for_more_noise(measure: str) -> None:
    values, noise = drawn(80, 6), drawn(80, 6, 1)
    found = [similarity(values, values + size * noise, measure) for size in (0.1, 0.5, 2.0)]
    assert found == sorted(found, reverse=True)
    assert 1 > found[0] > found[2] + 0.1
    assert similarity(values + noise, values, measure) == pytest.approx(similarity(values, values + noise, measure))


def test_any_map_that_can_be_undone_is_all_the_same_to_canonical_correlations_alone() -> None:
    values, mixed = drawn(80, 6), drawn(6, 6, 1)
    assert similarity(values, values @ (mixed + 3 * torch.eye(6)), "svcca") > 0.99
    assert similarity(values, values @ (mixed + 3 * torch.eye(6)), "cka") < 0.99


def test_cka_is_unbiased() -> None:
    """Of unrelated vectors it is 0 in the mean, however wide they are, where the plain form rises to 1."""
    found = [similarity(drawn(30, 200, 2 * n), drawn(30, 200, 2 * n + 1)) for n in range(40)]
    assert abs(sum(found) / 40) < 0.02
    plain = []
    for n in range(5):
        one, other = (values - values.mean(0) for values in (drawn(30, 200, 2 * n), drawn(30, 200, 2 * n + 1)))
        plain.append(float((one.T @ other).norm() ** 2 / ((one.T @ one).norm() * (other.T @ other).norm())))
    assert min(plain) > 0.8


def test_cka_by_its_formula() -> None:
    one, other = drawn(12, 4), drawn(12, 5, 1)
    k, m = (values @ values.T for values in (one, other))

    def hsic(k: Tensor, m: Tensor) -> float:
        n, k, m = len(k), k.clone().fill_diagonal_(0), m.clone().fill_diagonal_(0)
        ones = torch.ones(n, dtype=torch.float64)
        both = ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return float((torch.trace(k @ m) + both - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3)))

    assert similarity(one, other) == pytest.approx(hsic(k, m) / (hsic(k, k) * hsic(m, m)) ** 0.5)


def test_rsa_is_the_rank_correlation_of_distances() -> None:
    one, other = drawn(15, 6), drawn(15, 8, 1)
    above = torch.triu_indices(15, 15, 1)
    far = [(1 - torch.corrcoef(values))[above[0], above[1]] for values in (one, other)]
    assert similarity(one, other, "rsa") == pytest.approx(spearmanr(*far).statistic)


def test_procrustes_is_what_is_left_by_the_best_turn() -> None:
    one, other = drawn(40, 5), drawn(40, 5, 1) + drawn(40, 5)
    one, other = ((values - values.mean(0)) / (values - values.mean(0)).norm() for values in (one, other))
    left, _, right = torch.linalg.svd(one.T @ other)
    assert similarity(one, other, "procrustes") == pytest.approx(1 - float((one @ left @ right - other).square().sum()) / 2)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_never_varies_is_like_nothing(measure: str) -> None:
    assert torch.tensor(similarity(torch.ones(10, 4), drawn(10, 4), measure)).isnan()
