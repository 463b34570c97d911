"""Which number became which: numbered places sent along a few ops, worked out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.graph.graph import Graph
from fmr.nodes import Node
from fmr.structure.normal.indices import dim_map, iota, rows_of, trace
from fmr.structure.normal.match import projection
from tests.small import Fn

FOREIGN = -1.0
"""What stands for a number that comes from elsewhere, or for several."""


def way_of(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[Graph, tuple[Node, ...]]:
    """The graph of a function of x, and the nodes from x on, each reading the one before."""
    graph = fmr.run(Fn(lambda self, *args: function(*args)), *(torch.rand(shape) for shape in shapes)).graph
    (start, *_), way = graph.sources, [graph.nodes[-1]]
    while way[0] is not start:
        way.insert(0, graph[way[0].parents[0].id])
    return graph, tuple(way)


def test_each_place_has_its_own_number() -> None:
    assert iota(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]


def _written(x: Tensor) -> Tensor:
    whole = x.new_zeros(1, 3)
    whole[:, 1:] = x
    return whole + 0


MOVED: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], object]] = {
    "transposed": (lambda x: x.t(), (2, 3), [[0, 3], [1, 4], [2, 5]]),
    "split into heads and joined": (lambda x: x.view(1, 2, 2).transpose(0, 1).flatten(1), (1, 4), [[0, 1], [2, 3]]),
    "halved": (lambda x: x.chunk(2, -1)[1], (1, 4), [[2, 3]]),
    "rolled": (lambda x: x.roll(1, -1), (1, 4), [[3, 0, 1, 2]]),
    "repeated": (lambda x: x.repeat_interleave(2, 0), (2, 1), [[0], [0], [1], [1]]),
    "padded": (lambda x: F.pad(x, (0, 2)), (1, 2), [[0, 1, FOREIGN, FOREIGN]]),
    "written into zeros": (_written, (1, 2), [[FOREIGN, 0, 1]]),
    "added to zeros": (lambda x: x.new_zeros(3, 1).index_add(0, torch.arange(2), x), (2, 1), [[0], [1], [FOREIGN]]),
    "bent and scaled": (lambda x: (x * 2).tanh().t(), (1, 2), [[0], [1]]),
    "a sum over one place": (lambda x: x.sum(-1), (2, 1), [0, 1]),
    "a sum of several": (lambda x: x.sum(-1), (2, 2), [FOREIGN, FOREIGN]),
    "a mean of several": (lambda x: x.mean(-1), (2, 2), [FOREIGN, FOREIGN]),
    "a mean that keeps its dimension": (lambda x: x.mean(-1, keepdim=True), (2, 1), [[0], [1]]),
}


@pytest.mark.parametrize("name", MOVED)
def test_numbers_arrive_where_the_ops_move_them(name: str) -> None:
    function, shape, expected = MOVED[name]
    graph, way = way_of(function, shape)
    arrived = trace(graph, iota(*shape), way)
    assert arrived is not None
    assert arrived.tolist() == expected


def test_what_comes_from_elsewhere_has_no_number() -> None:
    graph, way = way_of(lambda x, y: torch.cat([x, y], -1), (2, 1), (2, 2))
    arrived = trace(graph, iota(2, 1), way)
    assert arrived is not None
    assert arrived.tolist() == [[0, FOREIGN, FOREIGN], [1, FOREIGN, FOREIGN]]


def test_what_a_product_makes_of_a_value_on_the_side_is_from_elsewhere() -> None:
    graph, way = way_of(lambda x: x.t() * (x.cos() @ torch.ones(3, 4)).sum(), (2, 3))
    arrived = trace(graph, iota(2, 3), way)
    assert arrived is not None
    assert arrived.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_view_needs_no_sizes_that_were_computed() -> None:
    graph, way = way_of(lambda x, y: x.reshape(y.sum().long() + 2, 2).t(), (4,), (0,))
    assert trace(graph, iota(4), way) is not None


def test_places_that_are_counted_out_are_known() -> None:
    graph, way = way_of(lambda x: x.gather(1, torch.arange(2)[:, None]), (2, 3))
    arrived = trace(graph, iota(2, 3), way)
    assert arrived is not None
    assert arrived.tolist() == [[0], [4]]


def test_a_way_that_cannot_be_run_again_carries_nothing() -> None:
    graph, way = way_of(lambda x: x.view(6).unflatten(0, (3, 2)).t(), (2, 3))
    assert trace(graph, iota(2, 2), way) is None


# ---- dimensions


DIMENSIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int | None, ...]]] = {
    "nothing moves": (lambda x: x.cos().exp(), (2, 3, 4), (0, 1, 2)),
    "turned": (lambda x: x.permute(2, 0, 1), (2, 3, 4), (2, 0, 1)),
    "one is put in": (lambda x: x[:, None].cos(), (2, 3), (0, None, 1)),
    "two become one": (lambda x: x.flatten(1), (2, 3, 4), (0, None)),
    "one becomes two": (lambda x: x.view(2, 3, 2), (2, 6), (0, None, None)),
    "one of size one stays in its place": (lambda x: x.cos().transpose(1, 2), (2, 1, 1), (0, 1, 2)),
    "a part is taken": (lambda x: x[:, :2], (2, 3), (0, None)),
    "filled up": (lambda x: F.pad(x, (0, 2)), (2, 3), (0, 1)),
    "turned round": (lambda x: x.flip(1), (2, 3), (0, None)),
    "added up without a move": (lambda x: x.sum(-1), (2, 3), (None,)),
    "added up after one": (lambda x: x.t().sum(-1), (2, 3), (None,)),
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_each_dimension_is_traced_to_the_one_that_it_was(name: str) -> None:
    function, shape, expected = DIMENSIONS[name]
    assert dim_map(*way_of(function, shape)) == expected


def test_an_empty_value_has_no_traces() -> None:
    assert dim_map(*way_of(lambda x: x.t(), (0, 3))) == (None, None)


def test_rows_are_what_a_projection_sums_over_for_one_place() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    graph = fmr.run(Fn(lambda self, x: x @ self.w, w=weight), torch.randn(2, 5, 3)).graph
    found = projection(graph, graph.nodes[-1])
    assert found is not None
    rows = rows_of(graph, found, iota(2, 5, 3))
    assert rows.shape == (10, 3)
    assert rows[6].tolist() == [18, 19, 20]


def test_rows_hold_all_heads_that_a_projection_tells_apart_but_for_named_places() -> None:
    weight = nn.Parameter(torch.randn(2, 3, 4))
    graph = fmr.run(Fn(lambda self, x: torch.einsum("bhpu,huo->bpo", x, self.w), w=weight), torch.randn(1, 2, 5, 3)).graph
    found = projection(graph, graph.nodes[-1])
    assert found is not None
    rows = rows_of(graph, found, iota(1, 2, 5, 3))
    assert rows.shape == (5, 6)
    assert rows[1].tolist() == [3, 4, 5, 18, 19, 20]
    assert rows_of(graph, found, iota(1, 2, 5, 3), places=(1,)).shape == (10, 3)
