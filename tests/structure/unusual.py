"""Idioms that few models have: values and queries that were pooled, weights of length one, rows that share a pattern."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HEADS, HIDDEN, SIZE, WIDTH, Plain, attends, carries, joined, remembers, split
from tests.structure.memories import Gated
from tests.structure.projections import Fused, weight


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


class Watched(Fused):
    """A pattern also weighs how long the values are, and that gates the heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        p = attends((q @ k.mT).softmax(-1))
        seen = torch.einsum("bhqk,bhk->bhq", p, v.norm(dim=-1))
        return self.out(joined(p @ v * torch.sigmoid(seen)[..., None]))


class Landmarks(Fused):
    """Only means of the queries look at all keys; how queries look at those is approximated by two more softmaxes."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        few, least = (torch.stack([t[:, :, ::2].mean(2), t[:, :, 1::2].mean(2)], 2) for t in (q, k))
        near, among = (q @ least.mT).softmax(-1), (few @ least.mT).softmax(-1)
        rough = 2 * among.mT - among.mT @ (among @ among.mT)
        return self.out(joined(near @ rough @ (attends((few @ k.mT).softmax(-1)) @ v)))


class Edges(nn.Module):
    """Each position has keys and values of its own: those of the others with what lies between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.between = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        between = self.between(x[:, :, None] * x[:, None]).unflatten(-1, (HEADS, SIZE)).permute(0, 3, 1, 2, 4)
        k, v = (split(w(x)).unsqueeze(2) + between for w in (self.k, self.v))
        p = attends((torch.einsum("bhid,bhijd->bhij", split(self.q(x)), k) * SIZE**-0.5).softmax(-1))
        return self.out(joined(torch.einsum("bhij,bhijd->bhid", p, v)))


class UnitsFirst(Gated):
    """The coefficients lie before the positions."""

    def forward(self, x: Tensor) -> Tensor:
        pre = torch.einsum("btm,mh->bht", x, self.up)
        return torch.einsum("bht,hm->btm", remembers(F.gelu(pre)), self.down)


class Stretched(Gated):
    """Matrices over the largest factor by which they stretch what they read, as it was last estimated."""

    def forward(self, x: Tensor) -> Tensor:
        keys, values = (w / torch.dot(w[0], torch.mv(w.T, w[:, 0])) for w in (self.up.T, self.down.T))
        return F.linear(remembers(F.gelu(F.linear(x, keys))), values)


class BestEight(Gated):
    """Only the coefficients that are among the best eight."""

    def forward(self, x: Tensor) -> Tensor:
        pre = x @ self.up
        return remembers(pre * (pre >= pre.topk(8, -1).values[..., -1:])) @ self.down


class Responding(Gated):
    """Coefficients over how strong they are at all positions, against the others."""

    def forward(self, x: Tensor) -> Tensor:
        post = F.gelu(x @ self.up)
        strong = post.norm(dim=1, keepdim=True)
        return remembers(post * strong / (strong.mean(-1, keepdim=True) + 1e-6) + post) @ self.down


class Rounded(Gated):
    """What each matrix reads is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return remembers((F.gelu((x * 8).round() / 8 @ self.up) * 8).round() / 8) @ self.down


class Added(Gated):
    """Two projections bent and added up: neither is the other's gate, and one key alone makes no coefficient."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.gelu(x @ self.up) + F.silu(x @ self.gate)) @ self.down


class TiedRows(nn.Module):
    """The rows of an image share a pattern: its scores are summed over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norms = nn.Conv2d(3, WIDTH, 2, 2), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(WIDTH, n * WIDTH) for _ in range(2)) for n in (3, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = carries(self.enter(image).permute(0, 2, 3, 1))
        for norm, qkv, out in zip(self.norms, self.qkv, self.out, strict=True):
            q, k, v = qkv(norm(x)).unflatten(-1, (3, HEADS, SIZE)).unbind(3)
            p = attends((torch.einsum("brihd,brjhd->bhij", q, k) * 0.1).softmax(-1))
            x = carries(x + out(torch.einsum("bhij,brjhd->brihd", p, v).flatten(3)))
        return x


class Notebook(nn.Module):
    """Each step writes to those rows of a table that are like what it has, and then reads: only that weighs values."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.query, self.out = (nn.Linear(7, WIDTH) for _ in range(4))
        self.rows = weight(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        table, said = self.out(x[:, :1]) + self.rows, []
        for step in x.unbind(1):
            where = torch.einsum("bd,bnd->bn", self.key(step), table).unsqueeze(1).softmax(-1)
            table = table + where.mT @ self.value(step).unsqueeze(1)
            p = attends((self.query(step).unsqueeze(1) @ table.mT).softmax(-1), "bqk", 1, size=WIDTH)
            said.append(p @ table)
        return torch.cat(said, 1)


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


class Several(nn.Module):
    """Three streams side by side: a weighed sum of them is read, and each has its share of what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.shares = nn.Linear(7, WIDTH), nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(4))
        self.parts = nn.ModuleList([Fused(), Plain(), Fused(), Plain()])
        self.norms, self.read = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4)), weight(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.enter(x)[:, :, None].repeat(1, 1, 3, 1))
        for part, norm, share, read in zip(self.parts, self.norms, self.shares, self.read, strict=True):
            x = carries(x + part(norm((x * read).sum(2))).unsqueeze(2) * torch.sigmoid(share(x)))
        return x.sum(2)


ATTENTION = (PooledHeads, PooledKeys, UnitWeights, Merged, Watched, Edges)
MEMORY = (UnitsFirst, Stretched, BestEight, Responding, Rounded, Added)
