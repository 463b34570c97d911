"""Every pair of projections that writes to a stream is claimed or refused with a reason that is so."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from tests.structure import scores
from tests.structure.idioms import HIDDEN, WIDTH, Heads, Stack


class Pair(nn.Module):
    """Two projections and what lies between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def rolled(h: Tensor) -> Tensor:
    return torch.relu(h).roll(1, 1)


REASONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nothing": (lambda h: h, "nothing bends what memory.0.up/linear#0 makes"),
    "a norm": (lambda h: F.normalize(h, dim=-1), "nothing but a norm bends what memory.0.up/linear#0 makes"),
    "a norm by hand": (lambda h: h / h.pow(2).mean(-1, keepdim=True).sqrt(), "nothing but a norm bends"),
    "a sum so far": (lambda h: torch.relu(h).cumsum(1), "memory.0/cumsum#0 lies between its two projections"),
    "a roll": (rolled, "its coefficients are made of other positions, too"),
    "a mean": (lambda h: torch.relu(h).mean(1, keepdim=True), "told of several positions or units: memory.0/mean#0"),
    "the other end": (lambda h: torch.relu(h).flip(1), "its coefficients are made of other positions, too"),
}


@pytest.mark.parametrize("name", REASONS)
def test_a_pair_of_projections_that_is_no_memory_is_told(name: str) -> None:
    between, reason = REASONS[name]
    torch.manual_seed(0)
    found = fmr.locate(fmr.run(Stack(lambda: Heads(scores.einsum), lambda: Pair(between)), torch.randint(11, (2, 6))))
    assert not found.mlps
    told = [one.reason for one in found.rejected if one.what == "memory" and "memory.0" in one.id]
    assert len(told) == 1
    assert reason in told[0]
