"""Lists of the strongest triggers are exact, however data come in; moments equal those of all data at once."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import Tensor

from analyzers.memories.tops import Moments, Prefixes, Tops

Batch = tuple[Tensor, Prefixes]


def batches(n: int, sizes: list[int], coarse: bool, seed: int = 0) -> list[Batch]:
    """Batches of values, (prefixes, memories); coarse ones have many ties."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        values = torch.randn(size, n, generator=generator)
        texts = torch.randint(1, 1 << 60, (size,), generator=generator)
        places = torch.randint(0, 50, (size,), generator=generator)
        found.append(((values * 2).round() / 2 if coarse else values, Prefixes(texts, places)))
    return found


def slow(given: list[Batch], k: int) -> list[list[tuple[float, int, int]]]:
    """The definition, one memory at a time: the largest positive values, ties by text and place, a prefix once."""
    lists: list[dict[tuple[int, int], float]] = [defaultdict(float) for _ in range(given[0][0].shape[1])]
    for values, (texts, places) in given:
        for row, text, place in zip(values.tolist(), texts.tolist(), places.tolist(), strict=True):
            for held, value in zip(lists, row, strict=True):
                held[text, place] = max(held[text, place], value)
    best = [sorted((-value, *at) for at, value in held.items() if value > 0)[:k] for held in lists]
    return [[(-value, text, place) for value, text, place in one] for one in best]


def held(tops: Tops) -> list[list[tuple[float, int, int]]]:
    rows = zip(tops.values.tolist(), tops.texts.tolist(), tops.places.tolist(), strict=True)
    return [[one for one in zip(*row, strict=True) if one[0] > 0] for row in rows]


def counted(given: list[Batch], k: int) -> Tops:
    tops = Tops.empty(given[0][0].shape[1], k)
    for values, at in given:
        tops.add(values, at)
    return tops


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_they_equal_sorting_everything(coarse: bool, k: int) -> None:
    given = batches(13, [7, 1, 40, 2, 25], coarse)
    assert held(counted(given, k)) == slow(given, k)


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
def test_order_and_shards_change_nothing(coarse: bool) -> None:
    given = batches(13, [9, 30, 4, 30, 9], coarse)
    whole = held(counted(given, 4))
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        assert held(counted([given[n] for n in order], 4)) == whole
    for cut in (1, 2, 4):
        one, two = counted(given[:cut], 4), counted(given[cut:], 4)
        two.merge(one)
        assert held(two) == whole


def test_what_comes_again_is_counted_once_with_its_larger_value() -> None:
    """A copy of one prefix must not drive others out, even if it comes with another last bit."""
    values, at = torch.tensor([[3.0], [2.0], [1.0]]), Prefixes(torch.tensor([5, 6, 7]), torch.tensor([0, 0, 0]))
    tops = counted([(values, at), (values - torch.tensor([[0.5], [-0.5], [0.0]]), at)], 3)
    assert held(tops) == [[(3.0, 5, 0), (2.5, 6, 0), (1.0, 7, 0)]]
    tops.merge(counted([(values, at)], 3))
    assert held(tops) == [[(3.0, 5, 0), (2.5, 6, 0), (1.0, 7, 0)]]


def test_what_is_not_positive_is_no_trigger() -> None:
    values = torch.tensor([[0.0, -1.0, float("nan"), 1.0]])
    tops = counted([(values, Prefixes(torch.tensor([5]), torch.tensor([2])))], 2)
    assert held(tops) == [[], [], [], [(1.0, 5, 2)]]
    assert tops.texts.tolist() == [[0, 0], [0, 0], [0, 0], [5, 0]]


def test_they_tell_which_memories_changed() -> None:
    tops = Tops.empty(3, 2)
    at = Prefixes(torch.tensor([5, 6]), torch.tensor([0, 0]))
    assert tops.add(torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 2.0]]), at).tolist() == [0, 2]
    late = Prefixes(torch.tensor([7]), torch.tensor([0]))
    assert tops.add(torch.tensor([[0.5, 0.0, 1.0]]), late).tolist() == [0]
    assert tops.add(torch.tensor([[0.1, 0.0, 2.0]]), late).tolist() == []


@pytest.mark.parametrize("cuts", [[50], [1, 49], [10, 10, 30], [1] * 50])
def test_moments_of_parts_are_those_of_the_whole(cuts: list[int]) -> None:
    values = torch.randn(50, 6, dtype=torch.float64) * torch.logspace(-3, 3, 6) + torch.logspace(5, -5, 6)
    found = Moments.of(values[:0])
    found.mean = found.mean.nan_to_num()
    for part in values.split(cuts):
        found = found.merge(Moments.of(part))
    assert found.count == 50
    assert np.allclose(found.mean, values.mean(0), rtol=1e-13)
    assert np.allclose(found.variance, values.var(0), rtol=1e-9)


def test_a_single_value_has_no_variance() -> None:
    assert bool(Moments.of(torch.ones(1, 2)).variance.isnan().all())
