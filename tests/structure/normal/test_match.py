"""The words of the matchers on graphs of a few nodes: what is a weight, a product, the same value; walks up and down."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.graph.execute import draws
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.normal.match import (
    above,
    below,
    between,
    contraction,
    data_inputs,
    depends_on,
    is_constant,
    paths,
    product,
    projection,
    settled,
    strip_views,
    unbroadcast,
    value_number,
    weighed_sum,
    weights,
)
from fmr.structure.normal.vocabulary import MOVES
from tests.small import Fn

X = (2, 3)
W, V = TensorId("param:w"), TensorId("param:v")


def graph_of(function: Callable[..., Tensor], *shapes: tuple[int, ...], w: tuple[int, ...] = (3, 3)) -> Graph:
    """The graph of `function(module, x, ...)`, whose module has the parameters w and v and a scale."""
    torch.manual_seed(0)
    made = {"w": nn.Parameter(torch.randn(w)), "v": nn.Parameter(torch.randn(3)), "scale": nn.Parameter(torch.ones(1))}
    return fmr.run(Fn(function, **made), *(torch.randn(shape) for shape in shapes or (X,))).graph


def last(graph: Graph) -> TensorId:
    return graph.nodes[-1].id


# ---- weights


MADE_OF_PARAMETERS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "a parameter": (lambda m, x: x @ m.w, (W,)),
    "transposed": (lambda m, x: x @ m.w.t(), (W,)),
    "standardised": (lambda m, x: x @ ((m.w - m.w.mean()) / m.w.std()), (W,)),
    "bent": (lambda m, x: x @ m.w.tanh(), (W,)),
    "scaled by another": (lambda m, x: x @ (m.w * m.v), (V, W)),
    "scaled by one number": (lambda m, x: x @ (m.w * m.scale), (W,)),
    "a product of two": (lambda m, x: x @ (m.w @ m.w), ()),
    "scaled by the input": (lambda m, x: x @ (m.w * x.mean()), ()),
}


@pytest.mark.parametrize("name", MADE_OF_PARAMETERS)
def test_a_weight_is_what_parameters_alone_are_shaped_and_scaled_into(name: str) -> None:
    function, expected = MADE_OF_PARAMETERS[name]
    graph = graph_of(function)
    operand = graph[last(graph)].parents[1].id
    assert set(weights(graph, operand)) == set(expected)


def test_a_row_of_a_table_is_no_weight_and_a_matrix_among_several_is() -> None:
    graph = graph_of(lambda m, x: m.w[x[0, 0].long()] * 1)
    assert weights(graph, graph[last(graph)].parents[0].id) == ()
    graph = graph_of(lambda m, x: m.w[x[0, 0].long()] * 1, w=(3, 3, 3))
    assert weights(graph, graph[last(graph)].parents[0].id) == (W,)


def test_a_weight_that_is_repeated_for_each_example_is_found_before_that() -> None:
    graph = graph_of(lambda m, x: x @ m.w[None].expand(4, 3, 3), (4, 2, 3))
    repeated = graph[last(graph)].parents[1].id
    assert (graph[repeated].op, unbroadcast(graph, repeated)) == ("expand", W)
    assert unbroadcast(graph, W) == W
    blown_up = graph_of(lambda m, x: x @ m.w.repeat(1, 2))
    tiled = blown_up[last(blown_up)].parents[1].id
    assert unbroadcast(blown_up, tiled) == tiled


def test_a_constant_is_what_no_input_flows_into() -> None:
    graph = graph_of(lambda m, x: torch.arange(3).float() * m.v + x.sum())
    assert [node.id for node in graph.nodes if is_constant(graph, node.id)] == ["/arange#0", "/to#0", V, "/mul#0"]


# ---- products


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.w),
        lambda m, x: x @ m.w,
        lambda m, x: torch.addmm(m.v, x, m.w),
        lambda m, x: torch.einsum("ij,jk->ik", x, m.w),
        lambda m, x: torch.einsum("jk,ij->ik", m.w, x),
        lambda m, x: m.w @ x.t(),
    ],
)
def test_a_projection_knows_its_data_and_its_weight_in_either_order(function: Callable[..., Tensor]) -> None:
    graph = graph_of(function)
    node = graph.nodes[-1]
    found = projection(graph, node)
    assert found is not None
    assert (found.weight, strip_views(graph, found.data, MOVES)) == (W, graph.sources[0].id)
    assert product(graph, node) is None


def test_a_product_is_one_of_two_activations() -> None:
    graph = graph_of(lambda m, x, y: x @ y, (2, 3), (3, 2))
    node = graph.nodes[-1]
    found = product(graph, node)
    assert found is not None
    assert (found.left, found.right) == tuple(node.parents)
    assert projection(graph, node) is None


def test_a_convolution_with_an_activation_is_no_product_of_queries_and_keys() -> None:
    graph = graph_of(lambda m, x, y: F.conv1d(x, y), (1, 2, 5), (4, 2, 3))
    assert contraction(graph.nodes[-1]) is not None
    assert product(graph, graph.nodes[-1]) is None


def test_a_parameter_that_is_projected_is_data() -> None:
    graph = graph_of(lambda m, x: x + F.linear(m.v, m.w))
    found = projection(graph, graph[TensorId("/linear#0")])
    assert found is not None
    assert (found.data, found.weight) == (V, W)


def test_what_is_no_product_is_no_contraction() -> None:
    graph = graph_of(lambda m, x: x * m.v + x)
    assert [contraction(node) for node in graph.nodes] == [None] * len(graph.nodes)


def test_a_multiplication_and_a_sum_are_a_product_of_what_was_repeated() -> None:
    graph = graph_of(lambda m, x, y: (x[:, None] * y).sum(-1), (2, 3), (2, 4, 3))
    found = weighed_sum(graph, graph.nodes[-1])
    assert found is not None
    x, y = (node.id for node in graph.nodes if node.op == "input")
    assert (found.left, found.right) == (x, y)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x * x).sum(-1),
        lambda m, x: (x * m.v).sum(-1),
        lambda m, x: (x * x.cos()).sum(),
        lambda m, x: (x + x.cos()).sum(-1),
    ],
)
def test_a_square_a_weighed_input_and_a_sum_of_all_are_no_product(function: Callable[..., Tensor]) -> None:
    graph = graph_of(function)
    assert weighed_sum(graph, graph.nodes[-1]) is None


# ---- values that are one


def test_what_is_computed_twice_in_the_same_way_is_one_value() -> None:
    graph = graph_of(lambda m, x: x.cos().exp() + x.cos().exp() + x.cos().sin())
    assert value_number(graph, TensorId("/exp#1")) == "/exp#0"
    assert value_number(graph, TensorId("/cos#2")) == "/cos#0"
    assert value_number(graph, TensorId("/sin#0")) == "/sin#0"


def test_other_arguments_and_other_places_make_other_values() -> None:
    graph = graph_of(lambda m, x: x.sum(0) + x.sum(1, keepdim=True) + (x - x.cos()) + (x.cos() - x))
    assert value_number(graph, TensorId("/sum#1")) == "/sum#1"
    assert value_number(graph, TensorId("/sub#1")) == "/sub#1"
    bounds = graph_of(lambda m, x: x.clamp(min=m.v) + x.clamp(max=m.v))
    assert value_number(bounds, TensorId("/clamp#1")) == "/clamp#1"
    halves = graph_of(lambda m, x: (lambda a, b: a + b)(*x.chunk(2)))
    assert value_number(halves, TensorId("/chunk#0:1")) == "/chunk#0:1"


def test_what_is_drawn_at_random_is_another_value_each_time() -> None:
    graph = graph_of(
        lambda m, x: F.dropout(x, 0.5, True) + F.dropout(x, 0.5, True) + torch.rand_like(x) * torch.rand_like(x)
    )
    assert [value_number(graph, name) == name for name in (TensorId("/dropout#1"), TensorId("/rand_like#1"))] == [True, True]
    idle = graph_of(lambda m, x: F.dropout(x.cos(), 0.5, False) + F.dropout(x.cos(), 0.5, False))
    assert value_number(idle, TensorId("/dropout#1")) == "/dropout#0"


@pytest.mark.parametrize(("p", "training", "drops"), [(0.5, True, True), (0.5, False, False), (0.0, True, False)])
def test_dropout_is_random_where_it_drops(p: float, training: bool, drops: bool) -> None:
    graph = graph_of(lambda m, x: F.dropout(x, p, training))
    assert draws(graph.nodes[-1]) is drops


# ---- walks


def diamond() -> Graph:
    """x, then cos and sin of it, their product, and exp of that."""
    return graph_of(lambda m, x: (x.cos() * x.sin()).exp())


PLACES = torch.tensor([1, 0])
SAYING_WHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "a bound of a slice": lambda x: x[:, : PLACES[0]],
    "a bound that no op made": lambda x: x[:, torch.IntTensor([1])[0] :],
    "an index": lambda x: x[PLACES],
    "a mask": lambda x: x[x > 0],
    "a place": lambda x: x[PLACES[0]],
    "narrow": lambda x: x.narrow(1, PLACES[0], 2),
    "index_select": lambda x: x.index_select(0, PLACES),
    "gather by name": lambda x: torch.gather(x, dim=1, index=PLACES.expand(2, 2)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "how often": lambda x: x.repeat_interleave(PLACES, 0),
    "a shape": lambda x: x.view_as(torch.ones(3, 2)),
}


@pytest.mark.parametrize("which", SAYING_WHERE)
def test_what_says_where_numbers_lie_is_no_input_of_data(which: str) -> None:
    graph = graph_of(lambda m, x: SAYING_WHERE[which](x))
    assert len(graph.nodes[-1].parents) > 1
    assert data_inputs(graph, graph.nodes[-1]) == ["input:args.0"]
    assert {node.id for node in above(graph, last(graph), MOVES)} == {last(graph), "input:args.0"}
    assert depends_on(graph, last(graph), graph.nodes[-1].parents[1].id)


def test_what_is_laid_together_or_counted_is_data() -> None:
    graph = graph_of(lambda m, x: torch.cat([x, torch.ones(2, 3, dtype=torch.int64)]))
    assert len(data_inputs(graph, graph.nodes[-1])) == 2
    graph = graph_of(lambda m, x: x.scatter(0, PLACES[:, None], x * 2))
    assert data_inputs(graph, graph.nodes[-1]) == ["input:args.0", "/mul#0"]
    graph = graph_of(lambda m, x: PLACES[PLACES])
    assert len(data_inputs(graph, graph.nodes[-1])) == len(graph.nodes[-1].parents)


def test_a_part_of_a_weight_is_one_however_it_is_told() -> None:
    graph = graph_of(lambda m, x: x @ m.w[:, : torch.IntTensor([2])[0]] @ m.w.narrow(0, torch.IntTensor([1])[0], 2))
    assert [weights(graph, node.id) for node in graph if node.op in ("getitem", "narrow") and len(node.shape) == 2] == [
        (W,),
        (W,),
    ]


def test_a_climb_meets_what_is_near_first_and_each_value_once() -> None:
    graph = diamond()
    x = graph.sources[0].id
    assert [node.id for node in above(graph, last(graph), lambda node: True)] == ["/exp#0", "/mul#0", "/cos#0", "/sin#0", x]


def test_a_climb_meets_what_it_may_not_go_through_and_nothing_above_it() -> None:
    graph = diamond()
    assert [node.id for node in above(graph, last(graph), frozenset(["exp"]))] == ["/exp#0", "/mul#0"]


def test_what_comes_after_a_value_stands_in_the_order_of_execution() -> None:
    graph = diamond()
    x = graph.sources[0].id
    assert [node.id for node in between(graph, x, last(graph))] == ["/cos#0", "/sin#0", "/mul#0", "/exp#0"]
    assert [node.id for node in between(graph, TensorId("/cos#0"), last(graph))] == ["/sin#0", "/mul#0", "/exp#0"]
    assert [node.id for node in between(graph, x, last(graph), lambda node: node.op != "mul")] == ["/mul#0", "/exp#0"]


def test_a_descent_meets_each_reader_with_the_way_to_it() -> None:
    graph = diamond()
    found = [(node.op, [one.op for one in way]) for node, way in below(graph, graph.sources[0], lambda node: True)]
    assert found == [
        ("input", []),
        ("cos", ["input"]),
        ("sin", ["input"]),
        ("mul", ["input", "cos"]),
        ("exp", ["input", "cos", "mul"]),
    ]


def test_a_descent_goes_below_its_start_and_no_further_than_it_is_let() -> None:
    graph = diamond()
    assert [node.op for node, _ in below(graph, graph.sources[0], frozenset(["cos"]))] == ["input", "cos", "sin", "mul"]
    seen = [node.op for node, _ in paths(graph, graph.sources[0], lambda node, way: len(way) < 2)]
    assert seen == ["input", "cos", "sin", "mul"]


def test_a_value_depends_on_what_it_is_computed_from() -> None:
    graph = diamond()
    assert depends_on(graph, TensorId("/exp#0"), TensorId("/sin#0"))
    assert depends_on(graph, TensorId("/sin#0"), TensorId("/sin#0"))
    assert not depends_on(graph, TensorId("/sin#0"), TensorId("/cos#0"))


def test_views_casts_and_copies_are_taken_off() -> None:
    graph = graph_of(lambda m, x: x.cos().view(3, 2).double().contiguous())
    assert strip_views(graph, last(graph)) == "/cos#0"
    turned = graph_of(lambda m, x: x.cos().t())
    assert strip_views(turned, last(turned)) == "/t#0"


def _overwritten(m: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[0].mul_(2)
    return y + 0


def test_a_value_that_was_overwritten_is_not_what_it_was_before() -> None:
    graph = graph_of(_overwritten)
    (alias,) = [node.id for node in graph.nodes if node.op == "alias"]
    assert strip_views(graph, alias) == alias


def test_views_and_the_bias_that_alone_read_a_projection_belong_to_it() -> None:
    graph = graph_of(lambda m, x: (F.linear(x, m.w).view(2, 1, 3) + m.v).exp())
    assert settled(graph, graph[TensorId("/linear#0")]).id == "/add#0"
    shared = graph_of(lambda m, x: F.linear(x, m.w).view(2, 3) * F.linear(x, m.w))
    assert settled(shared, shared[TensorId("/linear#0")]).id == "/view#0"
    read_twice = graph_of(lambda m, x: (lambda y: y + m.v + y)(F.linear(x, m.w)))
    assert settled(read_twice, read_twice[TensorId("/linear#0")]).id == "/linear#0"
    no_bias = graph_of(lambda m, x: F.linear(x, m.w) + x)
    assert settled(no_bias, no_bias[TensorId("/linear#0")]).id == "/linear#0"


@pytest.mark.parametrize("like", [lambda w, x: w.type_as(x), lambda w, x: w.to(x), lambda w, x: w.view_as(x)])
def test_a_weight_that_reads_data_for_its_type_or_shape_is_one(like: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = graph_of(lambda m, x: x @ like(m.w, 2 * x), (3, 3))
    found = contraction(graph.nodes[-1])
    assert found is not None
    assert weights(graph, found.right) == (W,)
    assert is_constant(graph, found.right)
