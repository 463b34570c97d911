"""Gradients led past dead zones: where they arrive, where nothing changes, and on which models."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from analyzers.images.redirect import redirected
from tests.small import Fn


def slopes(model: nn.Module, given: Tensor, site: str, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """The gradient of the sum of a site at the input, as it is and led past dead zones."""
    found = []
    for edits in (None, redirected(fmr.run(model, given).graph, [site], share)):
        leaf = given.clone().requires_grad_()
        run = fmr.run(model, leaf, keep=[site], stop=True, grad=True, edits=edits)
        (slope,) = torch.autograd.grad(run[site].sum(), leaf)
        found.append(slope)
    return found[0], found[1]


@pytest.mark.parametrize(
    ("bend", "dead"),
    [
        (F.relu, [0, 1]),
        (F.relu6, [0, 1, 4]),
        (F.hardswish, [0]),
        (F.hardsigmoid, [0, 4]),
        (lambda x: x.clamp(min=0), [0, 1]),
        (lambda x: F.hardtanh(x, -1, 1), [0, 1, 3, 4]),
        (lambda x: F.relu(x.clone(), inplace=True), [0, 1]),
        (lambda x: torch.clip(x, 0, 8), [0, 1, 4]),
        (lambda x: torch.maximum(x, torch.zeros(())), [0, 1]),
        (lambda x: torch.minimum(x.new_full((5,), 1.5), x), [3, 4]),
        (lambda x: torch.max(x, torch.zeros_like(x)), [0, 1]),
        (lambda x: torch.where(x > 0, x, 0.0), [0, 1]),
        (lambda x: torch.where(x <= 0, torch.zeros(()), x), [0, 1]),
        (lambda x: x.masked_fill(x < 0, 0.0), [0, 1]),
        (lambda x: x * (x > 0), [0, 1]),
        (lambda x: x * (x > 0).float(), [0, 1]),
    ],
)
def test_only_where_nothing_arrives_a_share_does(bend: object, dead: list[int]) -> None:
    model = Fn(lambda self, x: bend(x * 2) * 3)  # type: ignore[operator]
    given = torch.tensor([[-5.0, -0.5, 0.25, 1.0, 5.0]])
    plain, led = slopes(model, given, "")
    alive = [n for n in range(5) if n not in dead]
    assert torch.equal(plain[0, alive], led[0, alive])
    assert bool((plain[0, alive] != 0).all())
    assert plain[0, dead].tolist() == [0.0] * len(dead)
    assert led[0, dead].tolist() == [0.5 * 3 * 2] * len(dead)


def test_a_value_that_others_read_keeps_their_gradient() -> None:
    model = Fn(lambda self, x: F.relu(x * 1) + (x * 1).relu() * 0 + x)
    plain, led = slopes(model, torch.tensor([[-1.0, 2.0]]), "/add#1")
    assert plain.tolist() == [[1.0, 2.0]]
    assert led[0, 1] == 2.0
    shared = Fn(lambda self, x: [y := x * 1, F.relu(y) + y * 7][1])
    plain, led = slopes(shared, torch.tensor([[-1.0, 2.0]]), "/add#0")
    assert torch.equal(plain, led)


def test_dead_zones_behind_each_other_are_all_passed() -> None:
    model = Fn(lambda self, x: F.relu(F.relu(F.relu(x * 1) - 1) - 1))
    plain, led = slopes(model, torch.tensor([[-1.0, 1.5, 5.0]]), "/relu#2")
    assert plain.tolist() == [[0.0, 0.0, 1.0]]
    assert led.tolist() == [[0.125, 0.5, 1.0]]


def test_what_is_masked_for_good_or_has_a_slope_everywhere_is_left_alone() -> None:
    for bend in (
        lambda x: x.masked_fill(torch.arange(2) < 1, 0.0),
        lambda x: torch.where(torch.arange(2) < 1, x, 0.0),
        lambda x: torch.where(x > 0, x, x * 0.1),
        lambda x: torch.maximum(x, x * 2),
        lambda x: x * (torch.arange(2) < 1),
        lambda x: F.max_pool1d(x, 2),
    ):
        assert redirected(fmr.run(Fn(lambda self, x, bend=bend: bend(x * 2)), torch.ones(1, 2)).graph, [""]) == {}


@pytest.mark.parametrize(
    "bend",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.max_pool2d(x, 2, 1, dilation=2),
        lambda x: F.max_pool2d(x, (3, 2), ceil_mode=True),
        lambda x: F.adaptive_max_pool2d(x, (2, 3)),
        lambda x: x.amax((2, 3), keepdim=True),
        lambda x: x.amax(3),
        lambda x: x.max(2).values,
        lambda x: torch.maximum(x, x.flip(3) * 1.0),
    ],
)
def test_all_that_was_not_chosen_is_seen_where_it_is_asked_for(bend: object) -> None:
    """Beside numbers that are changed one by one."""
    model = Fn(lambda self, x: bend(x * 1.0))  # type: ignore[operator]
    given = torch.rand(1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    edits = redirected(fmr.run(model, given).graph, [""], 1.0, every=True)
    leaf = given.clone().requires_grad_()
    run = fmr.run(model, leaf, keep=[""], stop=True, grad=True, edits=edits)
    first = (0,) * run[""].dim()
    (slope,) = torch.autograd.grad(run[""][first], leaf)
    steps = 9 * torch.eye(49).reshape(-1, 1, 7, 7)
    changed = [(model(given + sign * steps)[(slice(None), *first[1:])] != run[""][first]).reshape(7, 7) for sign in (-1, 1)]
    assert torch.equal(slope[0, 0] != 0, changed[0] | changed[1])


def test_what_lies_behind_the_site_or_reads_an_input_is_left_alone() -> None:
    model = Fn(lambda self, x: F.relu(F.relu(F.relu(x) * 2) * 3))
    graph = fmr.run(model, torch.ones(1, 2)).graph
    assert sorted(map(str, redirected(graph, ["/mul#0"]))) == []
    assert redirected(fmr.run(Fn(lambda self, x: F.gelu(x * 2)), torch.ones(1, 2)).graph, [""]) == {}
    assert sorted(map(str, redirected(graph, ["/relu#1"]))) == ["/mul#0", "/relu#1"]
    assert sorted(map(str, redirected(graph, [""]))) == ["/mul#0", "/mul#1", "/relu#1", "/relu#2"]
