"""The rules of the normal form, each by a graph before it and the values after it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model

import fmr
from fmr.structure.normal.form import Form, form_of
from fmr.structure.normal.value import KINDS, Value
from tests.small import Fn

X = (2, 3, 4)
Spelling = Callable[[nn.Module, Tensor], Tensor]


def form(function: Spelling, *shape: int) -> Form:
    """The form of `function(module, x)`, whose module has a matrix w, a vector v and a token t as large as x."""
    torch.manual_seed(0)
    made = {"w": nn.Parameter(torch.randn(4, 4)), "v": nn.Parameter(torch.randn(4)), "t": nn.Parameter(torch.randn(3, 4))}
    return form_of(fmr.run(Fn(function, **made), torch.randn(shape or X)).graph.unfused)


def last(function: Spelling, *shape: int) -> Value:
    """What the last op of a function is."""
    made = form(function, *shape)
    return made[made.graph.nodes[-1].id]


def exps(x: Tensor) -> Tensor:
    return torch.exp(x - x.max(-1, keepdim=True).values)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


SOFTMAXES: dict[str, Spelling] = {
    "one op": lambda m, x: x.softmax(-1),
    "negated": lambda m, x: F.softmin(x, -1),
    "exponentials over their sum": lambda m, x: _over(x.exp()),
    "times the inverse of their sum": lambda m, x: _times(x.exp()),
    "less the largest": lambda m, x: _over(exps(x)),
    "more in the sum": lambda m, x: _over(exps(x), 1.0),
    "masked": lambda m, x: _over(exps(x) * torch.ones(3, 4).tril()),
    "by logarithms": lambda m, x: x.log_softmax(-1).exp(),
    "by the logarithm of the sum": lambda m, x: (x - x.logsumexp(-1, keepdim=True)).exp(),
    "brought to one": lambda m, x: F.normalize(x.exp(), p=1.0, dim=-1),
}


def _over(e: Tensor, more: float = 0.0) -> Tensor:
    return e / (e.sum(-1, keepdim=True) + more)


def _times(e: Tensor) -> Tensor:
    return e * e.sum(-1, keepdim=True).reciprocal()


@pytest.mark.parametrize("spelling", SOFTMAXES)
def test_a_softmax_is_one_value_however_it_is_written(spelling: str) -> None:
    value = last(SOFTMAXES[spelling])
    assert (value.kind, value.dim, [one.id for one in value.inputs]) == ("softmax", -1, ["input:args.0"])


def test_a_sum_over_another_value_makes_no_softmax() -> None:
    assert last(lambda m, x: x.exp() / (x * 2).exp().sum(-1, keepdim=True)).kind != "softmax"
    assert last(lambda m, x: _over(x.relu())).kind == "norm"
    assert last(lambda m, x: x.logsumexp(-1).exp()).kind == "statistic"


def test_a_masked_softmax_reads_the_scores_themselves() -> None:
    value = last(lambda m, x: _over(x.exp() * torch.ones(3, 4).tril()))
    assert value.operands == ("input:args.0",)


NORMS: dict[str, Spelling] = {
    "one op": lambda m, x: F.layer_norm(x, (4,)),
    "by the root of squares": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "over a length": lambda m, x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6),
    "mean and deviation": lambda m, x: centred(x) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "twice centred": lambda m, x: centred(x) * torch.rsqrt(centred(x).pow(2).mean(-1, keepdim=True) + 1e-5),
    "with a gain": lambda m, x: m.v * (x / x.norm(dim=-1, keepdim=True)),
    "with one and a gain": lambda m, x: (1 + m.v) * (x / x.norm(dim=-1, keepdim=True)),
    "with gain and bias": lambda m, x: F.normalize(x, dim=-1) * m.v + m.v,
}


@pytest.mark.parametrize("spelling", NORMS)
def test_a_norm_is_one_value_however_it_is_written(spelling: str) -> None:
    value = last(NORMS[spelling])
    assert (value.kind, [one.id for one in value.inputs]) == ("norm", ["input:args.0"])


def test_a_value_over_what_is_told_of_another_is_no_norm() -> None:
    assert last(lambda m, x: x.relu() / x.norm(dim=-1, keepdim=True)).kind != "norm"


PRODUCTS: dict[str, tuple[Spelling, str]] = {
    "matmul": (lambda m, x: x @ x.mT, "product"),
    "einsum": (lambda m, x: torch.einsum("bqd,bkd->bqk", x, x * 2), "product"),
    "multiplied and summed": (lambda m, x: (x[:, :, None] * (x * 2)[:, None]).sum(-1), "product"),
    "distances": (lambda m, x: torch.cdist(x, x * 2), "product"),
    "linear": (lambda m, x: F.linear(x, m.w), "projection"),
    "linear and a bias": (lambda m, x: x @ m.w + m.v, "projection"),
    "weight first": (lambda m, x: m.w @ x.mT, "projection"),
}


@pytest.mark.parametrize("spelling", PRODUCTS)
def test_a_product_is_one_value_with_its_subscripts(spelling: str) -> None:
    function, kind = PRODUCTS[spelling]
    value = last(function)
    assert value.kind == kind
    assert value.subscripts is not None
    assert len(value.subscripts.contracted) == 1


def test_a_learned_token_is_no_bias() -> None:
    assert last(lambda m, x: x @ m.w + m.t, 3, 4).kind == "affine"


def test_a_sum_weighed_by_a_constant_is_no_product() -> None:
    assert last(lambda m, x: (x * torch.arange(4.0)).sum(-1)).kind == "statistic"


BENT: dict[str, tuple[Spelling, str]] = {
    "one op": (lambda m, x: F.gelu(x), "bend"),
    "silu by hand": (lambda m, x: x * torch.sigmoid(x), "bend"),
    "gelu by hand": (lambda m, x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x.pow(3)))), "bend"),
    "relu by hand": (lambda m, x: x * (x > 0), "bend"),
    "squared by itself": (lambda m, x: x * x, "bend"),
    "a cap": (lambda m, x: torch.tanh(x / 30) * 30, "bend"),
    "a scale and a shift": (lambda m, x: x * 2 + 1, "affine"),
    "twice itself": (lambda m, x: x + x, "affine"),
    "a mask": (lambda m, x: x.masked_fill(torch.ones(3, 4).triu().bool(), -1e9), "affine"),
}


@pytest.mark.parametrize("spelling", BENT)
def test_what_is_computed_number_by_number_is_a_function_of_one_value(spelling: str) -> None:
    function, kind = BENT[spelling]
    value = last(function)
    assert value.kind == kind
    (read,) = value.inputs
    assert read.id == "input:args.0" or (read.kind == "affine" and read.inputs[0].id == "input:args.0")


def test_two_values_gate_or_add_up() -> None:
    assert last(lambda m, x: x @ m.w * (x @ m.w.mT)).kind == "gate"
    assert last(lambda m, x: x @ m.w + x @ m.w.mT).kind == "sum"
    assert last(lambda m, x: torch.stack([x @ m.w, x @ m.w.mT]).sum(0)).kind == "sum"
    assert last(lambda m, x: torch.stack([x @ m.w, x @ m.w.mT]).sum(1)).kind == "statistic"


def test_casts_copies_and_dropout_are_folded_into_the_value_that_they_hand_on() -> None:
    made = form(lambda m, x: F.dropout((x @ m.w).double().clone().detach(), 0.1, False).contiguous() * 2)
    (scaled,) = made.of_kind("affine")
    (projection,) = scaled.inputs
    assert projection.kind == "projection"
    assert [view.op for view in projection.views] == ["to", "clone", "detach", "dropout", "contiguous"]


def test_views_of_views_are_one_move_and_what_is_laid_together_a_join() -> None:
    value = last(lambda m, x: x.view(2, 3, 2, 2).transpose(1, 2).flatten(0, 1))
    assert (value.kind, [one.id for one in value.inputs]) == ("move", ["input:args.0"])
    assert [node.op for node in value.folded] == ["view", "transpose", "flatten"]
    assert last(lambda m, x: torch.cat([x, x * 2], 1)).kind == "join"


def test_constants_and_weights_are_no_inputs() -> None:
    made = form(lambda m, x: x @ (m.w * 2).mT + torch.arange(4.0))
    assert {value.kind for value in made.values} >= {"weight", "constant", "projection", "input"}
    (projection,) = made.of_kind("projection")
    assert [one.kind for one in projection.inputs] == ["input"]
    assert made[projection.operands[1]].kind == "weight"


def test_every_value_has_a_kind_and_knows_its_users() -> None:
    made = form(lambda m, x: (x @ m.w).softmax(-1) @ x.mT)
    assert {value.kind for value in made.values} <= set(KINDS)
    for value in made.values:
        assert all(value in one.users for one in value.inputs)


def test_a_block_is_read_in_fifteen_lines() -> None:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=1)).eval()
    made = form_of(fmr.run(model, torch.arange(6)[None]).graph.unfused)
    told = made.text("h.1").splitlines()
    kinds = [line.split()[1] for line in told]
    assert (
        kinds
        == (
            "norm projection join join product affine softmax product projection sum norm projection bend projection sum"
        ).split()
    )
    assert str(made).splitlines()[-1].split()[1] == "norm"
