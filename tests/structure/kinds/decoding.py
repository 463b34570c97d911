"""K10: grouped queries in a step of decoding under a mask."""

import torch

from tests.structure.kinds.truth import Heads, Layers, attends, heads, joined, look


class _Step(Layers):
    """One new token looks at a cache."""

    case = False
    depth = 1
    past = 5
    skip = ("one head",)

    def inputs(self):
        s = self.s
        cache = torch.randn(2, s.batch, 2, self.past, s.size, dtype=s.dtype)
        return torch.randn(s.batch, 1, s.width, dtype=s.dtype), cache

    class attention(Heads):
        def __init__(self, s):
            super().__init__(s, 2)

        cache = None

        def forward(self, x):
            s = self.s
            q, k, v = heads(self.q(x), s.heads), heads(self.k(x), 2), heads(self.v(x), 2)
            k, v = torch.cat([self.cache[0], k], 2), torch.cat([self.cache[1], v], 2)
            return self.o(joined(self.step(q, k, v)))

        def bias(self, q, k):
            mask = q.new_zeros(len(q), 1, 1, k.shape[2])
            mask[0, ..., :2] = float("-inf")
            return mask

        def tell(self, q, k, bias):
            _b, h, _n, d = q.shape
            many = k.repeat_interleave(h // 2, 1)
            attends(lambda: (q.detach() @ many.detach().mT * d**-0.5 + bias.detach()).softmax(-1), h, d, 2)

        def step(self, q, k, v): ...

    def forward(self, x, cache):
        self.looks[0].cache = cache
        return super().forward(x)


class GroupsApart(_Step):
    """Groups as a dimension of their own."""

    class attention(_Step.attention):
        def step(self, q, k, v):
            b, h, n, d = q.shape
            bias = self.bias(q, k)
            self.tell(q, k, bias)
            p = (q.reshape(b, 2, h // 2, n, d) @ k[:, :, None].mT * d**-0.5 + bias[:, :, None]).softmax(-1)
            return (p @ v[:, :, None]).reshape(b, h, n, d)


class Repeated(_Step):
    """Keys are repeated, as most do."""

    class attention(_Step.attention):
        def step(self, q, k, v):
            q.shape[-1]
            bias = self.bias(q, k)
            return look(self.s, q, k, v, bias)
