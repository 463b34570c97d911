"""Dominators: known answers on small graphs, and what carries data."""

import torch
from torch import Tensor, nn

import fmr
from fmr.ids import TensorId
from fmr.structure.streams.dominators import Flow


class Diamonds(nn.Module):
    """Two diamonds in a row; a mask goes past both of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.a(x)
        return (x.sin() * x.cos() + self.b(x)) * mask.to(x.dtype)[..., None]


def test_every_path_runs_through_the_dominators() -> None:
    run = fmr.run(Diamonds(), torch.arange(4)[None], torch.ones(1, 4, dtype=torch.long))
    flow = Flow(run.graph)
    nearest = {str(name): higher and str(higher) for name, higher in flow.higher.items()}
    assert nearest == {
        "table/embedding#0": None,
        "a/linear#0": "table/embedding#0",
        "/add#0": "table/embedding#0",
        "/sin#0": "/add#0",
        "/cos#0": "/add#0",
        "/mul#0": "/add#0",
        "b/linear#0": "/add#0",
        "/add#1": "/add#0",
        "/mul#1": "/add#1",
    }
    last = TensorId("/mul#1")
    assert flow.dominates(TensorId("table/embedding#0"), last)
    assert flow.dominates(last, last)
    assert not flow.dominates(TensorId("/sin#0"), last)
    assert not flow.dominates(last, TensorId("/add#0"))


def test_masks_and_parameters_carry_no_data() -> None:
    run = fmr.run(Diamonds(), torch.arange(4)[None], torch.ones(1, 4, dtype=torch.long))
    flow = Flow(run.graph)
    for name in ("/to#0", "param:a.weight", "input:ids"):
        assert TensorId(name) not in flow


def test_two_inputs_have_no_common_dominator() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x + y).exp()

    flow = Flow(fmr.run(Sum(), torch.ones(2), torch.ones(2)).graph)
    assert flow.higher[TensorId("/add#0")] is None
    assert flow.dominates(TensorId("/add#0"), TensorId("/exp#0"))
