"""K5: products of three activations: claimed rightly or refused."""

import torch

from tests.structure.kinds.truth import Heads, Layers, attends, heads, joined, linear, never, refused


class _Three(Heads):
    def __init__(self, s):
        super().__init__(s)
        self.other, self.w = linear(s.width, s.width), linear(s.width, s.width)

    def forward(self, x):
        q, k, v, other, w = (heads(p(x), self.s.heads) for p in (self.q, self.k, self.v, self.other, self.w))
        return self.o(joined(self.three(q, k, v, other, w)))


class ScoresOfThreeByTwo(Layers):
    """The same in products of two."""

    skip = ("one token",)

    class attention(_Three):
        def three(self, q, k, v, other, w):
            scores = torch.einsum("bhqd,bhkld->bhqkl", q, k[:, :, :, None] * other[:, :, None])
            p = scores.flatten(-2).softmax(-1)
            pairs = (v[:, :, :, None] * w[:, :, None]).flatten(2, 3)
            return torch.matmul(attends(p, self.s.heads, self.s.size, may=True), pairs)


class ValuesOfTwo(Layers):
    """One key, and values that are products of values at the query and at the key: z is the whole product."""

    class attention(_Three):
        def three(self, q, k, v, other, w):
            p = (q @ k.mT).softmax(-1)
            z = torch.einsum("bhqk,bhkd,bhqd->bhqd", p, v, other)
            attends(p, self.s.heads, self.s.size, may=True, z=lambda: p @ v)
            return z


class ValuesOfTwoKeys(Layers):
    """Two values at the same key, multiplied in the product itself."""

    class attention(_Three):
        def three(self, q, k, v, other, w):
            p = (q @ k.mT).softmax(-1)
            z = torch.einsum("bhqk,bhkd,bhkd->bhqd", p, v, w)
            attends(p, self.s.heads, self.s.size, may=True, z=z)
            return z


class ScoresGated(Layers):
    """Scores of a query, a key and a gate of the query: a product of three that is one of two."""

    class attention(_Three):
        def three(self, q, k, v, other, w):
            p = torch.einsum("bhqd,bhkd,bhqd->bhqk", q, k, other).softmax(-1)
            return attends(p, self.s.heads, self.s.size, may=True) @ v


class TwoPatterns(Layers):
    """The values are weighed by one pattern and then by another, in one product."""

    skip = ("one token",)

    class attention(_Three):
        def three(self, q, k, v, other, w):
            p, r = (q @ k.mT).softmax(-1), (other @ w.mT).softmax(-1)
            attends(p, self.s.heads, self.s.size, may=True)
            attends(r, self.s.heads, self.s.size, may=True, z=lambda: r @ v)
            return torch.einsum("bhqk,bhkl,bhld->bhqd", p, r, v)


class ProductPattern(Layers):
    """Two softmaxes are multiplied number by number and act as one pattern: neither is it alone."""

    skip = ("one token",)

    class attention(_Three):
        def three(self, q, k, v, other, w):
            p, r = (q @ k.mT).softmax(-1), (other @ w.mT).softmax(-1)
            both = p * r
            refused(p, both), refused(r, both)
            never(p, "pattern")
            return both @ v


class ProductInEinsum(Layers):
    """The same in one product of three."""

    skip = ("one token",)

    class attention(_Three):
        def three(self, q, k, v, other, w):
            p, r = (q @ k.mT).softmax(-1), (other @ w.mT).softmax(-1)
            refused(p), refused(r)
            return torch.einsum("bhqk,bhqk,bhkd->bhqd", p, r, v)
