"""Models of graphs and of steps in time: where attention looks different, and where there is none."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HEADS, HIDDEN, SIZE, TOKENS, WIDTH, Plain, attends, carries, weight


class Decoder(nn.Module):
    """A recurrent decoder that looks over a sequence at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.step = nn.GRU(7, WIDTH, batch_first=True), nn.GRUCell(WIDTH, WIDTH)
        self.key, self.query, self.score = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 1)
        self.logits = nn.Linear(2 * WIDTH, TOKENS)

    def look(self, state: Tensor, seen: Tensor) -> Tensor:
        scores = self.score(torch.tanh(self.query(state).unsqueeze(1) + self.key(seen))).squeeze(2)
        p = attends(F.softmax(scores, dim=1), "bk", heads=1, size=HIDDEN, kind="additive")
        return torch.sum(seen * p.unsqueeze(2), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        seen, last = self.encoder(x)
        state, out = last[0], []
        for _ in range(2):
            got = self.look(state, seen)
            state = self.step(got, state)
            out.append(self.logits(torch.cat([state, got], -1)))
        return torch.stack(out, 1)


class Halves(Decoder):
    """Keys and values are the halves of one projection, which are no two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * WIDTH)
        self.query, self.score = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def look(self, state: Tensor, seen: Tensor) -> Tensor:
        key, value = self.both(seen).chunk(2, -1)
        p = self.score(torch.tanh(self.query(state).unsqueeze(1) + key)).squeeze(2).softmax(1)
        attends(p, "bk", heads=1, size=WIDTH, kind="additive")
        return torch.bmm(p.unsqueeze(1), value).squeeze(1)


class Multiplicative(Decoder):
    """Scores are products with the state, through a matrix."""

    def look(self, state: Tensor, seen: Tensor) -> Tensor:
        scores = torch.bmm(seen, nn.functional.linear(state, self.step.weight_hh[:WIDTH]).unsqueeze(2)).squeeze(2)
        p = attends(F.softmax(scores, dim=-1), "bk", heads=1, size=WIDTH, kind="cross")
        return torch.bmm(p.unsqueeze(1), seen).squeeze(1)


class Concatenated(Decoder):
    """The state is repeated beside every value; one projection reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(2 * WIDTH, HIDDEN)

    def look(self, state: Tensor, seen: Tensor) -> Tensor:
        beside = torch.cat([state.unsqueeze(1).repeat(1, seen.shape[1], 1), seen], 2)
        p = F.softmax(self.score(torch.tanh(self.both(beside))).squeeze(2), 1)
        attends(p, "bk", heads=1, size=WIDTH, kind="additive")
        return torch.bmm(p.unsqueeze(1), seen).squeeze(1)


class TwoDirections(Decoder):
    """What lies side by side are the two directions of a sequence: every value is weighed by itself, no query looks."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.both = nn.GRU(7, WIDTH, batch_first=True), nn.Linear(2 * WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([self.encoder(x)[0], self.back(x.flip(1))[0].flip(1)], 2)
        p = self.score(torch.tanh(self.both(seen))).softmax(1)
        return self.logits((p.mT @ seen).squeeze(1))


class Pointer(Decoder):
    """The map is the answer; it weighs no values."""

    def forward(self, x: Tensor) -> Tensor:
        seen, last = self.encoder(x)
        return self.score(torch.tanh(self.query(last[0]).unsqueeze(1) + self.key(seen))).squeeze(2).softmax(-1)


class Hops(nn.Module):
    """A question is answered in steps, each a look at what is remembered, by multiplications and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.tables, self.logits = nn.ModuleList(nn.Embedding(TOKENS, WIDTH) for _ in range(3)), nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        words = torch.stack([ids, ids, ids, ids], 2)
        state = self.tables[0](ids).sum(1)
        for keys, values in pairwise(self.tables):
            scores = (keys(words).sum(2) * state.unsqueeze(1)).sum(2)
            p = attends(scores.softmax(1), "bk", 1, size=WIDTH, kind="cross")
            state = state + (values(words).sum(2) * p.unsqueeze(2)).sum(1)
        return self.logits(state)


class Capsules(nn.Module):
    """Parts agree on the wholes that they belong to: votes are weighed by how they fit what they were weighed to."""

    def __init__(self) -> None:
        super().__init__()
        self.votes = weight(3, 5, 7, 6)

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.einsum("bnd,nmde->bnme", x[:, :3], self.votes)
        scores = votes.new_zeros(votes.shape[:3])
        for _ in range(2):
            wholes = F.normalize((scores.softmax(2)[..., None] * votes).sum(1), dim=-1)
            scores = scores + (votes * wholes[:, None]).sum(-1)
        return wholes


class Neighbours(nn.Module):
    """A graph: a node weighs its neighbours by a sum of what is read off both."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out_of, self.into = nn.Linear(7, WIDTH), weight(HEADS, SIZE), weight(HEADS, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)
        a, b = ((h * w[:, None]).sum(-1) for w in (self.out_of, self.into))
        edges = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        scores = F.leaky_relu(a.unsqueeze(3) + b.unsqueeze(2), 0.2).masked_fill(~edges, float("-inf"))
        return (attends(scores.softmax(-1), size=1, kind="additive") @ h).transpose(1, 2).flatten(2)


class Pairs(nn.Module):
    """A graph: one vector reads two nodes side by side; then one reads their bent sum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.vector = nn.Linear(7, WIDTH), weight(2 * WIDTH, 1)
        self.a, self.b, self.score = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, n = self.enter(x), x.shape[1]
        sides = h.repeat_interleave(n, 1), h.repeat(1, n, 1)
        scores = F.leaky_relu(torch.cat(sides, -1).view(-1, n, n, 2 * WIDTH) @ self.vector, 0.2).squeeze(3)
        h = F.elu(attends(scores.softmax(-1), "bqk", heads=1, size=WIDTH, kind="additive") @ h)
        scores = self.score(F.leaky_relu(self.a(h).unsqueeze(2) + self.b(h).unsqueeze(1))).squeeze(3)
        return attends(scores.softmax(-1), "bqk", heads=1, size=HIDDEN, kind="additive") @ h


class Bent(Pairs):
    """A graph of heads: a vector of each, by which their bent sums are multiplied and added up, or which is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.read = weight(HEADS, SIZE), weight(1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).unflatten(-1, (HEADS, SIZE))
        scores = (F.leaky_relu(h[:, :, None] + h[:, None]) * self.reads).sum(-1)
        z = torch.einsum("bqkh,bkhd->bqhd", attends(scores.softmax(2), "bqkh", kind="additive"), h).flatten(2)
        pairs = torch.tanh(z.mean(1, keepdim=True) + h.flatten(2))
        p = torch.bmm(self.read.repeat(len(x), 1, 1), pairs.mT).softmax(-1)
        return attends(p, "bqk", heads=1, size=WIDTH, kind="additive") @ h.flatten(2)


class Scan(nn.Module):
    """A selective state, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.steps = nn.Linear(7, 2 * WIDTH), nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 2 * 3 + 1)
        self.decay = weight(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.enter(x).chunk(2, -1)
        rate, into, out = self.steps(u).split([1, 3, 3], -1)
        rate, state, ys = F.softplus(rate), torch.zeros(len(x), WIDTH, 3), []
        for t in range(x.shape[1]):
            state = state * torch.exp(-rate[:, t, :, None] * self.decay.abs()) + u[:, t, :, None] * into[:, t, None]
            ys.append((state * out[:, t, None]).sum(-1))
        return x + self.leave(torch.stack(ys, 1) * F.silu(gate))


class Classifier(nn.Module):
    """Layers without a stream, and a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)


class MeanWeighed(nn.Module):
    """A pooling: one score for each position, read off itself."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.score = (
            nn.Linear(7, WIDTH),
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return (self.score(x).softmax(1) * x).sum(1)


class SoftExperts(nn.Module):
    """Learned slots pool the tokens, an expert works on each, and tokens choose among what they say: a router twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.slots = nn.Linear(7, WIDTH), weight(3, WIDTH)
        self.experts = nn.ModuleList(Plain() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.enter(x))
        scores = F.normalize(x, dim=-1) @ F.normalize(self.slots, dim=-1).T
        seen = scores.softmax(1).mT @ x
        said = torch.stack([expert(seen[:, n]) for n, expert in enumerate(self.experts)], 1)
        return carries(x + scores.softmax(2) @ said)


class Forget(nn.Module):
    """A gate on the stream itself, as in a highway."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.new = nn.Linear(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(2):
            t = torch.sigmoid(self.gate(x))
            x = t * torch.relu(self.new(x)) + (1 - t) * x
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


STEPS = Decoder, Halves, Multiplicative, Concatenated
GRAPHS = Neighbours, Pairs, Bent
NOT_FOUND = Pointer, TwoDirections, Scan, Classifier, Capsules, MeanWeighed, Forget
"""In which nothing is to be found."""
