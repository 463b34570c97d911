"""K2: scores hidden behind a nearer product of the same softmax."""

import torch
from torch import nn

from tests.structure.kinds.truth import Heads, Layers, attends, heads, linear, weight


class _Relative(Heads):
    def __init__(self, s):
        super().__init__(s)
        n = s.tokens
        self.a, self.b = weight(n, n, s.size), weight(n, n, s.size)
        self.t, self.places = weight(n, s.size), linear(s.width, s.width)

    def scores(self, q, k):
        return q @ k.mT * self.s.size**-0.5

    def close(self, q, k, p):
        return attends(p.softmax(-1), self.s.heads, self.s.size)

    def mix(self, q, k, v):
        return self.close(q, k, self.scores(q, k)) @ v


class Decomposed(Layers):
    """Relative terms of rows and columns, added last, as over images."""

    class attention(_Relative):
        def __init__(self, s):
            super().__init__(s)
            self.h, self.w = weight(s.tokens, s.tokens, s.size), weight(1, 1, s.size)

        def mix(self, q, k, v):
            b, h, t, d = q.shape
            r = q.reshape(b * h, t, 1, d)
            rows = torch.einsum("bhwc,hkc->bhwk", r, self.h)
            columns = torch.einsum("bhwc,wkc->bhwk", r, self.w)
            scores = (q * d**-0.5 @ k.mT).view(b * h, t, 1, t, 1) + rows[..., None] + columns[..., None, :]
            return self.close(q, k, scores.view(b, h, t, t)) @ v


class DecomposedGrid(Layers):
    """The same over a grid of two rows, with heads in the batch."""

    skip = ("one token", "plain", "one example", "bfloat16", "fused", "one head", "heads of one")

    class attention(_Relative):
        def __init__(self, s):
            super().__init__(s)
            self.h, self.w = weight(2, 2, s.size), weight(2, 2, s.size)

        def mix(self, q, k, v):
            b, h, t, d = q.shape
            q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
            r = q.view(b * h, 2, 2, d)
            rows, columns = torch.einsum("bhwc,hkc->bhwk", r, self.h), torch.einsum("bhwc,wkc->bhwk", r, self.w)
            scores = (q * d**-0.5) @ k.mT
            scores = (scores.view(-1, 2, 2, 2, 2) + rows[..., :, None] + columns[..., None, :]).view(b * h, t, t)
            p = scores.softmax(-1)
            attends(p.view(b, h, t, t), self.s.heads, self.s.size)
            return (p @ v).view(b, h, t, d)


class Shaw(Layers):
    """Queries times a table of distances, added after the keys."""

    class attention(_Relative):
        def scores(self, q, k):
            return q @ k.mT + torch.einsum("bhqd,qkd->bhqk", q, self.a)


class ShawFirst(Layers):
    """The same, added before."""

    class attention(_Relative):
        def scores(self, q, k):
            return torch.einsum("bhqd,qkd->bhqk", q, self.a) + q @ k.mT


class Disentangled(Layers):
    """Content to place and place to content, each a product, gathered, added last."""

    class attention(_Relative):
        def scores(self, q, k):
            n = q.shape[-2]
            index = (torch.arange(n)[:, None] - torch.arange(n)).abs().expand(*q.shape[:2], n, n)
            c2p = (q @ self.t.mT).gather(-1, index)
            p2c = (k @ self.t.mT).gather(-1, index).mT
            return q @ k.mT + c2p + p2c


class Shifted(Layers):
    """Queries plus two biases; the places' product is shifted, and the keys' comes first."""

    class attention(_Relative):
        def __init__(self, s):
            super().__init__(s)
            self.u, self.w = weight(s.heads, 1, s.size), weight(s.heads, 1, s.size)

        def scores(self, q, k):
            b, h, n, d = q.shape
            r = (q + self.w) @ self.places(self.t.repeat(1, self.s.heads)).view(n, h, d).permute(1, 2, 0)
            r = torch.cat([r.new_zeros(b, h, n, 1), r], -1).view(b, h, n + 1, n)[:, :, 1:]
            return ((q + self.u) @ k.mT + r) * d**-0.5


class PairBias(Layers):
    """A bias for each pair, projected from a representation of pairs that is itself a product of both."""

    class attention(_Relative):
        def __init__(self, s):
            super().__init__(s)
            self.left, self.right, self.pair = linear(s.width, 3), linear(s.width, 3), linear(3, s.heads)

        def forward(self, x):
            pair = self.left(x)[:, :, None] * self.right(x)[:, None]
            self.bias = self.pair(pair).permute(0, 3, 1, 2)
            return super().forward(x)

        def scores(self, q, k):
            return q @ k.mT * self.s.size**-0.5 + self.bias


class DistanceNet(Layers):
    """A bias by a small network of distances, that is added last."""

    class attention(_Relative):
        def __init__(self, s):
            super().__init__(s)
            self.net = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, s.heads))

        def scores(self, q, k):
            n = q.shape[-2]
            d = (torch.arange(n)[:, None] - torch.arange(n)).to(q.dtype)[..., None]
            return q @ k.mT * self.s.size**-0.5 + self.net(d).permute(2, 0, 1)


class Contextual(Layers):
    """Places counted by gates of the scores themselves, looked up between two tables (CoPE)."""

    class attention(_Relative):
        def scores(self, q, k):
            scores = q @ k.mT
            count = torch.sigmoid(scores).flip(-1).cumsum(-1).flip(-1).clamp(max=q.shape[-2] - 1)
            table = q @ self.t.mT
            low, high = count.floor().long(), count.ceil().long()
            share = count - low
            return scores + table.gather(-1, high) * share + table.gather(-1, low) * (1 - share)


class TwoKeys(Layers):
    """Two products of different projections: content and places apart, both of data; a head has the units of both."""

    class attention(_Relative):
        def __init__(self, s):
            super().__init__(s)
            self.q2, self.k2 = linear(s.width, s.width), linear(s.width, s.width)

        def forward(self, x):
            self.more = heads(self.q2(x), self.s.heads) @ heads(self.k2(x), self.s.heads).mT
            return super().forward(x)

        def close(self, q, k, p):
            return attends(p.softmax(-1), self.s.heads, 2 * self.s.size)

        def scores(self, q, k):
            return q @ k.mT + self.more
