"""States laid one on another: weighed, they are summed up over depth; summed up plainly, they are added."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.structure.streams.over_depth import over_depth
from tests.small import Fn


def deep(read: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, list[str]]:
    """The sums over depth of a model that reads three states, each made of the one before."""

    def forward(module: nn.Module, x: Tensor) -> Tensor:
        x = x.cos()
        first = module.a(x)
        return read(module, torch.stack([x, first, module.b(first)]))

    model = Fn(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), rates=nn.Parameter(torch.rand(3, 1, 1)))
    graph = fmr.run(model, torch.randn(2, 4)).graph
    return {str(name): list(states) for name, states in over_depth(graph).items()}


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda module, states: (states * module.rates).sum(0), "/sum#0"),
        (lambda module, states: (states * module.rates).mean(0), "/mean#0"),
        (lambda module, states: torch.einsum("sbu,sxy->bu", states, module.rates), "/einsum#0"),
    ],
)
def test_states_that_are_weighed_are_summed_up_over_depth(read: Callable[[nn.Module, Tensor], Tensor], name: str) -> None:
    assert deep(read) == {name: ["/cos#0", "a/linear#0", "b/linear#0"]}


@pytest.mark.parametrize(
    "read",
    [
        lambda module, states: states.sum(0),
        lambda module, states: states.contiguous().view(3, 2, 4).sum(0),
        lambda module, states: (states * module.rates).sum(1),
        lambda module, states: (states * module.rates).sum((0, 1)),
    ],
)
def test_a_plain_sum_is_an_add_and_a_sum_over_something_else_is_not_over_depth(
    read: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    assert deep(read) == {}
