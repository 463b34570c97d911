"""K4: pairs of projections that are no memories."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.structure.kinds.truth import SIZES, Layers, Model, Plain, adds, carries, linear, refused, remembers, weight


class MakesTheStream(Model):
    """The first projection makes the stream; what is added is one projection of the bent stream, no memory."""

    def __init__(self, s):
        super().__init__(s)
        self.e, self.w = linear(s.width, s.width), linear(s.width, s.width)

    def forward(self, x):
        x = carries(self.e(x))
        return carries(x + self.w(torch.relu(x)))


class MakesTheStreamDeep(Model):
    """The same over three layers: units of pre-activation residual networks without a second projection."""

    def __init__(self, s):
        super().__init__(s)
        self.e, self.w = linear(s.width, s.width), nn.ModuleList(linear(s.width, s.width) for _ in range(3))

    def forward(self, x):
        x = carries(self.e(x))
        for w in self.w:
            x = carries(x + adds(w(torch.relu(x))))
        return x


class MakesTheStreamNormed(MakesTheStreamDeep):
    """The same with a norm before it is bent."""

    def forward(self, x):
        x = carries(self.e(x))
        for w in self.w:
            x = carries(x + w(F.gelu(F.layer_norm(x, x.shape[-1:]))))
        return x


class _Own(Layers):
    case = False

    def __init__(self, s):
        self.memory = self.pair
        super().__init__(s)


class LinearBetween(Layers):
    """Nothing at all between two projections."""

    class memory(Plain):
        def forward(self, x):
            return self.down(self.up(x))


class MeanOfPlaces(Layers):
    """Coefficients are meant over all positions before the second projection."""

    skip = ("one token",)

    class memory(Plain):
        def forward(self, x):
            h = torch.relu(self.up(x)).mean(1, keepdim=True)
            y = self.down(h)
            refused(h, y)
            return y


class ShiftedPlaces(Layers):
    """Coefficients of the position before."""

    skip = ("one token",)

    class memory(Plain):
        def forward(self, x):
            h = torch.relu(self.up(x))
            h = torch.cat([h.new_zeros(len(h), 1, h.shape[-1]), h[:, :-1]], 1)
            y = self.down(h)
            refused(h, y)
            return y


class RolledPlaces(Layers):
    """Coefficients are rolled round the sequence."""

    skip = ("one token",)

    class memory(Plain):
        def forward(self, x):
            h = torch.relu(self.up(x)).roll(1, 1)
            y = self.down(h)
            refused(h, y)
            return y


class TurnedPlaces(Layers):
    """Coefficients are read from the end."""

    skip = ("one token",)

    class memory(Plain):
        def forward(self, x):
            h = torch.relu(self.up(x)).flip(1)
            y = self.down(h)
            refused(h, y)
            return y


class MixedPlaces(Layers):
    """Positions are mixed by a fixed matrix between the projections (a spatial gating unit without the gate)."""

    skip = ("one token",)

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.mix = weight(s.tokens, s.tokens)

        def forward(self, x):
            h = self.mix @ torch.relu(self.up(x))
            y = self.down(h)
            refused(h, y)
            return y


class ConvPlaces(Layers):
    """A depthwise convolution over positions between the projections."""

    skip = ("one token",)

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.conv = nn.Conv1d(s.hidden, s.hidden, 3, padding=1, groups=s.hidden)

        def forward(self, x):
            h = torch.relu(self.conv(self.up(x).mT)).mT
            y = self.down(h)
            refused(h, y)
            return y


class ConvKeys(Layers):
    """A convolution over three positions as the keys, as over audio."""

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.conv = nn.Conv1d(s.width, s.hidden, 3, padding=1)

        def forward(self, x):
            h = torch.relu(self.conv(x.mT)).mT
            y = self.down(h)
            refused(h, y)
            return y


class ConvBoth(Layers):
    """Two convolutions, the first over three positions and the second over one."""

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.a, self.b = nn.Conv1d(s.width, s.hidden, 3, padding=1), nn.Conv1d(s.hidden, s.width, 1)

        def forward(self, x):
            h = torch.relu(self.a(x.mT))
            y = self.b(h)
            refused(h, y)
            return y.mT


class ConvKeysOfOne(ConvKeys):
    """The same where there is one position: the keys are filters still."""

    skip = tuple(size for size in SIZES if size != "one token")


class ConvBothOfOne(ConvBoth):
    """The same for the second."""

    skip = ConvKeysOfOne.skip


class MakesWeights(Layers):
    """A network whose output is the weight of another product."""

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.made = linear(s.hidden, s.width * s.width)

        def forward(self, x):
            w = self.made(torch.relu(self.up(x.mean(1)))).view(-1, x.shape[-1], x.shape[-1])
            return x @ w


class MakesWeightsEach(Layers):
    """Each position makes the weight that it is multiplied with."""

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.made = linear(s.hidden, s.width * s.width)

        def forward(self, x):
            w = self.made(torch.relu(self.up(x))).view(*x.shape, x.shape[-1])
            return (x[..., None, :] @ w).squeeze(-2)


class WeighsOthers(Layers):
    """Its output, through a sigmoid, weighs what is written by another."""

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.other = linear(s.width, s.width)

        def forward(self, x):
            return torch.sigmoid(self.down(torch.relu(self.up(x)))) * self.other(x)


class NarrowKeys(Layers):
    """Keys read half of the stream alone: claimed with vectors that say so, or refused."""

    skip = ("heads of one",)

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.up = linear(s.width // 2, s.hidden)

        def forward(self, x):
            return self.down(remembers(torch.relu(self.up(x[..., : x.shape[-1] // 2])), may=True))


class WideKeys(Layers):
    """Keys read the stream beside something else."""

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.up = linear(2 * s.width, s.hidden)

        def forward(self, x):
            return self.down(
                remembers(torch.relu(self.up(torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], -1))), may=True)
            )


class Classifier(Model):
    """Two projections with a bend, no stream at all."""

    def __init__(self, s):
        super().__init__(s)
        self.a, self.b = linear(s.width, s.hidden), linear(s.hidden, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        y = self.b(h)
        refused(h, y)
        return y


class Deepened(Layers):
    """Three projections: the middle one reads units and makes units, so the last two are no memory of the stream."""

    class memory(Plain):
        def __init__(self, s):
            super().__init__(s)
            self.middle = linear(s.hidden, s.hidden)

        def forward(self, x):
            return self.down(remembers(torch.relu(self.middle(torch.relu(self.up(x)))), may=True))
