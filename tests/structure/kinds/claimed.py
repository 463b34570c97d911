"""What was claimed, with a certificate, that is not so."""

import torch
from torch import Tensor, nn

from tests.structure.kinds.truth import (
    Heads,
    Layers,
    Model,
    Sizes,
    adds,
    attends,
    carries,
    ends,
    heads,
    joined,
    linear,
    reads_out,
    refused,
    weight,
)


class HeadsOfOwnMatrices(Layers):
    """Each head has matrices of its own, and its write is added to those of others: a row holds one of several heads."""

    class attention(Model):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.q, self.k, self.v = (weight(s.heads, s.width, s.size) for _ in range(3))
            self.o = weight(s.heads, s.size, s.width)

        def forward(self, x: Tensor) -> Tensor:
            s = self.s
            q, k, v = (torch.stack([x @ one for one in many], 1) for many in (self.q, self.k, self.v))
            z = attends((q @ k.mT * 0.3).softmax(-1), s.heads, s.size, may=True) @ v
            made = [z[:, n] @ one for n, one in enumerate(self.o)]
            return torch.stack(made).sum(0)


class HeadLessAnother(Layers):
    """Of each two heads the second is taken away, as a token says how much of it; one of them makes a row."""

    class attention(Model):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.q, self.k, self.v, self.o = (linear(s.width, n * s.width) for n in (2, 1, 1, 1))
            self.share = linear(s.width, s.heads)

        def forward(self, x: Tensor) -> Tensor:
            s = self.s
            q, k, v = heads(self.q(x), 2 * s.heads), heads(self.k(x), s.heads), heads(self.v(x), s.heads)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            z = attends((q @ k.mT * 0.3).softmax(-1), 2 * s.heads, s.size, s.heads) @ v
            return self.o(joined(z[:, ::2] - self.share(x).sigmoid().mT[..., None] * z[:, 1::2]))

    skip = ("plain", "one example", "bfloat16", "fused", "alike", "heads of one", "one token")


class TurnedByMatrices(Layers):
    """A matrix for each position turns queries and keys: they are of one stream still."""

    class attention(Heads):
        case = False

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            generator = torch.randn(q.shape[-1], q.shape[-1], generator=torch.Generator().manual_seed(0))
            turns = torch.matrix_exp(torch.arange(q.shape[-2])[:, None, None] * (generator - generator.mT)).to(q.dtype)
            q, k = (torch.einsum("tde,bhte->bhtd", turns, one) for one in (q, k))
            return attends((q @ k.mT * 0.3).softmax(-1), self.s.heads, self.s.size) @ v


class MergedExperts(Layers):
    """A router weighs the matrices of experts, and not what they write: its second projection makes weights."""

    class memory(Model):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.router, self.up, self.down = linear(s.width, 3), weight(3, s.width, 6), weight(3, 6, s.width)

        def forward(self, x: Tensor) -> Tensor:
            shares = refused(self.router(x.mean(1)).softmax(-1))
            up, down = torch.einsum("be,edn->bdn", shares, self.up), torch.einsum("be,end->bnd", shares, self.down)
            return torch.relu(x @ up) @ down

    def layers(self, x: Tensor) -> Tensor:
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=True)):
            x = carries(x + adds(a(self.norms[2 * n](x))))
            x = carries(x + adds(m(self.norms[2 * n + 1](x))))
        return x


class SumOfAllBefore(Layers):
    """Each layer reads the sum of all that was written, laid one on another."""

    def layers(self, x: Tensor) -> Tensor:
        written = [x]
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=True)):
            for norm, part in ((self.norms[2 * n], a), (self.norms[2 * n + 1], m)):
                written.append(adds(part(norm(x))))
                x = carries(torch.stack(written).sum(0))
        return x


class CappedBySigmoid(Layers):
    """A soft cap of the logits: a sigmoid, scaled."""

    def end(self, x: Tensor) -> Tensor:
        y = self.logits(ends(self.norms[-1](x)))
        return reads_out(y, 30 * torch.sigmoid(y / 7.5))


class HiddenUnitsAsKeys(Layers):
    """A network of three projections, in sizes in which its hidden units are as many as those of the stream."""

    skip = ("plain", "one example", "bfloat16", "fused", "one head", "heads of one", "one token")

    class memory(Model):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.parts = nn.ModuleList(linear(s.width, s.width) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            first, second, third = self.parts
            return refused(third(torch.relu(second(torch.relu(first(x))))), word="hidden units")


class WindowAtOnePosition(Layers):
    """Coefficients are made in windows over positions: at the first one nothing shows it but the op."""

    skip = ("plain", "one example", "bfloat16", "fused", "one head", "alike", "heads of one")

    class memory(Model):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.up, self.down = linear(s.width, s.hidden), linear(s.hidden, s.width)
            self.window = nn.Conv1d(s.hidden, s.hidden, 3, groups=s.hidden)

        def forward(self, x: Tensor) -> Tensor:
            h = self.window(nn.functional.pad(self.up(x).mT, (2, 0))).mT
            return refused(self.down(torch.relu(h)), word="window over these")


class OneHeadLessAnother(Layers):
    """A difference of two patterns with a single head."""

    skip = ("plain", "one example", "bfloat16", "fused", "alike", "heads of one", "one token")

    class attention(Heads):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.q2, self.k2, self.share = linear(s.width, s.width), linear(s.width, s.width), weight(s.heads, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            s = self.s
            q, k, v, q2, k2 = (heads(f(x), s.heads) for f in (self.q, self.k, self.v, self.q2, self.k2))
            p = (q @ k.mT * 0.3).softmax(-1) - self.share * (q2 @ k2.mT * 0.3).softmax(-1)
            return self.o(joined(attends(p, s.heads, s.size) @ v))


class QueriesOfAllHeads(Layers):
    """Heads are folded into the rows of queries, as keys are shared, and told apart again after the product."""

    class attention(Heads):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s, 1)

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = q.flatten(1, 2) @ k[:, 0].mT * 0.3
            p = attends(rows.view(*q.shape[:3], -1).softmax(-1), self.s.heads, self.s.size, 1)
            return (p.flatten(1, 2) @ v[:, 0]).view(q.shape)


class ComparedByCosine(Layers):
    """Queries and keys meet in an op that is no product."""

    class attention(Heads):
        case = False

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = nn.functional.cosine_similarity(q[..., None, :], k[..., None, :, :], dim=-1)
            return refused((scores * 3).softmax(-1), word="no product that is known") @ v


class LearnedKeys(Layers):
    """Learned vectors lie before those that are projected to keys and values: it is self-attention still."""

    class attention(Heads):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.kept = weight(3, s.width)

        def forward(self, x: Tensor) -> Tensor:
            every = torch.cat([self.kept.expand(len(x), -1, -1), x], 1)
            q, k, v = heads(self.q(x), self.s.heads), heads(self.k(every), self.s.heads), heads(self.v(every), self.s.heads)
            return self.o(joined(attends((q @ k.mT * 0.3).softmax(-1), self.s.heads, self.s.size) @ v))
