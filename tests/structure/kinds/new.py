"""The new kinds: claimed rightly, or refused with a reason that names them."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.structure.kinds.truth import (
    Heads,
    Layers,
    Model,
    Plain,
    apart,
    attends,
    carries,
    ends,
    heads,
    joined,
    linear,
    look,
    never,
    refused,
    remembers,
    weight,
)


class _Mix(Layers):
    """Kinds of mixing positions that are no softmax attention."""

    case = False
    depth = 1
    skip = ("one token",)


def _said(pattern, word, *others):
    """Refused by a reason that names the kind, at the pattern or at the value around it."""
    refused(pattern, *others, word=word)
    return pattern


class PlusOne(_Mix):
    """A softmax with one more in the sum below."""

    class attention(Heads):
        def mix(self, q, k, v):
            e = (q @ k.mT * self.s.size**-0.5).exp()
            return attends(e / (1 + e.sum(-1, keepdim=True)), self.s.heads, self.s.size, may=True) @ v


class Cell(Model):
    """A recurrent cell over time: no stream."""

    skip = ("one token",)

    def __init__(self, s):
        super().__init__(s)
        self.cell, self.out = nn.GRUCell(s.width, s.width), linear(s.width, 3)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.out(state)


class CellByHand(Model):
    """A recurrent cell with gates by hand (LSTM): its sums are no stream of layers."""

    skip = ("one token",)

    def __init__(self, s):
        super().__init__(s)
        self.x, self.h = linear(s.width, 4 * s.width), linear(s.width, 4 * s.width)

    def forward(self, x):
        h = c = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            i, f, o, g = (self.x(x[:, t]) + self.h(h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            carries(c, may=False) if False else never(c)
            h = torch.sigmoid(o) * torch.tanh(c)
        return h


class Differential(Layers):
    """Two softmaxes, of which one is taken from the other: one finding, whose maps are the difference."""

    class attention(Heads):
        def __init__(self, s):
            super().__init__(s)
            self.q2, self.k2, self.rate = linear(s.width, s.width), linear(s.width, s.width), nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            self.two = heads(self.q2(x), self.s.heads), heads(self.k2(x), self.s.heads)
            return super().forward(x)

        def mix(self, q, k, v):
            a, b = (q @ k.mT).softmax(-1), (self.two[0] @ self.two[1].mT).softmax(-1)
            p = a - self.rate * b
            return attends(p, self.s.heads, self.s.size) @ v


def weights(q, k):
    return (q.detach() @ k.detach().mT).softmax(-1)


class DifferentialKernels(Differential):
    """The same of two kernels, whose outputs are taken from one another."""

    class attention(Differential.attention):
        def mix(self, q, k, v):
            a = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            b = F.scaled_dot_product_attention(*self.two, v, scale=1.0)
            attends(
                lambda: weights(q, k) - self.rate.detach() * weights(*self.two),
                self.s.heads,
                self.s.size,
            )
            return a - self.rate * b


class Branches(Layers):
    """Three ways to look, each gated: means of blocks, chosen blocks, a window (NSA)."""

    skip = ("one token",)
    depth = 1

    class attention(Heads):
        def __init__(self, s):
            super().__init__(s)
            self.gate = linear(s.width, 3 * s.heads)

        def forward(self, x):
            self.gates = torch.sigmoid(self.gate(x)).view(*x.shape[:2], self.s.heads, 3).transpose(1, 2)
            return super().forward(x)

        def mix(self, q, k, v):
            n, d = q.shape[-2], q.shape[-1]
            pad = -n % 2
            pooled = [F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, 2)).mean(3) for t in (k, v)]
            coarse = attends((q @ pooled[0].mT * d**-0.5).softmax(-1), self.s.heads, d, may=True)
            one = coarse @ pooled[1]
            best = coarse.mean((1, 2)).topk(1, -1).indices
            places = (best * 2 + torch.arange(2)).clamp(max=n - 1)[:, None, :, None].expand(-1, self.s.heads, -1, d)
            k2, v2 = k.gather(2, places), v.gather(2, places)
            two = attends((q @ k2.mT * d**-0.5).softmax(-1), self.s.heads, d, may=True) @ v2
            mask = torch.ones(n, n).tril().triu(-2) == 0
            three = attends((q @ k.mT * d**-0.5).masked_fill(mask, float("-inf")).softmax(-1), self.s.heads, d, may=True) @ v
            g = self.gates
            return g[..., :1] * one + g[..., 1:2] * two + g[..., 2:] * three


class Latent(Layers):
    """Keys and values from a latent, with a turned part that all heads share (MLA)."""

    skip = ("heads of one",)

    class attention(Model):
        def __init__(self, s):
            super().__init__(s)
            self.q, self.kv, self.up, self.o = (
                linear(s.width, s.heads * (s.size + 2)),
                linear(s.width, 6 + 2),
                linear(6, 2 * s.width),
                linear(s.width, s.width),
            )

        def forward(self, x):
            s = self.s
            q = heads(self.q(x), s.heads)
            latent, shared = self.kv(x).split([6, 2], -1)
            k, v = heads(self.up(latent), s.heads).chunk(2, -1)
            k = torch.cat([k, shared[:, None].expand(-1, s.heads, -1, -1)], -1)
            return self.o(joined(look(s, q, k, v)))


class LatentAbsorbed(Layers):
    """The same with the up-projections taken into queries and output: keys and values are the latent itself."""

    case = False
    skip = ("heads of one",)

    class attention(Model):
        def __init__(self, s):
            super().__init__(s)
            self.q, self.kv, self.o = (
                linear(s.width, s.heads * (s.size + 2)),
                linear(s.width, 6 + 2),
                linear(s.width, s.width),
            )
            self.wk, self.wv = weight(s.heads, s.size, 6), weight(s.heads, 6, s.size)

        def forward(self, x):
            s = self.s
            q, r = heads(self.q(x), s.heads).split([s.size, 2], -1)
            latent, shared = self.kv(x).split([6, 2], -1)
            scores = torch.einsum("bhqd,hdc,bkc->bhqk", q, self.wk, latent) + torch.einsum("bhqr,bkr->bhqk", r, shared)
            p = attends(scores.softmax(-1), s.heads, 8, 1, may=True)
            attends(p, s.heads, s.size, s.heads, may=True)
            attends(p, s.heads, 6, 1, may=True)
            z = torch.einsum("bhqk,bkc,hcd->bqhd", p, latent, self.wv)
            return self.o(z.flatten(2))


class LatentAbsorbedByTwo(LatentAbsorbed):
    """The same in products of two."""

    class attention(LatentAbsorbed.attention):
        def forward(self, x):
            s = self.s
            q, r = heads(self.q(x), s.heads).split([s.size, 2], -1)
            latent, shared = self.kv(x).split([6, 2], -1)
            scores = (q @ self.wk) @ latent[:, None].mT + r @ shared[:, None].mT
            p = attends(scores.softmax(-1), s.heads, 6 + 2, 1)
            z = (p @ latent[:, None]) @ self.wv
            return self.o(joined(z))


class _Experts(Plain):
    count = 3

    def __init__(self, s):
        super().__init__(s)
        self.router = linear(s.width, self.count)
        self.ups, self.downs = weight(self.count, s.width, s.hidden), weight(self.count, s.hidden, s.width)


class ExpertsLoop(Layers):
    """The best two experts of each token, expert by expert: one memory each, as far as tokens went there."""

    depth = 1

    class memory(_Experts):
        def forward(self, x):
            flat = x.flatten(0, 1)
            p = self.router(flat).softmax(-1)
            refused(p)
            rate, which = p.topk(2, -1)
            out = torch.zeros_like(flat)
            for n in range(self.count):
                row, slot = (which == n).nonzero(as_tuple=True)
                h = torch.relu(flat[row] @ self.ups[n])
                remembers(h, may=not len(row))
                out = out.index_add(0, row, (h @ self.downs[n]) * rate[row, slot, None])
            return out.view_as(x)


class ExpertsGathered(Layers):
    """The weights of each token's expert are fetched: coefficients are a function of token and expert."""

    depth = 1

    class memory(_Experts):
        def forward(self, x):
            p = self.router(x).softmax(-1)
            refused(p)
            rate, which = p.max(-1)
            h = torch.relu(torch.einsum("btd,btdh->bth", x, self.ups[which]))
            remembers(h, may=True)
            return torch.einsum("bth,bthd->btd", h, self.downs[which]) * rate[..., None]


class ExpertsShared(Layers):
    """One expert for all beside those that are chosen."""

    depth = 1

    class memory(_Experts):
        def forward(self, x):
            p = self.router(x).sigmoid()
            rate, which = p.max(-1)
            shared = super().forward(x)
            h = torch.relu(torch.einsum("btd,edh->bteh", x, self.ups))
            remembers(h, may=True)
            each = torch.einsum("bteh,ehd->bted", h, self.downs)
            return shared + (each * (F.one_hot(which, self.count) * rate[..., None])[..., None]).sum(-2)


class HyperStatic(Layers):
    """Several copies of the stream, mixed by fixed weights before and after each part."""

    def __init__(self, s):
        super().__init__(s)
        self.read, self.write, self.keep = (
            nn.Parameter(torch.rand(2 * self.depth, *shape) + 0.1) for shape in ((3,), (3,), (3, 3))
        )

    def forward(self, x):
        h = carries(self.enter(x)[..., None, :].expand(-1, -1, 3, -1), may=True)
        for n, part in enumerate(m for pair in zip(self.looks, self.mlps, strict=False) for m in pair):
            y = (h * self.read[n][:, None]).sum(-2)
            carries(y, may=True)
            kept = torch.einsum("btnd,nm->btmd", h, self.keep[n])
            carries(kept, may=True)
            h = kept + part(self.norms[n](y))[..., None, :] * self.write[n][:, None]
            carries(h)
        x = h.sum(-2)
        apart()
        return self.end(carries(x, may=True))


class HyperDynamic(HyperStatic):
    """The weights of what is read and written are made of the copies."""

    def __init__(self, s):
        super().__init__(s)
        self.make = nn.ModuleList(linear(s.width, 2) for _ in range(2 * self.depth))

    def forward(self, x):
        h = carries(self.enter(x)[..., None, :].expand(-1, -1, 3, -1), may=True)
        for n, part in enumerate(m for pair in zip(self.looks, self.mlps, strict=False) for m in pair):
            a, b = torch.tanh(self.make[n](F.layer_norm(h, h.shape[-1:]))).split(1, -1)
            y = ((self.read[n][:, None] + a) * h).sum(-2)
            carries(y, may=True)
            kept = self.keep[n].T @ h
            carries(kept, may=True)
            h = carries(kept + part(self.norms[n](y))[..., None, :] * (self.write[n][:, None] + b))
        apart()
        return self.end(carries(h.sum(-2), may=True))


class ValueResidual(Layers):
    """Values of the first layer are mixed into those of the later ones."""

    def __init__(self, s):
        super().__init__(s)
        for n, one in enumerate(self.looks):
            one.__dict__["first"] = self.looks[0] if n else None  # no module of its own

    class attention(Heads):
        first = None

        def mix(self, q, k, v):
            self.v0 = v
            return look(self.s, q, k, v if self.first is None else 0.5 * v + 0.5 * self.first.v0)


class ManyTokens(Layers):
    """Heads for the next tokens, each a layer of its own that reads the last state beside a projected input."""

    depth = 1

    def __init__(self, s):
        super().__init__(s)
        self.more = nn.ModuleList(linear(s.width, 2 * s.width + 1) for _ in range(3))

    def end(self, x):
        y = ends(self.norms[-1](x))
        return [self.logits(y), *(m(y) for m in self.more)]


class Sinks(Layers):
    """A learned score of nothing beside the keys, cut off after the softmax."""

    class attention(Heads):
        def __init__(self, s):
            super().__init__(s)
            self.sink = weight(s.heads, 1, 1)

        def mix(self, q, k, v):
            scores = q @ k.mT * self.s.size**-0.5
            p = torch.cat([scores, self.sink.expand(len(q), -1, q.shape[-2], -1)], -1).softmax(-1)[..., :-1]
            return attends(p, self.s.heads, self.s.size) @ v


class GatedHeads(Layers):
    """What each head mixes is gated before the output projection."""

    class attention(Heads):
        def __init__(self, s):
            super().__init__(s)
            self.g = linear(s.width, s.width)

        def forward(self, x):
            self.gate = heads(torch.sigmoid(self.g(x)), self.s.heads)
            return super().forward(x)

        def mix(self, q, k, v):
            return look(self.s, q, k, v) * self.gate
