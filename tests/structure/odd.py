"""Small models of many shapes that no matcher was written for: what each of them is, a matcher must say or say why not."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDE, HIDDEN = 8, 12


class Odd(nn.Module):
    """Some layers, and a function that uses a few of them."""

    def __init__(self, function: Callable[["Odd", Tensor], object]) -> None:
        super().__init__()
        self.l = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(6))
        self.up, self.down, self.norm = nn.Linear(WIDE, HIDDEN), nn.Linear(HIDDEN, WIDE), nn.LayerNorm(WIDE)
        self.conv, self.flat = nn.Conv1d(WIDE, WIDE, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
        self.depth, self.point = nn.Conv1d(WIDE, WIDE, 3, padding=1, groups=WIDE), nn.Conv1d(WIDE, WIDE, 1)
        self.a, self.b, self.mix = (nn.Parameter(torch.randn(*s) / 3) for s in ((WIDE, 2), (2, WIDE), (5, 5)))
        self.cell, self.steps, self.two = nn.GRUCell(WIDE, WIDE), nn.LSTM(WIDE, WIDE, batch_first=True), nn.Bilinear(8, 8, 8)
        self.gate, self.row, self.function = nn.Parameter(torch.zeros(3)), nn.Linear(2 * WIDE, WIDE), function

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def heads(m: Odd, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values."""
    return m.l[0](x), m.l[1](x), m.l[2](x)


def mapped(m: Odd, x: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """An attention whose scores become weights in some way."""
    q, k, v = heads(m, x)
    return x + m.l[3](weigh(q @ k.mT) @ v)


def between(m: Odd, x: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    """Two projections beside a stream with something between them."""
    return x + m.down(made(m.up(x)))


def sinkhorn(scores: Tensor) -> Tensor:
    p = scores.softmax(-1)
    for _ in range(2):
        p = (p + 1e-3).log().softmax(-2)
        p = (p + 1e-3).log().softmax(-1)
    return p


def by_hand(m: Odd, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, 0]), []
    for t in range(3):
        z = torch.sigmoid(m.l[0](x[:, t]) + m.l[1](h))
        h = z * h + (1 - z) * torch.tanh(m.l[2](x[:, t]) + m.l[3](h))
        out.append(h)
    return m.l[4](torch.stack(out, 1))


def written(m: Odd, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(3):
        out[:, t] = m.l[1](torch.relu(m.l[0](x[:, t])) + out[:, t - 1])
    return m.l[2](out)


def routed(m: Odd, x: Tensor) -> Tensor:
    chosen = m.l[0](x).softmax(-1).topk(2)
    experts = torch.stack([m.l[1](x), m.l[2](x), m.l[3](x)], -2)
    best = experts.gather(-2, chosen.indices.clamp(max=2)[..., None].expand(*x.shape[:2], 2, WIDE))
    return x + (best * chosen.values[..., None]).sum(-2)


def looped(m: Odd, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    return torch.stack([sum(p[:, j, None] * v[:, j] for j in range(5)) for p in (q @ k.mT).softmax(-1).unbind(1)], 1)  # type: ignore[misc]


def picked(m: Odd, x: Tensor) -> Tensor:
    mask = x.sum(-1) > 0
    x = x.clone()
    x[mask] = m.down(F.gelu(m.up(x[mask])))
    return m.l[0](x)


def windows(m: Odd, x: Tensor) -> Tensor:
    q, k, v = (one.unfold(1, 2, 1).transpose(-1, -2) for one in heads(m, x))
    return m.l[3](((q @ k.mT).softmax(-1) @ v).flatten(2)[..., :WIDE])


def additive(m: Odd, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    return m.l[3](F.leaky_relu(q.sum(-1)[:, :, None] + k.sum(-1)[:, None]).softmax(-1) @ v)


ODD: dict[str, Callable[[Odd, Tensor], object]] = {
    "router": lambda m, x: x * m.l[0](x).softmax(-1),
    "experts": lambda m, x: (torch.stack([m.l[1](x), m.l[2](x)], -1) * m.l[3](x)[..., None, :2].softmax(-1)).sum(-1),
    "pool": lambda m, x: m.l[1]((m.l[0](x)[..., :1].softmax(1) * x).sum(1)),
    "pool by product": lambda m, x: m.l[1](m.l[0](x)[..., :1].softmax(1).mT @ x),
    "bare": lambda m, x: x + (x @ x.mT).softmax(-1) @ x,
    "two maps": lambda m, x: m.l[1](m.l[0](x)),
    "network": lambda m, x: m.l[1](m.l[0](x).relu()),
    "deep network": lambda m, x: m.l[3](m.l[2](m.l[1](m.l[0](x).relu()).relu()).relu()).softmax(-1),
    "memory": lambda m, x: between(m, m.norm(x), torch.relu),
    "norm between": lambda m, x: x + m.l[1](m.norm(m.l[0](x))),
    "idle dropout": lambda m, x: between(m, x, lambda h: F.dropout(h, 0.5, False)),
    "sum so far": lambda m, x: between(m, x, lambda h: h.cumsum(1)),
    "transform": lambda m, x: between(m, x, lambda h: torch.fft.fft(h).real),
    "sorted": lambda m, x: between(m, x, lambda h: h.sort(-1).values),
    "rolled": lambda m, x: between(m, x, lambda h: h.relu().roll(1, 1)),
    "sine": lambda m, x: between(m, x, torch.sin),
    "read by softmax": lambda m, x: between(m, x, lambda h: h.softmax(-1)),
    "softmax over places": lambda m, x: between(m, x, lambda h: h.softmax(1)),
    "largest": lambda m, x: between(m, x, lambda h: h * (h == h.amax(-1, keepdim=True))),
    "by another": lambda m, x: between(m, x, lambda h: h * h.mean(1, keepdim=True).tanh()),
    "complex": lambda m, x: between(m, x, lambda h: torch.view_as_real(torch.polar(h.abs(), h)).sum(-1)),
    "excited": lambda m, x: x * torch.sigmoid(m.l[1](m.l[0](x.mean(1, keepdim=True)).relu())),
    "three factors": lambda m, x: x + m.l[3](m.l[0](x) * m.l[1](x) * m.l[2](x)),
    "difference": lambda m, x: x + m.l[3](m.l[0](x).relu() - m.l[1](x).relu()),
    "two sources": lambda m, x: m.l[3](m.l[0](x).relu() * m.l[1](x.flip(1))),
    "highway": lambda m, x: torch.sigmoid(m.l[0](x)) * m.l[1](x).relu() + (1 - torch.sigmoid(m.l[0](x))) * x,
    "cell": lambda m, x: m.l[0](m.cell(x[:, 0], m.cell(x[:, 1]))),
    "cell by hand": by_hand,
    "recurrent layer": lambda m, x: m.l[0](m.steps(x)[0]),
    "bilinear": lambda m, x: m.l[1](m.two(m.l[0](x), x)),
    "convolutions": lambda m, x: x + m.conv(m.conv(x.mT).relu()).mT,
    "filters": lambda m, x: m.flat(m.flat(x[:, None]).relu()),
    "separable": lambda m, x: x + m.point(m.depth(m.point(x.mT)).relu()).mT,
    "mixer": lambda m, x: between(m, x + (m.mix @ (m.mix @ x).relu()), torch.relu),
    "spatial gate": lambda m, x: x + m.l[2](m.l[0](x) * (m.mix @ m.l[1](x))),
    "low rank": lambda m, x: x + m.l[1](m.l[0](x) + x @ m.a @ m.b),
    "made weight": lambda m, x: m.l[1](x @ m.l[0](x.mean(1)).view(2, WIDE, 1).expand(-1, -1, WIDE)),
    "laid beside": lambda m, x: m.l[1](m.row(torch.cat([m.l[0](x).relu(), x], -1)).relu()),
    "written over": written,
    "picked": picked,
    "chosen experts": routed,
    "difference of maps": lambda m, x: m.l[4](((x @ m.l[0](x).mT).softmax(-1) - (x @ m.l[1](x).mT).softmax(-1)) @ m.l[2](x)),
    "balanced": lambda m, x: mapped(m, x, sinkhorn),
    "own heat": lambda m, x: mapped(m, x, lambda s: (s / F.softplus(m.l[4](x).mean())).softmax(-1)),
    "both ways": lambda m, x: mapped(m, x, lambda s: s.flatten(1).softmax(-1).view_as(s)),
    "drawn": lambda m, x: mapped(m, x, lambda s: F.gumbel_softmax(s, dim=-1)),
    "sorted scores": lambda m, x: mapped(m, x, lambda s: s.sort(-1).values.softmax(-1)),
    "sum of scores": lambda m, x: mapped(m, x, lambda s: s.cumsum(-1).softmax(-1)),
    "sine of scores": lambda m, x: mapped(m, x, lambda s: s.sin().softmax(-1)),
    "only the best": lambda m, x: mapped(m, x, lambda s: (s.softmax(-1) == s.softmax(-1).amax(-1, keepdim=True)).float()),
    "three maps": lambda m, x: mapped(m, x, lambda s: s.softmax(-1) @ s.softmax(-1)),
    "no softmax": lambda m, x: mapped(m, x, torch.sigmoid),
    "by loop": looped,
    "in windows": windows,
    "by a sum": additive,
    "of weights": lambda m, x: sum(w * layer(x) for w, layer in zip(m.gate.softmax(0), m.l, strict=False)),
    "of constants": lambda m, x: m.l[0](torch.arange(5.0).softmax(0) @ x),
    "loss": lambda m, x: (
        m.l[1](m.l[0](x).relu()).softmax(-1).log().mean(),
        F.cross_entropy(m.l[2](x)[:, 0], x[:, 0].argmax(-1)),
    ),
    "entropy": lambda m, x: -(mapped(m, x, lambda s: s.softmax(-1)).softmax(-1) * x).sum(),
}
