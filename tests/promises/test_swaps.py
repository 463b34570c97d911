"""Two tensors that become each other inside a pass: each value stays what it was, and each reader reads the right one."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import swap_tensors

import fmr
from tests.small import Fn

X = torch.arange(1.0, 9.0).view(2, 4)


def made(self: Any, x: Tensor) -> Tensor:
    a = self.inner(x).detach()
    b = x * 3
    c = a * 1
    swap_tensors(a, b)
    return a + b * 2 + c


def other_shapes(self: Any, x: Tensor) -> Tensor:
    a, b = self.inner(x).detach(), x.sum(-1, keepdim=True)
    c = a.exp()
    swap_tensors(a, b)
    b.add_(1)
    return (a * b + c).view(-1)


def weight(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.inner(x)
    swap_tensors(self.inner.weight, nn.Parameter(self.inner.weight.detach() * 2))
    return y + self.inner(x)


def given(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = x.exp()
    swap_tensors(x, y)
    return (y - x) + z


FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "made": made, "other shapes": other_shapes, "weight": weight, "given": given,
}  # fmt: skip


def model(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Fn(forward, inner=nn.Linear(4, 4))


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("name", FORWARDS)
def test_each_value_is_what_its_op_made_and_is_made_of_its_parents(name: str, history: bool) -> None:
    context = torch.enable_grad if history else torch.no_grad
    with context():
        expected = model(FORWARDS[name])(X.clone())
        graphs = []
        for keep in ("all", "*", "none"):
            with fmr.track(module := model(FORWARDS[name]), keep=keep) as run:
                out = module(X.clone())
            assert out.equal(expected)
            graphs.append(run.graph)
            if keep == "none":
                continue
            for node in run.graph:
                value = run[node.id].detach()
                assert tuple(value.shape) == node.shape
                read = [run[parent.id].detach() for parent in node.parents]
                if node.op in ("mul", "add", "sub") and len(read) == 2:
                    assert getattr(torch, node.op)(*read).equal(value), node.id
                elif node.op == "mul":
                    assert value.equal(read[0] * node.args["1"]), node.id
                elif node.op in ("linear", "exp"):
                    plain = nn.functional.linear if node.op == "linear" else torch.exp
                    assert plain(*read).equal(value), node.id
    assert graphs[0].nodes == graphs[1].nodes == graphs[2].nodes


@pytest.mark.parametrize("keep", ["all", "*", ["/mul#0"]])
def test_a_swap_between_two_passes_leaves_the_values_of_the_first(keep: Any) -> None:
    module, x = Fn(lambda self, x: x * 2), X.clone()
    with torch.no_grad(), fmr.track(module, keep=keep) as run:
        out = module(x)
        swap_tensors(out, torch.zeros(3))
        swap_tensors(x, torch.zeros(3))
        module(x)
    assert run.passes[0]["/mul#0"].equal(X * 2)
    assert run.passes[1]["/mul#0"].equal(torch.zeros(3))


@pytest.mark.parametrize("keep", ["all", "*"])
def test_a_swap_that_torch_refuses_is_refused_alike_and_changes_nothing(keep: str) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        a, b = x * 2, x * 3
        held = weakref.ref(a)
        with pytest.raises(RuntimeError, match="Cannot swap t1 because it has weakref"):
            swap_tensors(a, b)
        del held
        return a.exp()

    with torch.no_grad():
        run = fmr.run(Fn(forward), X, keep=keep)
    assert run["/mul#0"].equal(X * 2)
    assert [str(parent.id) for parent in run.graph["/exp#0"].parents] == ["/mul#0"]


@pytest.mark.parametrize("keep", ["all", "none"])
def test_after_the_block_torch_swaps_by_itself_what_the_run_does_not_refer_to(keep: str) -> None:
    code = swap_tensors.__code__
    module = model(made)
    with torch.no_grad():
        run = fmr.run(module, X, keep=keep)
    gc.collect()
    assert swap_tensors.__code__ is code
    swap_tensors(module.inner.weight, nn.Parameter(torch.zeros(4, 4)))
    assert run.graph.nodes
    assert module.inner.weight.equal(torch.zeros(4, 4))


def test_gradients_of_swapped_values_are_those_of_the_values() -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        a, b = x * 2, x * 3
        swap_tensors(a, b)
        return a * 5 + b * 7

    with fmr.track(module := Fn(forward), grad=True) as run:
        out = module(X.clone().requires_grad_())
    out.sum().backward()
    assert run.grad["/mul#0"].equal(torch.full((2, 4), 7.0))
    assert run.grad["/mul#1"].equal(torch.full((2, 4), 5.0))
