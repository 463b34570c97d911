"""Whole models of text and sets, each written in its own way: one forward, encoder and decoder, queries that are learned."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.blocks import Attention, Block
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
    weight,
)


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


class Excited(nn.Module):
    """What is written is weighed, unit by unit, by a bottleneck that reads the mean: a gate, and no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(7, WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.few, self.many = (nn.ModuleList(nn.Linear(*n) for _ in range(2)) for n in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.enter(x))
        for leave, few, many in zip(self.leave, self.few, self.many, strict=True):
            y = leave(x)
            x = carries(x + y * torch.sigmoid(many(torch.relu(few(y.mean(1, keepdim=True))))))
        return x
