"""How a stream ends: the final norm is the whole, gain included, and logits are found behind what pools and scales."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from tests.structure.blocks import Block
from tests.structure.idioms import WIDTH

LOGITS = 2 * WIDTH + 1


class Ended(nn.Module):
    """A layer and the end of the stream as a function of it, which tells the true final norm and the logits."""

    def __init__(self, end: Callable[["Ended", Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.block, self.logits, self.end = Block(), nn.Linear(WIDTH, LOGITS), end
        self.norm = nn.LayerNorm(WIDTH)
        self.gain, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.rand(WIDTH))
        self.told: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        norm, logits = self.end(self, self.block(x))
        self.told += [norm, logits]
        return logits


def unit(model: Ended, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.normalize(x, dim=-1) * model.gain
    return y, model.logits(y)


def unit_scaled(model: Ended, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.normalize(x, dim=-1) * WIDTH**0.5 * model.gain
    return y, model.logits(y)


def standard(model: Ended, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.addcmul(model.bias, F.layer_norm(x, (WIDTH,)), model.gain)
    return y, model.logits(y)


def scaled_before(model: Ended, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model.norm(x)
    return y, model.logits(y / 4)


def capped(model: Ended, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model.norm(x)
    return y, torch.tanh(model.logits(y) / 3) * 3


def pooled(model: Ended, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model.norm(x)
    return y, model.logits(y.mean(1))


@pytest.mark.parametrize("end", [unit, unit_scaled, standard, scaled_before, capped, pooled])
def test_the_final_norm_is_the_whole_and_the_last_point_reads_as_the_logits(
    end: Callable[[Ended, Tensor], tuple[Tensor, Tensor]],
) -> None:
    torch.manual_seed(0)
    model = Ended(end).eval()
    run = fmr.run(model, torch.randn(2, 5, WIDTH))
    found = fmr.locate(run)
    assert found.final_norm is not None
    assert torch.equal(run[found.final_norm], model.told[0])
    assert found.unembedding is not None
    assert run[found.unembedding].shape[-1] == LOGITS
    assert found.residual is not None
    torch.testing.assert_close(found.read_out(run, found.residual.writes[-1].after), model.told[1])


class Masked(Ended):
    """What stands at padded tokens is set to zero after the final norm."""

    def forward(self, x: Tensor) -> Tensor:
        ids = x[..., 0].long()
        return self.logits(self.norm(self.block(x)) * (ids != 0)[..., None].to(x.dtype))  # type: ignore[no-any-return]


def test_logits_are_found_behind_a_mask_of_tokens() -> None:
    found = fmr.locate(fmr.run(Masked(pooled).eval(), 3 * torch.rand(2, 5, WIDTH)))
    assert (found.final_norm, found.unembedding) == (fmr.Site("norm/layer_norm#0"), fmr.Site("logits/linear#0"))
