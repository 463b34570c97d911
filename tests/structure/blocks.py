"""Blocks of an attention and a memory: how the two join the stream, and what they share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HIDDEN, SIZE, TOKENS, WIDTH, Plain, attends, carries, joined, remembers, split, weight


class Attention(nn.Module):
    """Queries of one value, keys and values of another."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(WIDTH, WIDTH),
            *(nn.Linear(width, WIDTH) for _ in range(2)),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor, seen: Tensor, mask: Tensor | None = None, kind: str = "self") -> Tensor:
        scores = split(self.q(x)) @ split(self.k(seen)).mT * SIZE**-0.5
        scores = scores if mask is None else scores + mask
        return self.out(joined(attends(scores.softmax(-1), kind=kind) @ split(self.v(seen))))


class Block(nn.Module):
    """An attention and a memory; how they join the stream is what differs."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.memory = Attention(), Plain()
        self.a, self.b, self.c, self.d = (nn.LayerNorm(WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + self.attend(y, y))
        return carries(x + self.memory(self.b(x)))


class Parallel(Block):
    """Both read the same value and are written one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return carries(x + self.attend(y, y) + self.memory(y))


class ParallelFirst(Block):
    """The two writes meet before they join the stream."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return carries(self.attend(y, y) + self.memory(y) + x)


class Sandwich(Block):
    """A norm before each of the two, and one after."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + self.c(self.attend(y, y)))
        return carries(x + self.d(self.memory(self.b(x))))


class PostNorm(Block):
    """A norm on the stream after each write."""

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.a(x + self.attend(x, x)))
        return carries(self.b(x + self.memory(x)))


class ReZero(Block):
    """Each write is scaled by one number that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = carries(x + self.rate * self.attend(x, x))
        return carries(x + self.rate * self.memory(x))


class LayerScale(Block):
    """Each write is scaled by a learned number for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((2, WIDTH), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + self.attend(y, y) * self.scale[0])
        return carries(x + self.memory(self.b(x)).mul(self.scale[1]))


class GatedWrite(Block):
    """A gate that is read off the stream weighs what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + torch.sigmoid(self.gate(y)) * self.attend(y, y))
        return carries(x + self.memory(self.b(x)))


class Masked(Block):
    """Padded positions are set to zero after each write."""

    def forward(self, x: Tensor) -> Tensor:
        real = 1 - (x[..., :1] < -9).float()
        y = self.a(x)
        x = carries((x + self.attend(y, y)) * real)
        return carries((x + self.memory(self.b(x))).masked_fill(real == 0, 0.0))


class OneOp(Block):
    """Each write scales what it adds in one op, written in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = weight(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(torch.add(x, self.attend(y, y), alpha=0.5))
        x = carries(torch.addcmul(x, self.scale, self.memory(self.b(x))))
        return torch.lerp(x, self.memory(self.c(x)), 0.25)


class SumOfList(Block):
    """What is added is put in a list or a stack with the stream, and that is summed up."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(sum([self.attend(y, y)], x))
        return carries(torch.stack([x, self.memory(self.b(x))]).sum(0))


class Subtracted(Block):
    """Steps down a slope: what is taken away is written, minus once."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + self.attend(y, y))
        return x - self.memory.down(F.gelu(self.memory.up(self.b(x))))


class Overtaken(Block):
    """Goes on with the larger of two values: no write, and a norm on the way is not the last one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + self.attend(y, y))
        return torch.maximum(x, self.memory.down(F.gelu(self.memory.up(self.b(x)))))


class HalfSteps(Block):
    """Two memories around the attention, each written by half."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Plain()

    def forward(self, x: Tensor) -> Tensor:
        x = carries(x + 0.5 * self.first(self.c(x)))
        y = self.a(x)
        x = carries(x + self.attend(y, y))
        x = carries(x + 0.5 * self.memory(self.b(x)))
        return self.d(x)


class Convolved(Block):
    """A gated convolution beside attention, which mixes positions: no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv1d(WIDTH, 2 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.near, self.batch = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + self.attend(y, y))
        y = F.glu(self.enter(self.c(x).mT), 1)
        x = carries(x + self.leave(F.silu(self.batch(self.near(y)))).mT)
        return carries(x + self.memory(self.b(x)))


class Factored(Block):
    """The output of the attention is projected in two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + self.up(self.attend(y, y)))
        return carries(x + self.memory(self.b(x)))


class InPlace(Block):
    """What is written is overwritten by the sum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = self.attend(y, y).add_(x)
        y = self.b(x)
        return self.memory(y).add_(x)


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


class Turned(OneProjection):
    """Pairs of units are turned by matrices of two by two, and one projection reads all."""

    def __init__(self) -> None:
        super().__init__()
        self.leave = nn.Linear(WIDTH + HIDDEN, WIDTH)

    def turned(self, x: Tensor) -> Tensor:
        """One column of each matrix times the first unit of each pair, the other one times the second."""
        angles = torch.arange(x.shape[2])[:, None] * 0.5 ** torch.arange(SIZE // 2)
        turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).unflatten(-1, (2, 2))
        pairs = x.unflatten(-1, (-1, 1, 2))
        return (turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs[..., 1]).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, units = self.enter(self.a(x)).split([WIDTH] * 3 + [HIDDEN], -1)
        p = attends((self.turned(split(q)) @ self.turned(split(k)).mT * SIZE**-0.5).softmax(-1))
        return carries(x + self.leave(torch.cat([joined(p @ split(v)), remembers(F.gelu(units))], -1)))


class Layers(nn.Module):
    """Blocks over tokens; one block may come more than once."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.tokens, self.blocks, self.norm = nn.Embedding(TOKENS, WIDTH), nn.ModuleList(blocks), nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


FOUND = (
    Block,
    Parallel,
    ParallelFirst,
    Sandwich,
    PostNorm,
    ReZero,
    LayerScale,
    GatedWrite,
    Masked,
    OneOp,
    SumOfList,
    HalfSteps,
    Convolved,
    Factored,
    InPlace,
    OneProjection,
    OneOutput,
    OneProjectionGated,
    Turned,
)
