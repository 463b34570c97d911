"""Every spelling of an operation has one name, its operands stand in mathematical order, and its writes are known."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fmr
from fmr.ops.names import PASS, READ, WRITE, canonical, op_of
from tests.small import Fn

SPELLINGS: dict[str, list[Callable[[Tensor], Any]]] = {
    "add": [lambda x: x + 1, lambda x: 1 + x, lambda x: torch.add(x, 1), lambda x: x.add(1), lambda x: x.clone().add_(1)],
    "sub": [
        lambda x: x - 1, lambda x: 1 - x, lambda x: torch.sub(x, 1),
        lambda x: x.subtract(1), lambda x: torch.subtract(x, 1),
    ],
    "mul": [
        lambda x: x * 2, lambda x: 2 * x, lambda x: torch.multiply(x, x),
        lambda x: x.mul(2), lambda x: x.clone().mul_(2),
    ],
    "div": [
        lambda x: x / 2, lambda x: 2 / x, lambda x: torch.true_divide(x, 2), lambda x: x.divide(2),
        lambda x: torch.div(x, 2),
        lambda x: x.clone().div_(2), lambda x: operator.itruediv(x.clone(), 2),
    ],
    "floor_divide": [
        lambda x: x // 2, lambda x: 2 // x,
        lambda x: torch.floor_divide(x, 2), lambda x: operator.ifloordiv(x.clone(), 2),
    ],
    "remainder": [lambda x: x % 2, lambda x: 2 % x, lambda x: torch.remainder(x, 2)],
    "pow": [
        lambda x: x**2, lambda x: 2**x, lambda x: torch.pow(x, 2),
        lambda x: x.pow(2), lambda x: operator.ipow(x.clone(), 2),
    ],
    "matmul": [lambda x: x @ x, lambda x: torch.matmul(x, x), lambda x: x.matmul(x), lambda x: operator.matmul(x, x)],
    "neg": [lambda x: -x, lambda x: x.neg(), lambda x: torch.negative(x), lambda x: x.clone().neg_()],
    "abs": [lambda x: abs(x), lambda x: x.abs(), lambda x: torch.absolute(x)],
    "softmax": [
        lambda x: x.softmax(-1), lambda x: torch.softmax(x, -1), lambda x: F.softmax(x, -1),
        lambda x: torch.special.softmax(x, -1), lambda x: torch._safe_softmax(x, -1),
    ],
    "log_softmax": [lambda x: x.log_softmax(-1), lambda x: F.log_softmax(x, -1), lambda x: torch.special.log_softmax(x, -1)],
    "relu": [
        lambda x: x.relu(), lambda x: torch.relu(x), lambda x: F.relu(x), lambda x: x.clone().relu_(),
        lambda x: F.relu(x.clone(), inplace=True), lambda x: F.relu_(x.clone()),
    ],
    "sigmoid": [lambda x: x.sigmoid(), lambda x: torch.sigmoid(x), lambda x: F.sigmoid(x)],
    "tanh": [lambda x: x.tanh(), lambda x: torch.tanh(x), lambda x: F.tanh(x), lambda x: x.clone().tanh_()],
    "dropout": [lambda x: F.dropout(x, 0.0), lambda x: torch.dropout(x, 0.0, True)],
    "erf": [lambda x: x.erf(), lambda x: torch.special.erf(x)],
    "expit": [lambda x: torch.special.expit(x)],
    "norm": [lambda x: x.norm(), lambda x: torch.linalg.norm(x)],
    "inv": [lambda x: torch.linalg.inv(x + 3 * torch.eye(2))],
    "to": [
        lambda x: x.double(), lambda x: x.half(), lambda x: x.to(torch.int), lambda x: x.bool(),
        lambda x: x.type(torch.double), lambda x: x.long(), lambda x: x.type_as(x),
        lambda x: x.cpu(), lambda x: x.bfloat16(),
    ],
    "gt": [lambda x: x > 0, lambda x: torch.gt(x, 0), lambda x: x.greater(0), lambda x: operator.lt(0, x)],
    "le": [lambda x: x <= 0, lambda x: x.less_equal(0), lambda x: torch.le(x, 0)],
    "eq": [lambda x: x == 0, lambda x: x.eq(0)],
    "ne": [lambda x: x != 0, lambda x: x.not_equal(0)],
    "bitwise_and": [lambda x: (x > 0) & (x > 0), lambda x: torch.bitwise_and(x > 0, x > 0)],
    "bitwise_or": [lambda x: (x > 0) | (x > 0), lambda x: True | (x > 0)],
    "bitwise_xor": [lambda x: (x > 0) ^ (x > 0)],
    "bitwise_not": [lambda x: ~(x > 0), lambda x: torch.bitwise_not(x > 0)],
    "bitwise_left_shift": [lambda x: x.int() << 1],
    "bitwise_right_shift": [lambda x: x.int() >> 1],
    "cat": [lambda x: torch.cat([x, x]), lambda x: torch.concat([x, x]), lambda x: torch.concatenate([x, x])],
    "transpose": [lambda x: x.transpose(0, 1), lambda x: torch.swapaxes(x, 0, 1), lambda x: x.swapdims(0, 1)],
    "movedim": [lambda x: x.movedim(0, 1), lambda x: torch.moveaxis(x, 0, 1)],
    "T": [lambda x: x.T],
    "mT": [lambda x: x.mT],
    "real": [lambda x: x.real],
    "data": [lambda x: x.data],
    "getitem": [lambda x: x[0], lambda x: x[:, None], lambda x: x[..., -1]],
    "setitem": [lambda x: operator.setitem(x.clone(), 0, 1.0)],
    "unbind": [lambda x: list(x), lambda x: x.unbind(0), lambda x: tuple(x)],
    "linear": [lambda x: F.linear(x, x)],
    "einsum": [lambda x: torch.einsum("ij,jk->ik", x, x)],
}  # fmt: skip


def last_op(function: Callable[[Tensor], Any]) -> tuple[fmr.Graph, str]:
    graph = fmr.run(Fn(lambda self, x: function(x)), torch.eye(2) + 1, keep="none").graph
    return graph, graph.nodes[-1].op


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_has_one_name(name: str) -> None:
    assert [last_op(function)[1] for function in SPELLINGS[name]] == [name] * len(SPELLINGS[name])


# `3 + x` and `3 * x` arrive from torch as `x.add(3)` and `x.mul(3)`, which says the same.
REFLECTED: dict[str, Callable[[Any, Any], Any]] = {
    "sub": operator.sub,
    "div": operator.truediv,
    "floor_divide": operator.floordiv,
    "remainder": operator.mod,
    "pow": operator.pow,
}


@pytest.mark.parametrize("name", REFLECTED)
def test_operands_stand_in_mathematical_order(name: str) -> None:
    straight = last_op(lambda x: REFLECTED[name](x, 3))[0].nodes[-1]
    reflected = last_op(lambda x: REFLECTED[name](3, x))[0].nodes[-1]
    assert ([p.at for p in straight.parents], dict(straight.args)) == (["0"], {"1": 3})
    assert ([p.at for p in reflected.parents], dict(reflected.args)) == (["1"], {"0": 3})


def test_a_reflected_op_of_two_tensors_is_in_order_too() -> None:
    run = fmr.run(Fn(lambda self, a, b: Tensor.__rsub__(a, b)), torch.ones(2), torch.zeros(2))
    assert run.graph["/sub#0"].parents == ("input:args.1", "input:args.0")
    assert run.output.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("__iadd__", "add"), ("add_", "add"), ("__rsub__", "sub"), ("special_expit", "expit"), ("linalg_inv", "inv"),
     ("__and__", "bitwise_and"), ("__ixor__", "bitwise_xor"), ("_foreach_add_", "foreach_add"), ("index_put_", "index_put"),
     ("add.Tensor", "add"), ("true_divide", "div"), ("__invert__", "bitwise_not"), ("__imod__", "remainder")],
)  # fmt: skip
def test_a_spelling_is_stripped_to_the_canonical_name(spelling: str, name: str) -> None:
    assert canonical(spelling) == name


@pytest.mark.parametrize(
    ("func", "kind"),
    [
        (torch.relu, READ), (Tensor.relu_, WRITE), (Tensor.size, PASS), (Tensor.item, PASS), (Tensor.__setitem__, WRITE),
        (Tensor.shape.__get__, PASS), (Tensor.T.__get__, READ), (Tensor.grad.__get__, READ), (Tensor.is_contiguous, PASS),
        (Tensor.__bool__, PASS), (F.relu, WRITE), (F.batch_norm, WRITE), (F.gelu, READ), (torch.einsum, READ),
        (Tensor.__iadd__, WRITE), (Tensor.__add__, READ), (Tensor.__len__, PASS), (Tensor.__index__, PASS),
        (torch.nn.init.normal_, WRITE),
    ],
)  # fmt: skip
def test_what_the_tracker_does_with_a_function(func: Callable[..., Any], kind: int) -> None:
    assert op_of(func).kind == kind
    assert op_of(func) is op_of(func)


def written(func: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Tensor]:
    writes = op_of(func).writes
    return writes(args, kwargs) if writes else []


def test_what_a_call_overwrites() -> None:
    x, mean, var = torch.ones(2, 3), torch.zeros(3), torch.ones(3)
    for call in (
        written(Tensor.add_, x, 1), written(F.relu, x, True), written(F.relu, x, inplace=True),
        written(F.relu, input=x, inplace=True),
        written(Tensor.__setitem__, x, 0, 1), written(torch.relu_, x), written(Tensor.__imul__, x, 2),
        written(Tensor.copy_, x, x),
        written(F.dropout, x, 0.5, True, True), written(torch.nn.init.zeros_, tensor=x),
        written(F.embedding, mean, x, max_norm=1.0),
    ):  # fmt: skip
        assert len(call) == 1
        assert call[0] is x
    assert [id(t) for t in written(F.batch_norm, x, mean, var, training=True)] == [id(mean), id(var)]
    assert [id(t) for t in written(F.instance_norm, x, mean, var)] == [id(mean), id(var)]
    assert not written(F.instance_norm, x, mean, var, use_input_stats=False)
    assert [id(t) for t in written(torch._foreach_add_, [mean, var], 1)] == [id(mean), id(var)]
    for call in (
        written(F.relu, x),
        written(F.relu, x, False),
        written(F.batch_norm, x, mean, var),
        written(torch.add, x, x),
    ):
        assert call == []


def test_questions_about_a_tensor_are_no_ops() -> None:
    def ask(self: Any, x: Tensor) -> Tensor:
        assert (x.shape, x.dim(), x.size(0), x.device.type, x.dtype) == ((2, 2), 2, 2, "cpu", torch.float32)
        assert x.requires_grad is False
        assert bool(x.numel() == 4 and x.is_contiguous() and x.stride() and x.element_size())
        assert float(x.sum()) == len(x.tolist()) * 3
        return x * 1

    graph = fmr.run(Fn(ask), torch.eye(2) + 1).graph
    assert [str(node.id) for node in graph.nodes] == ["input:args.0", "/sum#0", "/mul#0"]
