"""K7: how a stream ends."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.structure.kinds.truth import Layers, adds, carries, ends, linear, never, reads_out


class _End(Layers):
    case = False
    depth = 1

    def __init__(self, s):
        super().__init__(s)
        self.g = nn.Parameter(torch.rand(s.width) + 0.5)
        self.b = nn.Parameter(torch.rand(s.width))
        self.make(s)

    def make(self, s): ...
    def out(self, y):
        return reads_out(y, y)


class ByHand(_End):
    """A root mean square written out."""

    def end(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        carries(y, may=True)
        return self.out(self.logits(ends(self.g * y)))


class ByHandGainPlusOne(_End):
    """The gain is one plus what is learned."""

    def end(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        carries(y, may=True)
        return self.out(self.logits(ends(y * (1 + self.g))))


class ByHandStandard(_End):
    """A layer norm written out, with gain and bias."""

    skip = ("heads of one",)

    def end(self, x):
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        carries(y, may=True)
        carries(y * self.g, may=True)
        return self.out(self.logits(ends(y * self.g + self.b)))


class SoftCap(_End):
    """The logits are capped after the unembedding."""

    def end(self, x):
        y = self.logits(ends(self.norms[-1](x)))
        return reads_out(y, torch.tanh(y / 3) * 3)


class ScaledAfter(_End):
    """The logits are scaled after the unembedding."""

    def end(self, x):
        y = self.logits(ends(self.norms[-1](x)))
        return reads_out(y, y * 0.125)


class ScaledBefore(_End):
    """The norm's output is scaled before the unembedding."""

    def end(self, x):
        return self.out(self.logits(carries(ends(self.norms[-1](x)) / 4.0, may=True)))


class Sigmoid(_End):
    """Probabilities of labels by a sigmoid."""

    def end(self, x):
        return torch.sigmoid(self.logits(ends(self.norms[-1](x))))


class LogSoftmax(_End):
    """Log probabilities."""

    def end(self, x):
        return self.logits(ends(self.norms[-1](x))).log_softmax(-1)


class PooledFirst(_End):
    """The stream is meant over positions, and that is normed."""

    def end(self, x):
        return self.out(self.logits(ends(self.norms[-1](carries(x.mean(1), may=True)))))


class TwoHeads(_End):
    """Two heads read the final norm."""

    def make(self, s):
        self.second = linear(s.width, 3)

    def end(self, x):
        y = ends(self.norms[-1](x))
        return self.logits(y), self.second(y)


class HeadOfTwo(_End):
    """A head of two projections with a bend, and a norm of its own between."""

    def make(self, s):
        self.first, self.between = linear(s.width, s.width), nn.LayerNorm(s.width)

    def end(self, x):
        return self.logits(never(self.between(F.gelu(self.first(ends(self.norms[-1](x)))))))


class NoNorm(_End):
    """There is no final norm."""

    def end(self, x):
        ends(None)
        return self.logits(x)


class CutFirst(_End):
    """The last position is cut out, normed and read."""

    def end(self, x):
        return self.out(self.logits(ends(self.norms[-1](carries(x[:, -1], may=True)))))


class LengthScaled(_End):
    """Brought to length one, then to that of the width, with a gain of one and something."""

    def end(self, x):
        y = never(F.normalize(x, dim=-1))
        return self.out(self.logits(ends(y * x.shape[-1] ** 0.5 * (1 + self.g))))


class Bounded(_End):
    """What bounds each unit stands in the place of the final norm: there is none, and the logits are read."""

    def end(self, x):
        ends(None)
        y = carries(torch.tanh(carries(0.5 * x, may=True)), may=True)
        return self.out(self.logits(carries(y * self.g, may=True)))


class NormedAgain(_End):
    """Norms on the stream itself, the last of which goes into the final norm: both are of the stream."""

    def layers(self, x):
        x = carries(self.norms[0](carries(x + adds(self.looks[0](x)))))
        return carries(self.norms[1](carries(x + adds(self.mlps[0](x)))))

    def end(self, x):
        return self.logits(ends(self.norms[2](x)))
