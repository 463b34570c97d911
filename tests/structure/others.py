"""Models of images, graphs and steps in time: where attention looks different, and where there is none."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HEADS, HIDDEN, SIZE, TOKENS, WIDTH, Plain, attends, carries
from tests.structure.projections import weight
from tests.structure.wholes import Block


class Inside(nn.Module):
    """A transformer with a stream of its own inside a residual block of an image model."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        x = carries(self.enter(image))
        y = carries(self.inner(x.flatten(2).mT))
        for block in self.blocks:
            y = block(y)
        return carries(x + self.leave(y).mT.view(x.shape))


class Windows(nn.Module):
    """Attention within shifted windows of an image, with a bias for each offset."""

    def __init__(self, shift: int = 1) -> None:
        super().__init__()
        self.qkv, self.out, self.bias, self.shift = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            weight(HEADS, 4, 4),
            shift,
        )
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, WIDTH)
        q, k, v = self.qkv(y).reshape(-1, 4, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        p = attends((q @ k.transpose(-2, -1) + self.bias.unsqueeze(0)).softmax(-1))
        y = self.out((p @ v).transpose(1, 2).reshape(-1, 4, WIDTH))
        y = y.view(b, h // 2, w // 2, 2, 2, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, WIDTH)
        return carries(x + torch.roll(y, (self.shift, self.shift), (1, 2)))


class Vision(nn.Module):
    """Patches, windows, memories, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.windows = nn.Conv2d(3, WIDTH, 2, 2), nn.ModuleList(Windows(n) for n in range(2))
        self.memories, self.norms = (
            nn.ModuleList(Plain() for _ in range(2)),
            nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3)),
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).permute(0, 2, 3, 1)
        for n in range(2):
            x = self.windows[n](x)
            x = carries(x + self.memories[n](self.norms[n](x)))
        return self.head(self.norms[2](x).mean((1, 2)))


class Axial(nn.Module):
    """Along rows, then along columns."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, WIDTH, 2, 2)
        self.qkv, self.out = (nn.ModuleList(nn.Linear(WIDTH, n * WIDTH) for _ in range(2)) for n in (3, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image).permute(0, 2, 3, 1)
        for n in range(2):
            y = x.transpose(1, 2) if n else x
            q, k, v = self.qkv[n](y).unflatten(-1, (3, HEADS, SIZE)).permute(3, 0, 1, 4, 2, 5)
            p = attends((q @ k.mT).softmax(-1), "bwhqk")
            y = self.out[n]((p @ v).transpose(2, 3).flatten(3))
            x = carries(x + (y.transpose(1, 2) if n else y))
        return x


class Pixels(nn.Module):
    """Attention over all pixels between convolutions, channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.GroupNorm(4, WIDTH), nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, HEADS, SIZE, h * w).unbind(1)
        p = attends((q.transpose(-2, -1) @ k * SIZE**-0.5).softmax(-1))
        return x + self.out((v @ p.transpose(-2, -1)).reshape(b, c, h, w))


class Convolved(nn.Module):
    """Two convolutions of width three around a time embedding: what image generators are made of."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, 1, 1), nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm, self.time = nn.GroupNorm(4, channels), nn.Linear(WIDTH, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.a(F.silu(self.norm(x))) + self.time(F.silu(time))[:, :, None, None]
        return x + self.b(F.silu(y))


class Denoiser(nn.Module):
    """Down, attention in the middle, up again with what was seen on the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))
        self.enter, self.down, self.middle = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, WIDTH, 2, 2), Pixels()
        self.first, self.last = Convolved(16), Convolved(WIDTH)
        self.up, self.leave = nn.ConvTranspose2d(WIDTH, 16, 2, 2), nn.Conv2d(32, 3, 3, 1, 1)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        time = self.time(time)
        before = self.first(self.enter(image), time)
        x = self.last(self.middle(self.down(before)), time)
        return self.leave(torch.cat([self.up(x), before], 1))


class Decoder(nn.Module):
    """A recurrent decoder that looks over a sequence at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.step = nn.GRU(7, WIDTH, batch_first=True), nn.GRUCell(WIDTH, WIDTH)
        self.key, self.query, self.score = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 1)
        self.logits = nn.Linear(2 * WIDTH, TOKENS)

    def look(self, state: Tensor, seen: Tensor) -> Tensor:
        scores = self.score(torch.tanh(self.query(state).unsqueeze(1) + self.key(seen))).squeeze(2)
        p = attends(F.softmax(scores, dim=1), "bk", heads=1, size=HIDDEN, kind="additive")
        return torch.sum(seen * p.unsqueeze(2), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        seen, last = self.encoder(x)
        state, out = last[0], []
        for _ in range(2):
            got = self.look(state, seen)
            state = self.step(got, state)
            out.append(self.logits(torch.cat([state, got], -1)))
        return torch.stack(out, 1)


class Multiplicative(Decoder):
    """Scores are products with the state, through a matrix."""

    def look(self, state: Tensor, seen: Tensor) -> Tensor:
        scores = torch.bmm(seen, nn.functional.linear(state, self.step.weight_hh[:WIDTH]).unsqueeze(2)).squeeze(2)
        p = attends(F.softmax(scores, dim=-1), "bk", heads=1, size=WIDTH, kind="cross")
        return torch.bmm(p.unsqueeze(1), seen).squeeze(1)


class Concatenated(Decoder):
    """The state is repeated beside every value; one projection reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(2 * WIDTH, HIDDEN)

    def look(self, state: Tensor, seen: Tensor) -> Tensor:
        beside = torch.cat([state.unsqueeze(1).repeat(1, seen.shape[1], 1), seen], 2)
        p = F.softmax(self.score(torch.tanh(self.both(beside))).squeeze(2), 1)
        attends(p, "bk", heads=1, size=WIDTH, kind="additive")
        return torch.bmm(p.unsqueeze(1), seen).squeeze(1)


class TwoDirections(Decoder):
    """What lies side by side are the two directions of a sequence: every value is weighed by itself, no query looks."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.both = nn.GRU(7, WIDTH, batch_first=True), nn.Linear(2 * WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([self.encoder(x)[0], self.back(x.flip(1))[0].flip(1)], 2)
        p = self.score(torch.tanh(self.both(seen))).softmax(1)
        return self.logits((p.mT @ seen).squeeze(1))


class Pointer(Decoder):
    """The map is the answer; it weighs no values."""

    def forward(self, x: Tensor) -> Tensor:
        seen, last = self.encoder(x)
        return self.score(torch.tanh(self.query(last[0]).unsqueeze(1) + self.key(seen))).squeeze(2).softmax(-1)


class Neighbours(nn.Module):
    """A graph: a node weighs its neighbours by a sum of what is read off both."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out_of, self.into = nn.Linear(7, WIDTH), weight(HEADS, SIZE), weight(HEADS, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)
        a, b = ((h * w[:, None]).sum(-1) for w in (self.out_of, self.into))
        edges = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        scores = F.leaky_relu(a.unsqueeze(3) + b.unsqueeze(2), 0.2).masked_fill(~edges, float("-inf"))
        return (attends(scores.softmax(-1), size=1, kind="additive") @ h).transpose(1, 2).flatten(2)


class Pairs(nn.Module):
    """A graph: one vector reads two nodes side by side; then one reads their bent sum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.vector = nn.Linear(7, WIDTH), weight(2 * WIDTH, 1)
        self.a, self.b, self.score = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, n = self.enter(x), x.shape[1]
        sides = h.repeat_interleave(n, 1), h.repeat(1, n, 1)
        scores = F.leaky_relu(torch.cat(sides, -1).view(-1, n, n, 2 * WIDTH) @ self.vector, 0.2).squeeze(3)
        h = F.elu(attends(scores.softmax(-1), "bqk", heads=1, size=WIDTH, kind="additive") @ h)
        scores = self.score(F.leaky_relu(self.a(h).unsqueeze(2) + self.b(h).unsqueeze(1))).squeeze(3)
        return attends(scores.softmax(-1), "bqk", heads=1, size=HIDDEN, kind="additive") @ h


class Mixer(nn.Module):
    """Positions mixed by a memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.positions, self.units = nn.Linear(7, WIDTH), Plain(5), Plain()
        self.a, self.b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.enter(x))
        x = carries(x + self.positions(self.a(x).mT).mT)
        return carries(x + self.units(self.b(x)))


class Separable(nn.Module):
    """Depthwise convolutions, then a memory over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.near = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH)
        self.norm, self.memory = nn.LayerNorm(WIDTH), Plain()

    def forward(self, image: Tensor) -> Tensor:
        x = carries(self.enter(image))
        return carries(x + self.memory(self.norm(self.near(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class Scan(nn.Module):
    """A selective state, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.steps = nn.Linear(7, 2 * WIDTH), nn.Linear(WIDTH, 7), nn.Linear(WIDTH, 2 * 3 + 1)
        self.decay = weight(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.enter(x).chunk(2, -1)
        rate, into, out = self.steps(u).split([1, 3, 3], -1)
        rate, state, ys = F.softplus(rate), torch.zeros(len(x), WIDTH, 3), []
        for t in range(x.shape[1]):
            state = state * torch.exp(-rate[:, t, :, None] * self.decay.abs()) + u[:, t, :, None] * into[:, t, None]
            ys.append((state * out[:, t, None]).sum(-1))
        return x + self.leave(torch.stack(ys, 1) * F.silu(gate))


class Classifier(nn.Module):
    """Layers without a stream, and a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)


class MeanWeighed(nn.Module):
    """A pooling: one score for each position, read off itself."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.score = (
            nn.Linear(7, WIDTH),
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return (self.score(x).softmax(1) * x).sum(1)


class SoftExperts(nn.Module):
    """Learned slots pool the tokens, an expert works on each, and tokens choose among what they say: a router twice."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.slots = nn.Linear(7, WIDTH), weight(3, WIDTH)
        self.experts = nn.ModuleList(Plain() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = carries(self.enter(x))
        scores = F.normalize(x, dim=-1) @ F.normalize(self.slots, dim=-1).T
        seen = scores.softmax(1).mT @ x
        said = torch.stack([expert(seen[:, n]) for n, expert in enumerate(self.experts)], 1)
        return carries(x + scores.softmax(2) @ said)


class Forget(nn.Module):
    """A gate on the stream itself, as in a highway."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.new = nn.Linear(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for _ in range(2):
            t = torch.sigmoid(self.gate(x))
            x = t * torch.relu(self.new(x)) + (1 - t) * x
        return x
