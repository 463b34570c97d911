"""fmr.edits.left: what a model keeps on itself by name during an edited pass is not there after the block."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits


class Keeps(nn.Module):
    """Keeps what it computed: by name, in a list, a dictionary and an object, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.last: Any = None
        self.listed: list[Tensor] = []
        self.named: dict[str, Tensor] = {"old": torch.ones(1)}
        self.held = SimpleNamespace()
        self.calls = 0

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        h = self.linear(x)
        self.calls += 1
        self.last = h if self.last is None else self.last + h
        self.listed.append(h)
        self.named["new"] = h
        self.held = SimpleNamespace(h=h)
        self.made = h * 2
        if fail:
            raise ValueError("in the model")
        return h + self.last

    def kept(self) -> list[Any]:
        return [self.last, list(self.listed), dict(self.named), vars(self.held), hasattr(self, "made"), self.calls]


X = torch.ones(2, 4)


@pytest.mark.parametrize("keep", [(), "all"])
def test_nothing_that_was_computed_under_an_edit_stays_on_the_model(keep: Any) -> None:
    model = nn.Sequential(Keeps(), Keeps())
    before = [one.kept() for one in model]  # type: ignore[operator]
    fmr.run(model, X, keep=keep, edits={"0.linear": edits.Zero()})
    assert [one.kept() for one in model] == before  # type: ignore[operator]
    assert list(model[0].named) == ["old"]  # type: ignore[arg-type]


def test_what_an_error_left_is_put_back_too() -> None:
    model = Keeps()
    before = model.kept()
    with pytest.raises(ValueError, match="in the model"):
        fmr.run(model, X, fail=True, edits={"linear": edits.Zero()})
    assert model.kept() == before


def test_between_the_passes_of_a_block_the_model_has_what_it_kept() -> None:
    model, twin = Keeps(), Keeps()
    twin.load_state_dict(model.state_dict())
    expected = [twin(X), twin(X), twin(X)]
    with fmr.track(model, keep=(), edits={"linear": lambda value, context: value.clone()}):
        first = model(X)
        model.training, model.note = False, X  # type: ignore[assignment]  # of the user's own
        assert model.calls == 1
        assert torch.equal(model.last, model.listed[0])
        assert all(torch.equal(a, b) for a, b in zip((first, model(X), model(X)), expected, strict=True))
    assert (model.last, model.listed, model.calls) == (None, [], 0)
    assert not model.training
    assert model.note is X


def test_what_the_user_puts_there_since_stays() -> None:
    model = Keeps()
    with fmr.track(model, keep=(), edits={"linear": edits.Zero()}):
        model(X)
        model.last = X
    assert model.last is X
    assert model.named.keys() == {"old"}


def test_numbers_alone_and_what_runs_without_edits_are_left_as_always() -> None:
    class Counts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2

    model, keeping = Counts(), Keeps()
    fmr.run(model, X, edits={"/mul#0": edits.Zero()})
    assert model.calls == 1
    fmr.run(keeping, X)
    assert keeping.calls == len(keeping.listed) == 1
