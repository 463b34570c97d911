"""The name of a model's weights: every bit counts, wherever and however it lies."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fmr.weights import fingerprint


def holding(*values: Tensor) -> nn.Module:
    model = nn.Module()
    for n, value in enumerate(values):
        model.register_buffer(f"b{n}", value)
    return model


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor(1.0),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(3, dtype=torch.bool),
        torch.ones(70, 7).t()[1:],
        torch.arange(9001, dtype=torch.uint8)[3:],
        torch.ones(8192 * 3 + 5, dtype=torch.float64),
        torch.ones(3, 4).expand(2, 3, 4),
    ],
    ids=lambda one: f"{one.dtype} {tuple(one.shape)}",
)
def test_every_element_counts(value: Tensor) -> None:
    before = fingerprint(holding(value))
    assert fingerprint(holding(value.clone())) == before
    for place in (0, value.numel() // 2, value.numel() - 1):
        changed = value.clone(memory_format=torch.contiguous_format).resolve_conj()
        assert fingerprint(holding(changed)) == before
        changed.view(-1).view(torch.uint8)[place * value.element_size()] ^= 1
        assert fingerprint(holding(changed)) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[torch.arange(len(x)).flip(0)],
        lambda x: x[:, [1, 0, *range(2, x.shape[1])]],
        lambda x: x.view(x.shape[1], x.shape[0]),
        lambda x: x.double(),
        lambda x: x.view(torch.int32),
        lambda x: 1 - x,
    ],
)
def test_so_does_where_it_lies_and_what_it_is(change: Callable[[Tensor], Tensor]) -> None:
    x = torch.eye(4).repeat(500, 25)
    x[3, 4], x[0, 1] = 0.5, 0.25
    assert fingerprint(holding(change(x))) != fingerprint(holding(x))
    y = torch.eye(2).repeat(600, 600)  # the same sums of rows and columns both ways
    assert fingerprint(holding(change(y))) != fingerprint(holding(y)) or change(y).equal(y)


def test_weights_without_bits_are_names_and_shapes_and_tied_ones_are_told() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2, device="meta"))
    assert fingerprint(model) == fingerprint(model)
    sparse = torch.eye(3).to_sparse()
    assert fingerprint(holding(sparse)) != fingerprint(holding(2 * sparse))
    assert fingerprint(holding(torch.empty(0))) != fingerprint(holding(torch.empty(0, 1)))
    one = torch.ones(2)
    assert fingerprint(holding(one, one)) != fingerprint(holding(one, one.clone()))
