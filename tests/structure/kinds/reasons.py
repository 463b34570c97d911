"""K8: reasons, complete and true."""

import torch
from torch.nn import functional as F

from tests.structure.kinds.truth import Heads, Layers, attends, ends, refused


class OwnSoftmax(torch.autograd.Function):
    """A softmax with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.softmax(-1)

    @staticmethod
    def backward(ctx, g):
        return g


class OwnLook(torch.autograd.Function):
    """A whole attention with a gradient of its own."""

    @staticmethod
    def forward(ctx, q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    @staticmethod
    def backward(ctx, g):
        return g, g, g


class InsideFunction(Layers):
    """The softmax runs in a custom autograd function."""

    class attention(Heads):
        def mix(self, q, k, v):
            return attends(OwnSoftmax.apply(q @ k.mT), self.s.heads, self.s.size, may=True) @ v


class WholeInsideFunction(Layers):
    """The whole attention runs in a custom autograd function: claimed, or said."""

    class attention(Heads):
        def mix(self, q, k, v):
            z = OwnLook.apply(q, k, v)
            attends(lambda: (q.detach() @ k.detach().mT).softmax(-1), self.s.heads, self.s.size, may=True)
            self.said = z
            return z


@torch.jit.script
def scripted_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


@torch.jit.script
def scripted_look(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


class InsideVmap(Layers):
    """The attention is mapped over examples by a transform."""

    class attention(Heads):
        def mix(self, q, k, v):
            z = torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)
            refused(z, word="hidden")
            return z


class InsideCompiled(Layers):
    """The attention runs in a compiled function."""

    skip = ("one example", "bfloat16", "fused", "one head", "alike", "heads of one", "one token")
    depth = 1

    class attention(Heads):
        def mix(self, q, k, v):
            z = torch.compile(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, backend="eager")(q, k, v)
            attends(lambda: (q.detach() @ k.detach().mT).softmax(-1), self.s.heads, self.s.size, may=True)
            return z


class ByExp(Layers):
    """A softmax written out."""

    class attention(Heads):
        def mix(self, q, k, v):
            e = (q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).exp()
            return attends(e / e.sum(-1, keepdim=True), self.s.heads, self.s.size) @ v


class ByLogSoftmax(Layers):
    """The exponential of a log softmax."""

    class attention(Heads):
        def mix(self, q, k, v):
            return attends((q @ k.mT).log_softmax(-1).exp(), self.s.heads, self.s.size) @ v


class ByLogSumExp(Layers):
    """The exponential of scores less their log sum."""

    class attention(Heads):
        def mix(self, q, k, v):
            scores = q @ k.mT
            return attends((scores - scores.logsumexp(-1, keepdim=True)).exp(), self.s.heads, self.s.size) @ v


class ByProducts(Layers):
    """Pattern times values by multiplication and sum."""

    class attention(Heads):
        def mix(self, q, k, v):
            return (attends((q @ k.mT).softmax(-1), self.s.heads, self.s.size)[..., None] * v[:, :, None]).sum(-2)


class Hard(Layers):
    """Only the largest weight is left, and its value is fetched: something reads the softmax, and no product mixes."""

    skip = ("one token",)

    class attention(Heads):
        def mix(self, q, k, v):
            p = (q @ k.mT).softmax(-1)
            refused(p)
            best = p.max(-1)
            return v.gather(2, best.indices[..., None].expand_as(q)) * best.values[..., None]


class Sampled(Layers):
    """A Gumbel softmax with a straight-through choice."""

    skip = ("one token",)

    class attention(Heads):
        def mix(self, q, k, v):
            scores = q @ k.mT
            p = scores.softmax(-1)
            hard = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)
            attends(hard - p.detach() + p, self.s.heads, self.s.size, may=True)
            attends(p, self.s.heads, self.s.size, may=True)
            refused(p) if False else None
            return (hard - p.detach() + p) @ v


class Entropy(Layers):
    """A softmax that only an entropy reads."""

    depth = 1

    def end(self, x):
        y = ends(self.norms[-1](x))
        p = (y @ y.mT).softmax(-1)
        refused(p, word="multiplies")
        return self.logits(y), (p * p.log()).sum()


class MapOnly(Layers):
    """A map that is returned, and values that it weighs after it was sharpened by a power."""

    class attention(Heads):
        def mix(self, q, k, v):
            p = (q @ k.mT).softmax(-1)
            sharp = p.square() / p.square().sum(-1, keepdim=True)
            attends(sharp, self.s.heads, self.s.size, may=True)
            return sharp @ v


class Channels(Layers):
    """Units look at units (cross-covariance): a pattern of channels by channels."""

    skip = ("heads of one",)

    class attention(Heads):
        def mix(self, q, k, v):
            p = (F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)).softmax(-1)
            refused(p, word="units|channels")
            return (p @ v.mT).mT
