"""Blocks whose attention and memory share a projection: the one that they begin with, or the one that they end in."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HIDDEN, SIZE, WIDTH, attends, carries, joined, remembers, split
from tests.structure.wholes import Block


class OneProjection(Block):
    """Queries, keys, values and what enters the memory come from one projection."""

    gates = 0

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(WIDTH, 3 * WIDTH + (1 + self.gates) * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, *units = self.enter(self.a(x)).split([WIDTH] * 3 + [HIDDEN] * (1 + self.gates), -1)
        p = attends((split(q) @ split(k).mT * SIZE**-0.5).softmax(-1))
        post = remembers(units[0] * F.silu(units[1]) if self.gates else F.gelu(units[0]))
        return carries(x + self.attend.out(joined(p @ split(v))) + self.memory.down(post))


class OneOutput(Block):
    """One projection reads the heads and the coefficients of the memory side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = nn.Linear(WIDTH + HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        q, k, v = (split(one(y)) for one in (self.attend.q, self.attend.k, self.attend.v))
        z = joined(attends((q @ k.mT * SIZE**-0.5).softmax(-1)) @ v)
        return carries(x + self.leave(torch.cat([z, remembers(F.gelu(self.memory.up(y)))], -1)))


class OneProjectionGated(OneProjection):
    """The same with a gate for what enters the memory."""

    gates = 1
