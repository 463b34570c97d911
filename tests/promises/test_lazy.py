"""Lazy layers: the first call leaves the graph and the values of every later one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.small import Fn

LAZY = [name for name in dir(nn) if name.startswith("Lazy")]


def lazy(name: str) -> tuple[nn.Module, Tensor]:
    """A model with one lazy layer of this class, and an input for it."""
    dimensions = int(name[-2]) if name[-2].isdigit() else 0
    settings = (3,) if name == "LazyLinear" else (4, 2) if "Conv" in name else ()
    shape = (3, 3) + (5,) * dimensions if dimensions else (3, 4)
    return nn.Sequential(getattr(nn, name)(*settings), nn.ReLU()), torch.randn(shape)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
class TestLazy:
    @pytest.mark.parametrize("keep", ["all", "none", "*", lambda node: True])
    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("name", LAZY)
    def test_the_first_call_has_the_graph_of_the_second(self, name: str, grad: bool, keep: Any) -> None:
        model, x = lazy(name)
        first = fmr.run(model, x, keep=keep, grad=grad).graph
        first.lint()
        second = fmr.run(model, x, keep=keep, grad=grad).graph
        assert first.fingerprint == second.fingerprint
        assert [node.shape for node in first] == [node.shape for node in second]
        assert {str(node.id) for node in first.sources} >= {f"param:{name}" for name, _ in model.named_parameters()}

    @pytest.mark.parametrize("keep", ["all", "*", lambda node: True])
    def test_statistics_that_the_first_call_moves_are_kept_as_they_were_before(self, keep: Any) -> None:
        model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
        run = fmr.run(model, torch.randn(4, 2) + 5, keep=keep)
        assert torch.equal(run["buffer:1.running_mean"], torch.zeros(3))
        assert not torch.equal(model[1].running_mean, torch.zeros(3))
        assert torch.equal(run["param:0.weight"], model[0].weight)

    @pytest.mark.parametrize("keep", ["all", "none", "*", ["a/linear#0"]])
    def test_a_lazy_layer_that_is_never_called_is_not_there(self, keep: Any) -> None:
        model = Fn(lambda self, x: self.a(x), a=nn.Linear(4, 4), b=nn.LazyLinear(3))
        run = fmr.run(model, torch.randn(2, 4), keep=keep)
        if isinstance(keep, str):
            assert [str(node.id) for node in run.graph.sources] == ["input:args.0", "param:a.weight", "param:a.bias"]

    def test_ids_of_a_later_call_serve_the_first(self) -> None:
        model, x = lazy("LazyConv2d")
        run = fmr.run(model, x, keep=["0/conv2d#0"])
        assert torch.equal(run["0/conv2d#0"], model[0](x))

    def test_gradients_of_a_parameter_that_was_lazy(self) -> None:
        model, x = lazy("LazyLinear")
        with fmr.track(model, grad=True) as run:
            model(x).sum().backward()
        assert run.grad["param:0.weight"] is model[0].weight.grad
        assert torch.equal(run.grad["0/linear#0"], (model[0](x) > 0).float())

    def test_random_numbers_and_weights_are_those_of_a_plain_first_call(self) -> None:
        found = []
        for watched in (False, True):
            torch.manual_seed(0)
            model, x = lazy("LazyLinear")
            if watched:
                fmr.run(model, x)
            else:
                model(x)
            found.append((model[0].weight, torch.rand(1)))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
