"""A way gives the value at its end again, from other values at its starts."""

import pytest
import torch

import fmr
from analyzers import AnalyzerError
from analyzers.circuits.ways import Way, sources
from tests.small import Fn


def recorded() -> tuple[fmr.Run, torch.Tensor]:
    weight = torch.nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    model = Fn(lambda self, x, y: (x @ self.weight).relu() * y + (x * 2).sum(), weight=weight)
    with torch.no_grad():
        return fmr.run(model, torch.ones(2, 4), torch.full((2, 4), 3.0)), weight.detach()


def test_a_way_runs_on_other_values_and_reads_the_rest_as_recorded() -> None:
    run, weight = recorded()
    way = Way(run.graph, ["input:args.0"], "/add#0")
    other = torch.arange(8.0).view(2, 4)
    assert way.beside == {"param:weight", "input:args.1"}
    with torch.no_grad():
        assert way({"input:args.0": other}, run.last).equal((other @ weight).relu() * 3 + (other * 2).sum())
        assert way({"input:args.0": torch.ones(2, 4)}, run.last).equal(run["/add#0"])


def test_a_way_from_several_values_does_not_go_above_them() -> None:
    run, _ = recorded()
    way = Way(run.graph, ["/relu#0", "/sum#0"], "/add#0")
    assert [step.first.op for step in way.steps] == ["mul", "add"]
    assert way({"/relu#0": torch.ones(2, 4), "/sum#0": torch.tensor(5.0)}, run.last).equal(torch.full((2, 4), 8.0))
    assert sources(run.graph, "/add#0", {"/relu#0", "input:args.0", "/add#0"}) == {"/relu#0", "input:args.0"}


def test_a_value_that_does_not_follow_is_told() -> None:
    run, _ = recorded()
    with pytest.raises(AnalyzerError, match=r"/relu#0 does not follow from input:args.1 in Fn."):
        Way(run.graph, ["input:args.1"], "/relu#0")
    assert not Way(run.graph, ["/relu#0"], "/relu#0").steps
