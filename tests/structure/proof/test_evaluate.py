"""A part of a graph computed again: from values that are given, in double precision, with what was recorded for the rest."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.ids import TensorId
from fmr.structure.proof.evaluate import at_zero, evaluate, evaluate_each
from tests.small import Fn

X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def ran(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[fmr.Run, TensorId, TensorId]:
    """A run of a function, its first input and its result."""
    run = fmr.run(Fn(lambda self, *args: function(*args)), *(inputs or (X,)))
    return run, run.graph.sources[0].id, run.graph.nodes[-1].id


def test_what_depends_on_a_given_value_is_computed_anew() -> None:
    run, x, end = ran(lambda x: (x * 2 + 1).sum(-1))
    assert evaluate(run.graph, end, {x: torch.ones(2, 2)}, run.__getitem__).tolist() == [6, 6]


def test_what_does_not_depend_on_it_is_taken_as_it_was_recorded() -> None:
    run, x, end = ran(lambda x, y: x + y.cos().round(), X, torch.zeros(2, 2))
    read: list[str] = []

    def value(name: TensorId) -> Tensor:
        read.append(name)
        return torch.full((2, 2), 10.0)

    assert evaluate(run.graph, end, {x: X}, value).tolist() == [[11, 12], [13, 14]]
    assert read == ["/round#0"]


def test_a_given_value_is_taken_as_it_is_given() -> None:
    run, x, end = ran(lambda x: x.cos() + x.sin())
    given = {x: torch.zeros(2, 2), TensorId("/sin#0"): torch.full((2, 2), 5.0)}
    assert evaluate(run.graph, end, given, run.__getitem__).tolist() == [[6, 6], [6, 6]]


def test_nothing_above_a_given_value_is_computed() -> None:
    run, x, end = ran(lambda x, y: x + (x.sin() + y.exp()) * 2, X, X.clone())
    read: list[str] = []

    def value(name: TensorId) -> Tensor:
        read.append(name)
        return run[name]

    given = {x: torch.zeros(2, 2), TensorId("/mul#0"): torch.full((2, 2), 5.0)}
    assert evaluate(run.graph, end, given, value).tolist() == [[5, 5], [5, 5]]
    assert read == []


def test_it_is_computed_in_double_precision() -> None:
    run, x, end = ran(lambda x: (x + 1e9) - 1e9)
    again = evaluate(run.graph, end, {x: X}, run.__getitem__)
    assert (run[end].dtype, again.dtype) == (torch.float32, torch.float64)
    assert run[end].tolist() == [[0, 0], [0, 0]]
    assert again.tolist() == X.tolist()


def test_choices_are_those_that_were_recorded() -> None:
    run, x, end = ran(lambda x: x.gather(1, x.argmax(1, keepdim=True)))
    assert evaluate(run.graph, end, {x: -X}, run.__getitem__).tolist() == [[-2], [-4]]


def test_several_results_of_one_op_are_told_apart() -> None:
    run, x, end = ran(lambda x: x.chunk(2, -1)[1] * 1)
    assert evaluate(run.graph, end, {x: X * 10}, run.__getitem__).tolist() == [[20], [40]]


def test_tensors_in_a_list_and_sizes_are_given_as_they_were() -> None:
    run, x, end = ran(lambda x, y: torch.cat([x, y, x], 0).view(3, 4), X, torch.zeros(2, 2))
    expected = [[5, 6, 7, 8], [0, 0, 0, 0], [5, 6, 7, 8]]
    assert evaluate(run.graph, end, {x: X + 4}, run.__getitem__).tolist() == expected


def _a_view_of_a_copy(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0].mul_(3)
    return y + 0


def test_a_value_that_was_overwritten_through_a_view_is_overwritten_again() -> None:
    run, x, end = ran(_a_view_of_a_copy)
    assert any(node.op == "alias" for node in run.graph.nodes)
    assert evaluate(run.graph, end, {x: torch.ones(2, 2)}, run.__getitem__).tolist() == [[3, 1], [3, 1]]


def test_the_inside_of_a_fused_op_is_computed_like_any_other_part() -> None:
    q = torch.zeros(1, 1, 2, 2)
    run, _, _ = ran(torch.nn.functional.scaled_dot_product_attention, q, q, X[None, None])
    graph = run.graph.unfused
    weights = next(node.id for node in graph.nodes if node.op == "softmax")
    only_first = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    again = evaluate(graph, graph.nodes[-1].id, {weights: only_first}, run.__getitem__)
    assert again.tolist() == [[[[1, 2], [1, 2]]]]


def test_a_layer_with_weights_reads_them_from_the_run() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        layer.bias.copy_(torch.tensor([10.0, 0.0]))
    run = fmr.run(layer, X)
    x = next(node.id for node in run.graph.nodes if node.op == "input")
    assert evaluate(run.graph, run.graph.nodes[-1].id, {x: 2 * X}, run.__getitem__).tolist() == [[14, 2], [18, 6]]


def test_what_does_not_depend_on_the_given_values_is_refused() -> None:
    run, x, _ = ran(lambda x, y: x.cos() + y.sin(), X, X.clone())
    with pytest.raises(fmr.StructureError, match=r"^/sin#0 does not depend on any of input:args\.0\.$"):
        evaluate(run.graph, TensorId("/sin#0"), {x: X}, run.__getitem__)


def projected(x: Tensor, weight: Tensor, given: Tensor) -> Tensor:
    """What comes of an input that is multiplied with a weight, when another one is given."""
    run = fmr.run(Fn(lambda self, x: x @ self.weight, weight=nn.Parameter(weight)), x)
    end = next(node.id for node in run.graph.nodes if node.op == "matmul")
    return evaluate(run.graph, end, {run.graph[end].parents[0].id: given}, run.__getitem__)


def test_products_with_weights_are_computed_in_the_precision_of_these() -> None:
    weight = torch.full((2, 2), 1 + 1e-7)
    found = projected(X, weight, X.double() + 1e-12)
    assert found.dtype == torch.float64
    assert torch.equal(found, (X @ weight).double())
    given = X.double() + 1e-12
    assert torch.equal(projected(X.double(), weight.double(), given), given @ weight.double())


def test_products_with_weights_in_half_precision_are_computed_in_single() -> None:
    found = projected(X.bfloat16(), torch.eye(2).bfloat16(), X + 0.01)
    assert found.dtype == torch.float64
    assert torch.equal(found, (X + 0.01).double())


def test_several_values_are_given_one_after_the_other() -> None:
    run, x, end = ran(lambda x: x.sin().sum(-1))
    several = torch.stack([X, 2 * X, 0 * X])
    assert torch.allclose(evaluate_each(run.graph, end, x, several, run.__getitem__), several.double().sin().sum(-1))


def test_an_op_that_torch_cannot_run_on_several_is_run_on_each() -> None:
    run, x, end = ran(lambda x: x[x > 0].sum())
    several = torch.stack([X, 2 * X])
    assert evaluate_each(run.graph, end, x, several, run.__getitem__).tolist() == [10, 20]


class Beside(nn.Module):
    """A projection whose result is added to what it reads, by a layer or by a product of its own."""

    def __init__(self, spelled: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 5.0]])), nn.Parameter(torch.tensor([7.0, 9.0]))
        self.spelled = spelled

    def forward(self, x: Tensor) -> Tensor:
        match self.spelled:
            case "linear":
                return x + nn.functional.linear(x.view(2, 2), self.weight, self.bias)
            case "addmm":
                return x + torch.addmm(self.bias, x, self.weight)
        return x + (x @ self.weight + self.bias)


@pytest.mark.parametrize("spelled", ["linear", "addmm", "matmul"])
def test_what_is_left_where_a_value_is_zero(spelled: str) -> None:
    run = fmr.run(Beside(spelled), X)
    x, end = TensorId("input:x"), run.graph.nodes[-1].id
    zero = evaluate(run.graph, end, {x: torch.zeros(2, 2)}, run.__getitem__)
    assert at_zero(run.graph, end, x, run.__getitem__).tolist() == zero.tolist() == [[7, 9], [7, 9]]


def test_what_is_zero_has_no_part_in_a_weight_that_is_no_number() -> None:
    model = Beside("linear")
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    run = fmr.run(model, X)
    assert at_zero(run.graph, run.graph.nodes[-1].id, TensorId("input:x"), run.__getitem__).tolist() == [[7, 9], [7, 9]]
