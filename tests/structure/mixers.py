"""Layers that bring positions together without a softmax, each with what is true of it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.structure.idioms import WIDTH, Plain, Stack, joined, split, weight


class Parts(nn.Module):
    """Projections, and a function that brings what they make together."""

    def __init__(self, function: Callable[["Parts", Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.g = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.one, self.out, self.narrow = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.window = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)
        self.steps, self.cell = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.GRUCell(WIDTH, WIDTH)
        self.filter, self.decay, self.function = weight(WIDTH, 64), weight(WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self, x))


def heads(m: Parts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return split(m.q(x)), split(m.k(x)), split(m.v(x))


def earlier(scores: Tensor) -> Tensor:
    return scores * torch.ones(scores.shape[-2:]).tril()


def parallel(m: Parts, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    return joined(earlier(q @ k.mT) @ v)


def decayed(m: Parts, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    place = torch.arange(x.shape[1])
    return joined((q @ k.mT * earlier(0.9 ** (place[:, None] - place).abs())) @ v) * F.silu(m.g(x))


def one_state(m: Parts, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return joined(q @ (k.mT @ v) / (q @ k.sum(-2)[..., None]))


def summed(m: Parts, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    states = (k[..., :, None] * v[..., None, :]).cumsum(-3)
    return joined(torch.einsum("bhtd,bhtde->bhte", q, states))


def chunks(m: Parts, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    state, made = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for one, other, value in zip(q.split(3, 2), k.split(3, 2), v.split(3, 2), strict=True):
        made.append(one @ state + earlier(one @ other.mT) @ value)
        state = state + other.mT @ value
    return joined(torch.cat(made, 2))


def looped(m: Parts, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    state, made = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        made.append((q[:, :, t, None] @ state)[:, :, 0])
    return joined(torch.stack(made, 2))


def looped_in_one_line(m: Parts, x: Tensor) -> Tensor:
    u, step, b, c = m.v(x), F.softplus(m.g(x)), m.narrow(x), m.narrow(x.flip(-1))
    state, made = x.new_zeros(len(x), WIDTH, 4), []
    for t in range(x.shape[1]):
        state = (step[:, t, :, None] * -m.decay.abs()[:, None]).exp() * state + (step[:, t] * u[:, t])[..., None] * b[
            :, t, None
        ]
        made.append((state * c[:, t, None]).sum(-1))
    return torch.stack(made, 1) + u * m.decay


def delta(m: Parts, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    rate, state, made = m.narrow(x).sigmoid().mT, torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for t in range(x.shape[1]):
        told = (k[:, :, t, None] @ state)[:, :, 0]
        new = (v[:, :, t] - told) * rate[:, :, t, None]
        state = state + k[:, :, t, :, None] * new[:, :, None]
        made.append((q[:, :, t, None] @ state)[:, :, 0])
    return joined(torch.stack(made, 2))


def gated(m: Parts, x: Tensor) -> Tensor:
    kept, new, gate = m.one(x).chunk(3, -1)
    h, made = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        a = kept[:, t].sigmoid()
        h = a * h + (1 - a) * new[:, t]
        made.append(h)
    return torch.stack(made, 1) * F.silu(gate)


def backward(m: Parts, x: Tensor) -> Tensor:
    return gated(m, x.flip(1)).flip(1)


def into_rows(m: Parts, x: Tensor) -> Tensor:
    x, h = m.window(m.v(x).mT)[..., : x.shape[1]].mT, torch.zeros_like(x[:, 0])
    made = torch.zeros_like(x)
    for t in range(x.shape[1]):
        h = m.decay.sigmoid() * h + x[:, t]
        made[:, t] = h
    return made


def cells(m: Parts, x: Tensor) -> Tensor:
    x, h = m.v(x), torch.zeros_like(x[:, 0])
    return torch.stack([h := m.cell(one, h) for one in x.unbind(1)], 1)


def bare_cells(m: Parts, x: Tensor) -> Tensor:
    h, made = None, []
    for one in reversed(x.unbind(1)):
        made.append(h := m.cell(one, h))
    return torch.stack(made[::-1], 1)


def gated_window(m: Parts, x: Tensor) -> Tensor:
    b, c, x = m.one(x).chunk(3, -1)
    return c * m.window((b * x).mT)[..., : x.shape[1]].mT


def long_filter(m: Parts, x: Tensor) -> Tensor:
    v, n = m.v(x), 2 * x.shape[1]
    made = torch.fft.irfft(torch.fft.rfft(v.mT, n=n) * torch.fft.rfft(m.filter[:, : x.shape[1]], n=n), n=n)
    return made[..., : x.shape[1]].mT * m.g(x)


def one_line(m: Parts, x: Tensor) -> Tensor:
    u, dt, b, c = m.v(x)[..., None], F.softplus(m.g(x))[..., None], m.narrow(x)[:, :, None], m.narrow(x.flip(-1))[:, :, None]
    h, made = torch.zeros_like(u[:, 0] * b[:, 0]), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t] * -m.filter[:, :4].exp()) * h + dt[:, t] * b[:, t] * u[:, t]
        made.append((h * c[:, t]).sum(-1))
    return torch.stack(made, 1)


def bent(m: Parts, x: Tensor) -> Tensor:
    q, k, v = heads(m, x)
    return joined(earlier((q @ k.mT).sigmoid()) @ v)


class Truth(NamedTuple):
    """How a layer mixes, and what is known of it: its inputs, those that are gates, how many states, which way."""

    function: Callable[[Parts, Tensor], Tensor]
    kind: str
    inputs: int
    gates: int = 0
    states: int = 0
    direction: str = "causal"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return Stack(lambda: Parts(self.function), Plain).eval()


STEPS = 6
MIXERS: dict[str, Truth] = {
    "products": Truth(parallel, "linear attention", 3),
    "products that decay": Truth(decayed, "linear attention", 4, 1),
    "one state for all": Truth(one_state, "linear attention", 3, direction="both"),
    "states summed so far": Truth(summed, "linear attention", 3, states=1),
    "chunks": Truth(chunks, "linear attention", 3),
    "products in a loop": Truth(looped, "recurrence", 3, states=STEPS),
    "steps in one line": Truth(looped_in_one_line, "recurrence", 4, states=STEPS),
    "delta rule": Truth(delta, "recurrence", 4, states=STEPS),
    "gated recurrence": Truth(gated, "recurrence", 3, 1, STEPS),
    "backward": Truth(backward, "recurrence", 3, 1, STEPS, "anticausal"),
    "window, then steps written into rows": Truth(into_rows, "recurrence", 1, states=STEPS),
    "cells": Truth(cells, "recurrence", 1, states=STEPS),
    "cells without a projection": Truth(bare_cells, "recurrence", STEPS, states=STEPS, direction="anticausal"),
    "several products of one line": Truth(one_line, "recurrence", 4, 0, STEPS),
    "one kernel": Truth(lambda m, x: m.steps(m.v(x))[0], "recurrence", 1),
    "gated window": Truth(gated_window, "convolution", 3, 1),
    "long filter": Truth(long_filter, "fixed", 2, 1),
    "transform": Truth(lambda m, x: torch.fft.fft2(m.v(x)).real, "fixed", 1, direction="both"),
    "sigmoid of scores": Truth(bent, "sigmoid attention", 3),
}
