"""Edits of passes that are calls of functions and of methods: all that is edited of a module's call is edited there."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits

LINEAR = nn.Linear(4, 4)


def doubled(x: Tensor, scale: Tensor) -> Tensor:
    return LINEAR(x) * scale + 1


class Model(nn.Module):
    """A model with a method that is no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.linear(x) + 1


SITES = ["input:x", "input:scale", "/mul#0", "LINEAR", "LINEAR/linear#0", "param:LINEAR.bias"]


@pytest.mark.parametrize("keep", [(), "all", "none", ["/add#0"]])
@pytest.mark.parametrize("site", SITES)
def test_what_a_function_is_given_and_makes_is_edited(site: str, keep: Any) -> None:
    x, scale = torch.randn(2, 4), torch.tensor(2.0)
    run = fmr.run(doubled, x, scale, keep=keep, edits={site: edits.Zero()})
    with torch.no_grad():
        expected = {
            "input:x": LINEAR.bias * 2 + 1,
            "param:LINEAR.bias": (LINEAR(x) - LINEAR.bias) * 2 + 1,
        }.get(site, torch.ones(2, 4))
    torch.testing.assert_close(run.output, expected.expand(2, 4))
    assert run.receipts[site].fired == 1
    assert len(run.passes) == 1


@pytest.mark.parametrize("keep", [(), "all"])
def test_a_method_is_edited_where_its_calls_are_the_passes(keep: Any) -> None:
    model, x = Model(), torch.randn(2, 4)
    with fmr.track(model, method="encode", keep=keep, edits={"input:x": edits.Zero(), "/add#0": edits.Scale(2.0)}) as run:
        out = model.encode(x)
        model(x)
    torch.testing.assert_close(out, (model.linear.bias + 1).mul(2).expand(2, 4))
    assert run.receipts["/add#0"].fired == 1
    assert fmr.run(model, x, method="encode", keep=keep, edits={"/add#0": edits.Zero()}).output.abs().sum() == 0
    assert "encode" not in vars(model)


def test_blocks_in_one_another_know_the_inputs_of_a_method_by_name() -> None:
    model, x = Model(), torch.randn(2, 4)
    with fmr.track(model, method="encode", keep=["input:x"]) as outer, fmr.track(model, method="encode") as inner:
        model.encode(x)
    assert torch.equal(outer["input:x"], x)
    assert torch.equal(inner["input:x"], x)


def test_an_argument_that_is_called_like_one_of_the_run_is_bound_before() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, grad: Tensor) -> Tensor:
            return x * grad

    x = torch.ones(2)
    for name in ("grad", "stop", "optional"):
        with pytest.raises(fmr.TrackError, match=rf"^{name} is Tensor, expected True or False. An argument of the model"):
            fmr.run(Named(), x, **{name: x})  # type: ignore[arg-type]
    assert torch.equal(fmr.run(partial(Named(), grad=x * 3), x).output, x * 3)
