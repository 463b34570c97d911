"""Operations that read a shape alone share nothing, and what is cut off from gradients is followed all the same."""

import pytest
import torch
from torch import Tensor, nn

from analyzers import AnalyzerError, InputAttribution
from tests.small import Fn

SHAPES = {
    "zeros_like": lambda x: torch.zeros_like(x) + x * x,
    "ones_like": lambda x: torch.ones_like(x) * x.tanh(),
    "new_zeros": lambda x: x.new_zeros(x.shape) + x.relu(),
    "full_like": lambda x: torch.full_like(x, 2.0) * x.sigmoid(),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_reads_a_shape_shares_nothing(name: str) -> None:
    made = SHAPES[name]
    x = torch.tensor([[0.5, -1.0, 2.0]])
    found = InputAttribution(Fn(lambda self, x: made(x).sum(-1, keepdim=True)).eval()).run({"x": x}, 0, "deeplift")
    zero = torch.zeros_like(x)
    assert torch.allclose(found.values, made(x) - made(zero), atol=1e-6)
    assert found.complete


def test_a_detached_maximum_is_followed_as_what_it_is() -> None:
    def stable(self: nn.Module, x: Tensor) -> Tensor:
        powers = (x - x.max(-1, keepdim=True).values.detach()).exp()
        return powers / powers.sum(-1, keepdim=True)

    x = torch.tensor([[0.5, -1.0, 2.0]])
    found = InputAttribution(Fn(stable).eval()).run({"x": x}, 2, "deeplift")
    assert found.complete
    assert found.gap[0] < 1e-6


def test_as_many_baselines_as_examples_are_refused() -> None:
    model, (x, base) = nn.Linear(4, 3).eval(), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AnalyzerError, match=r"baseline has 3 rows, and so many are the examples.*one example at a time"):
        InputAttribution(model).run(x, 0, "deeplift", baseline=base)
    one = InputAttribution(model).run(x[:1], 0, "deeplift", baseline=base)
    assert torch.allclose(one.values, (x[:1] - base.mean(0)) * model.weight[0], atol=1e-6)
