"""Streams that a branch joins in another way than by a plain add: gated twice, in a bottleneck, beside a token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.blocks import Attention
from tests.structure.idioms import SIZE, WIDTH, Plain, attends, carries, joined, remembers, split, weight
from tests.structure.streams import Deep


class HighwayKept(Deep):
    """The gate says what is kept of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def go(self, x: Tensor) -> Tensor:
        for gate, block in zip(self.gates, self.blocks, strict=True):
            y = block.a(x)
            x = carries(x + block.attend(y, y))
            keep = torch.sigmoid(gate(x))
            x = carries(keep * x + (1 - keep) * block.memory(block.b(x)))
        return x


class Gateway(Deep):
    """Queries read a context; two gates, each made of both, say what is kept and what is added.

    Positions are given to the queries before they read: that sum is no write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context, self.places = weight(2, 7, WIDTH), Plain()
        self.reads = nn.ModuleList(Attention() for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(2 * WIDTH, 2 * WIDTH) for _ in range(2))

    def go(self, x: Tensor) -> Tensor:
        seen = x.flip(1).cumsum(1)
        for block, read, gates in zip(self.blocks, self.reads, self.gates, strict=True):
            place = torch.relu(x.detach()) + 1
            x = carries(block.c(x + block.attend(x + place, x + place)))
            y = read(x + place, seen, kind="cross")
            keep, add = torch.sigmoid(gates(torch.cat([x, y], -1))).chunk(2, -1)
            x = carries(block.d(keep * x + add * y))
            x = carries(x + block.memory(block.b(x)))
        return x


class SpaceTime(Deep):
    """Attention over time for all but the first token, then over space with it: both are laid side by side again."""

    frames = 2

    def __init__(self) -> None:
        super().__init__()
        self.mark, self.times = weight(1, 1, WIDTH), nn.ModuleList(Attention() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.go(self.tokens(ids.repeat(1, self.frames))))

    def go(self, x: Tensor) -> Tensor:
        frames = self.frames
        x = carries(torch.cat([self.mark.expand(len(x), -1, -1), x], 1))
        for block, time in zip(self.blocks, self.times, strict=True):
            token, rest = x[:, :1], x[:, 1:]
            y = block.a(rest).unflatten(1, (frames, -1)).transpose(1, 2).flatten(0, 1)
            y = time(y, y).unflatten(0, (len(x), -1)).transpose(1, 2).flatten(1, 2)
            rest = carries(rest + y)
            y = torch.cat([token.repeat_interleave(frames, 0), rest.unflatten(1, (frames, -1)).flatten(0, 1)], 1)
            y = block.c(y)
            y = block.attend(y, y)
            mark = y[:, :1].unflatten(0, (-1, frames)).mean(1)
            space = y[:, 1:].unflatten(0, (-1, frames)).flatten(1, 2)
            x = carries(torch.cat([token, rest], 1) + torch.cat([mark, space], 1))
            x = carries(x + block.memory(block.b(x)))
        return x[:, 1:]


class TwoMasks(Deep):
    """A memory of their own for some positions and another for the rest, each added under a mask in place."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(Plain() for _ in range(2))

    def go(self, x: Tensor) -> Tensor:
        some = torch.arange(x.shape[1]).expand(x.shape[:2]) % 3 == 0
        for block, other in zip(self.blocks, self.others, strict=True):
            y = block.a(x)
            x = x + block.attend(y, y)
            y = block.b(x)
            added, more = block.memory(y[~some]), other(y[some])
            x[~some] += added
            x[some] += more
            carries(x)
        return x


class Affine(nn.Module):
    """A weight and a bias for each unit in place of a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), weight(width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Bottleneck(nn.Module):
    """A layer that works in a narrower stream of its own, which a projection begins, and writes once to the outer one."""

    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.share = nn.Linear(WIDTH, self.width), nn.Linear(WIDTH, self.width)
        self.q, self.k, self.v = (nn.Linear(width, WIDTH) for width in (self.width, self.width, WIDTH))
        self.o, self.wide = nn.Linear(WIDTH, self.width), nn.Linear(self.width, WIDTH)
        self.ups = nn.ModuleList(nn.Linear(self.width, 24) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(24, self.width) for _ in range(3))
        self.affines = nn.ModuleList(Affine(self.width) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        share, y = self.share(x), carries(self.affines[0](self.narrow(x)))
        p = attends((split(self.q(share)) @ split(self.k(share)).mT * SIZE**-0.5).softmax(-1))
        y = carries(self.affines[1](self.o(joined(p @ split(self.v(x)))) + y))
        for up, down, affine in zip(self.ups, self.downs, self.affines[2:], strict=True):
            y = carries(affine(down(remembers(torch.relu(up(y)))) + y))
        return carries(x + self.wide(y))


class Bottlenecks(Deep):
    """Narrow streams inside the layers of a wide one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Bottleneck() for _ in range(2))

    def go(self, x: Tensor) -> Tensor:
        for inner in self.inner:
            x = inner(x)
        return x


class Parted(Deep):
    """All positions attend; then the first ones read a context, and each part has a memory of its own."""

    first = 2

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.others = nn.ModuleList(Attention() for _ in range(2)), nn.ModuleList(Plain() for _ in range(2))

    def go(self, x: Tensor) -> Tensor:
        seen = x.flip(1).cumsum(1)
        for block, read, other in zip(self.blocks, self.reads, self.others, strict=True):
            y = block.a(x)
            x = carries(x + block.attend(y, y))
            few, rest = x.split([self.first, x.shape[1] - self.first], 1)
            few = carries(few + read(block.c(few), seen, kind="cross"))
            rest = carries(rest + other(block.d(rest)))
            few = carries(few + block.memory(block.b(few)))
            x = carries(torch.cat([few, rest], 1))
        return x


class PartedPost(Parted):
    """The same with the norms on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def go(self, x: Tensor) -> Tensor:
        seen = x.flip(1).cumsum(1)
        for block, read, other, after in zip(self.blocks, self.reads, self.others, self.after, strict=True):
            x = carries(block.a(carries(x + block.attend(x, x))))
            few, rest = x[:, : self.first], x[:, self.first :]
            few = carries(block.c(few + read(few, seen, kind="cross")))
            few = after(carries(few + block.memory(few)))
            rest = block.d(carries(rest + other(rest)))
            x = carries(torch.cat([few, rest], 1))
        return x


class PartedBare(PartedPost):
    """The norms of both parts are the last ones: no norm of the whole comes after them."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.go(carries(self.tokens(ids)))


class WrittenOver(Deep):
    """What is written to all but the first tokens is added to them in place."""

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block.a(x)
            x = carries(x + block.attend(y, y))
            x[:, 1:] += block.memory(block.b(x[:, :1]))
            carries(x)
        return x


class Beside(Deep):
    """What the attention reads is written once more beside it, with a small projection of it."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)) for _ in self.blocks)

    def go(self, x: Tensor) -> Tensor:
        for block, small in zip(self.blocks, self.small, strict=True):
            y = block.a(x)
            x = carries(carries(x + block.attend(y, y)) + (y + small(y)))
            x = carries(x + block.memory(block.b(x)))
        return x


class GivenPlace(Deep):
    """Each sum is written into a tensor that was made for it."""

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            for norm, part in ((block.a, lambda y, attend=block.attend: attend(y, y)), (block.b, block.memory)):
                y, place = part(norm(x)), torch.empty_like(x)
                torch.add(x, y, out=place)
                x = carries(place)
        return x


class Conditioned(Deep):
    """Between layers all positions are scaled and shifted by what is made of one condition, in two spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.scale, self.shift = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def go(self, x: Tensor) -> Tensor:
        condition = torch.tanh(x.flip(1))
        scale, shift = self.both(condition).chunk(2, -1)
        for block in self.blocks:
            x = block(carries(x * (1 + scale) + shift))
        return carries(self.shift(condition) + self.scale(condition) * x)


class Pooled(Deep):
    """Between layers the first token is repeated, all are pooled and the last cut off: parts of one stream, side by side."""

    layers, whole = 3, False

    def go(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.blocks):
            before = x
            if n > 0:
                twice = torch.cat([x[:, :1], x], 1)
                x = carries(F.avg_pool1d(twice.mT, 2, ceil_mode=True).mT[:, :-1])
            y = block.a(x)
            x = carries(x + block.attend(y, block.a(before) if self.whole else y))
            x = carries(x + block.memory(block.b(x)))
        return x


class PooledQueries(Pooled):
    """What is pooled looks at all that it was pooled of."""

    whole = True


class RegistersLast(Deep):
    """Learned tokens are laid behind all others, and cut off before the norm: the states count the same places."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.randn(3, WIDTH) / 6)

    def go(self, x: Tensor) -> Tensor:
        return carries(super().go(carries(torch.cat([carries(x), self.extra.expand(len(x), -1, -1)], 1)))[:, :-3])


class CutAndLaid(Deep):
    """The positions are cut in two and laid side by side again after each layer."""

    def go(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = torch.cat([x[:, :1], x[:, 1:]], 1)
        return x


class Coupled(Deep):
    """Two streams that write to one another, each projected of the tokens, or halves of one projection."""

    layers = 2
    halves = False

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.logits = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH + 1)
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        a, b = self.enter(x).chunk(2, -1) if self.halves else (self.one(x), torch.tanh(self.two(x)))
        a, b = carries(a), carries(b)
        for block in self.blocks:
            y = block.a(b)
            a = carries(a + block.attend(y, y))
            b = carries(b + block.memory(block.b(a)))
        return self.logits(torch.cat([a, b], -1))


class CoupledHalves(Coupled):
    """The halves of one projection."""

    halves = True


OF_PARTS = (Parted, PartedPost, PartedBare, WrittenOver, Beside)
"""Streams of which parts are written to apart, or whose branches begin with what is written once more."""

FOUND = {
    4: (Coupled, CoupledHalves),
    2: (RegistersLast, CutAndLaid, HighwayKept, Gateway, SpaceTime, TwoMasks, GivenPlace, Conditioned, *OF_PARTS),
    3: (Pooled, PooledQueries),
    None: (Bottlenecks,),
}
"""What is found, by how many layers it has."""
