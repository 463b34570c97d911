"""What models that were written to attack the matchers, and packages of others, were told wrongly of."""

import torch
from torch import Tensor, nn

from tests.structure.kinds.truth import (
    TOLD,
    Heads,
    Layers,
    Model,
    Plain,
    Sizes,
    adds,
    attends,
    carries,
    ends,
    linear,
    never,
    refused,
    remembers,
    weight,
)


class Minus(Layers):
    """What layers make is taken away from the stream."""

    def layers(self, x: Tensor) -> Tensor:
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=True)):
            x = carries(x - adds(a(self.norms[2 * n](x))))
            x = carries(torch.sub(x, adds(m(self.norms[2 * n + 1](x))), alpha=0.5))
        TOLD[-1].layers = self.depth
        return x


class Halves(Layers):
    """Entries of one list are attentions and memories in turn, each of which adds to the stream itself."""

    class half(Model):
        case = False

        def __init__(self, s: Sizes, norm: nn.Module, part: nn.Module) -> None:
            super().__init__(s)
            self.norm, self.part = norm, part

        def forward(self, x: Tensor) -> Tensor:
            return carries(x + adds(self.part(self.norm(x))))

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        parts = [part for pair in zip(self.looks, self.mlps, strict=True) for part in pair]
        self.halves = nn.ModuleList(self.half(s, norm, part) for norm, part in zip(self.norms, parts, strict=False))
        del self.looks, self.mlps

    def layers(self, x: Tensor) -> Tensor:
        for half in self.halves:
            x = half(x)
        TOLD[-1].layers = self.depth
        return x


class SoftExperts(Layers):
    """All experts run, and a softmax weighs what they make."""

    depth = 1
    skip = ("plain",)

    class memory(Model):
        case = False

        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.router, self.up, self.down = linear(s.width, 3), weight(3, s.width, 6), weight(3, 6, s.width)

        def forward(self, x: Tensor) -> Tensor:
            p = refused(self.router(x).softmax(-1))
            h = torch.einsum("btd,edh->bteh", x, self.up).tanh()
            return torch.einsum("bteh,ehd,bte->btd", remembers(h, may=True), self.down, p)


class TiedRows(Model):
    """One pattern for all rows of an alignment: its scores are summed over them."""

    skip = ("heads of one",)

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.q, self.k, self.v, self.o = (linear(s.width, s.width) for _ in range(4))

    def inputs(self) -> tuple[Tensor]:
        return (torch.randn(3, self.s.tokens, self.s.batch, self.s.width, dtype=self.s.dtype),)

    def forward(self, x: Tensor) -> Tensor:
        s = self.s
        q, k, v = (f(carries(x)).unflatten(-1, (s.heads, s.size)) for f in (self.q, self.k, self.v))
        p = attends(torch.einsum("rinhd,rjnhd->hnij", q * 0.3, k).softmax(-1), s.heads, s.size, layout="hbqk")
        return carries(x + self.o(torch.einsum("hnij,rjnhd->rinhd", p, v).flatten(3)))


class Shares(Heads):
    """Learned shares of what two heads make: a softmax that looks at nothing."""

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.share = weight(s.width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * refused(self.share.softmax(0))


class Sparsemax(Layers):
    """Scores are held against a threshold of the largest of them."""

    class attention(Heads):
        case = False

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.mT
            top = scores.sort(-1, descending=True).values
            sums, n = top.cumsum(-1), torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype)
            size = (1 + n * top > sums).sum(-1, keepdim=True)
            p = (scores - (sums.gather(-1, size - 1) - 1) / size.to(scores.dtype)).clamp(min=0)
            return attends(p, self.s.heads, self.s.size, may=True) @ v


class Factored(Layers):
    """The values are the product of two weights: what the first makes of the coefficients is projected once more."""

    class memory(Plain):
        def __init__(self, s: Sizes) -> None:
            super().__init__(s)
            self.down, self.last = linear(s.hidden, 3), linear(3, s.width)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            y = self.down(h)
            refused(h, y, word="projects it first")
            return self.last(y)


class GivesWeights(Layers):
    """What two projections make are weights of the stream that another product reads."""

    depth = 1
    skip = ("heads of one",)

    class memory(Plain):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.up(x))
            y = self.down(h)
            refused(h, y, word="is summed by")
            return torch.einsum("btd,bde->bte", x, y.mT @ x / 5)


class GivesValues(Model):
    """What two projections make is mixed over positions by an attention, which writes what it mixes."""

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.up, self.down, self.q = linear(s.width, s.hidden), linear(s.hidden, s.width), linear(s.width, s.width)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(carries(x)))
        y = self.down(h)
        refused(h, y, word="is summed by")
        p = attends((self.q(x) @ x.mT).softmax(-1), 1, self.s.width, layout="bqk", may=True)
        return carries(x + adds(p @ y))


class ValuesOverDepth(Layers):
    """The values of an attention are added to those of the layer before: they are no stream."""

    depth = 3
    skip = ("fused",)

    class attention(Heads):
        case = False
        before: tuple["ValuesOverDepth.attention", ...] = ()

        def added(self, before: Tensor, v: Tensor) -> Tensor:
            return v + before

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.values = never(v) if not self.before else never(self.added(self.before[0].values, v))
            return super().mix(q, k, self.values)

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        for one, before in zip(self.looks[1:], self.looks, strict=False):
            one.before = (before,)


class ValuesMixed(ValuesOverDepth):
    """The same, where they go a part of the way from the first to the new ones."""

    depth = 2

    class attention(ValuesOverDepth.attention):
        def added(self, before: Tensor, v: Tensor) -> Tensor:
            return torch.lerp(before, v, 0.5)


class StatesBeside(Layers):
    """All states laid side by side make the logits."""

    def __init__(self, s: Sizes) -> None:
        super().__init__(s)
        self.wide = linear((2 * self.depth + 1) * s.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = [carries(self.enter(x))]
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=True)):
            states.append(carries(states[-1] + adds(a(self.norms[2 * n](states[-1])))))
            states.append(carries(states[-1] + adds(m(self.norms[2 * n + 1](states[-1])))))
        TOLD[-1].layers = self.depth
        return self.wide(torch.cat(states, -1))


class LaidInto(Layers):
    """What is projected of the end of a stream is laid into a tensor that was made in its type alone."""

    def end(self, x: Tensor) -> Tensor:
        rows = ends(self.norms[-1](x)).flatten(0, 1)
        laid = rows.new_empty(len(rows), 3)
        laid[:, :3] = self.logits(rows)[:, :3]
        return never(laid)


class KeptWhere(Layers):
    """A part of the positions keeps what it had."""

    def inputs(self) -> tuple[Tensor, Tensor]:
        return *super().inputs(), torch.arange(self.s.batch * self.s.tokens).view(self.s.batch, -1, 1) % 3 != 1

    def forward(self, x: Tensor, some: Tensor) -> Tensor:
        self.some = some
        return super().forward(x)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.where(self.some, carries(x + adds(y), may=True), x)

    def layers(self, x: Tensor) -> Tensor:
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=True)):
            x = carries(self.step(x, a(self.norms[2 * n](x))))
            x = carries(self.step(x, m(self.norms[2 * n + 1](x))))
        return x

    def end(self, x: Tensor) -> Tensor:
        return self.logits(ends(self.norms[-1](x)))  # the last sum alone does not tell them


class KeptWhereLayers(KeptWhere):
    """A part of the positions keeps what it had before a whole layer."""

    def layers(self, x: Tensor) -> Tensor:
        for n, (a, m) in enumerate(zip(self.looks, self.mlps, strict=True)):
            y = carries(x + adds(a(self.norms[2 * n](x))))
            y = carries(y + adds(m(self.norms[2 * n + 1](y))))
            x = carries(torch.where(self.some, x, y))
        return x


class FilledWhere(KeptWhere):
    """A part of the positions is filled with zeros after each write, as padding is."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return carries(x + adds(y), may=True).masked_fill(self.some, 0.0)

    def end(self, x: Tensor) -> Tensor:
        return Layers.end(self, x)


class NumPyNames(Layers):
    """Dimensions are given by the name that NumPy has for them."""

    class memory(Plain):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.cat([x, torch.stack([y, y], axis=0).mean(axis=0)], axis=-1)[..., x.shape[-1] :]

    def end(self, x: Tensor) -> Tensor:
        return self.logits(ends(x / ((x * x).mean(axis=-1, keepdims=True) + 1e-6).sqrt()))
