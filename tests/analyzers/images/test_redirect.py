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
    ],
)
def test_only_where_nothing_arrives_a_share_does(bend: object, dead: list[int]) -> None:
    model = Fn(lambda self, x: bend(x * 2) * 3)  # type: ignore[operator]
    given = torch.tensor([[-5.0, -0.5, 0.25, 1.0, 5.0]])
    plain, led = slopes(model, given, "/mul#1")
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


def test_what_lies_behind_the_site_or_reads_an_input_is_left_alone() -> None:
    model = Fn(lambda self, x: F.relu(F.relu(F.relu(x) * 2) * 3))
    graph = fmr.run(model, torch.ones(1, 2)).graph
    assert sorted(map(str, redirected(graph, ["/mul#0"]))) == []
    assert redirected(fmr.run(Fn(lambda self, x: F.gelu(x * 2)), torch.ones(1, 2)).graph, [""]) == {}
    assert sorted(map(str, redirected(graph, ["/relu#1"]))) == ["/mul#0", "/relu#1"]
    assert sorted(map(str, redirected(graph, [""]))) == ["/mul#0", "/mul#1", "/relu#1", "/relu#2"]
