"""Superposition and polysemanticity: known geometries, toy models that learn them, units that answer to what is known."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor

import fmr
from analyzers import AnalyzerError, Answers, Interference, Polysemanticity, Superposition
from analyzers.dictionaries.superposed import draw_dimensionalities, draw_features, draw_phases
from analyzers.dictionaries.superposition import REPRESENTED, dimensionality
from fmr.zoo import tasks

matplotlib.use("Agg")


def ngon(corners: int) -> Tensor:
    angles = torch.arange(corners, dtype=torch.float64) * 2 * math.pi / corners
    return torch.stack([angles.cos(), angles.sin()], 1)


# ---- geometry that is known


@pytest.mark.parametrize(
    ("directions", "each"),
    [
        (torch.eye(4), 1.0),
        (torch.cat([torch.eye(3), -torch.eye(3)]), 1 / 2),
        (ngon(3), 2 / 3),
        (ngon(5) * 7, 2 / 5),
        (torch.ones(6, 3), 1 / 6),
    ],
)
def test_dimensionality_of_known_figures(directions: Tensor, each: float) -> None:
    assert torch.allclose(dimensionality(directions), torch.full((len(directions),), each, dtype=directions.dtype))


def test_a_feature_without_length_has_no_dimension() -> None:
    found = Superposition(draws=3).run(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert found.dimensionality.tolist() == [1.0, 0.0]
    assert found.represented == 1


def test_interference_is_that_of_the_formula() -> None:
    rows = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()
    found = Superposition(draws=5).run(rows)
    for i in range(7):
        others = sum(float(rows[i] @ rows[j] / rows[i].norm()) ** 2 for j in range(7) if j != i)
        assert found.others[i] == pytest.approx(others)
        assert found.dimensionality[i] == pytest.approx(float(rows[i].norm() ** 2) / (float(rows[i].norm() ** 2) + others))
    assert found.random_others.shape == (5, 7)
    assert np.allclose(np.diag(found.cosines), 1)


def test_random_directions_are_no_less_random_than_random_ones() -> None:
    shares = [Superposition(draws=39, seed=n).run(torch.randn(20, 8)).p for n in range(12)]
    assert 0.1 < np.mean(shares) < 0.9
    assert Superposition(draws=39).run(torch.eye(8)).p == pytest.approx(1 / 40)


def test_a_result_is_saved_shown_and_drawn(tmp_path: Path) -> None:
    found = Superposition(draws=10).run(ngon(5))
    found.save(tmp_path / "one.safetensors")
    assert repr(Interference.load(tmp_path / "one.safetensors")) == repr(found)
    assert "Interference of 5 directions in 2 dimensions: 5 represented, 0 antipodal pairs" in repr(found)
    assert list(found.table().dimensionality) == pytest.approx([0.4] * 5)
    assert len(found.plot().axes) == 3
    assert Superposition().run(torch.cat([torch.eye(3), -torch.eye(3)])).pairs == 3


# ---- toy models that were trained


def test_five_features_become_two_then_two_pairs_then_a_pentagon() -> None:
    model, toys = fmr.zoo.load("superposition").model, tasks.toys("superposition")
    found = [Superposition(draws=99).run(weights) for weights in model.weights]
    assert [one.represented for one in found] == sorted(one.represented for one in found)
    dense, rare = found[0], found[-1]
    assert (dense.represented, dense.pairs) == (2, 0)
    assert dense.dimensionality[:2] == pytest.approx([1, 1], abs=0.02)
    assert any((one.represented, one.pairs) == (4, 2) for one in found)
    assert (rare.represented, rare.pairs) == (5, 0)
    assert rare.dimensionality == pytest.approx([0.4] * 5, abs=0.02)
    assert rare.p <= 0.02 < dense.p
    assert toys.shares[0] == 1


def test_dimensionalities_stick_at_those_of_figures() -> None:
    model = fmr.zoo.load("superposition-geometry").model
    found = torch.cat([dimensionality(one)[one.norm(dim=1) >= REPRESENTED] for one in model.weights.detach()])
    half = ((found - 0.5).abs() < 0.03).float().mean()
    random = torch.cat([dimensionality(torch.randn(one.shape)) for one in model.weights])
    assert half > 0.1
    assert half > 3 * ((random - 0.5).abs() < 0.03).float().mean()


def test_two_features_in_one_dimension_have_phases() -> None:
    model = fmr.zoo.load("superposition-phases").model
    on = (model.weights.detach()[..., 0].abs() >= REPRESENTED).view(tasks.PHASES, tasks.PHASES, 2)
    both = on.all(-1)
    alone = [on[..., feature] & ~on[..., 1 - feature] for feature in (0, 1)]
    assert not both[:, -1].any()
    assert both[tasks.PHASES // 2, 0]
    assert alone[0][0, -1]
    assert alone[1][-1, -1]
    opposite = model.weights.detach()[..., 0].view(tasks.PHASES, tasks.PHASES, 2).prod(-1)
    assert bool((opposite[both] < 0).all())


def test_toy_models_are_drawn() -> None:
    axes = plt.subplots(1, 3)[1]
    draw_features(ngon(5), axes[0])
    draw_dimensionalities(ngon(5)[None].repeat(2, 1, 1), [1.0, 0.1], axes[1])
    draw_phases(torch.rand(4, 3, 2, 1), [0.1, 10.0], [0.01, 1.0], axes[2])
    assert axes[1].get_xscale() == "log"
    assert axes[2].images[0].get_array().shape == (4, 3, 3)


# ---- to what units answer

TYPES = ["town", "name", "trade", "verb"]


def things(rows: int = 80) -> tuple[Tensor, list[str]]:
    """Four units: one for towns, one for towns and trades, one for nothing, one that is constant."""
    draw = torch.Generator().manual_seed(0)
    labels = [TYPES[n % 4] for n in range(rows)]
    values = torch.randn(rows, 4, generator=draw)
    values[:, 3] = 1.0
    values[[label == "town" for label in labels], 0] += 4
    values[[label in ("town", "trade") for label in labels], 1] += 4
    return values, labels


def test_units_answer_to_what_they_were_made_for() -> None:
    found = Polysemanticity().run(*things())
    assert list(found.of(0)) == ["town"]
    assert set(found.of(1)) == {"town", "trade"}
    assert found.of(2) == found.of(3) == {}
    assert found.counts.tolist() == [1, 2, 0, 0]
    assert found.shares == (0.5, 0.25, 0.25)
    assert dict(found.table().units) == {"name": 0, "town": 2, "trade": 1, "verb": 0}
    assert found.table().alone["town"] == 1


def test_shuffled_labels_are_answered_as_often_as_the_level_says() -> None:
    values = torch.randn(120, 300, generator=torch.Generator().manual_seed(1))
    found = Polysemanticity(draws=100, level=0.1).run(values, [TYPES[n % 4] for n in range(120)])
    assert (found.counts > 0).mean() == pytest.approx(0.1, abs=0.06)
    assert (found.null > 0).mean() == pytest.approx(0.1, abs=0.02)


def test_rows_of_one_thing_count_once() -> None:
    """Ten words in a thousand rows: labels that each word has by chance are no type that a unit answers to."""
    draw = torch.Generator().manual_seed(2)
    words = torch.randint(12, (1000,), generator=draw)
    values = torch.randn(12, 60, generator=draw)[words] + 0.1 * torch.randn(1000, 60, generator=draw)
    labels = [TYPES[int(word) % 2] for word in words]
    assert (Polysemanticity().run(values, labels).counts > 0).mean() > 0.8
    assert (Polysemanticity().run(values, labels, words).counts > 0).mean() < 0.2


def test_answers_are_saved_shown_and_drawn(tmp_path: Path) -> None:
    found = Polysemanticity(draws=20).run(*things())
    found.save(tmp_path / "answers.safetensors")
    assert repr(Answers.load(tmp_path / "answers.safetensors")) == repr(found)
    assert "50.0% answer to none, 25.0% to one, 25.0% to several" in repr(found)
    assert found.plot().axes[0].get_xlabel() == "types that a unit answers to"


def test_geometry_does_not_depend_on_the_scale() -> None:
    ways = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = Superposition(draws=5).run(ways)
    for scale in (1e-20, 1e-100, 1e20):
        found = Superposition(draws=5).run(ways * scale)
        assert np.allclose(found.dimensionality, plain.dimensionality)
        assert np.allclose(found.cosines, plain.cosines)
        assert np.allclose(found.random_dimensionality, plain.random_dimensionality)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Superposition().run(torch.ones(3)), "The directions are shape (3,): expected a tensor (features, width)"),
        (lambda: Superposition().run(torch.full((2, 2), float("inf"))), "The directions hold numbers that are not finite."),
        (lambda: Superposition(draws=0), "draws=0: expected a whole number from 1 on."),
        (lambda: Polysemanticity(level=5), "level=5: expected a share between 0 and 1, such as 0.05."),
        (lambda: Polysemanticity().run(torch.ones(3), "abc"), "The values are shape (3,): expected numbers with fractions"),
        (
            lambda: Polysemanticity().run(torch.ones(3, 1), "ab"),
            "There are 3 rows, 2 labels and 3 things: expected as many.",
        ),
        (lambda: Polysemanticity().run(torch.ones(3, 1), "aaa"), "There are 1 types of 3 things: expected two or more"),
        (lambda: Polysemanticity().run(torch.ones(4, 1), "abab", [1, 1, 2, 3]), "The thing 1 has more than one label."),
        (lambda: tasks.toys("superpositions"), "There are no toy models 'superpositions'."),
    ],
)
def test_a_mistake_is_told(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(fmr.FmrError, match=re.escape(message)):
        mistake()
    assert issubclass(AnalyzerError, fmr.FmrError)
