"""A write that no mode sees: a value that it changed is refused in words, and who reads after it reads a new value."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.small import Fn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

X = torch.arange(1.0, 7.0).view(2, 3)


def scripted() -> Callable[[Tensor], Any]:
    def add(y: Tensor) -> None:
        y.add_(1)

    return torch.jit.script(add)


def another_thread(y: Tensor) -> None:
    thread = threading.Thread(target=lambda: y.mul_(3))
    thread.start()
    thread.join()


def outside_of_modes(y: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        y.mul_(3)


def imaginary(y: Tensor) -> None:
    torch.view_as_complex(y.view(-1)[:4].view(2, 2)).imag = torch.zeros(2)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "a scripted function": lambda y: scripted()(y),
    "a thread": another_thread,
    "outside of modes": outside_of_modes,
    "set_": lambda y: y.set_(torch.full((2, 3), 9.0)),
    "the imaginary part": imaginary,
    "through a view": lambda y: scripted()(y[0]),
}


def model(write: Callable[[Tensor], Any], seen: list[Tensor]) -> nn.Module:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        write(y)
        seen.append(y.exp())
        return seen[-1]

    return Fn(forward)


@pytest.mark.parametrize("keep", ["all", "none", "*", ["/mul#0", "/exp#0"]])
@pytest.mark.parametrize("name", WRITES)
def test_a_value_is_refused_or_right_and_the_next_reader_reads_another(name: str, keep: Any) -> None:
    seen: list[Tensor] = []
    run = fmr.run(model(WRITES[name], seen), X, keep=keep)
    assert not seen[-1].equal((X * 2).exp())
    if isinstance(keep, str):
        (read,) = run.graph["/exp#0"].parents
        assert run.graph[read].op in ("opaque", "alias")
        assert "/mul#0" in {node.id for node in run.graph.ancestors(read)}
    if keep in ("all", "*"):
        assert run["/exp#0"].equal(seen[-1])
        assert "/mul#0" not in run
        with pytest.raises(fmr.IdError, match=r"'/mul#0' was overwritten in place later .* Read it in a run of its own"):
            run["/mul#0"]
    elif isinstance(keep, list):
        assert run["/mul#0"].equal(X * 2)


@pytest.mark.parametrize("keep", ["all", "*"])
def test_a_value_written_unseen_and_then_by_an_op_is_refused(keep: str) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        outside_of_modes(y)
        return y.add_(1)

    run = fmr.run(Fn(forward), X, keep=keep)
    assert run["/add#0"].equal(X * 6 + 1)
    with pytest.raises(fmr.IdError, match="overwritten in place"):
        run["/mul#0"]


@pytest.mark.parametrize("keep", ["all", "*"])
def test_a_weight_written_unseen_between_two_passes_is_refused_for_the_first(keep: str) -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad(), fmr.track(layer, keep=keep) as run:
        layer(X)
        outside_of_modes(layer.weight)
        layer(X)
    assert run.passes[1]["param:weight"].equal(layer.weight)
    assert run.passes[0]["param:bias"].equal(layer.bias)
    with pytest.raises(fmr.IdError, match="overwritten in place"):
        run.passes[0]["param:weight"]


def test_a_refused_value_is_refused_after_loading(tmp_path: Any) -> None:
    run = fmr.run(model(outside_of_modes, []), X)
    run.save(tmp_path / "run.fmr")
    loaded = fmr.load(tmp_path / "run.fmr")
    assert loaded["/exp#0"].equal(run["/exp#0"])
    with pytest.raises(fmr.IdError, match="overwritten in place"):
        loaded["/mul#0"]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


SEEN: dict[str, Callable[[Tensor], Any]] = {
    "an autograd function that says what it writes": Double.apply,
    "slices beside one another": lambda y: (y[0].add_(1), y[1].mul_(2)),
    "one hot": lambda y: y.copy_(nn.functional.one_hot(torch.tensor([1, 0]), 3)),
    "data": lambda y: y.data.add_(1),
    "detached": lambda y: y.detach().add_(1),
}


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("keep", ["all", "*"])
@pytest.mark.parametrize("name", SEEN)
def test_no_value_is_refused_after_writes_that_were_seen(name: str, keep: str, history: bool) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        rows = y[0], y[1]
        SEEN[name](y)
        return y.exp() + rows[0] + rows[1]

    x = X.clone().requires_grad_(history)
    with fmr.track(module := Fn(forward), keep=keep) as run:
        module(x)
    assert run["/mul#0"].equal(X * 2)
    assert all(node.id in run for node in run.graph)
    assert not run.graph.opaque


def test_a_value_of_a_plan_with_gradients_is_what_it_was() -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * torch.tensor([float("nan"), 2, 2])
        z = y + 1
        y.data.add_(1)
        return y.exp() + z

    x = X.clone().requires_grad_()
    run = fmr.run(Fn(forward), x, keep=["/mul#0", "/add#0"], grad=True)
    assert run["/mul#0"][:, 1:].equal((X * 2)[:, 1:])
    assert torch.autograd.grad(run.output[:, 1:].sum(), run["/add#0"])[0].sum() == 4


@pytest.mark.parametrize("keep", ["all", "none", "*"])
def test_inference_mode_entered_inside_or_outside_a_pass_is_tracked(keep: str) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = x * 2
            y.add_(1)
            return y.exp()

    assert "/exp#0" in fmr.run(Fn(forward), X, keep=keep).graph
    with torch.inference_mode():
        assert "/exp#0" in fmr.run(Fn(forward), X.clone(), keep=keep).graph


def inner(self: Any, x: Tensor) -> Tensor:
    y = self.inner(x).detach()
    a, rows = y * 2, y[0]
    self.write(y)
    return a + torch.cat([y, rows[None]])[:2] + self.inner(y)


def weight(self: Any, x: Tensor) -> Tensor:
    y = self.inner(x)
    self.write(self.inner.weight)
    return y + self.inner(x)


def twice(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    a = y.exp()
    self.write(y)
    b = y.exp()
    self.write(x)
    y.add_(1)
    return a + b + torch.where(y > 0, y, other=x)


@pytest.mark.parametrize("forward", [inner, weight, twice])
@pytest.mark.parametrize("name", [name for name in WRITES if name != "set_"])
def test_every_keep_dates_a_write_between_what_was_read_before_and_after(name: str, forward: Callable[..., Tensor]) -> None:
    graphs = []
    for keep in ("all", "*", "none"):
        torch.manual_seed(0)
        module = Fn(forward, inner=nn.Linear(3, 3).requires_grad_(False))
        module.write = WRITES[name]
        with torch.no_grad():
            graphs.append(fmr.run(module, X.clone(), keep=keep).graph)
    for one, other in zip(graphs[0], graphs[2], strict=True):
        assert one == other
    assert graphs[0].nodes == graphs[1].nodes == graphs[2].nodes
    assert graphs[0].opaque or any(node.op == "alias" for node in graphs[0])
    before = graphs[0].nodes[0].id if forward is weight else "/mul#0"
    assert not any(graphs[0][ancestor].op == "opaque" for ancestor in graphs[0].ancestors(before))
