"""The completeness census: a witness below the mode finds what the mode could not see."""

import torch
from torch import Tensor, nn

import fmr
from tests.models import build


def test_a_graph_of_plain_ops_accounts_for_every_kernel() -> None:
    model, args, kwargs = build("gpt2")
    census = fmr.census(model, *args, **kwargs)
    assert census.complete
    assert census.kernels > len(fmr.run(model, *args, keep="none", **kwargs).graph.scopes)
    assert repr(census) == f"Census: {census.kernels} kernels, all inside recorded ops"


class Hidden(nn.Module):
    """One kernel that never meets the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Unseen()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


class Unseen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return x * 2


def test_a_kernel_outside_every_op_is_named_with_its_module() -> None:
    census = fmr.census(Hidden(), torch.ones(2))
    assert not census.complete
    assert dict(census.unseen) == {("inner", "aten.mul.Tensor"): 1}
    assert "inner: aten.mul.Tensor x 1" in repr(census)
    run = fmr.run(Hidden(), torch.ones(2))
    assert [node.id for node in run.graph.opaque] == ["inner/opaque#0"]
    assert run.graph.opaque[0].parents == ("input:x",)
