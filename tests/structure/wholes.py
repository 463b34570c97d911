"""Whole models of text and sets, each written in its own way: one forward, encoder and decoder, queries that are learned."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import (
    HEADS,
    HIDDEN,
    SIZE,
    TOKENS,
    WIDTH,
    Plain,
    attends,
    carries,
    causal,
    joined,
    remembers,
    split,
)
from tests.structure.projections import weight


class OneForward(nn.Module):
    """A decoder as parameters and one function."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = weight(TOKENS, WIDTH), weight(64, WIDTH)
        self.qkv, self.o = weight(2, 3, HEADS, WIDTH, SIZE), weight(2, HEADS, SIZE, WIDTH)
        self.up, self.down = weight(2, WIDTH, HIDDEN), weight(2, HIDDEN, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = carries(self.tokens[ids] + self.places[: ids.shape[1]])
        for qkv, o, up, down in zip(self.qkv, self.o, self.up, self.down, strict=True):
            y = F.layer_norm(x, (WIDTH,))
            q, k, v = torch.einsum("btm,chmd->cbhtd", y, qkv)
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / SIZE**0.5
            p = attends(scores.masked_fill(causal(scores), -1e9).softmax(-1))
            x = carries(x + torch.einsum("bhqd,hdm->bqm", torch.einsum("bhqk,bhkd->bhqd", p, v), o))
            y = F.layer_norm(x, (WIDTH,))
            x = carries(x + remembers(F.gelu(y @ up)) @ down)
        return F.layer_norm(x, (WIDTH,)) @ self.tokens.T


class OneForwardHalfSteps(OneForward):
    """The same with two memories around each attention."""

    def forward(self, ids: Tensor) -> Tensor:
        x = carries(self.tokens[ids])
        for qkv, o, up, down in zip(self.qkv, self.o, self.up, self.down, strict=True):
            x = carries(x + 0.5 * (remembers(F.gelu(F.layer_norm(x, (WIDTH,)) @ up)) @ down))
            q, k, v = torch.einsum("btm,chmd->cbhtd", F.layer_norm(x, (WIDTH,)), qkv)
            p = attends((torch.einsum("bhqd,bhkd->bhqk", q, k) / SIZE**0.5).softmax(-1))
            x = carries(x + torch.einsum("bhqd,hdm->bqm", torch.einsum("bhqk,bhkd->bhqd", p, v), o))
            x = carries(x + 0.5 * (remembers(F.silu(F.layer_norm(x, (WIDTH,)) @ up)) @ down))
        return F.layer_norm(x, (WIDTH,)) @ self.tokens.T


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
    """Steps down a slope: what is taken away is no write, and a norm on the way is not the last one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = carries(x + self.attend(y, y))
        return x - self.memory.down(F.gelu(self.memory.up(self.b(x))))


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


class Translator(nn.Module):
    """An encoder, and a decoder that looks back and over to it."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.encoder = nn.ModuleList(Block() for _ in range(layers))
        self.looks, self.crosses = (nn.ModuleList(Attention() for _ in range(layers)) for _ in range(2))
        self.memories = nn.ModuleList(Plain() for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3 * layers + 2))
        self.logits = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        seen = carries(self.tokens(source))
        for block in self.encoder:
            seen = block(seen)
        seen, x = self.norms[-2](seen), carries(self.tokens(target))
        mask = torch.full((target.shape[1],) * 2, -1e9).triu(1)
        for n, (look, cross, memory) in enumerate(zip(self.looks, self.crosses, self.memories, strict=True)):
            a, b, c = self.norms[3 * n : 3 * n + 3]
            y = a(x)
            x = carries(x + look(y, y, mask))
            x = carries(x + cross(b(x), seen, kind="cross"))
            x = carries(x + memory(c(x)))
        return self.logits(self.norms[-1](x))


class Detector(nn.Module):
    """Queries that are learned and a map with positions, which are added to queries and keys only."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted, self.pixels = nn.Embedding(3, WIDTH), nn.Conv2d(3, WIDTH, 2, 2)
        self.looks, self.crosses = (nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS) for _ in range(2)) for _ in range(2))
        self.memories, self.norms = (
            nn.ModuleList(Plain() for _ in range(2)),
            nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(6)),
        )

    def forward(self, image: Tensor) -> Tensor:
        seen = self.pixels(image).flatten(2).permute(2, 0, 1)
        places = torch.linspace(-1, 1, len(seen))[:, None, None].expand_as(seen)
        wanted = self.wanted.weight[:, None].expand(-1, image.shape[0], -1)
        x = torch.zeros_like(wanted)
        for n in range(2):
            q = k = x + wanted
            out, p = self.looks[n](q, k, x, average_attn_weights=False)
            attends(p)
            x = carries(self.norms[3 * n](x + out))
            out, p = self.crosses[n](query=x + wanted, key=seen + places, value=seen, average_attn_weights=False)
            attends(p, kind="cross")
            x = carries(self.norms[3 * n + 1](x + out))
            x = carries(self.norms[3 * n + 2](x + self.memories[n](x)))
        return x


class Perceiver(nn.Module):
    """A few learned values look at many, then at themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.learned, self.enter = weight(3, WIDTH), nn.Linear(7, 6)
        self.cross, self.norm, self.memory, self.block = Attention(6), nn.LayerNorm(6), Plain(), Block()

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(self.enter(x))
        z = carries(self.learned.expand(len(x), -1, -1))
        z = carries(z + self.cross(z, seen, kind="cross"))
        return self.block(carries(z + self.memory(z))).mean(1)


class Between(nn.Module):
    """One set looks at another, as for sets: heads go into the batch by `split` and `cat`, queries join what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.up = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, kind: str) -> Tensor:
        q, k, v = self.q(x), self.k(y), self.v(y)
        a, b, c = (torch.cat(t.split(SIZE, 2), 0) for t in (q, k, v))
        p = torch.softmax(a.bmm(b.transpose(1, 2)) / WIDTH**0.5, 2)
        attends(p.unflatten(0, (HEADS, -1)), "hbqk", kind=kind)
        out = torch.cat((a + p.bmm(c)).split(len(x), 0), 2)
        return out + F.relu(self.up(out))


class Sets(nn.Module):
    """Sets to sets, and pooled by a seed that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.pool, self.seed = nn.Linear(7, WIDTH), Between(), Between(), weight(1, 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = self.first(x, x, "self")
        return self.pool(self.seed.repeat(len(x), 1, 1), x, "cross")


class Slots(nn.Module):
    """Slots compete for what is seen: the softmax is over the queries, and then the rows are made to add up to one."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.enter = weight(3, WIDTH), nn.Linear(7, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.step, self.memory, self.norm = nn.GRUCell(WIDTH, WIDTH), Plain(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.enter(x)
        k, v, slots = self.k(seen), self.v(seen), self.slots.expand(len(x), -1, -1)
        for _ in range(2):
            p = torch.einsum("bid,bjd->bij", self.q(self.norm(slots)), k).mul(WIDTH**-0.5).softmax(dim=1) + 1e-8
            p = attends(p / p.sum(-1, keepdim=True), "bqk", heads=1, size=WIDTH, kind="cross")
            got = torch.einsum("bjd,bij->bid", v, p)
            slots = self.step(got.reshape(-1, WIDTH), slots.reshape(-1, WIDTH)).view(slots.shape)
            slots = slots + self.memory(self.norm(slots))
        return slots


class Pool(nn.Module):
    """A raw query for each head pools a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.k, self.v = weight(HEADS, SIZE), nn.Linear(7, WIDTH), nn.Linear(7, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (w(x).unflatten(-1, (HEADS, SIZE)) for w in (self.k, self.v))
        p = attends((torch.einsum("hd,bkhd->bhk", self.query, k) / SIZE**0.5).softmax(-1), "bhk", kind="cross")
        return self.out(torch.einsum("bhk,bkhd->bhd", p, v).flatten(1))


class Torch(nn.Module):
    """torch's own attention with everything that it can be given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.first = options.get("batch_first", False)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x, seen = (x, seen) if self.first else (x.transpose(0, 1), seen.transpose(0, 1))
        out, p = self.attend(x, seen, seen, average_attn_weights=False)
        attends(p, kind="cross")
        return x + out


class Resumed(nn.Module):
    """One new token and the keys and values of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, -1))
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return x + self.out(joined(attends((q @ k.mT).softmax(-1)) @ v))


class Compressed(nn.Module):
    """Keys and values are shortened by a projection of their positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.short = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), weight(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        k, v = (split(torch.einsum("btm,ts->bsm", t, self.short)) for t in (k, v))
        return x + self.out(joined(attends((split(q) @ k.mT).softmax(-1)) @ v))
