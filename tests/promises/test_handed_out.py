"""Memory handed out of torch's sight: what an op made stays what it was, and who reads after a write reads a new value."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.small import Fn

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

X = torch.arange(1.0, 7.0).view(2, 3)


def through_the_pointer(y: Tensor) -> None:
    (ctypes.c_float * y.numel()).from_address(y.data_ptr())[0] = 7.0


def through_a_view(y: Tensor) -> None:
    y[0].numpy()[:] = 5


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda y: y.numpy().fill(3),
    "an array of it": lambda y: np.asarray(y).fill(3),
    "dlpack": lambda y: torch.from_dlpack(y).numpy().fill(3),
    "the pointer": through_the_pointer,
    "a view": through_a_view,
    "the storage": lambda y: y.untyped_storage().fill_(3),
    "a byte of the storage": lambda y: y.untyped_storage().__setitem__(2, 1),
    "the storage's pointer": lambda y: ctypes.memset(y.untyped_storage().data_ptr(), 1, 8),
    "the typed storage": lambda y: y.storage().untyped().fill_(3),
    "the storage of a view": lambda y: y[0].untyped_storage().fill_(3),
    "a capsule": lambda y: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(y)).zero_(),
    "a capsule of C": lambda y: torch.from_dlpack(torch._C._to_dlpack(y)).zero_(),
    "detached": lambda y: y.detach().numpy().fill(3),
}


def parents(graph: fmr.Graph, op: str) -> list[str]:
    return [str(parent.id) for node in graph if node.op == op for parent in node.parents]


@pytest.mark.parametrize("keep", ["all", "none", "*", ["/mul#0", "/exp#0"]])
@pytest.mark.parametrize("name", HOLDS)
def test_a_value_stays_what_it_was_and_the_next_reader_reads_another(name: str, keep: Any) -> None:
    seen: list[Tensor] = []

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        before = y.sin()
        HOLDS[name](y)
        seen.append(y.exp())
        return before + seen[0]

    run = fmr.run(Fn(forward), X, keep=keep)
    assert not seen[0].equal((X * 2).exp())
    if keep != "none":
        assert run["/mul#0"].equal(X * 2)
        assert run["/exp#0"].equal(seen[0])
    if isinstance(keep, str):
        assert parents(run.graph, "sin") == ["/mul#0"]
        assert parents(run.graph, "exp") in (["/opaque#0"], ["/alias#0"], ["/opaque#1"])
        assert "/mul#0" in {node.id for node in run.graph.ancestors("/exp#0")}
    if keep in ("all", "*"):
        assert run[parents(run.graph, "exp")[0]].exp().equal(seen[0])


@pytest.mark.parametrize("keep", ["all", "*"])
def test_an_array_written_twice_makes_two_values_and_each_view_is_what_it_was(keep: str) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        array = y.numpy()
        first = y.view(-1)
        array[:] = 3
        second = y.exp()
        array[:] = 4
        return first + y.view(-1) + second.view(-1)

    run = fmr.run(Fn(forward), X, keep=keep)
    assert run["/mul#0"].equal(X * 2)
    assert run["/view#0"].equal((X * 2).view(-1))
    assert run["/exp#0"].equal(torch.full((2, 3), 3.0).exp())
    assert run["/view#1"].equal(torch.full((6,), 4.0))
    assert run.graph.nodes == fmr.run(Fn(forward), X, keep="none").graph.nodes


@pytest.mark.parametrize("keep", ["all", "none"])
def test_what_is_only_read_or_written_by_an_op_that_is_seen_makes_no_new_value(keep: str) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        array = y.numpy()
        y.add_(float(array.sum()))
        return y.exp()

    graph = fmr.run(Fn(forward), X, keep=keep).graph
    assert parents(graph, "exp") == ["/add#0"]
    assert not graph.opaque


@pytest.mark.parametrize("keep", ["all", "none"])
def test_what_a_module_wrote_into_an_array_comes_out_of_its_call(keep: str) -> None:
    def write(_: nn.Module, y: Tensor) -> Tensor:
        y.numpy()[:] = 3
        return y

    model = Fn(lambda self, x: self.inner(x * 2).exp(), inner=Fn(write))
    graph = fmr.run(model, X, keep=keep).graph
    assert parents(graph, "exp") == ["inner/opaque#0"]
    assert next(scope for scope in graph.scopes if scope.path == "inner").output == "inner/opaque#0"


@pytest.mark.parametrize("keep", ["all", "*", ["/exp#0"]])
@pytest.mark.parametrize("name", HOLDS)
def test_memory_handed_out_between_two_passes_leaves_the_values_of_the_first(name: str, keep: Any) -> None:
    model = Fn(lambda self, x: (x * 2).exp())
    x = X.clone()
    with torch.no_grad(), fmr.track(model, keep=keep) as run:
        out = model(x)
        HOLDS[name](out)
        HOLDS[name](x)
        model(x)
    assert not x.equal(X)
    assert not out.equal((X * 2).exp())
    assert run.passes[0]["/exp#0"].equal((X * 2).exp())
    assert run.passes[1]["/exp#0"].equal((x * 2).exp())
    if isinstance(keep, str):
        assert run.passes[0]["input:args.0"].equal(X)
