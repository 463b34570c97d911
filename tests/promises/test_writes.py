"""Whatever overwrites a value, the value that an op made stays what it was, and who reads next reads a new one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.small import Fn

X = torch.ones(2, 3)


@torch.library.custom_op("fmr_tests::bump", mutates_args=("t",))
def bump(t: Tensor) -> None:
    t.add_(1)


@torch.library.custom_op("fmr_tests::spill", mutates_args=("first", "second"))
def spill(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    first.add_(x.sum())
    second.add_(1)
    return x + 1


def statistics(function: Callable[..., Any], *rest: Any) -> Callable[[Tensor], Any]:
    return lambda y: function(torch.randn(8, 3, *rest), None, None, y[0], y[1], True, 0.1, 1e-5)


def with_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*args, False)


def adamw(y: Tensor) -> None:
    one = torch.ones(1)
    more = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-5, "amsgrad": False, "maximize": False}
    torch._fused_adamw_([y], [X.clone()], [X.clone()], [X.clone()], [], [one], **more)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "a custom op": bump,
    "a custom op by its packet": lambda y: torch.ops.fmr_tests.bump(y),
    "a custom op by its overload": lambda y: torch.ops.fmr_tests.bump.default(t=y),
    "a custom op that writes two and returns another": lambda y: spill(X, X.clone(), y),
    "an overload": lambda y: torch.ops.aten.add_.Tensor(y, X),
    "a packet": lambda y: torch.ops.aten.add_(y, X),
    "an overload with out": lambda y: torch.ops.aten.add.out(X, X * 5, out=y),
    "an overload with outs of other names": lambda y: torch.ops.aten.sort.values(-X, values=y, indices=X.long()),
    "torch.batch_norm": statistics(with_cudnn(torch.batch_norm)),
    "torch.instance_norm": statistics(with_cudnn(torch.instance_norm), 4),
    "torch.native_batch_norm": statistics(torch.native_batch_norm),
    "torch._native_batch_norm_legit": statistics(torch._native_batch_norm_legit),
    "an overload of batch_norm": statistics(with_cudnn(torch.ops.aten.batch_norm.default)),
    "batch_norm_update_stats": lambda y: torch.batch_norm_update_stats(torch.randn(8, 3), y[0], y[1], 0.1),
    "fused AdamW": adamw,
    "scaling of gradients": lambda y: torch._amp_foreach_non_finite_check_and_unscale_(
        [y], torch.zeros(1), torch.full((1,), 3.0)
    ),
    "a flag of the scaling": lambda y: torch._amp_foreach_non_finite_check_and_unscale_(
        [X * torch.inf], y.view(-1)[:1], torch.ones(1)
    ),
    "foreach by name": lambda y: torch._foreach_add_(self=[y], scalar=1.0),
    "in place by name": lambda y: torch.dropout_(input=y, p=0.999, train=True),
}


def read_by_exp(graph: fmr.Graph) -> fmr.TensorId:
    return next(node for node in graph if node.op == "exp").parents[0].id


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("keep", ["all", "none", "*", ["/mul#0", "/exp#0"]])
def test_a_value_stays_what_it_was_and_the_next_reader_reads_another(name: str, keep: Any) -> None:
    torch.manual_seed(0)
    seen: list[Tensor] = []

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        WRITES[name](y)
        seen.append(y.clone())
        return y.exp()

    run = fmr.run(Fn(forward), X, keep=keep)
    assert not seen[-1].equal(X * 2)
    if keep != "none":
        assert run["/mul#0"].equal(X * 2)
        assert run["/exp#0"].equal(seen[-1].exp())
    if isinstance(keep, str):
        read = read_by_exp(run.graph)
        assert read != "/mul#0"
        assert "/mul#0" in {node.id for node in run.graph.ancestors(read)}


@pytest.mark.parametrize("function", [torch.batch_norm, torch.instance_norm, torch.ops.aten.batch_norm.default])
def test_statistics_that_are_only_read_are_no_new_values(function: Callable[..., Any]) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        variance = x[0, :, 0] + 1
        function(x, None, None, x[0, :, 0], variance, False, 0.1, 1e-5, False)
        return variance.exp()

    assert read_by_exp(fmr.run(Fn(forward), torch.ones(2, 3, 4)).graph) == "/add#0"


@pytest.mark.parametrize("sort", [torch.sort, Tensor.sort, torch.ops.aten.sort, torch.ops.aten.sort.default])
def test_what_is_sorted_stays_as_it_is(sort: Callable[[Tensor], Any]) -> None:
    """TorchScript has a function of that name, too, which puts a list of tensors in order."""

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        most = sort(y)[0]
        return y.exp() + most

    run = fmr.run(Fn(forward), torch.randn(2, 3))
    assert read_by_exp(run.graph) == "/mul#0"
    assert all(node.op != "alias" for node in run.graph)


class Steps(nn.Module):
    """What exporting keeps in place: arithmetic, activations, slices, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lin = nn.BatchNorm1d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x * 2)
        y += 1
        y[:, 0] = 0
        z = self.lin(y)
        z.relu_().mul_(2)
        return z.exp() + y.sum()


def exported() -> nn.Module:
    torch.manual_seed(0)
    return torch.export.export(Steps(), (torch.randn(4, 3),)).module()


def test_every_value_of_an_exported_module_is_what_a_plan_reads() -> None:
    x = torch.randn(4, 3)
    run = fmr.run(exported(), x)
    names = [node.id for node in run.graph if node.op not in ("alias", "opaque")]
    assert any(node.op == "alias" for node in run.graph)
    for name in names:
        assert fmr.run(exported(), x, keep=[name])[name].equal(run[name]), name


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_the_weights_of_each_pass_are_those_that_it_ran_with(options: dict[str, bool]) -> None:
    model, seen = nn.Linear(2, 2), []
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, **options)
    with fmr.track(model) as run:
        for _ in range(3):
            seen.append(model.weight.detach().clone())
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(one["param:weight"].equal(weight) for one, weight in zip(run.passes, seen, strict=True))


STATES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "itself": lambda self, x: self.held["state"].add_(x * 2) * 1,
    "a view": lambda self, x: self.held["state"].view(-1).add_((x * 2).view(-1)) * 1,
    "out": lambda self, x: torch.add(self.held["state"], x * 2, out=self.held["state"]) * 1,
    "after a reader": lambda self, x: self.held["state"].exp() + self.held["state"].add_(x * 2),
}


@pytest.mark.parametrize("keep", ["all", "*"])
@pytest.mark.parametrize("name", STATES)
def test_a_state_that_each_pass_overwrites_is_in_each_what_it_was_before(name: str, keep: str) -> None:
    model = Fn(STATES[name])
    model.held = {"state": torch.zeros(2, 3)}
    x = torch.arange(1.0, 7.0).view(2, 3)
    with torch.no_grad(), fmr.track(model, keep=keep) as run:
        for _ in range(3):
            model(x)
    for number, one in enumerate(run.passes):
        assert one["/opaque#0"].equal(x * 2 * number)
        assert one["/add#0"].flatten().equal((x * 2 * (number + 1)).flatten()) or name == "after a reader"
