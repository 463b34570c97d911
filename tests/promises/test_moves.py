"""A node has the shape, the type and the value of its moment, whatever its tensor is given in place later."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.small import Fn


def other_data(h: Tensor) -> Tensor:
    h.data = torch.ones(5, 2, dtype=torch.float64)
    return h


def resized_by_out(h: Tensor) -> Tensor:
    out = torch.empty(0)
    torch.add(h, 1, out=out)
    return out


def between_views(h: Tensor) -> Tensor:
    flat = h.view(-1)
    h.t_()
    h.add_(1)
    return flat * 3 + h.reshape(-1)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze_": lambda h: h.unsqueeze_(0),
    "t_": lambda h: h.t_(),
    "transpose_": lambda h: h.transpose_(0, 1),
    "swapaxes_": lambda h: h.swapaxes_(0, 1),
    "squeeze_": lambda h: h.view(3, 1, 4).squeeze_(1),
    "resize_": lambda h: h.resize_(2, 2),
    "as_strided_": lambda h: h.as_strided_((2,), (1,)),
    "an overload": lambda h: torch.ops.aten.t_.default(h),
    "set_": lambda h: torch.ops.aten.set_.source_Tensor(h, torch.ones(7)),
    "data": other_data,
    "out": resized_by_out,
    "twice": lambda h: h.t_().unsqueeze_(0),
    "between views": between_views,
}


def model(move: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Fn(lambda self, x: move(self.l(x)) * 2, l=nn.Linear(4, 4))


@pytest.mark.parametrize("name", MOVES)
def test_every_node_has_the_shape_and_the_value_of_its_moment(name: str) -> None:
    x = torch.arange(12.0).view(3, 4)
    run = fmr.run(model(MOVES[name]), x)
    at_once = fmr.run(model(MOVES[name]), x, keep="*")
    assert run.graph.nodes == fmr.run(model(MOVES[name]), x, keep="none").graph.nodes == at_once.graph.nodes
    for node in run.graph:
        value = run[node]
        assert (node.shape, node.dtype) == (tuple(value.shape), value.dtype), node.id
        assert at_once[node].equal(value)
        if node.op != "alias":
            assert fmr.run(model(MOVES[name]), x, keep=[node])[node].equal(value)


@pytest.mark.parametrize("keep", ["all", "none", "*"])
def test_a_view_of_a_tensor_that_only_changed_its_shape_is_the_value_it_was(keep: str) -> None:
    graph = fmr.run(model(lambda h: (h.view(-1), h.t_())[0].exp()), torch.ones(3, 4), keep=keep).graph
    assert graph["/exp#0"].parents[0].id == "/view#0"


def test_a_weight_given_other_data_between_two_passes_has_its_own_shape_in_each() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(3, 4)
    with fmr.track(layer) as run:
        layer(x)
        layer.weight.data = torch.ones(2, 4)
        layer.bias.data = torch.ones(2)
        layer(x)
    assert [one.graph["param:weight"].shape for one in run.passes] == [(4, 4), (2, 4)]
    assert [tuple(one["/linear#0"].shape) for one in run.passes] == [(3, 4), (3, 2)]


def test_a_run_read_between_two_moves_goes_on_from_there() -> None:
    seen: list[Any] = []

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        y.t_()
        seen.append(run.graph["/t#0"].shape)
        y.unsqueeze_(0)
        return y.exp()

    module = Fn(forward)
    with fmr.track(module) as run:
        module(torch.ones(2, 3))
    assert seen == [(3, 2)]
    assert [run.graph[name].shape for name in ("/mul#0", "/t#0", "/unsqueeze#0", "/exp#0")] == [
        (2, 3), (3, 2), (1, 3, 2), (1, 3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("keep", ["all", "none", "*"])
def test_a_tensor_given_under_two_names_belongs_to_the_first(keep: str) -> None:
    module = Fn(lambda _, a, b, c: a.exp() + b.sin() + c)
    one, other = torch.ones(2), torch.ones(2)
    graph = fmr.run(module, one, other, c=one, keep=keep).graph
    assert [str(node.id) for node in graph.readers("input:args.0")] == ["/exp#0", "/add#1"]
    assert [str(node.id) for node in graph.readers("input:args.1")] == ["/sin#0"]
    assert "input:c" in graph
    assert graph.readers("input:c") == ()


def test_both_names_of_a_tensor_have_its_value_and_its_gradient() -> None:
    module, x = Fn(lambda _, a, b: (a * b).sum()), torch.tensor([3.0], requires_grad=True)
    with fmr.track(module, grad=True) as run:
        module(x, x).backward()
    assert run["input:args.0"].equal(x)
    assert run["input:args.1"].equal(x)
    assert run.grad["input:args.0"].equal(run.grad["input:args.1"])
