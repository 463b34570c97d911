"""K1: one bad spot costs one finding, never the search."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.kinds.truth import (
    TOLD,
    Heads,
    Layers,
    Model,
    apart,
    attends,
    carries,
    linear,
    look,
    remembers,
    weight,
)


class _Beside(Layers):
    """A layer with something odd in its input; attention and memory of the layer are there all the same."""

    case = False
    depth = 1

    def __init__(self, s):
        super().__init__(s)
        self.make(s)

    def make(self, s): ...
    def odd(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x):
        y = super().forward(self.odd(x))
        TOLD[-1].layers = None
        return y


class MhaOfOne(_Beside):
    """nn.MultiheadAttention(1, 1) beside a layer."""

    def make(self, s):
        self.one = nn.MultiheadAttention(1, 1, batch_first=True)

    def odd(self, x):
        y = x[..., :1]
        z, p = self.one(y, y, y, need_weights=True, average_attn_weights=False)
        attends(p, 1, 1, may=True)
        return x * (1 + z)


class HandOfOne(_Beside):
    """An attention of width one by hand."""

    def make(self, s):
        self.p = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))

    def odd(self, x):
        y = x[..., :1]
        q, k, v = (p(y) for p in self.p[:3])
        p = attends((q @ k.mT).softmax(-1), 1, 1, layout="bqk", may=True)
        return x * (1 + self.p[3](p @ v))


class EncoderOfOne(_Beside):
    """An encoder layer of width one with a feed-forward of one unit."""

    def make(self, s):
        self.one = nn.TransformerEncoderLayer(1, 1, 1, batch_first=True, norm_first=True)

    def odd(self, x):
        apart()
        y = carries(x[..., :1], may=True)
        one = self.one
        carries(lambda: y + one.self_attn(one.norm1(y), one.norm1(y), one.norm1(y))[0], may=True)
        attends(
            lambda: one.self_attn(one.norm1(y), one.norm1(y), one.norm1(y), average_attn_weights=False)[1], 1, 1, may=True
        )

        def middle():
            return y + one.self_attn(one.norm1(y), one.norm1(y), one.norm1(y))[0]

        remembers(lambda: torch.relu(one.linear1(one.norm2(middle()))), may=True)
        carries(x, may=True)
        carries(lambda: x * (1 + one(y)), may=True)
        return x * carries(1 + carries(self.one(y), may=True), may=True)


class MemoryOfOne(_Beside):
    """A memory of a single unit on a stream of width one: it is one, or it is refused."""

    def make(self, s):
        self.up, self.down = nn.Linear(1, 1), nn.Linear(1, 1)

    def odd(self, x):
        y = carries(x, may=True)[..., :1]
        apart()
        return x * (carries(carries(y, may=True) + self.down(remembers(torch.relu(self.up(y)), may=True)), may=True))


class EinsumThreeDots(_Beside):
    """A product of three with an ellipsis."""

    def make(self, s):
        self.w, self.g = weight(s.width, s.width), weight(s.width)

    def odd(self, x):
        return x + 0 * x if False else torch.einsum("...d,de,e->...e", x, self.w, self.g)


class EinsumThreeNoArrow(_Beside):
    """A product of three without an arrow; letters sort themselves."""

    def make(self, s):
        self.w, self.g = weight(s.width, s.width), weight(s.width, s.width)

    def odd(self, x):
        return torch.einsum("abc,cd,de", x, self.w, self.g)


class EinsumThreeUnsorted(_Beside):
    """The same with letters out of order, so that the result is turned."""

    def make(self, s):
        self.w, self.g = weight(s.width, s.width), weight(s.width, s.width)

    def odd(self, x):
        return torch.einsum("zyc,cd,da", x, self.w, self.g).permute(2, 1, 0)


class EinsumList(_Beside):
    """The operands in one list."""

    def make(self, s):
        self.w, self.g = weight(s.width, s.width), weight(s.width, s.width)

    def odd(self, x):
        return torch.einsum("btc,cd,de->bte", [x, self.w, self.g])


class EinsumListScores(Layers):
    """Scores of an attention as a product of three in one list: q, k and a scale of each unit."""

    class attention(Heads):
        def __init__(self, s):
            super().__init__(s)
            self.g = nn.Parameter(torch.rand(s.size) + 0.5)

        def mix(self, q, k, v):
            p = attends(torch.einsum("bhqd,bhkd,d->bhqk", [q, k, self.g]).softmax(-1), self.s.heads, self.s.size)
            return torch.einsum("bhqk,bhkd->bhqd", [p, v])


class EinsumNumbers(Layers):
    """Einsum in the form that names dimensions by numbers."""

    class attention(Heads):
        def mix(self, q, k, v):
            p = torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3]).mul(0.5).softmax(-1)
            return torch.einsum(attends(p, self.s.heads, self.s.size), [0, 1, 2, 3], v, [0, 1, 3, 4], [0, 1, 2, 4])


class EinsumDiagonal(_Beside):
    """Diagonals, traces, sums over everything, one operand."""

    def make(self, s):
        self.w = weight(s.width, s.width)

    def odd(self, x):
        gram = torch.einsum("btc,bsc->bts", x, x)
        apart()
        y = carries(carries(x, may=True) + torch.einsum("btt->bt", gram)[..., None], may=True)
        return carries(carries(y + torch.einsum("ii", self.w), may=True) + torch.einsum("...->", x), may=True)


class EinsumOuter(_Beside):
    """Outer products of three without a shared letter, and a scalar operand."""

    def make(self, s):
        self.a, self.b = weight(3), weight(2)

    def odd(self, x):
        return (
            x
            + torch.einsum("btc,i,j->btcij", x, self.a, self.b).sum((-1, -2))
            * torch.einsum(",i->i", self.a[0], self.b).mean()
        )


class Strict(torch.Tensor):
    """A weight that asserts what it is multiplied with, as quantised ones do."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.matmul):
            x = args[0]
            assert x.dtype != torch.float64, "only single precision"
            with torch._C.DisableTorchFunctionSubclass():
                return func(*(a.as_subclass(torch.Tensor) if isinstance(a, Strict) else a for a in args), **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class AssertingWeights(Layers):
    """Weights that assert the precision of what they are multiplied with: found, or refused in words."""

    skip = ("bfloat16",)

    class attention(Heads):
        def __init__(self, s):
            super().__init__(s)
            self.o.weight = nn.Parameter(Strict(self.o.weight.data), requires_grad=False)

        def mix(self, q, k, v):
            return look(self.s, q, k, v, may=True)


class RaisingWeights(_Beside):
    """A weight whose class raises an error of its own when it is cast."""

    skip = ("bfloat16",)

    class _Odd(torch.Tensor):
        @staticmethod
        def __new__(cls, data):
            return torch.Tensor._make_subclass(cls, data)

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.to, torch.Tensor.double):
                raise KeyError("no such layout")
            return super().__torch_function__(func, types, args, kwargs)

    def make(self, s):
        self.w = nn.Parameter(self._Odd(torch.randn(s.hidden, s.width)), requires_grad=False)
        self.u = weight(s.width, s.hidden)

    def odd(self, x):
        apart()
        return carries(
            carries(x, may=True)
            + F.linear(remembers(F.linear(x, self.w).relu().as_subclass(torch.Tensor), may=True), self.u),
            may=True,
        ).as_subclass(torch.Tensor)


class Fourier(Layers):
    """Positions are mixed by a Fourier transform, in complex numbers."""

    skip = ("bfloat16", "fused")

    class attention(Model):
        def forward(self, x):
            return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real

    def layers(self, x):
        return super().layers(x)


class ComplexHeads(Layers):
    """Queries and keys are turned as complex numbers."""

    skip = ("bfloat16", "heads of one")

    class attention(Heads):
        def turn(self, x):
            z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            angle = torch.arange(x.shape[-2])[:, None] * torch.linspace(1, 0.1, z.shape[-1])
            return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

        def mix(self, q, k, v):
            return look(self.s, self.turn(q), self.turn(k), v)


class ComplexWeights(_Beside):
    """A complex projection and the absolute value of what it makes."""

    skip = ("bfloat16",)

    def make(self, s):
        self.w = nn.Parameter(torch.randn(s.width, s.width, dtype=torch.complex64))

    def odd(self, x):
        return (x.to(torch.complex64) @ self.w).abs()


class ComplexScores(_Beside):
    """The softmax of the real part of a complex product."""

    skip = ("bfloat16",)

    def make(self, s):
        self.w = nn.ParameterList(nn.Parameter(torch.randn(s.width, s.width, dtype=torch.complex64)) for _ in range(3))

    def odd(self, x):
        q, k, v = (x.to(torch.complex64) @ w for w in self.w)
        p = attends((q @ k.mH).real.softmax(-1), 1, self.s.width, layout="bqk", may=True)
        apart()
        return carries(carries(x, may=True) + (p.to(torch.complex64) @ v).real, may=True)


class Sparse(_Beside):
    """A sparse weight, and a graph as a sparse matrix."""

    skip = ("bfloat16",)

    def make(self, s):
        self.register_buffer("adjacency", torch.eye(s.batch * s.tokens).to_sparse())

    def odd(self, x):
        return torch.sparse.mm(self.adjacency, x.flatten(0, 1)).view_as(x)


class Vectors(Model):
    """Vectors without examples or positions; a softmax over a number."""

    def __init__(self, s):
        super().__init__(s)
        self.up, self.down, self.one = linear(s.width, s.hidden), linear(s.hidden, s.width), linear(s.width, 1)

    def inputs(self):
        return (torch.randn(self.s.width, dtype=self.s.dtype),)

    def forward(self, x):
        x = carries(carries(x) + self.down(remembers(torch.relu(self.up(x)))))
        return x * self.one(x).squeeze().softmax(0)


class Recurrent(_Beside):
    """A recurrent network, a transposed convolution and folds beside a layer."""

    def make(self, s):
        self.net, self.c = nn.LSTM(s.width, s.width, batch_first=True), nn.ConvTranspose1d(s.width, s.width, 1)

    def odd(self, x):
        return F.fold(F.unfold(self.c(self.net(x)[0].mT)[:, :, None], (1, 1)), (1, x.shape[1]), (1, 1))[:, :, 0].mT


class Products(_Beside):
    """Products of every name: bilinear, tensordot over nothing, baddbmm with factors, chains, kron, cdist."""

    def make(self, s):
        self.net, self.w = nn.Bilinear(s.width, s.width, s.width), weight(s.width, s.width)

    def odd(self, x):
        x = self.net(x, x) + torch.linalg.multi_dot([x.flatten(0, 1), self.w, self.w]).view_as(x)
        y = torch.baddbmm(x, x, self.w.expand(len(x), -1, -1), beta=0.5, alpha=2)
        z = torch.tensordot(x, x.new_tensor(2.0), dims=0) + torch.kron(x[:1], x.new_ones(1, 1, 1))
        return y + z + torch.addmm(x[0, 0], x[0], self.w, beta=0) + torch.cdist(x.float(), x.float()).mean().to(x.dtype)


class WholeNumbers(_Beside):
    """Products of whole numbers and of truth values."""

    def odd(self, x):
        i = (x * 10).long()
        apart()
        x = carries(carries(x, may=True) + (i @ i.mT).sum(-1, keepdim=True).sign().to(x.dtype), may=True)
        carries(
            lambda: (
                x
                + (
                    (x > 0).to(x.dtype)
                    @ (x > 0).to(x.dtype).mT.sum(-1, keepdim=True).sum(1, keepdim=True).expand(-1, x.shape[-1], -1)
                )
            ),
            may=True,
        )
        return x + (x > 0).to(x.dtype) @ (x > 0).to(x.dtype).mT.sum(-1, keepdim=True).sum(1, keepdim=True).expand(
            -1, x.shape[-1], -1
        )


class Masked(Layers):
    """Every key of the first query is masked: rows that are no numbers, and weigh nothing."""

    class attention(Heads):
        def mix(self, q, k, v):
            bias = q.new_zeros(q.shape[-2], k.shape[-2])
            bias[0] = float("-inf")
            scores = q @ k.mT * self.s.size**-0.5 + bias
            p = torch.nan_to_num(scores.softmax(-1))
            return attends(p, self.s.heads, self.s.size) @ v
