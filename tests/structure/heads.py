"""Self-attention as a module to itself: how heads lie beside one another, share keys, and talk to one another."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HEADS, SIZE, WIDTH, attends, joined, split, weight
from tests.structure.projections import Fused


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


class HeadsFirstViewed(Fused):
    """Heads, then examples, by a view."""

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.transpose(0, 1) for part in super().parts(qkv))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        p = attends((q @ k.mT).softmax(-1), "hbqk")
        return self.out((p @ v).permute(1, 2, 0, 3).flatten(2))


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


class MultiQueryCopied(MultiQuery):
    """Heads are cut out of the queries and laid one behind the other, with as many copies of the keys."""

    def forward(self, x: Tensor) -> Tensor:
        q = torch.cat(self.q(x).chunk(HEADS, -1))
        k, v = (torch.cat([part] * HEADS) for part in self.kv(x).chunk(2, -1))
        p = torch.bmm(q, k.mT).softmax(-1)
        attends(p.unflatten(0, (HEADS, -1)), "hbqk", groups=1)
        return self.out(torch.cat(torch.bmm(p, v).chunk(HEADS), -1))


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


class GroupedBroadcast(Grouped):
    """Each key head is broadcast over a dimension of its query heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        q = q.view(*x.shape[:2], 2, 2, SIZE).permute(0, 2, 3, 1, 4)
        p = (q @ k.unsqueeze(2).mT).softmax(-1)
        attends(p.flatten(1, 2), groups=2)
        return self.out((p @ v.unsqueeze(2)).permute(0, 3, 1, 2, 4).reshape(x.shape))


class GroupedInBatch(Grouped):
    """Key heads lie in the batch of a product, the query heads that share one in its rows."""

    def forward(self, x: Tensor) -> Tensor:
        examples, length = x.shape[:2]
        q, k, v = self.parts(x)
        q = q.view(examples, length, 2, 2, SIZE).permute(0, 2, 3, 1, 4).reshape(2 * examples, 2 * length, SIZE)
        p = torch.bmm(q, k.flatten(0, 1).mT).softmax(-1)
        attends(p.view(examples, HEADS, length, length), groups=2)
        z = torch.bmm(p, v.flatten(0, 1)).view(examples, 2, 2, length, SIZE)
        return self.out(z.permute(0, 3, 1, 2, 4).reshape(x.shape))


class GroupedRepeated(Grouped):
    """Each key head is repeated for its query heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return self.out(joined(attends((split(q) @ k.mT).softmax(-1), groups=2) @ v))


class GroupedChosen(Grouped):
    """The key head of each query head is chosen by its number."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        k, v = (t[:, torch.arange(HEADS) // 2] for t in (k, v))
        return self.out(joined(attends((split(q) @ k.mT).softmax(-1), groups=2) @ v))


class ChosenQueries(Fused):
    """The queries of some places, told by a measure, look; the others get the mean of the values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in self.parts(self.qkv(x)))
        heads = torch.arange(len(q))[:, None]
        places = q.pow(2).sum(-1).topk(3, -1).indices
        p = (q[heads, places] @ k.mT).softmax(-1)
        z = v.mean(1, keepdim=True).expand(v.shape).clone()
        z[heads, places] = torch.bmm(attends(p.unflatten(0, (len(x), HEADS))).flatten(0, 1), v)
        return self.out(joined(z.unflatten(0, (len(x), HEADS))))


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


class GroupedBranches(Fused):
    """Groups of queries look at all and at their neighbours; a gate weighs both, one value stacked on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.kv, self.gate = nn.Linear(WIDTH, 4 * SIZE), nn.Linear(WIDTH, 2 * HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q = split(self.qkv(x)[..., :WIDTH]).unflatten(1, (2, 2))
        k, v = (split(t, 2) for t in self.kv(x).chunk(2, -1))
        scores = torch.einsum("bgmqd,bgkd->bgmqk", q, k)
        near = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(2)
        maps = [scores.softmax(-1), scores.masked_fill(near | near.mT, -1e9).softmax(-1)]
        z = [torch.einsum("bgmqk,bgkd->bgmqd", p, v).flatten(1, 2) for p in maps]
        for p in maps:
            attends(p.flatten(1, 2), groups=2)
        gate = torch.sigmoid(self.gate(x)).unflatten(-1, (HEADS, 2))
        return self.out(joined(torch.einsum("bqhn,nbhqd->bhqd", gate, torch.stack(z))))


class GroupedInBlocks(Fused):
    """Keys that two heads share, in blocks that are laid beside the block before; heads lie with the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(WIDTH, 4 * SIZE)

    def forward(self, x: Tensor) -> Tensor:
        examples, length = x.shape[:2]
        x = F.pad(x, (0, 0, 0, -length % 2))
        k, v = (split(t, 2).repeat_interleave(2, 1) for t in self.kv(x).chunk(2, -1))
        q, k, v = (t.reshape(examples * HEADS, -1, 2, SIZE) for t in (split(self.qkv(x)[..., :WIDTH]), k, v))
        k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, -1), value=-1.0), t], 2) for t in (k, v))
        p = torch.einsum("nbqd,nbkd->nbqk", q, k).softmax(-1)
        attends(p.unflatten(0, (examples, HEADS)).transpose(1, 2).flatten(0, 1), groups=2)
        z = torch.einsum("nbqk,nbkd->nbqd", p, v)
        return self.out(joined(z.reshape(examples, HEADS, -1, SIZE))[:, :length])


class Convolved(Fused):
    """Queries, keys and values that a short convolution mixes and bends, before they are split."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=2, groups=3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = F.silu(self.mix(self.qkv(x).mT)[..., : x.shape[1]]).mT
        q, k, v = map(split, made.chunk(3, -1))
        return self.out(joined(attends((q @ k.mT).softmax(-1)) @ v))


FOUND = (
    HeadMatrices,
    HeadWrites,
    HeadWritesAtOnce,
    HeadsBroadcast,
    HeadsLast,
    HeadsFirst,
    HeadsFirstViewed,
    ListOfHeads,
    Single,
    MultiQuery,
    MultiQueryBroadcast,
    MultiQueryFolded,
    MultiQueryViewed,
    MultiQueryCopied,
    Grouped,
    GroupedBroadcast,
    GroupedInBatch,
    GroupedRepeated,
    GroupedChosen,
    ChosenQueries,
    TalkingHeads,
    TalkingByConvolution,
    GroupedBranches,
    GroupedInBlocks,
    Convolved,
)
