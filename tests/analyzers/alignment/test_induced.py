"""Interchange training moves variables to where they are wanted, and the task is not lost."""

import copy
from pathlib import Path

import pytest
import torch

from analyzers import AnalyzerError, Induced, InterchangeTraining
from fmr import subspaces
from tests.analyzers.alignment.models import Planted, one_hot, planted, rotated

UNITS = {"x": subspaces.Units(8, [0, 1]), "y": subspaces.Units(8, [2, 3, 4])}


def training(seed: int = 0) -> InterchangeTraining:
    return InterchangeTraining(Planted(rotated(seed=seed)).eval(), planted(), "hidden", UNITS)


def test_variables_come_to_the_units_that_are_named(tmp_path: Path) -> None:
    causal, trained = planted(), training()
    data = causal.counterfactuals(400, encode=one_hot, seed=0)
    found = trained.run(data, epochs=8, batch=32, lr=0.05, progress=False)
    assert found.before["task"] == 1.0
    assert found.before["interchange"] < 0.7
    assert found.after["interchange"] >= 0.95
    assert found.after["changed"] >= 0.95
    assert found.after["task"] == 1.0
    assert all(one.grad is None for one in trained.model.parameters())
    assert found.table().what.tolist() == ["interchange", "changed", "task"]
    assert found.plot().axes[0].get_xlabel() == "epoch"
    found.save(tmp_path / "induced.safetensors")
    assert repr(Induced.load(tmp_path / "induced.safetensors")) == repr(found)
    assert repr(found).startswith("Induced x and y at Site('hidden'): accuracy on 81 held-out examples\n  interchange 0.")


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    data = planted().counterfactuals(100, encode=one_hot, seed=0)
    whole, part, again = training(), training(), training()
    expected = whole.run(data, epochs=2, batch=32, progress=False)
    part.run(data, epochs=2, batch=32, checkpoint=tmp_path, progress=False)
    found = again.run(data, epochs=2, batch=32, checkpoint=tmp_path, progress=False)  # all of it is in the file
    assert (found.losses == expected.losses).all()
    assert found.after == expected.after
    for one, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_trained_is_refused() -> None:
    data = planted().counterfactuals(40, encode=one_hot)
    with pytest.raises(AnalyzerError, match=r"task=-1: expected a number from 0 on, the weight of the task's own loss"):
        training().run(data, task=-1)
    fixed = training()
    fixed.model.requires_grad_(False)
    with pytest.raises(AnalyzerError, match=r"No weight of the model takes a gradient. Expected some: model.requires_grad_"):
        fixed.run(data)


def test_a_training_that_fails_leaves_the_model_as_it_was() -> None:
    data, one = planted().counterfactuals(60, encode=one_hot), training()
    before = copy.deepcopy(one.model.state_dict())
    gradient = torch.ones_like(one.model.out.weight)
    one.model.out.weight.grad = gradient
    with pytest.raises(AnalyzerError, match=r"The loss is .*Expected a finite one: lr= below 1e\+30"):
        one.run(data, epochs=3, batch=16, lr=1e30, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    assert one.model.out.weight.grad is gradient
    assert one.model.hidden.weight.grad is None
