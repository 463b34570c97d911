"""Self-attention as a module (examples, positions, width) to itself: how queries, keys and values are projected."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HEADS, SIZE, WIDTH, attends, joined, rounded, split, weight


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


class Unprojected(nn.Module):
    """Heads whose values are joined and written as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(part) for part in self.qkv(x).chunk(3, -1))
        return joined(attends((q @ k.mT).softmax(-1)) @ v)


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


class PooledHeads(Fused):
    """A convolution over the positions of each head, normed, and the queries added to what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.Conv1d(SIZE, SIZE, 3, padding=1, groups=SIZE) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.parts(self.qkv(x))
        q, k, v = (
            norm(pool(part.flatten(0, 1).mT).mT.view_as(part))
            for part, pool, norm in zip(parts, self.pools, self.norms, strict=True)
        )
        p = attends(((q * SIZE**-0.5) @ k.mT).softmax(-1))
        return self.out(joined(p @ v + q))


class PooledKeys(Fused):
    """Keys and values of a mean over every two positions."""

    def forward(self, x: Tensor) -> Tensor:
        few = F.avg_pool1d(x.mT, 2, ceil_mode=True).mT
        q, (_, k, v) = self.parts(self.qkv(x))[0], self.parts(self.qkv(few))
        return self.out(joined(attends((q @ k.mT).softmax(-1)) @ v))


class Watched(Fused):
    """A pattern also weighs how long the values are, and that gates the heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        p = attends((q @ k.mT).softmax(-1))
        seen = torch.einsum("bhqk,bhk->bhq", p, v.norm(dim=-1))
        return self.out(joined(p @ v * torch.sigmoid(seen)[..., None]))


class ForEachExample(Fused):
    """The weights are repeated for each example."""

    def forward(self, x: Tensor) -> Tensor:
        qkv, out = (layer.weight.mT.unsqueeze(0).expand(len(x), -1, -1) for layer in (self.qkv, self.out))
        q, k, v = self.parts(x.bmm(qkv) + self.qkv.bias)
        return torch.baddbmm(self.out.bias, joined(attends((q @ k.mT * SIZE**-0.5).softmax(-1)) @ v), out)


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


class UnitWeights(nn.Module):
    """Every row of every matrix is brought to length one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (weight(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(F.linear(x, F.normalize(w, dim=-1))) for w in (self.q, self.k, self.v))
        return F.linear(joined(attends((q @ k.mT).softmax(-1)) @ v), F.normalize(self.o, dim=0))


class Merged(nn.Module):
    """Every matrix has a small update of two factors, merged into it on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (weight(WIDTH, WIDTH) for _ in range(4))
        self.a, self.b = weight(WIDTH, 2), weight(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(F.linear(x, w + self.a @ self.b)) for w in (self.q, self.k, self.v))
        return F.linear(joined(attends((q @ k.mT).softmax(-1)) @ v), self.o + self.a @ self.b)


class EachPlace(nn.Module):
    """Each place has projections of its own, those that write included."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weight(64, WIDTH, WIDTH) for _ in range(4))

    def made(self, n: int, x: Tensor) -> Tensor:
        return (x.transpose(0, 1) @ self.weights[n][: x.shape[1]]).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(self.made(n, x)) for n in range(3))
        return self.made(3, joined(attends((q @ k.mT).softmax(-1)) @ v))


class QueriesOfBoth(nn.Module):
    """Queries are read off what is small, normalised and as it is, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.both, self.rest = nn.Linear(WIDTH, 5), nn.Linear(10, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        small = self.small(x)
        q = split(self.both(torch.cat([F.layer_norm(small, (5,)), small], -1)))
        k, v = (split(t) for t in self.rest(x).chunk(2, -1))
        return self.out(joined(attends((q @ k.mT).softmax(-1)) @ v))


class CastToData(Fused):
    """Weights are cast to the type of what they are multiplied with, which tells nothing but that."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x @ self.qkv.weight.mT.type_as(x))
        z = attends((q @ k.mT).softmax(-1)) @ v
        return joined(z) @ self.out.weight.mT.to(x)


FOUND = (
    CastToData,
    EachPlace,
    QueriesOfBoth,
    Fused,
    Interleaved,
    Stacked,
    Strided,
    Image,
    ImageOneHead,
    Unprojected,
    Gated,
    Normed,
    PooledHeads,
    PooledKeys,
    Watched,
    ForEachExample,
    Rounded,
    Clipped,
    LowRank,
    UnitWeights,
    Merged,
)
