"""The gradient of an ID is that of its value: what a twin without writes, Functions or checkpoints gives, in every mode."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fmr
from tests.small import Fn

SCALE = torch.linspace(-1.0, 2.0, 6)


class Doubled(torch.autograd.Function):
    """Doubles its input in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Mixed(torch.autograd.Function):
    """The same by two writes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.mul_(4)
        return x.div_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + x * s * (1 - s))


class Through(torch.autograd.Function):
    """Rounds; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Two(torch.autograd.Function):
    """Two outputs, made where no op shows them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C.DisableTorchFunction():
            return x * 2, x * 3

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return 2 * one + 3 * other


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Case(NamedTuple):
    """A forward on x, and a twin that gives the same value of `name` and the result, out of place and of plain ops."""

    name: str
    forward: Callable[[Tensor], Tensor]
    twin: Callable[[Tensor], tuple[Tensor, Tensor]]


def then(value: Tensor, read: Callable[[Tensor], Tensor] = lambda value: value) -> tuple[Tensor, Tensor]:
    return value, read(value)


def _two(x: Tensor) -> Tensor:
    one, other = Two.apply(x * 1)
    return one.sin() + other.cos() * one


def _inside_a_module(x: Tensor) -> Tensor:
    return nn.ReLU(inplace=True)((x * 1).view(-1, 2, 3)).flatten(1)


def _read_before_it_is_written(x: Tensor) -> Tensor:
    view = (x * 1).view(-1, 2, 3)
    before = view * 3
    return (view.mul_(SCALE.view(2, 3)) * before).flatten(1)


def _written_twice(x: Tensor) -> Tensor:
    view = (x * 1).t()
    view.mul_(3).sigmoid_()
    return view.t()


def _view_of_a_view(x: Tensor) -> Tensor:
    whole = x * 1
    view = whole.view(-1, 2, 3)
    kept = view * 3
    view[:, 0].mul_(SCALE[:3])
    return whole + kept.flatten(1)


def _disjoint(x: Tensor) -> Tensor:
    whole = (x * 1).view(2, -1)
    one, other = whole[0], whole[1]
    one *= 3
    return other.sin() * one


def _slice_written(x: Tensor) -> Tensor:
    whole = x * 1
    whole[:, :2].mul_(2.0)
    return whole * SCALE


def _slice_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.cat([(x * 1)[:, :2] * 2, (x * 1)[:, 2:]], 1)
    return value, value * SCALE


def _part_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    view = (x * 1).view(-1, 2, 3)
    written = torch.stack([view[:, 0] * SCALE[:3], (x * 1).view(-1, 2, 3)[:, 1]], 1)
    return view, written.flatten(1) + (view * 3).flatten(1)


def _disjoint_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    one, other = (x * 1).view(2, -1).unbind()
    return other, other.sin() * (one * 3)


def _masked(x: Tensor) -> Tensor:
    view = (x * 1).unsqueeze(1)
    view.masked_fill_(view > 0.3, 2.0)
    return (view * SCALE).squeeze(1)


def _masked_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    view = (x * 1).unsqueeze(1)
    return view, (view.masked_fill(view > 0.3, 2.0) * SCALE).squeeze(1)


def _twice_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    value = (x * 1).t() * 3
    return value, value.sigmoid().t()


def _before_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    view = (x * 1).view(-1, 2, 3)
    return view, (view * SCALE.view(2, 3) * (view * 3)).flatten(1)


CASES = {
    "in-place Function": Case("/mul#1", lambda x: Doubled.apply(x * 1) ** 2, lambda x: then(x * 2, lambda y: y**2)),
    "its input": Case("/mul#0", lambda x: Doubled.apply(x * 1) ** 2, lambda x: then(x * 1, lambda y: (2 * y) ** 2)),
    "in-place Function of two writes": Case("/div#0", lambda x: Mixed.apply(x * 1).sin(), lambda x: then(x * 2, torch.sin)),
    "in-place Function, then a write": Case(
        "/mul#1", lambda x: Doubled.apply(x * 1).sin_(), lambda x: then(x * 2, torch.sin)
    ),
    "in-place Function on a view": Case(
        "/mul#1", lambda x: Doubled.apply((x * 1).t()).t(), lambda x: then((x * 2).t(), Tensor.t)
    ),
    "the view before it": Case(
        "/t#0", lambda x: Doubled.apply((x * 1).t()).t(), lambda x: then((x * 1).t(), lambda y: (2 * y).t())
    ),
    "in-place Function returned": Case("/mul#1", lambda x: Doubled.apply(x * 1), lambda x: then(x * 2)),
    "Function": Case("/mul#1", lambda x: Swish.apply(x * 1).tanh(), lambda x: then(swish(x), torch.tanh)),
    "straight through": Case(
        "/round#0", lambda x: Through.apply(x * 1).sin(), lambda x: then(x.round() + x - x.detach(), torch.sin)
    ),
    "unseen Function": Case("/opaque#0", _two, lambda x: then(x * 2, lambda y: y.sin() + (x * 3).cos() * y)),
    "scripted": Case("/opaque#0", lambda x: scripted(x * 1).tanh(), lambda x: then(swish(x), torch.tanh)),
    "scripted, then a write": Case("/opaque#0", lambda x: scripted(x * 1).tanh_(), lambda x: then(swish(x), torch.tanh)),
    "vmapped": Case("/opaque#0", lambda x: torch.vmap(torch.sin)(x * 1).tanh(), lambda x: then(x.sin(), torch.tanh)),
    "reentrant checkpoint": Case(
        "/sigmoid#0",
        lambda x: checkpoint(lambda y: y.sin().sigmoid(), x * 1, use_reentrant=True).tanh(),
        lambda x: then(x.sin().sigmoid(), torch.tanh),
    ),
    "checkpoint": Case(
        "/sin#0",
        lambda x: checkpoint(lambda y: y.sin().sigmoid(), x * 1, use_reentrant=False).tanh(),
        lambda x: then(x.sin(), lambda y: y.sigmoid().tanh()),
    ),
    "view": Case(
        "/view#0",
        lambda x: (x * 1).view(-1, 2, 3).relu_().flatten(1),
        lambda x: then((x * 1).view(-1, 2, 3), lambda y: y.relu().flatten(1)),
    ),
    "view written by a module": Case(
        "/view#0", _inside_a_module, lambda x: then((x * 1).view(-1, 2, 3), lambda y: y.relu().flatten(1))
    ),
    "view read before it is written": Case("/view#0", _read_before_it_is_written, _before_twin),
    "view written twice": Case("/mul#1", _written_twice, _twice_twin),
    "view of which a part is written": Case("/view#0", _view_of_a_view, _part_twin),
    "view beside one that is written": Case("/getitem#1", _disjoint, _disjoint_twin),
    "masked view": Case("/unsqueeze#0", _masked, _masked_twin),
    "alias": Case("/alias#0", _slice_written, _slice_twin),
}


def _loss(out: Tensor, weight: Tensor) -> Tensor:
    return (out.flatten() * weight.flatten()[: out.numel()]).sum()


@pytest.mark.parametrize("mode", ["all", "*", "id"])
@pytest.mark.parametrize("name", CASES)
def test_a_gradient_is_that_of_the_twin(name: str, mode: str) -> None:
    case, x, weight = CASES[name], torch.linspace(-1, 1, 12).view(2, 6), torch.linspace(1, 2, 12).view(2, 6)
    model, keep = Fn(lambda self, x: case.forward(x)), [case.name] if mode == "id" else mode
    given = x.clone().requires_grad_()
    value, out = case.twin(given)
    truth, above = torch.autograd.grad(_loss(out, weight), [value, given])
    own = x.clone().requires_grad_()
    with fmr.track(model, keep=keep, grad=True) as run:
        _loss(model(own), weight).backward()
    torch.testing.assert_close(run[case.name], value, check_stride=False)
    torch.testing.assert_close(run.grad[case.name], truth)
    torch.testing.assert_close(own.grad, above)


def test_a_module_with_a_full_backward_hook_has_gradients_at_its_output_and_inside() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(3, 4)
    model[1].register_full_backward_hook(lambda *_: None)
    with fmr.track(model, grad=True) as run:
        model(x).sum().backward()
    truth = model[2].weight.expand(3, 4)
    output = run.graph.module("1").output.id
    assert output != "1/tanh#0"
    torch.testing.assert_close(run.grad[output], truth)
    torch.testing.assert_close(run.grad["1/tanh#0"], truth)


@pytest.mark.parametrize("keep", ["all", "*relu*", ["1/relu#0"]])
def test_autograd_reaches_a_kept_value_in_every_mode(keep: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(3, 4)
    with fmr.track(model, grad=True, keep=keep) as run:
        y = model(x).sum()
    (grad,) = torch.autograd.grad(y, run["1/relu#0"], retain_graph=True)
    torch.testing.assert_close(grad, model[2].weight.expand(3, 8))
    assert torch.equal(run.grad["1/relu#0"], grad)
    y.backward()
    assert torch.equal(run.grad["1/relu#0"], grad * 2)


def test_a_planned_value_that_is_overwritten_later_is_the_copy() -> None:
    model, x = Fn(lambda self, x: (x * 2).relu_()), torch.tensor([-1.0, 1.0], requires_grad=True)
    with fmr.track(model, grad=True, keep=["/mul#0"]) as run:
        model(x).sum().backward()
    assert run["/mul#0"].tolist() == [-2.0, 2.0]
    assert run.grad["/mul#0"].tolist() == [0.0, 1.0]


def test_a_planned_parameter_is_the_parameter_until_it_is_trained() -> None:
    model, x = nn.Linear(2, 2), torch.randn(3, 2)
    with fmr.track(model, grad=True, keep=["param:weight"]) as run:
        model(x).sum().backward()
    before = model.weight.detach().clone()
    assert run["param:weight"] is model.weight
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(run["param:weight"], before)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("keep", ["all", "1", ["1"], "1*"])
def test_what_a_module_returned_has_a_gradient_also_where_it_is_a_view_overwritten_later(keep: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.ReLU(inplace=True)), torch.randn(3, 4)
    with fmr.track(model, keep=keep, grad=True) as run:
        (model(x) * SCALE.view(2, 3)).sum().backward()
    given = model[0](x).view(3, 2, 3)
    (truth,) = torch.autograd.grad((given.relu() * SCALE.view(2, 3)).sum(), given)
    assert torch.equal(run["1"], given)
    assert torch.equal(run.grad["1"], truth)


# ---- reasons


class Reasons(nn.Module):
    """Values that have a gradient, and one for each reason to have none."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.line(x)
        picked = hidden.argmax(-1)
        constant = x.exp()
        apart = hidden.detach()
        with torch.no_grad():
            still = hidden.sigmoid()
        unused = hidden.sin()
        fused = nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
        return fused * constant + apart + still + (0 * picked[..., None]) + unused.detach()


REASONS = {
    "/argmax#0": r"it holds int64, which autograd does not differentiate",
    "/exp#0": r"it requires none: nothing that it was computed from does",
    "/detach#0": r"the model detached it from the history\. Expected a value before or beside it",
    "/sigmoid#0": r"it was computed while no history was recorded: under torch\.no_grad",
    "/sin#0": r"backward\(\) ran and did not come to it\. Expected a loss that depends on it",
    "/scaled_dot_product_attention#0/softmax#0": r"it lies inside /scaled_dot_product_attention#0, a kernel",
}


@pytest.mark.parametrize("mode", ["all", "*", "ids"])
@pytest.mark.parametrize("name", REASONS)
def test_a_missing_gradient_has_its_reason(name: str, mode: str) -> None:
    model, x = Reasons(), torch.randn(1, 1, 3, 4)
    with fmr.track(model, keep=[*REASONS, "line/linear#0"] if mode == "ids" else mode, grad=True) as run:
        model(x).sum().backward()
    assert run.grad["line/linear#0"].shape == (1, 1, 3, 4)
    with pytest.raises(fmr.IdError, match=rf"'{name}' has no gradient: {REASONS[name]}"):
        run.grad[name]


def test_no_backward_is_a_reason_of_its_own() -> None:
    run = fmr.run(Reasons(), torch.randn(1, 1, 3, 4), grad=True)
    with pytest.raises(
        fmr.IdError, match=r"'/sin#0' has no gradient: no backward\(\) has come to any kept value of this pass"
    ):
        run.grad["/sin#0"]


def test_a_value_inside_a_function_has_no_gradient_of_another() -> None:
    model, x = Fn(lambda self, x: Mixed.apply(x * 1)), torch.ones(3, requires_grad=True)
    with fmr.track(model, grad=True) as run:
        model(x).sum().backward()
    assert run.grad["/mul#0"].tolist() == [2.0] * 3
    assert run.grad["/div#0"].tolist() == [1.0] * 3
    with pytest.raises(
        fmr.IdError, match=r"'/mul#1' has no gradient: it was computed while no history .*autograd\.Function"
    ):
        run.grad["/mul#1"]


def test_a_view_under_which_memory_changed_says_where_it_is_heard() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        whole = x * 1
        view = whole.view(3, 2)
        whole.mul_(2)
        return view.sin()

    with fmr.track(model := Fn(forward), grad=True) as run:
        model(torch.ones(6, requires_grad=True)).sum().backward()
    assert run.grad["/alias#0"].shape == (3, 2)
    with pytest.raises(fmr.IdError, match=r"'/view#0' has no gradient: its memory was .*another view.*Expected /alias#0\."):
        run.grad["/view#0"]


# ---- copies


@pytest.mark.parametrize("keep", ["all", "*relu*", ["1/relu#0"]])
@pytest.mark.parametrize("read", [False, True])
def test_a_deep_copy_has_the_values_and_gradients_and_no_history(keep: Any, read: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    with fmr.track(model, grad=True, keep=keep) as run:
        model(x).sum().backward()
    assert not read or run["1/relu#0"] is not None
    other = copy.deepcopy(run)
    assert torch.equal(other["1/relu#0"], run["1/relu#0"])
    assert torch.equal(other.grad["1/relu#0"], run.grad["1/relu#0"])
    assert torch.equal(other.output, run.output)
    assert not other["1/relu#0"].requires_grad
    assert other["1/relu#0"].data_ptr() != run["1/relu#0"].data_ptr()
    if isinstance(keep, str):
        assert other.graph.fingerprint == run.graph.fingerprint


def test_what_a_copy_lacks_it_says() -> None:
    other = copy.deepcopy(fmr.run(nn.Tanh(), torch.ones(2, requires_grad=True), grad=True))
    with pytest.raises(fmr.IdError, match=r"'/tanh#0' has no gradient: the run had none when it was saved or copied"):
        other.grad["/tanh#0"]


def test_gradients_of_an_earlier_backward_are_not_those_of_this_pass() -> None:
    model = nn.Linear(3, 3)
    model(torch.ones(3)).sum().backward()
    run = fmr.run(model, torch.ones(3), grad=True)
    assert repr(run.grad).startswith("Gradients of")
    with pytest.raises(fmr.IdError, match=r"no backward\(\) has come to any kept value of this pass\. Expected backward"):
        run.grad["/linear#0"]
    run.output.sum().backward()
    assert repr(run.grad) == f"Gradients of {len(run.grad)} values"
    assert repr(fmr.run(model, torch.ones(3)).grad) == "Gradients: the run kept no history. Track with grad=True"
