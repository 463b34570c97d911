"""Every product as an einsum: the subscripts by hand, and what torch computes of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.graph.graph import Graph
from fmr.structure.normal.einsum import Subscripts, made_dim, of_projection, read_dims, subscripts_of, summed_dim
from fmr.structure.normal.match import Contraction, Projection, contraction, projection, weighed_sum
from tests.small import Fn


def equation(subscripts: Subscripts) -> str:
    """Subscripts as torch writes them, with the subscripts in the order in which they appear."""
    names: dict[str, str] = {}
    words = ["".join(names.setdefault(letter, chr(97 + len(names))) for letter in word) for word in subscripts]
    return f"{words[0]},{words[1]}->{words[2]}"


def product_of(run: fmr.Run) -> Contraction:
    """The only product of a run."""
    graph = run.graph
    found = [contraction(node) or weighed_sum(graph, node) for node in graph.nodes]
    (only,) = [one for one in found if one is not None]
    return only


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], str]] = {
    "matrices": (torch.matmul, [(2, 3), (3, 4)], "ab,bc->ac"),
    "batches": (torch.bmm, [(5, 2, 3), (5, 3, 4)], "abc,acd->abd"),
    "two dimensions of a batch": (torch.matmul, [(6, 5, 2, 3), (6, 5, 3, 4)], "abcd,abde->abce"),
    "a batch and a matrix": (torch.matmul, [(5, 2, 3), (3, 4)], "abc,cd->abd"),
    "a matrix and a batch": (torch.matmul, [(2, 3), (5, 3, 4)], "ab,cbd->cad"),
    "a matrix and a vector": (torch.mv, [(2, 3), (3,)], "ab,b->a"),
    "a batch and a vector": (torch.matmul, [(5, 2, 3), (3,)], "abc,c->ab"),
    "a linear layer": (F.linear, [(5, 2, 3), (4, 3)], "abc,dc->abd"),
    "a linear layer of one unit": (F.linear, [(5, 2, 3), (3,)], "abc,c->ab"),
    "rows of two matrices": (torch.inner, [(2, 3), (4, 3)], "ab,cb->ac"),
    "the last two with the first two": (torch.tensordot, [(2, 3, 4), (3, 4, 5)], "abc,bcd->ad"),
    "the last with the first": (lambda a, b: torch.tensordot(a, b, 1), [(2, 3), (3, 4)], "ab,bc->ac"),
    "pairs of dimensions": (lambda a, b: torch.tensordot(a, b, ([0, 2], [2, 0])), [(3, 2, 4), (4, 5, 3)], "abc,cda->bd"),
    "an einsum": (lambda a, b: torch.einsum("bqhd, bkhd -> bhqk", a, b), [(2, 3, 4, 5), (2, 6, 4, 5)], "abcd,aecd->acbe"),
    "an einsum that says no result": (lambda a, b: torch.einsum("ki,jk", a, b), [(3, 2), (4, 3)], "ab,ca->bc"),
    "an einsum with dots": (lambda a, b: torch.einsum("...d,...d->...", a, b), [(2, 3, 4), (2, 3, 4)], "abc,abc->ab"),
    "dots for more on the left": (lambda a, b: torch.einsum("...i,...ij", a, b), [(2, 3, 4), (3, 4, 5)], "abc,bcd->abd"),
    "dots for more on the right": (lambda a, b: torch.einsum("...i,...ij", a, b), [(3, 4), (2, 3, 4, 5)], "ab,cabd->cad"),
    "dots and no result": (lambda a, b: torch.einsum("...ij,jk", a, b), [(2, 3, 4), (4, 5)], "abc,cd->abd"),
    "a sum of a multiplication": (lambda a, b: (a * b).sum(-1), [(2, 3), (2, 3)], "ab,ab->a"),
    "a sum over the middle": (lambda a, b: (a[..., None] * b[:, :, None]).sum(1), [(2, 3, 4), (2, 3, 5)], "abc,abd->acd"),
    "a sum over two": (lambda a, b: (a * b).sum((0, 2)), [(2, 3, 4), (2, 3, 4)], "abc,abc->b"),
    "a factor that is repeated": (lambda a, b: (a[:, None] * b).sum(-1), [(2, 4), (2, 3, 4)], "ab,acb->ac"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_subscripts_of_a_product_are_those_of_an_einsum_that_computes_it(name: str) -> None:
    function, shapes, expected = PRODUCTS[name]
    run = fmr.run(Fn(lambda self, a, b: function(a, b)), *(torch.randn(shape) for shape in shapes))
    found = product_of(run)
    told = equation(subscripts_of(run.graph, found))
    assert told == expected
    computed = torch.einsum(told, run[found.left], run[found.right])
    assert torch.allclose(computed, run[found.node.id], atol=1e-5)


def test_a_sum_that_keeps_its_dimension_has_a_letter_of_its_own_for_it() -> None:
    run = fmr.run(Fn(lambda self, a, b: (a * b).sum(-1, keepdim=True)), torch.randn(2, 3), torch.randn(2, 3))
    subscripts = subscripts_of(run.graph, product_of(run))
    assert equation(subscripts) == "ab,ab->ac"
    assert len(subscripts.contracted) == 1


def test_distances_are_a_product_of_the_rows_of_both() -> None:
    run = fmr.run(Fn(lambda self, a, b: torch.cdist(a, b)), torch.randn(5, 2, 3), torch.randn(5, 4, 3))
    node = run.graph.nodes[-1]
    assert equation(subscripts_of(run.graph, Contraction(node, *(parent.id for parent in node.parents)))) == "abc,adc->abd"


@pytest.mark.parametrize(
    ("function", "data", "weight", "expected"),
    [
        (F.conv1d, (2, 3, 9), (4, 3, 1), "abc,dbe->adc"),
        (F.conv2d, (2, 3, 9, 8), (4, 3, 1, 1), "abcd,ebfg->aecd"),
        (F.conv1d, (3, 9), (4, 3, 1), "ab,cad->cb"),
        (F.conv_transpose1d, (2, 3, 9), (3, 4, 1), "abc,bde->adc"),
    ],
)
def test_a_convolution_sums_over_the_channels(
    function: Callable[..., Tensor], data: tuple[int, ...], weight: tuple[int, ...], expected: str
) -> None:
    run = fmr.run(Fn(lambda self, a, b: function(a, b)), torch.randn(data), torch.randn(weight))
    found = product_of(run)
    told = equation(subscripts_of(run.graph, found))
    assert told == expected
    computed = torch.einsum(told, run[found.left], run[found.right])  # a window of one place adds nothing up
    assert torch.allclose(computed, run[found.node.id], atol=1e-5)


def test_what_letters_say_of_their_dimensions() -> None:
    subscripts = Subscripts("bhqd", "bhkd", "bhqk")
    assert (subscripts.contracted, subscripts.batch) == ("d", "bh")
    assert (subscripts.free(subscripts.left), subscripts.free(subscripts.right)) == ("q", "k")
    assert subscripts.swapped == Subscripts("bhkd", "bhqd", "bhqk")


# ---- projections


def projected(function: Callable[..., Tensor], weight: tuple[int, ...], *data: int) -> tuple[Graph, Projection]:
    """The only projection of a run of `function(x, weight)`."""
    run = fmr.run(Fn(lambda self, x: function(x, self.w), w=nn.Parameter(torch.randn(weight))), torch.randn(data))
    (found,) = [found for node in run.graph.nodes if (found := projection(run.graph, node)) is not None]
    return run.graph, found


PROJECTIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    # what reads a weight: its shape, that of the data; the subscripts, which dims it reads, sums over, and makes
    "a linear layer": (F.linear, (4, 3), (5, 2, 3), ("abc,dc->abd", (2,), -1, 0)),
    "a matrix (in, out)": (torch.matmul, (3, 4), (5, 2, 3), ("abc,cd->abd", (2,), -1, 1)),
    "a weight on the left": (lambda x, w: w @ x, (4, 3), (5, 3, 2), ("abc,db->adc", (1,), -2, 0)),
    "a matrix for each head": (torch.matmul, (6, 3, 4), (5, 6, 2, 3), ("abcd,bde->abce", (1, 3), -1, 1)),
    "a matrix for the only head": (torch.matmul, (1, 3, 4), (5, 1, 2, 3), ("abcd,bde->abce", (3,), -1, 1)),
    "one matrix, repeated": (lambda x, w: x @ w.expand(5, 3, 4), (3, 4), (5, 2, 3), ("abc,acd->abd", (2,), -1, 1)),
    "heads laid out": (
        lambda x, w: torch.einsum("bshd,hdo->bso", x, w), (6, 3, 4), (5, 2, 6, 3), ("abcd,cde->abe", (2, 3), -1, 1)
    ),
    "a convolution": (F.conv1d, (4, 3, 1), (5, 3, 9), ("abc,dbe->adc", (1,), -2, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROJECTIONS)
def test_what_a_projection_reads_and_makes(name: str) -> None:
    function, weight, data, expected = PROJECTIONS[name]
    graph, found = projected(function, weight, *data)
    told = equation(of_projection(graph, found)), read_dims(graph, found), summed_dim(graph, found), made_dim(graph, found)
    assert told == expected
