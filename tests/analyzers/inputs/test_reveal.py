"""The reveal-cancel rule: what two causes hide from one another is seen, and nothing is lost on any network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analyzers import InputAttribution
from analyzers.inputs.result import Attribution
from tests.analyzers.inputs.models import TOKENS, gated, made, numbers, reused
from tests.analyzers.inputs.test_rules import JOINT, SINGLE

RULE = "deeplift-reveal-cancel"


def total(output: Tensor) -> Tensor:
    return output.reshape(len(output), -1).sum(1)


def shares(function: Callable[[Tensor], Tensor], x: list[float], base: Any = "zero", method: str = RULE) -> list[float]:
    """What is found for a function of a few numbers."""
    given = base if isinstance(base, str) else torch.tensor([base])
    found = InputAttribution(made(function)).run(torch.tensor([x]), total, method, baseline=given)
    assert found.complete
    same = "the target is the same at input and baseline, so that there is nothing to attribute"
    assert found.notes == ((same,) if found.output == found.base else ())
    values: list[float] = found.values[0].tolist()
    return values


# ---- by hand


def least(x: Tensor) -> Tensor:
    return x[:, 0] - torch.relu(x[:, 0] - x[:, 1])


@pytest.mark.parametrize(("x", "rescaled"), [([1.0, 3.0], [1.0, 0.0]), ([3.0, 1.0], [0.0, 1.0]), ([2.0, 2.0], [1.0, 1.0])])
def test_both_share_in_the_least_of_two(x: list[float], rescaled: list[float]) -> None:
    assert shares(least, x) == pytest.approx([min(x) / 2, min(x) / 2])
    if x[0] != x[1]:
        assert shares(least, x, method="deeplift") == pytest.approx(rescaled)


def test_what_cancels_is_revealed() -> None:
    def hidden(x: Tensor) -> Tensor:
        return torch.relu(x[:, 0] - x[:, 1])

    assert shares(hidden, [2.0, 2.0], method="deeplift")[0] == pytest.approx(
        -shares(hidden, [2.0, 2.0], method="deeplift")[1]
    )
    assert shares(hidden, [3.0, 3.0]) == pytest.approx([1.5, -1.5])  # (3 - 0 + 0 - 0) / 2, and its opposite


@pytest.mark.parametrize("end", [lambda h: 1 - torch.relu(1 - h), lambda h: torch.relu(h) - torch.relu(h - 1)])
def test_either_of_two_is_shared_equally(end: Callable[[Tensor], Tensor]) -> None:
    assert shares(lambda x: end(x.sum(1)), [1.0, 1.0]) == pytest.approx([0.5, 0.5])


def test_both_of_two_are_shared_equally() -> None:
    assert shares(lambda x: torch.relu(x.sum(1) - 1), [1.0, 1.0]) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("kind", [torch.relu, F.silu, F.gelu, torch.tanh, torch.abs, lambda h: F.leaky_relu(h, 0.3)])
def test_an_activation_shares_by_the_mean_over_both_orders(kind: Callable[[Tensor], Tensor]) -> None:
    x, base = [1.5, 0.7, -0.4], [-0.3, 0.9, 0.2]

    def f(value: float) -> float:
        return float(kind(torch.tensor(value, dtype=torch.double)))

    terms = [2 * (x[0] - base[0]), -3 * (x[1] - base[1]), 1 * (x[2] - base[2])]
    start = 2 * base[0] - 3 * base[1] + base[2] + 0.25
    up, down = sum(t for t in terms if t > 0), sum(t for t in terms if t < 0)
    positive = (f(start + up) - f(start) + f(start + up + down) - f(start + down)) / 2
    negative = (f(start + down) - f(start) + f(start + up + down) - f(start + up)) / 2
    expected = [term * (positive / up if term > 0 else negative / down) for term in terms]
    weight = torch.tensor([2.0, -3.0, 1.0])
    for spelled in (
        lambda x: kind((x * weight).sum(1) + 0.25),
        lambda x: kind(F.linear(x, weight[None], torch.tensor([0.25]))),
    ):
        assert shares(spelled, x, base) == pytest.approx(expected, abs=1e-5)


# ---- beside an independent implementation


def by_loops(layers: list[nn.Linear], x: Tensor, base: Tensor, end: int) -> Tensor:
    """The rule on a network of layers with relu between them, number by number, as it is written in the paper."""
    at, start, changes, parts = x.double(), base.double(), [], []
    for place, layer in enumerate(layers):
        w, b = layer.weight.detach().double(), layer.bias.detach().double()
        change = at - start
        changes.append(change)
        terms = w * change
        up, down = terms.clamp(min=0).sum(1), terms.clamp(max=0).sum(1)
        at, start = w @ at + b, w @ start + b
        if place < len(layers) - 1:
            f = torch.relu
            raised = (f(start + up) - f(start) + f(at) - f(start + down)) / 2
            fallen = (f(start + down) - f(start) + f(at) - f(start + up)) / 2
            parts.append((up, down, raised, fallen))
            at, start = f(at), f(start)
    weight = torch.zeros(len(at), dtype=torch.double)
    weight[end] = 1
    positive = negative = weight
    for place in reversed(range(len(layers))):
        w, change = layers[place].weight.detach().double(), changes[place]
        below = torch.zeros_like(change)
        for i in range(len(change)):
            for j in range(len(w)):
                sign = w[j, i] * change[i]
                one = positive[j] if sign > 0 else negative[j] if sign < 0 else (positive[j] + negative[j]) / 2
                below[i] += w[j, i] * one
        if place:
            up, down, raised, fallen = parts[place - 1]
            positive = torch.where(up > 0, below * raised / torch.where(up > 0, up, 1.0), 0.0)
            negative = torch.where(down < 0, below * fallen / torch.where(down < 0, down, 1.0), 0.0)
        else:
            positive = below
    return positive * changes[0]


@pytest.mark.parametrize("reused_relu", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_of_layers_is_that_of_the_paper(seed: int, reused_relu: bool) -> None:
    torch.manual_seed(seed)
    layers, act = [nn.Linear(5, 9), nn.Linear(9, 7), nn.Linear(7, 3)], nn.ReLU()
    chain = [layers[0], act, layers[1], act if reused_relu else nn.ReLU(), layers[2]]
    x, base = numbers(1, 5, seed=seed), numbers(1, 5, seed=seed + 7)
    found = InputAttribution(nn.Sequential(*chain).eval()).run(x, 2, RULE, baseline=base)
    assert torch.allclose(found.values[0].double(), by_loops(layers, x[0], base[0], 2), atol=1e-6)
    other = InputAttribution(nn.Sequential(*chain).eval()).run(x, 2, "deeplift", baseline=base)
    assert not torch.allclose(found.values, other.values, atol=1e-4)


# ---- complete on all


@pytest.mark.parametrize("name", [*SINGLE, *JOINT])
def test_nothing_is_lost_before_or_behind_any_operation(name: str) -> None:
    function, weigh, mix = {**SINGLE, **JOINT}[name], numbers(400, seed=3), numbers(5, 5, seed=4)

    def whole(x: Tensor) -> Tensor:
        y = function(F.silu(x @ mix) - x.roll(1, -1)).flatten(1)
        return torch.tanh(y * weigh[: y.shape[1]]).sum(1, keepdim=True) + F.relu(y * 0.7 - 0.1).sum(1, keepdim=True)

    base = numbers(1, 5, 5, seed=5)
    found = InputAttribution(made(whole)).run(numbers(1, 5, 5), total, RULE, at=TOKENS, baseline=base)
    expected = float(found.output - found.base)
    assert abs(float(found.values.double().sum()) - expected) <= 2e-5 * max(1.0, abs(expected)), found
    assert found.notes == ()


@pytest.mark.parametrize("build", [reused, gated], ids=["reused ReLU6 and maxima", "gates, norms and a softmax"])
def test_whole_networks_are_complete(build: Callable[[], nn.Module]) -> None:
    x = numbers(2, 3, 8, 8) if build is reused else numbers(2, 4, 6)
    for baseline in ("zero", "mean"):
        at = None if build is reused else TOKENS
        found = InputAttribution(build()).run(x, [2, (0, 1)], RULE, at=at, baseline=baseline)
        assert float(found.gap.max()) < 1e-5
        assert found.notes == ()


@pytest.mark.parametrize("at", ["transformer.wte", "layers[1].resid_post", "attention[2].z"])
def test_a_language_model_is_complete_from_any_place(loaded: tuple[nn.Module, Any], at: str) -> None:
    model, tokenizer = loaded
    asking = InputAttribution(model, tokenizer)
    found = asking.run("Junel Dunoth grew up in", ("Brigost", "Oranby"), RULE, at=at)
    assert found.gap[0] < 1e-5, found
    assert found.notes == ()
    assert not torch.allclose(found.values, asking.run("Junel Dunoth grew up in", ("Brigost", "Oranby"), at=at).values)


def test_signs_of_weights_count_in_products_and_differences() -> None:
    def turned(x: Tensor) -> Tensor:
        return torch.relu(-(x[:, :1] - x[:, 1:]) * -2.0 / torch.tensor(-4.0))

    x = [3.0, 1.0]  # relu((x1 - x0) / 2): the second raises it by 1/2, the first hides that
    assert shares(turned, x) == pytest.approx([-0.25, 0.25])


def test_a_wrong_part_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from analyzers.inputs import reveal

    own = reveal.BothParts._made
    monkeypatch.setattr(reveal.BothParts, "_made", lambda self, call: tuple(1.5 * part for part in own(self, call)))
    found = InputAttribution(made(lambda x: torch.relu(x @ numbers(3, 2)))).run(numbers(1, 3), total, RULE)
    assert isinstance(found, Attribution)
    assert found.complete is False
    assert any("relu#0 (relu): " in note and "is lost" in note for note in found.notes)
