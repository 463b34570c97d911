"""Agreement of triggers and words beside chance: known answers, and the null holds what is wrongly claimed."""

from itertools import permutations

import numpy as np
import pytest

from analyzers.memories.agreement import agreement


def test_what_always_agrees_is_one_and_far_above_chance() -> None:
    tokens = np.arange(100)
    found = agreement(tokens[:, None], tokens, seed=0, draws=200)
    assert found.share == 1.0
    assert found.chance == pytest.approx(0.01)
    assert found.p_value == pytest.approx(1 / 201)
    assert found.high < 0.06


def test_one_frequent_word_agrees_no_more_than_by_chance() -> None:
    """Nine of ten memories say "the", and nine of ten triggers are followed by it: a high share, and nothing in it."""
    rng = np.random.default_rng(0)
    words, following = (np.where(rng.random(400) < 0.9, 7, rng.integers(0, 50, 400)) for _ in range(2))
    found = agreement(following[:, None], words, seed=0, draws=500)
    assert found.share > 0.7
    assert abs(found.share - found.chance) < 0.03
    assert found.p_value > 0.05


def test_chance_equals_the_mean_over_all_permutations() -> None:
    following, words = np.array([[3, 4], [3, 3], [5, -1], [-1, 4]]), np.array([3, 4, 5, 3])
    found = agreement(following, words, seed=0, draws=10)
    first = np.array([3, 3, 5, 4])
    every = [(first == words[list(order)]).mean() for order in permutations(range(4))]
    among = [(following == words[list(order)][:, None]).any(1).mean() for order in permutations(range(4))]
    assert found.chance == pytest.approx(np.mean(every))
    assert found.among_chance == pytest.approx(np.mean(among))
    assert found.share == 0.5
    assert found.among == 0.5


def test_memories_without_a_token_after_any_trigger_are_left_out() -> None:
    found = agreement(np.array([[-1, -1], [4, -1]]), np.array([4, 4]), seed=0, draws=10)
    assert found.memories == 1
    assert found.share == 1.0
    nothing = agreement(np.array([[-1]]), np.array([4]), seed=0, draws=10)
    assert nothing.memories == 0
    assert np.isnan(nothing.share)


def test_a_seed_gives_the_same_draws_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    following, words = rng.integers(0, 9, (60, 2)), rng.integers(0, 9, 60)
    whole = agreement(following, words, seed=3, draws=50)
    assert agreement(following, words, seed=3, draws=50) == whole
    monkeypatch.setattr("analyzers.memories.agreement._CELLS", 600)
    assert agreement(following, words, seed=3, draws=50) == whole
