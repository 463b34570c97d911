"""Attentions of the smallest sizes: a width, a head, a position or a batch of one, or of none."""

import pytest
import torch
from torch import Tensor, nn

import fmr


class Attention(nn.Module):
    """One attention with a norm before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm(x)
        q, k, v = (
            layer(y).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        z = (q @ k.mT).softmax(-1) @ v
        return x + self.o(z.transpose(1, 2).reshape(batch, length, width))


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (2, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_heads_and_their_size_are_told_at_any_width_batch_and_length(
    width: int, heads: int, batch: int, length: int
) -> None:
    (block,) = fmr.locate(fmr.run(Attention(width, heads), torch.randn(batch, length, width))).attention
    assert (block.n_heads, block.head_dim) == (heads, width // heads)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0)])
def test_a_run_without_numbers_proves_nothing(batch: int, length: int) -> None:
    found = fmr.locate(fmr.run(Attention(4, 2), torch.randn(batch, length, 4)))
    assert found.attention == ()
    reasons = [one.reason for one in found.rejected if one.what == "attention"]
    assert reasons == [f"/softmax#0 has no numbers, [{batch}, 2, {length}, {length}], that prove anything"]
