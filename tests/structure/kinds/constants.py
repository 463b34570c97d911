"""K3: what a softmax weighs are constants: an expectation, no attention."""

import torch

from tests.structure.kinds.truth import Layers, carries, ends, heads, linear, never, refused


class _Expectation(Layers):
    case = False
    depth = 1

    def __init__(self, s):
        super().__init__(s)
        self.a, self.b, self.last = linear(s.width, s.width), linear(s.width, s.width), linear(s.width, s.width)

    def weigh(self, p): ...
    def forward(self, x):
        x = self.layers(carries(self.enter(x)))
        y = self.norms[-1](x)
        carries(y, may=True)
        return self.weigh(self.look(y))

    def look(self, y):
        q, k = heads(self.a(y), self.s.heads), heads(self.b(y), self.s.heads)
        p = (q @ k.mT).softmax(-1)
        refused(p, word="constant|not data|no data|grid|expectation")
        return never(p, "pattern")


class Bins(Layers):
    """A distance as an expectation over bins, as in detectors."""

    depth = 1

    def __init__(self, s):
        super().__init__(s)
        self.bins = linear(s.width, 4 * 6)

    def end(self, x):
        y = ends(self.norms[-1](x))
        p = self.bins(y).view(*y.shape[:2], 4, 6).softmax(-1)
        refused(p)
        return p @ torch.arange(6.0, dtype=p.dtype)


class BinsConv(Bins):
    """The same by a convolution with a fixed weight."""

    def end(self, x):
        y = ends(self.norms[-1](x))
        p = self.bins(y).view(*y.shape[:2], 4, 6).softmax(-1)
        refused(p)
        return torch.nn.functional.conv1d(p.flatten(0, 1).mT, torch.arange(6.0, dtype=p.dtype).view(1, 6, 1))


class Disparity(_Expectation):
    """Costs of shifts between two views and the expected shift."""

    def look(self, y):
        a, b = self.a(y), self.b(y)
        cost = torch.stack([(a * b.roll(n, 1)).sum(-1) for n in range(4)], -1)
        p = cost.softmax(-1)
        refused(p)
        return never(p, "pattern")

    def weigh(self, p):
        return (p * torch.arange(4.0, dtype=p.dtype)).sum(-1)
