"""A product of several operands is that of `torch.einsum`, however it is spelled."""

from typing import Any

import pytest
import torch
from torch import nn

import fmr
from fmr.ops.einsum import einsum

A, B, C, V = (torch.randn(shape, generator=torch.manual_seed(n)) for n, shape in enumerate([(2, 3), (3, 4), (4, 5), (3,)]))
X, Y, W = torch.randn(2, 6, 3), torch.randn(2, 7, 3), torch.randn(2, 7, 3)

CALLS: list[tuple[Any, ...]] = [
    ("ij,jk,kl->il", A, B, C),
    ("ij,jk,kl->li", [A, B, C]),
    ("ij,jk,kl", A, B, C),
    ("zj,jk,ka", A, B, C),
    ("...j,jk,kl->...l", X, B, C),
    ("...j,jk,kl", X, B, C),
    ("...qd,...kd,d->...qk", X, Y, V),
    ("bqd, bkd, bkd -> bqkd", X, Y, W),
    ("bqd,bkd,bqd->bqk", X, Y, X),
    ("bqd,d,d->bq", X, V, V),
    ("ii,ij,j->j", torch.randn(3, 3), torch.randn(3, 4), torch.randn(4)),
    ("i,j,k->kij", V, V, V),
    (",ij,->ij", torch.tensor(2.0), A, torch.tensor(3.0)),
    ("...i,j...,k->...k", torch.randn(5, 3), torch.randn(4, 5), V),
    (X, [0, 1, 2], B, [2, 3], C, [3, 4], [0, 1, 4]),
    (X, [..., 2], B, [2, 3], C, [3, 4], [..., 4]),
    (A, [0, 1], B, [1, 2], C, [2, 3]),
]


@pytest.mark.parametrize("given", CALLS, ids=lambda given: str([one for one in given if not isinstance(one, torch.Tensor)]))
def test_several_operands_are_multiplied_two_at_a_time(given: tuple[Any, ...]) -> None:
    torch.testing.assert_close(einsum(*given), torch.einsum(*given))


class Product(nn.Module):
    def __init__(self, *equation: Any) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *operands: torch.Tensor) -> torch.Tensor:
        return torch.einsum(*self.equation, operands)


@pytest.mark.parametrize(
    ("equation", "operands", "ops"),
    [
        ("bqd,bkd,d->bqk", (X, Y, V), ["permute", "getitem", "mul", "einsum"]),
        ("bqd,bkd,bqd->bqk", (X, Y, X), ["permute", "getitem", "mul", "einsum"]),
        ("...j,jk,kl", (X, B, C), ["einsum", "einsum"]),
    ],
)
def test_what_only_scales_an_operand_is_multiplied_into_it(equation: str, operands: Any, ops: list[str]) -> None:
    run = fmr.run(Product(equation), *operands)
    assert [node.op for node in run.graph.inner("/einsum#0")] == ops
    last = run.graph.inner("/einsum#0")[-1].id
    torch.testing.assert_close(run[last], torch.einsum(equation, *operands))
