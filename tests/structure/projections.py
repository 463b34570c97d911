"""Self-attention as a module (examples, positions, width) to itself: how queries, keys, values and heads come about."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HEADS, SIZE, WIDTH, attends, joined, split


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / WIDTH**0.5)


class Fused(nn.Module):
    """One projection for all three, taken apart by `parts`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(split(part) for part in qkv.chunk(3, -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        return self.out(joined(attends((q @ k.mT * SIZE**-0.5).softmax(-1)) @ v))


class Interleaved(Fused):
    """The three lie side by side for each head."""

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.view(*qkv.shape[:2], HEADS, 3 * SIZE).transpose(1, 2).split(SIZE, -1)


class Stacked(Fused):
    """The three are the first dimension of a view."""

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.reshape(*qkv.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)


class Strided(Fused):
    """The three are the last dimension: unit by unit."""

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        by_unit = qkv.unflatten(-1, (HEADS, SIZE, 3)).transpose(1, 2)
        return by_unit[..., 0], by_unit[..., 1], by_unit[..., 2]


class HeadMatrices(nn.Module):
    """A matrix for each head, and their writes summed up without being joined."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (weight(HEADS, WIDTH, SIZE) for _ in range(3))
        self.o = weight(HEADS, SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btm,hmd->bthd", x, w) for w in (self.q, self.k, self.v))
        p = attends(torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1))
        return torch.einsum("bqhd,hdm->bqm", torch.einsum("bhqk,bkhd->bqhd", p, v), self.o)


class HeadWrites(HeadMatrices):
    """What each head writes is made on its own, and then summed."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btm,hmd->bhtd", x, w) for w in (self.q, self.k, self.v))
        p = attends((q @ k.mT).softmax(-1))
        return torch.einsum("bhqd,hdm->bhqm", p @ v, self.o).sum(1)


class HeadWritesAtOnce(HeadMatrices):
    """Pattern, values and output matrices in one product, and a scale in that of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = weight(HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btm,hmd->bthd", x, w) for w in (self.q, self.k, self.v))
        p = attends(torch.einsum("bqhd,bkhd,h->bhqk", q, k, self.scale).softmax(-1))
        return torch.einsum("bhqk,bkhd,hdm->bqm", p, v, self.o)


class HeadsBroadcast(HeadMatrices):
    """The same by broadcasting: (examples, 1, positions, width) times (heads, width, units)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x.unsqueeze(1) @ w for w in (self.q, self.k, self.v))
        p = attends((q @ k.transpose(-1, -2)).softmax(-1))
        return (p @ v @ self.o).sum(dim=1)


class HeadsLast(nn.Module):
    """Heads are the last dimension, and the softmax is not."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = weight(3, WIDTH, SIZE, HEADS), weight(SIZE, HEADS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btm,mdh->btdh", x, w) for w in self.qkv)
        p = attends(torch.einsum("bqdh,bkdh->bqkh", q, k).softmax(2), "bqkh")
        return torch.einsum("bqdh,dhm->bqm", torch.einsum("bqkh,bkdh->bqdh", p, v), self.o)


class HeadsFirst(nn.Module):
    """Heads, then examples, joined by `cat`: as the notebook of the first transformer does it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.stack(w(x).split(SIZE, 2)) for w in (self.q, self.k, self.v))
        p = attends((q @ k.transpose(2, 3)).softmax(3), "hbqk")
        return self.o(torch.cat((p @ v).split(1), -1).squeeze(0))


class OneHead(nn.Module):
    """A head as a module: its projections make one head only."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, SIZE, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * SIZE**-0.5
        after = torch.tril(torch.ones(x.shape[1], x.shape[1])) == 0
        p = F.softmax(scores.masked_fill(after, float("-inf")), dim=-1)
        return attends(p, "bqk", heads=1) @ self.value(x)


class ListOfHeads(nn.Module):
    """Each head is a module; their outputs are joined and projected."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.ModuleList(OneHead() for _ in range(HEADS)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([head(x) for head in self.heads], -1))


class Single(nn.Module):
    """One head as wide as the stream, and nothing after it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        p = (self.q(x) @ self.k(x).mT / WIDTH**0.5).softmax(-1)
        return attends(p, "bqk", heads=1, size=WIDTH) @ self.v(x)


class Unprojected(nn.Module):
    """Heads whose values are joined and written as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, -1))
        return joined(attends((q @ k.mT).softmax(-1)) @ v)


class MultiQuery(nn.Module):
    """All heads share one key head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * SIZE), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = split(self.q(x)), self.kv(x).chunk(2, -1)
        p = attends(torch.einsum("bhqd,bkd->bhqk", q, k).softmax(-1), groups=1)
        return self.out(torch.einsum("bhqk,bkd->bhqd", p, v).transpose(1, 2).flatten(2))


class MultiQueryBroadcast(MultiQuery):
    """The key head is broadcast over those of the queries."""

    def forward(self, x: Tensor) -> Tensor:
        q, (k, v) = split(self.q(x)), self.kv(x).unsqueeze(1).chunk(2, -1)
        return self.out(joined(attends((q @ k.mT).softmax(-1), groups=1) @ v))


class MultiQueryFolded(MultiQuery):
    """Heads and positions of the queries are one dimension, so that one product serves all heads."""

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        p = torch.bmm(self.q(x).view(len(x), -1, SIZE), k.mT).softmax(-1)
        attends(p.view(len(x), -1, HEADS, p.shape[-1]), "bqhk", groups=1)
        return self.out(self.unfolded(torch.bmm(p, v), x))

    def unfolded(self, z: Tensor, x: Tensor) -> Tensor:
        return z.reshape(x.shape)


class MultiQueryViewed(MultiQueryFolded):
    """The same with a view in place of a reshape."""

    def unfolded(self, z: Tensor, x: Tensor) -> Tensor:
        return z.view(x.shape)


class Grouped(nn.Module):
    """Two key heads for four query heads, by a dimension of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * SIZE), nn.Linear(WIDTH, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (split(part, 2) for part in self.kv(x).chunk(2, -1))
        return self.q(x), k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        q = q.view(*x.shape[:2], 2, 2, SIZE).permute(0, 2, 3, 1, 4)
        p = torch.einsum("bgrqd,bgkd->bgrqk", q, k).softmax(-1)
        attends(p.flatten(1, 2), groups=2)
        z = torch.einsum("bgrqk,bgkd->bgrqd", p, v)
        return self.out(z.permute(0, 3, 1, 2, 4).reshape(x.shape))


class GroupedRepeated(Grouped):
    """Each key head is repeated for its query heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return self.out(joined(attends((split(q) @ k.mT).softmax(-1), groups=2) @ v))


class TalkingHeads(Fused):
    """Heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = weight(HEADS, HEADS), weight(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        scores = torch.einsum("bhqk,hg->bgqk", q @ k.mT, self.before)
        p = torch.einsum("bgqk,gh->bhqk", attends(scores.softmax(-1)), self.after)
        return self.out(joined(p @ v))


class TalkingByConvolution(TalkingHeads):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        scores = F.conv2d(q @ k.mT, self.before[:, :, None, None])
        return self.out(joined(F.conv2d(attends(scores.softmax(-1)), self.after[:, :, None, None]) @ v))


class Relative(Fused):
    """Shaw's relative positions, among keys and among values."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = weight(7, SIZE), weight(7, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        places = torch.arange(x.shape[1])
        away = (places - places[:, None]).clamp(-3, 3) + 3
        scores = q @ k.mT + torch.einsum("bhqd,qkd->bhqk", q, self.near[away])
        p = attends((scores / SIZE**0.5).softmax(-1))
        return self.out(joined(p @ v + torch.einsum("bhqk,qkd->bhqd", p, self.far[away])))


class Bucketed(Fused):
    """A learned bias for each head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(7, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        places = torch.arange(x.shape[1])
        bias = self.bias((places - places[:, None]).clamp(-3, 3) + 3).permute(2, 0, 1)
        return self.out(joined(attends((q @ k.mT + bias).softmax(-1)) @ v))


class Disentangled(Fused):
    """A query's bias and a second product with positions, shifted row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.w, self.r = weight(HEADS, 1, SIZE), weight(HEADS, 1, SIZE), nn.Linear(WIDTH, WIDTH)
        self.places = weight(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        r = split(self.r(self.places[: x.shape[1]]).unsqueeze(0))
        far = F.pad((q + self.w) @ r.mT, (1, 0)).view(*q.shape[:2], -1, x.shape[1])[:, :, 1:].view(*q.shape[:3], -1)
        return self.out(joined(attends(((q + self.u) @ k.mT + far).softmax(-1)) @ v))


class Gated(Fused):
    """What the heads mix is gated by a projection of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        z = joined(attends((q @ k.mT).softmax(-1)) @ v)
        return self.out(z * torch.sigmoid(self.gate(x)))


class Normed(Fused):
    """Queries and keys are normalised by hand, and what the heads mix is normed before it is projected."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Parameter(torch.ones(SIZE)), nn.Parameter(torch.ones(SIZE)), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        q, k = (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * w for t, w in ((q, self.a), (k, self.b)))
        return self.out(self.norm(joined(attends((q @ k.mT).softmax(-1)) @ v)))


class ForEachExample(Fused):
    """The weights are repeated for each example."""

    def forward(self, x: Tensor) -> Tensor:
        qkv, out = (layer.weight.mT.unsqueeze(0).expand(len(x), -1, -1) for layer in (self.qkv, self.out))
        q, k, v = self.parts(x.bmm(qkv) + self.qkv.bias)
        return torch.baddbmm(self.out.bias, joined(attends((q @ k.mT * SIZE**-0.5).softmax(-1)) @ v), out)


def rounded(x: Tensor) -> Tensor:
    """A value in 255 steps, with the gradient of the value itself."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return x + ((x / scale).round() * scale - x).detach()


class Rounded(nn.Module):
    """Each layer rounds what it reads by itself, so that queries and keys are read off two values that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(layer(rounded(x))) for layer in (self.q, self.k, self.v))
        return self.out(rounded(joined(attends((q @ k.mT * SIZE**-0.5).softmax(-1)) @ v)))


class Clipped(Fused):
    """Each projection is clipped to what it met in training, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = (nn.Buffer(torch.tensor(bound)) for bound in (-1.5, 1.5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x.clamp(self.low, self.high)).clamp(self.low, self.high))
        z = joined(attends((q @ k.mT).softmax(-1)) @ v)
        return self.out(z.clamp(self.low, self.high)).clamp(self.low, self.high)


class LowRank(Fused):
    """A trained projection with a small update beside it, on the way in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = weight(3, WIDTH), weight(3 * WIDTH, 3), weight(3, WIDTH), weight(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x) + F.linear(F.linear(x, self.a), self.b) * 2)
        z = joined(attends((q @ k.mT).softmax(-1)) @ v)
        return self.out(z) + F.linear(F.linear(z, self.c), self.d) * 2


class Image(nn.Module):
    """Channels first: 1 x 1 convolutions, and positions that come last."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv1d(WIDTH, 3 * WIDTH, 1, bias=False), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (HEADS, SIZE)) for part in self.qkv(x.mT).chunk(3, 1))
        p = attends(torch.einsum("bhdi,bhdj->bhij", q, k).softmax(-1))
        z = torch.einsum("bhij,bhdj->bhid", p, v).permute(0, 1, 3, 2)
        return self.out(z.reshape(len(x), WIDTH, -1)).mT


class ImageOneHead(nn.Module):
    """As image generators have it: one head, pixels last, the pattern transposed for the values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.mT
        p = attends(torch.bmm(self.q(x).permute(0, 2, 1), self.k(x)).softmax(2), "bqk", heads=1, size=WIDTH)
        return self.out(torch.bmm(self.v(x), p.permute(0, 2, 1))).mT


FOUND = (
    Fused,
    Interleaved,
    Stacked,
    Strided,
    HeadMatrices,
    HeadWrites,
    HeadWritesAtOnce,
    HeadsBroadcast,
    HeadsLast,
    HeadsFirst,
    ListOfHeads,
    Single,
    Unprojected,
    MultiQuery,
    MultiQueryBroadcast,
    MultiQueryFolded,
    MultiQueryViewed,
    Grouped,
    GroupedRepeated,
    TalkingHeads,
    TalkingByConvolution,
    Relative,
    Bucketed,
    Disentangled,
    Gated,
    Normed,
    ForEachExample,
    Rounded,
    Clipped,
    LowRank,
    Image,
    ImageOneHead,
)
