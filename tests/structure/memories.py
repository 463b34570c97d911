"""Feed-forward layers as modules (examples, positions, width) to itself: gates, layouts, thresholds, made weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import HIDDEN, WIDTH, remembers, rounded, weight


class Squared(nn.Module):
    """Up, the square of what is positive, down."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(remembers(F.relu(self.up(x)) ** 2))

    def made(self, w: Tensor) -> Tensor:
        """What a weight is made of its parameter before it is used."""
        return w


class Merged(Squared):
    """Each weight has a small update of low rank, which is added before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = weight(2, WIDTH), weight(HIDDEN, 2)

    def made(self, w: Tensor) -> Tensor:
        update = self.b @ self.a
        return w + (update if w.shape == update.shape else update.T)

    def forward(self, x: Tensor) -> Tensor:
        coefficients = remembers(F.relu(F.linear(x, self.made(self.up.weight))) ** 2)
        return F.linear(coefficients, self.made(self.down.weight))


class Ternary(Merged):
    """Weights of three values and a scale, with gradients as if they were not."""

    def made(self, w: Tensor) -> Tensor:
        scale = w.abs().mean().clamp(min=1e-5)
        return w + ((w / scale).round().clamp(-1, 1) * scale - w).detach()


class UnitRows(Merged):
    """Every row of every matrix is brought to length one."""

    def made(self, w: Tensor) -> Tensor:
        return F.normalize(w, dim=-1)


class Spectral(Merged):
    """Weights over their largest stretch."""

    def made(self, w: Tensor) -> Tensor:
        u, v = self.b.flatten()[: len(w)], self.b.flatten()[: w.shape[1]]
        return w / torch.dot(u, torch.mv(w, v))


class ForEachExample(Squared):
    """The weights are repeated for a product of batches."""

    def forward(self, x: Tensor) -> Tensor:
        up, down = (layer.weight.T.expand(len(x), -1, -1) for layer in (self.up, self.down))
        return torch.bmm(remembers(F.relu(torch.bmm(x, up))), down)


class WeightFirst(Squared):
    """Weights times columns."""

    def forward(self, x: Tensor) -> Tensor:
        coefficients = F.relu(self.up.weight @ x.mT)
        remembers(coefficients.mT)
        return (self.down.weight @ coefficients).mT


class ByInner(Squared):
    """Both products are inner products with the rows of a weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.inner(remembers(F.relu(torch.inner(x, self.up.weight))), self.down.weight)


class Competing(Squared):
    """A coefficient counts by how strong its unit is over all positions, beside the other units."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        strength = torch.linalg.vector_norm(h, dim=1, keepdim=True)
        return self.down(remembers(h + h * strength / (strength.mean(-1, keepdim=True) + 1e-6)))


class Thresholded(Squared):
    """Only the largest coefficients stay."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).clamp_min(0)
        return self.down(remembers(torch.where(h >= h.topk(5, -1).values[..., -1:], h, 0.0)))


class Clipped(Squared):
    """What is below zero is cut off by a bound, and the rest scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(remembers(torch.clip(self.up(x), min=0.0) * 1.7))


class Gated(nn.Module):
    """A bent projection times another one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = weight(WIDTH, HIDDEN), weight(WIDTH, HIDDEN), weight(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return remembers(F.silu(x @ self.gate) * (x @ self.up)) @ self.down


class RoundedEach(Gated):
    """Gate and what is gated round what they read, each by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return remembers(rounded(F.silu(rounded(x) @ self.gate) * (rounded(x) @ self.up))) @ self.down


class Bilinear(Gated):
    """A gate without a nonlinearity."""

    def forward(self, x: Tensor) -> Tensor:
        return remembers((x @ self.gate) * (x @ self.up)) @ self.down


class Fused(nn.Module):
    """Gate and what is gated from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(remembers(up * F.gelu(gate)))


class FusedOp(Fused):
    """The two halves of one projection meet in one op."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(remembers(F.glu(self.both(x), -1)))


class FusedStrided(Fused):
    """Gates and what they gate take turns."""

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        return self.down(remembers(both[..., ::2] * torch.sigmoid(both[..., 1::2])))


class ByEinsum(Gated):
    """Both products are einsums."""

    def forward(self, x: Tensor) -> Tensor:
        pre = torch.einsum("btm,mh->bth", x, self.up)
        return torch.einsum("bth,hm->btm", remembers(F.gelu(pre, approximate="tanh")), self.down)


class ByTensordot(Gated):
    """The first weight is read by its rows, the second by its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = weight(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        pre = torch.tensordot(x, self.keys, dims=([2], [1]))
        return torch.tensordot(remembers(F.relu(pre)), self.down, dims=1)


class Twice(Gated):
    """The gate is projected anew where it is used again."""

    def forward(self, x: Tensor) -> Tensor:
        return remembers((x @ self.gate) * torch.sigmoid(x @ self.gate) * (x @ self.up)) @ self.down


class Sine(Gated):
    """Waves: a unit plus the square of its sine."""

    def forward(self, x: Tensor) -> Tensor:
        pre = x @ self.up
        return remembers(pre + torch.sin(pre) ** 2) @ self.down


class Largest(Fused):
    """Of two units side by side the larger one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(remembers(self.both(x).unflatten(-1, (HIDDEN, 2)).amax(-1)))


class ByHand(Gated):
    """A swish of its own and the tokens of all examples in one row."""

    def forward(self, x: Tensor) -> Tensor:
        pre = torch.mm(x.reshape(-1, WIDTH), self.up)
        return torch.mm(remembers(pre * torch.sigmoid(1.702 * pre)), self.down).view(x.shape)


class Normed(nn.Module):
    """A norm on the coefficients, and one on what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.inner, self.outer = nn.LayerNorm(HIDDEN), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.down(remembers(self.inner(F.gelu(self.up(x))))))


class Channels(nn.Module):
    """Channels first, by convolutions of width one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(WIDTH, HIDDEN, 1), nn.GELU())
        self.down = nn.Conv1d(HIDDEN, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(remembers(self.net(x.transpose(1, 2)))).transpose(1, 2)


class LowRank(Squared):
    """Small updates beside the trained projections."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = weight(3, WIDTH), weight(HIDDEN, 3), weight(3, HIDDEN), weight(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        post = remembers(F.gelu(self.up(x) + F.linear(F.linear(F.dropout(x, 0.1, False), self.a), self.b)))
        return self.down(post) + F.linear(F.linear(post, self.c), self.d)


class KeyValue(nn.Module):
    """Keys and values by name, weighed by a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = weight(HIDDEN, WIDTH), weight(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return remembers(torch.softmax(x @ self.keys.T, -1)) @ self.values


class UnitsFirst(Gated):
    """The coefficients lie before the positions."""

    def forward(self, x: Tensor) -> Tensor:
        pre = torch.einsum("btm,mh->bht", x, self.up)
        return torch.einsum("bht,hm->btm", remembers(F.gelu(pre)), self.down)


class BestEight(Gated):
    """Only the coefficients that are among the best eight."""

    def forward(self, x: Tensor) -> Tensor:
        pre = x @ self.up
        return remembers(pre * (pre >= pre.topk(8, -1).values[..., -1:])) @ self.down


class Rounded(Gated):
    """What each matrix reads is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return remembers((F.gelu((x * 8).round() / 8 @ self.up) * 8).round() / 8) @ self.down


class Added(Gated):
    """Two projections bent and added up: neither is the other's gate, and one key alone makes no coefficient."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.gelu(x @ self.up) + F.silu(x @ self.gate)) @ self.down


FOUND = (
    Squared,
    Merged,
    Ternary,
    UnitRows,
    Spectral,
    ForEachExample,
    WeightFirst,
    ByInner,
    Competing,
    Thresholded,
    Clipped,
    Gated,
    RoundedEach,
    Bilinear,
    Fused,
    FusedOp,
    FusedStrided,
    ByEinsum,
    ByTensordot,
    Twice,
    Sine,
    Largest,
    ByHand,
    Normed,
    Channels,
    LowRank,
    KeyValue,
    UnitsFirst,
    BestEight,
    Rounded,
    Added,
)
