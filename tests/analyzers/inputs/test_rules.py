"""The rules of DeepLIFT: each shares the whole difference, whichever operation made it, and a wrong one is told."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from analyzers import AnalyzerError, InputAttribution
from analyzers.inputs import forms, rules
from analyzers.inputs.rescale import TwoRuns
from fmr.nests import ids_in
from tests.analyzers.inputs.models import TOKENS, made, numbers

WEIGHT = numbers(5, 5, seed=9)

SINGLE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "exp": torch.exp,
    "sin": torch.sin,
    "erf": torch.erf,
    "abs": torch.abs,
    "pow": lambda x: x**3,
    "number to a power": lambda x: 1.5**x,
    "sqrt": lambda x: (x.abs() + 1).sqrt(),
    "log": lambda x: (x.abs() + 1).log(),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp below": lambda x: x.clamp_min(0.2),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "in place": lambda x: torch.relu_(x * 2),
    "step": lambda x: torch.round(3 * x),
    "log1p": lambda x: x.abs().log1p(),
    "huber_loss": lambda x: F.huber_loss(x, torch.full_like(x, 0.3), reduction="none"),
    "frac": torch.frac,
}

JOINT: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: x * torch.roll(x, 1, -1),
    "square": lambda x: x * x,
    "gate": lambda x: F.silu(x) * (x @ WEIGHT),
    "quotient": lambda x: x / (x.roll(1, -1).abs() + 1),
    "reciprocal": lambda x: 2 / (x.abs() + 1),
    "by a number": lambda x: x / 3,
    "matmul": lambda x: x @ (x.transpose(-1, -2) @ x),
    "bmm": lambda x: torch.bmm(x, x.mT),
    "einsum": lambda x: torch.einsum("bij,bkj->bik", x, x),
    "three": lambda x: torch.einsum("bij,bkj,bkl->bil", x, x, x),
    "softmax": lambda x: x.softmax(-1),
    "softmax down": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "softmin": lambda x: F.softmin(x, -1),
    "far apart": lambda x: (900 * x).softmax(-1),
    "masked": lambda x: x.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1),
    "sdpa": lambda x: F.scaled_dot_product_attention(x, x @ WEIGHT, x, is_causal=True),
    "layer_norm": lambda x: F.layer_norm(x, (5,), WEIGHT[0], WEIGHT[1]),
    "rms_norm": lambda x: F.rms_norm(x, (5,), WEIGHT[0]),
    "group_norm": lambda x: F.group_norm(x, 5, WEIGHT[0], WEIGHT[1]),
    "instance_norm": lambda x: F.instance_norm(x),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "vector norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "norm": lambda x: x.norm(dim=-1),
    "std": lambda x: x.std(-1),
    "var": lambda x: x.var(-1),
    "glu": lambda x: F.glu(x[..., :4]),
    "amax": lambda x: x.amax(-1),
    "amin": lambda x: x.amin(-1),
    "max": lambda x: x.max(-1).values,
    "min": lambda x: x.min(-1)[0],
    "maximum": lambda x: torch.maximum(x, x.roll(1, -1)),
    "minimum": lambda x: torch.minimum(x, x @ WEIGHT),
    "max_pool": lambda x: F.max_pool1d(x, 3, 1),
    "max_pool2d": lambda x: nn.MaxPool2d(3, 2, 1)(x[:, None]),
    "adaptive": lambda x: F.adaptive_max_pool1d(x, 2),
    "avg_pool": lambda x: F.avg_pool1d(x, 2),
    "shapes": lambda x: torch.cat([x.transpose(1, 2).reshape(len(x), -1), x.flatten(1)[:, 3:]], 1).split(7, 1)[1],
    "written": lambda x: _written(x),
    "cumsum": lambda x: x.cumsum(-1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "lerp": lambda x: torch.lerp(x, x.roll(1, -1), x.sigmoid()),
    "addcmul": lambda x: torch.addcmul(x, x, x.roll(1, 1)),
    "prod": lambda x: x.prod(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "sort": lambda x: x.sort(-1).values,
    "sort down": lambda x: x.sort(1, descending=True)[0],
    "topk": lambda x: x.topk(3, -1).values,
    "topk of the least": lambda x: x.topk(2, 1, largest=False).values,
    "kthvalue": lambda x: x.kthvalue(2, -1).values,
    "median": lambda x: x.median(-1).values,
    "cosine": lambda x: F.cosine_similarity(x, x.roll(1, 1), dim=-1),
    "cdist": lambda x: torch.cdist(x, 2 * x.roll(1, 1)),
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.roll(1, 1)),
    "hypot": lambda x: torch.hypot(x, x.roll(1, -1)),
    "logaddexp": lambda x: torch.logaddexp(x, x.roll(1, -1)),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1),
    "bilinear": lambda x: F.bilinear(x, x, torch.ones(3, 5, 5)),
    "clamp by others": lambda x: x.clamp(min=x.roll(1, -1)),
    "largest size": lambda x: torch.linalg.vector_norm(x, float("inf"), -1),
    "local response": lambda x: F.local_response_norm(x, 2, 0.5),
    "statistics that are kept": lambda x: F.instance_norm(x, WEIGHT[0], WEIGHT[1].abs(), WEIGHT[2], WEIGHT[3], False),
    "instance_norm with weights": lambda x: F.instance_norm(x, None, None, WEIGHT[2], WEIGHT[3]),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.arange(5).expand(len(x), 5), reduction="none"),
    "idle dropout": lambda x: F.dropout2d(x[:, None], training=False),
    "std_mean": lambda x: torch.cat(torch.std_mean(x, dim=-1), 1),
    "where": lambda x: torch.where(WEIGHT > 0, x, torch.tanh(x)),
    "weights in its type": lambda x: WEIGHT.to(x) * x + WEIGHT[0].expand_as(x) + WEIGHT.type_as(x),
    "clamp by others above and below": lambda x: x.clamp_min(x.roll(1, 1)).clamp_max(x.roll(1, -1)),
    "small numbers in rms_norm": lambda x: F.rms_norm(1e-3 * x, (5,)),
    "smallest size": lambda x: x.norm(float("-inf"), dim=-1),
    "normalize by the largest": lambda x: F.normalize(x, p=float("inf"), dim=-1),
    "numbers of its kind": lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
    "cosine with fewer dimensions": lambda x: F.cosine_similarity(x, WEIGHT, dim=2),
    "cosine with one number": lambda x: F.cosine_similarity(x, x[..., :1] + 2, dim=-1),
    "cross_entropy with chances": lambda x: F.cross_entropy(
        x, WEIGHT.softmax(0)[None].expand_as(x), WEIGHT[0].abs(), reduction="none"
    ),
}


def _written(x: Tensor) -> Tensor:
    """A value of which a part is overwritten."""
    y = x * 1.0
    y[:, 1:3] = torch.tanh(x[:, 2:4])
    y[..., 0].mul_(2.0)
    return y.relu()


@pytest.mark.parametrize("name", [*SINGLE, *JOINT])
@pytest.mark.parametrize("base", ["zero", "given"])
def test_an_operation_shares_the_whole_difference(name: str, base: str) -> None:
    function = {**SINGLE, **JOINT}[name]
    weigh = numbers(400, seed=3)
    model = made(lambda x: (function(x).flatten(1) * weigh[: function(x)[0].numel()]).sum(1, keepdim=True))
    given = base if base == "zero" else numbers(1, 5, 5, seed=5)
    asking, target = InputAttribution(model), lambda output: output[:, 0]
    found = asking.run(numbers(1, 5, 5), target, "deeplift", at=TOKENS, baseline=given)
    expected = float(found.output - found.base)
    assert abs(float(found.values.double().sum()) - expected) <= 2e-5 * max(1.0, abs(expected)), found
    assert [note for note in found.notes if "rows were run one by one" not in note] == []


def test_the_secant_of_a_relu_is_the_rescale_rule() -> None:
    x, base = torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([[-2.0, 1.0, 1.0]])
    found = InputAttribution(made(torch.relu)).run(x, lambda output: output.sum(1), "deeplift", baseline=base)
    assert torch.equal(found.values, torch.tensor([[2.0, -1.0, 2.0]]))


def test_a_product_gives_each_factor_the_mean_of_the_other() -> None:
    model = made(lambda x: x[:, :1] * x[:, 1:])
    found = InputAttribution(model).run(
        torch.tensor([[3.0, 5.0]]), lambda y: y[:, 0], "deeplift", baseline=torch.tensor([[1.0, 2.0]])
    )
    assert torch.allclose(found.values, torch.tensor([[2 * 3.5, 3 * 2.0]]))


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "one op": lambda x: F.rms_norm(x, (3,), None, 1e-12),
    "written": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-12).rsqrt(),
    "by a power": lambda x: x * x.square().mean(-1, keepdim=True).add(1e-12).pow(-0.5),
    "quotient": lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt(),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_the_scale_of_the_input_where_the_baseline_is_zero(name: str) -> None:
    x = torch.tensor([[1.0, 2.0, -3.0]])
    found = InputAttribution(made(NORMS[name])).run(x, (0, 2), "deeplift")
    scale = float((x.square().mean() + 1e-12).rsqrt())
    assert torch.allclose(found.values, torch.tensor([[1.0, 0.0, 3.0]]) * scale, atol=1e-5)


def test_a_maximum_gives_all_to_the_larger() -> None:
    model = made(lambda x: x.amax(1, keepdim=True))
    found = InputAttribution(model).run(torch.tensor([[1.0, 4.0, 2.0]]), lambda y: y[:, 0], "deeplift")
    assert torch.equal(found.values, torch.tensor([[0.0, 4.0, 0.0]]))
    found = InputAttribution(model).run(
        torch.tensor([[1.0, -4.0]]), lambda y: y[:, 0], "deeplift", baseline=torch.tensor([[0.0, 3.0]])
    )
    assert torch.equal(found.values, torch.tensor([[0.0, -2.0]]))


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(5, 4, 2, batch_first=True, bidirectional=True),
    "gru": lambda: nn.GRU(5, 4, 2),
    "relu": lambda: nn.RNN(5, 4, nonlinearity="relu", bias=False, bidirectional=True),
    "tanh": lambda: nn.RNN(5, 4, batch_first=True),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("packed", [False, True])
def test_a_recurrent_kernel_is_its_steps(name: str, packed: bool) -> None:
    torch.manual_seed(0)
    kernel = RECURRENT[name]()
    first = bool(kernel.batch_first)

    def told(x: Tensor) -> Tensor:
        rows = torch.cat([x, x.flip(1) * 2, x.cos()])
        given: Any = rows if first else rows.transpose(0, 1)
        if packed:
            given = nn.utils.rnn.pack_padded_sequence(given, [5, 3, 2], batch_first=first)
        shown, ends = kernel(given)
        shown = shown.data if packed else shown
        ends = [ends] if isinstance(ends, Tensor) else ends
        return torch.cat([shown.flatten(), *(one.flatten() for one in ends)])

    weigh = numbers(400, seed=3)
    model = made(lambda x: (told(x) * weigh[: len(told(x))]).sum()[None, None])
    model.kernel = kernel.eval()
    for parameter in kernel.parameters():
        parameter.data *= 3
    found = InputAttribution(model).run(numbers(1, 5, 5), 0, "deeplift", at=TOKENS, baseline=numbers(1, 5, 5, seed=5))
    assert found.complete
    assert not [note for note in found.notes if "rule" in note or "lost" in note]


def test_a_cell_gives_each_gate_its_share() -> None:
    """By hand: a GRU cell whose gates are held open has its candidate's secant alone."""
    cell = nn.GRUCell(1, 1).eval()
    with torch.no_grad():
        cell.weight_hh.zero_(), cell.bias_hh.zero_()
        cell.weight_ih.copy_(torch.tensor([[0.0], [0.0], [2.0]]))
        cell.bias_ih.copy_(torch.tensor([0.0, -30.0, 0.5]))
    model = made(lambda x: cell(x[:, :1]) + cell(x[:, 1:]))
    x, base = torch.tensor([[0.3, -0.2]]), torch.tensor([[0.1, 0.4]])
    found = InputAttribution(model).run(x, 0, "deeplift", baseline=base)
    assert torch.allclose(found.values, (2 * x + 0.5).tanh() - (2 * base + 0.5).tanh(), atol=1e-5)


def test_an_lstm_with_a_projection_and_cells_are_complete() -> None:
    torch.manual_seed(0)
    cell, other = nn.LSTMCell(5, 4).eval(), nn.RNNCell(5, 4, nonlinearity="relu").eval()

    def told(x: Tensor) -> Tensor:
        state, last = (torch.zeros(len(x), 4), torch.ones(len(x), 4)), torch.zeros(len(x), 4)
        for step in x.unbind(1):
            state, last = cell(step, state), other(step, last)
        return torch.cat([*state, last], 1)

    found = InputAttribution(made(told)).run(numbers(1, 5, 5), lambda y: y.sum(1), "deeplift", at=TOKENS)
    assert found.complete
    assert found.notes == ()


@pytest.mark.parametrize("sizes", [(1, 5), (2, 5), (3, 7), (2, 8), (1, 1)])
def test_sorted_numbers_are_those_of_torch(sizes: tuple[int, int]) -> None:
    x = numbers(*sizes).round(decimals=1)
    assert torch.equal(forms.FORMS["sort"](x, -1), x.sort(-1).values)
    assert torch.equal(forms.FORMS["sort"](x, 0, descending=True), x.sort(0, descending=True).values)
    assert torch.equal(forms.FORMS["topk"](x, 1, 0, largest=False), x.topk(1, 0, largest=False).values)
    assert torch.equal(forms.FORMS["median"](x), x.median())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weight", [None, WEIGHT[0].abs()])
@pytest.mark.parametrize("sizes", [(5,), (3, 5), (2, 5, 4)])
def test_a_cross_entropy_is_that_of_torch(sizes: tuple[int, ...], weight: Tensor | None, reduction: str) -> None:
    x, chances = numbers(*sizes), numbers(*sizes, seed=1).softmax(min(1, len(sizes) - 1))
    for target in (chances, chances.argmax(min(1, len(sizes) - 1))):
        found = forms.FORMS["cross_entropy"](x, target, weight, reduction=reduction)
        assert torch.allclose(found, F.cross_entropy(x, target, weight, reduction=reduction), atol=1e-6)


def test_the_first_of_all_is_the_largest_and_what_is_chosen_alike_is_followed() -> None:
    x, base = numbers(1, 6), numbers(1, 6, seed=1)
    one, other = (
        InputAttribution(made(way)).run(x, 0, "deeplift", baseline=base).values
        for way in (lambda x: x.topk(1, 1).values, lambda x: x.amax(1, keepdim=True))
    )
    assert torch.allclose(one, other)
    near = torch.tensor([[5.0, 1.0, 3.0, 2.5]])
    found = InputAttribution(made(lambda x: x.topk(2, 1).values * torch.tensor([1.0, 10.0]))).run(
        near, lambda y: y.sum(1), "deeplift", baseline=torch.tensor([[4.0, 0.0, 1.0, 0.5]])
    )
    assert torch.allclose(found.values, torch.tensor([[1.0, 0.0, 20.0, 0.0]]))


@pytest.mark.parametrize("base", ["zero", "given"])
@pytest.mark.parametrize("name", ["sort", "topk", "kthvalue", "median", "median of all"])
def test_numbers_in_another_order_have_the_same_shares(name: str, base: str) -> None:
    weigh = torch.tensor([1.0, 10.0, 100.0])
    way: Callable[[Tensor], Tensor] = {
        "sort": lambda x: (x.sort(1).values[:, :3] * weigh).sum(1, keepdim=True),
        "topk": lambda x: (x.topk(3, 1).values * weigh).sum(1, keepdim=True),
        "kthvalue": lambda x: x.kthvalue(3, 1, keepdim=True).values,
        "median": lambda x: x.median(1, keepdim=True).values,
        "median of all": lambda x: x.median()[None, None],
    }[name]
    x, other = numbers(1, 6), torch.zeros(1, 6) if base == "zero" else numbers(1, 6, seed=1)
    asking = InputAttribution(made(way))
    whole = asking.run(x, 0, "deeplift", baseline=other).values
    for seed in range(4):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        found = asking.run(x[:, order], 0, "deeplift", baseline=other[:, order]).values
        assert torch.allclose(found, whole[:, order], atol=1e-5)


def test_memory_that_was_not_written_is_nothing() -> None:
    def written(x: Tensor) -> Tensor:
        y = x.new_empty(1, 4)
        y[:, :2] = 2 * x
        y[:, 2:] = x
        return y

    place = fmr.Site("input:x")
    both = [fmr.run(made(written), one) for one in (torch.ones(1, 2), torch.zeros(1, 2))]
    both[0]["/new_empty#0"].fill_(torch.inf)  # what may lie there
    runs = TwoRuns(*both, place)
    (end,) = ids_in(both[0].graph.scopes[0].output)
    found = runs.followed_back({end: torch.ones(1, 4).double()}, [place.id])
    assert found[place.id].tolist() == [[3.0, 3.0]]
    assert runs.notes == []


def test_a_target_that_leaves_torch_is_refused() -> None:
    for target in (lambda y: y.detach().numpy()[:, 0], lambda y: float(y[0, 0])):
        with pytest.raises(
            AnalyzerError, match=r"comes of no operation of torch on the output.* lambda output: output\[:, 3\]"
        ):
            InputAttribution(made(torch.tanh)).run(numbers(1, 3), target, "deeplift")


NO_SIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "vector_norm": lambda x: torch.linalg.vector_norm(x, 0, -1),
    "norm": lambda x: x.norm(0, dim=-1),
    "cdist": lambda x: torch.cdist(x[:, None], 2 * x[:, None] + 1, p=0.0).flatten(1),
}


@pytest.mark.parametrize("name", NO_SIZE)
def test_sizes_that_count_are_said(name: str) -> None:
    model = made(lambda x: NO_SIZE[name](x).reshape(len(x), -1) + x.sum(1, keepdim=True))
    found = InputAttribution(model).run(numbers(1, 4), 0, "deeplift")
    assert any(f"no rule for {name!r}" in note for note in found.notes)


def test_a_product_of_many_is_shared_alike() -> None:
    found = InputAttribution(made(lambda x: x.prod(1, keepdim=True))).run(torch.full((1, 5), 2.0), 0, "deeplift")
    assert torch.allclose(found.values, torch.full((1, 5), 32 / 5))


def test_what_is_chosen_in_no_order_is_said() -> None:
    model = made(lambda x: x.topk(2, 1, sorted=False).values)
    found = InputAttribution(model).run(numbers(1, 6), 0, "deeplift", baseline=numbers(1, 6, seed=1))
    assert "/topk#0:0: no rule for 'topk', the mean gradient on the way stands in" in found.notes


def test_what_has_no_rule_is_said_and_the_mean_gradient_stands_in() -> None:
    model = made(lambda x: torch.atan2(x[:, :1], x[:, 1:]))
    found = InputAttribution(model).run(torch.tensor([[1.0, 1.0]]), 0, "deeplift", baseline=torch.tensor([[0.0, 1.0]]))
    assert found.notes == ("/atan2#0: no rule for 'atan2', the mean gradient on the way stands in",)
    assert torch.allclose(found.values, torch.tensor([[torch.pi / 4, 0.0]]))


CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu by a mask": lambda x: x * (x > 0),
    "relu by a cast": lambda x: (x >= 0).float() * x,
    "relu by filling": lambda x: x.masked_fill(x < 0, 0.0),
    "leaky_relu": lambda x: torch.where(x.gt(0), x, 0.01 * x),
}


@pytest.mark.parametrize("method", ["deeplift", "deeplift-reveal-cancel"])
@pytest.mark.parametrize("name", CHOICES)
def test_an_activation_made_of_a_choice_is_that_activation(name: str, method: str) -> None:
    x, base = numbers(1, 8), numbers(1, 8, seed=1)
    plain = getattr(F, name.split()[0])

    def found(act: Callable[[Tensor], Tensor]) -> Tensor:
        run = InputAttribution(made(lambda x: act(x - 0.1))).run(x, lambda y: y.sum(1), method, baseline=base)
        assert run.complete
        assert run.notes == ()
        return run.values

    assert torch.allclose(found(CHOICES[name]), found(plain), atol=1e-6)


@pytest.mark.parametrize("method", ["deeplift", "deeplift-reveal-cancel"])
def test_a_choice_by_other_values_shares_with_them(method: str) -> None:
    def switched(x: Tensor) -> Tensor:
        return torch.where(x[:, :1] > x[:, 1:2], x[:, 2:], -x[:, 2:])

    found = InputAttribution(made(switched)).run(
        torch.tensor([[3.0, 1.0, 4.0]]), 0, method, baseline=torch.tensor([[0.0, 2.0, 2.0]])
    )
    assert torch.allclose(found.values, torch.tensor([[4.5, 1.5, 0.0]]))  # 6 for the choice, of which 3 and 1 parts of 4
    assert found.notes == ()
    assert found.complete


def test_an_order_that_differs_is_said_and_leaves_a_gap() -> None:
    model = made(lambda x: x.gather(1, x.argsort(1)) * torch.tensor([1.0, 3.0]))
    found = InputAttribution(model).run(
        torch.tensor([[2.0, 0.5]]), lambda y: y.sum(1), "deeplift", baseline=torch.tensor([[0.7, 0.8]])
    )
    assert any("/argsort#0 differs between input and baseline and has no derivative" in note for note in found.notes)
    assert any("that it passes on is lost" in note for note in found.notes)
    assert found.complete is False
    assert "NOT complete" in repr(found)


@pytest.mark.parametrize(
    ("rule", "name", "instead"),
    [
        ("secant", "gelu", lambda call: call.pulled({n: pair.at for n, pair in call.live.items()}, call.weight)),
        ("halfway", "product", lambda call: call.pulled({n: pair.at for n, pair in call.live.items()}, call.weight)),
        ("scaled", "rms_norm", lambda call: call.pulled({n: pair.at for n, pair in call.live.items()}, call.weight)),
        ("extreme", "max_pool", lambda call: call.pulled({n: pair.at for n, pair in call.live.items()}, call.weight)),
        ("logsumexp", "softmax", lambda call: call.pulled({n: pair.middle for n, pair in call.live.items()}, call.weight)),
    ],
)
def test_a_wrong_rule_is_told(
    rule: str, name: str, instead: Callable[[rules.Call], rules.Shares], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, rule, instead)
    model = made(lambda x: (2 * {**SINGLE, **JOINT}[name](2 * x)).flatten(1))
    found = InputAttribution(model).run(
        numbers(1, 5, 5), lambda y: (y * y).sum(1), "deeplift", baseline=numbers(1, 5, 5, seed=5)
    )
    assert any("is lost" in note for note in found.notes)
    assert found.complete is False


def test_a_form_that_is_not_the_operation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "FORMS", {**rules.FORMS, "softmax": lambda x, dim, **_: x.sigmoid()})
    found = InputAttribution(made(lambda x: x.softmax(-1))).run(numbers(1, 4), 1, "deeplift")
    assert any("is lost" in note for note in found.notes)
    assert forms.FORMS is not rules.FORMS


def test_it_equals_captums_where_that_is_exact() -> None:
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)).eval()
    x, base = numbers(1, 4), numbers(1, 4, seed=1)
    own = InputAttribution(model).run(x, 2, "deeplift", baseline=base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum says that it sets hooks
        theirs = captum.DeepLift(model).attribute(x, base, target=2)
    assert torch.allclose(own.values, theirs, atol=1e-5)
