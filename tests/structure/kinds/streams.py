"""K6: what is a stream and what is none."""

import torch
from torch import nn

from tests.structure.kinds.truth import (
    TOLD,
    Layers,
    Model,
    Plain,
    adds,
    apart,
    carries,
    ends,
    linear,
    never,
    remembers,
    weight,
)


class SummedChain(Model):
    """Plain layers, whose outputs are summed at the end: nobody reads the sum."""

    case = False

    def __init__(self, s):
        super().__init__(s)
        self.w = nn.ModuleList(linear(s.width, s.width) for _ in range(4))

    def forward(self, x):
        outs = []
        for w in self.w:
            x = torch.relu(w(x))
            outs.append(x)
        return outs[0] + outs[1] + outs[2] + outs[3]


class SummedStack(SummedChain):
    """The same by a stack and a sum."""

    def forward(self, x):
        outs = []
        for w in self.w:
            x = torch.relu(w(x))
            outs.append(x)
        return torch.stack(outs).sum(0)


class Ensemble(SummedChain):
    """Networks side by side, summed."""

    def forward(self, x):
        return sum(torch.relu(w(x)) for w in self.w)


class Losses(Model):
    """Plain layers and a sum of what each of them costs."""

    def __init__(self, s):
        super().__init__(s)
        self.w = nn.ModuleList(linear(s.width, s.width) for _ in range(4))

    def forward(self, x):
        total = 0
        for w in self.w:
            y = torch.relu(w(x))
            total = total + (y - x).square().mean()
            x = y
        return x, total


class Registers(Layers):
    """Tokens are laid before the stream and cut off again before the last norm."""

    def __init__(self, s):
        super().__init__(s)
        self.extra = weight(2, s.width)

    def forward(self, x):
        x = carries(self.enter(x), may=True)
        x = carries(torch.cat([self.extra.expand(len(x), -1, -1), x], 1))
        x = self.layers(x)
        return self.end(carries(x[:, 2:], may=True))


class RegistersEach(Registers):
    """Prompts are exchanged before each layer (deep prompts)."""

    depth = 3

    def layers(self, x):
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=False)):
            x = carries(torch.cat([self.extra.expand(len(x), -1, -1), x[:, 2:]], 1))
            x = carries(x + a(self.norms[2 * n](x)))
            x = carries(x + m(self.norms[2 * n + 1](x)))
        return x

    def forward(self, x):
        x = torch.cat([self.extra.expand(len(x), -1, -1), carries(self.enter(x), may=True)], 1)
        x = self.layers(carries(x, may=True))
        carries(x[:, 2:], may=True)
        return self.end(x)


class ClassToken(Registers):
    """One token is laid before, and it alone is read at the end."""

    def forward(self, x):
        x = carries(self.enter(x), may=True)
        x = carries(torch.cat([self.extra[:1].expand(len(x), -1, -1), x], 1))
        x = self.layers(x)
        return self.logits(ends(self.norms[-1](x))[:, 0])


class JointEach(Layers):
    """Two kinds of tokens are laid together for the attention of each layer and cut apart for their own memories."""

    skip = ("one token",)

    def __init__(self, s):
        super().__init__(s)
        self.others = nn.ModuleList(Plain(s) for _ in range(self.depth))
        self.two = linear(s.width, s.width)

    def forward(self, x):
        a, b = carries(self.enter(x)), carries(self.two(x[:, :-1]))
        for n, (look, m, o) in enumerate(zip(self.looks, self.mlps, self.others, strict=False)):
            y = look(self.norms[2 * n](torch.cat([a, b], 1)))
            a, b = carries(a + y[:, : a.shape[1]]), carries(b + y[:, a.shape[1] :])
            a = carries(a + m(self.norms[2 * n + 1](a)))
            b = carries(b + o(self.norms[2 * n + 1](b)))
        carries(torch.cat([a, b], 1), may=True)
        carries(lambda: torch.cat([a, b], 1), may=True)
        apart()
        return self.logits(carries(self.norms[-1](a), may=True)), self.logits(carries(self.norms[-1](b), may=True))


class Coupled(Layers):
    """Two streams that write to each other (reversible)."""

    case = False

    def forward(self, x):
        a = carries(self.enter(x))
        b = carries(torch.tanh(self.enter(x)))
        for n, (look, m) in enumerate(zip(self.looks, self.mlps, strict=False)):
            a = carries(a + adds(look(self.norms[2 * n](b))))
            b = carries(b + adds(m(self.norms[2 * n + 1](a))))
        apart()
        return self.logits(carries(self.norms[-1](a), may=True)), self.logits(carries(self.norms[-1](b), may=True))


class CoupledMomentum(Layers):
    """A velocity takes what layers write, and the stream takes the velocity."""

    def forward(self, x):
        x = carries(self.enter(x))
        v = torch.zeros_like(x)
        for n, (look, m) in enumerate(zip(self.looks, self.mlps, strict=False)):
            v = carries(0.9 * v + look(self.norms[2 * n](x)), may=True)
            x = carries(x + v)
            v = carries(0.9 * v + m(self.norms[2 * n + 1](x)), may=True)
            x = carries(x + v)
        return self.end(x)


class CoupledHalves(Layers):
    """Halves of the width that write to each other, as in flows: scale and shift of the other half."""

    skip = ("heads of one",)
    depth = 1

    def __init__(self, s):
        super().__init__(s)
        self.nets = nn.ModuleList(
            nn.Sequential(linear(s.width // 2, s.hidden), nn.Tanh(), linear(s.hidden, s.width)) for _ in range(4)
        )

    def forward(self, x):
        a, b = x.chunk(2, -1)
        for net in self.nets:
            scale, shift = net(a).chunk(2, -1)
            b = carries(b * torch.exp(torch.tanh(scale)) + shift, may=True)
            carries(a, may=True)
            carries(b * 1, may=True)
            a, b = b, a
        for net in self.nets:
            for _layer in net:
                ...
        return torch.cat([a, b], -1)


class Highway(Model):
    """A gate mixes what is new with the state: no sum of writes."""

    def __init__(self, s):
        super().__init__(s)
        self.g, self.n = linear(s.width, s.width), linear(s.width, s.width)

    def forward(self, x):
        for _ in range(3):
            t = torch.sigmoid(self.g(carries(x, may=True)))
            x = t * torch.relu(self.n(x)) + carries((1 - t) * x, may=True)
            carries(x, may=True)
        return x


class Hidden(Model):
    """Hidden units that are added to hidden units: the inner sum of a memory is no stream."""

    def __init__(self, s):
        super().__init__(s)
        self.e, self.u, self.w, self.d = (
            linear(s.width, s.width),
            linear(s.width, s.hidden),
            linear(s.width, s.hidden),
            linear(s.hidden, s.width),
        )

    def forward(self, x):
        x = carries(self.e(x))
        h = remembers(torch.relu(self.u(x) + self.w(torch.tanh(x))), may=True)
        never(self.u.weight.new_zeros(1))
        return carries(x + self.d(h))


class HiddenDeep(Layers):
    """Memories with a shortcut inside, from units to units."""

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.inner = linear(s.hidden, s.hidden)

        def forward(self, x):
            h = never(torch.relu(self.up(x)))
            h = never(h + torch.relu(self.inner(h)))
            return self.down(remembers(h, may=True))


class PostNorm(Layers):
    """The norm stands on the stream."""

    def layers(self, x):
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=False)):
            x = carries(self.norms[2 * n](carries(x + a(x), may=True)))
            x = carries(self.norms[2 * n + 1](carries(x + m(x), may=True)))
        return x

    def end(self, x):
        return self.logits(x)


class Sandwich(Layers):
    """A norm before and after each part."""

    def __init__(self, s):
        super().__init__(s)
        self.more = nn.ModuleList(nn.RMSNorm(s.width) for _ in range(2 * self.depth))

    def layers(self, x):
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=False)):
            x = carries(x + adds(self.more[2 * n](a(self.norms[2 * n](x)))))
            x = carries(x + adds(self.more[2 * n + 1](m(self.norms[2 * n + 1](x)))))
        return x


class Parallel(Layers):
    """Attention and memory write at once."""

    def layers(self, x):
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=False)):
            y = self.norms[2 * n](x)
            x = carries(carries(x + a(y), may=True) + m(y))
        return x
        TOLD[-1].layers = self.depth
        return x
