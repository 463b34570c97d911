"""What is moved, masked or lost after it was mixed, what mixes examples, what only looks like a mixer: a claim is what the
layer does when it is asked itself."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.structure.parts import Structure
from tests.structure.idioms import WIDTH, Plain, Stack
from tests.structure.mixers import Parts, cells, delta, gated, gated_window, long_filter, parallel

STEPS = 6


class Around(nn.Module):
    """A layer with something done to what it reads, and to what it makes."""

    def __init__(self, layer: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.before, self.after = layer, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


def same(x: Tensor) -> Tensor:
    return x


AROUND: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "flipped": (lambda x: x.flip(1), lambda y: y.flip(1)),
    "rolled": (lambda x: x.roll(1, 1), lambda y: y.roll(-1, 1)),
    "shifted after": (same, lambda y: F.pad(y, (0, 0, 1, -1))),
    "masked": (same, lambda y: y * (torch.arange(y.shape[1]) < 4)[:, None]),
    "padded": (lambda x: F.pad(x, (0, 0, 0, 3)), lambda y: y[:, :STEPS]),
    "padded before": (lambda x: F.pad(x, (0, 0, 2, 0)), lambda y: y[:, 2:]),
    "scaled": (same, lambda y: 0.5 * y),
    "normed": (same, lambda y: F.layer_norm(y, (WIDTH,))),
    "gone": (same, lambda y: y * 0.0),
}
MIXING = {
    "products": parallel,
    "recurrence": gated,
    "cells": cells,
    "delta": delta,
    "window": gated_window,
    "fft": long_filter,
}


def located(layer: Callable[[], nn.Module], examples: int = 2, steps: int = STEPS) -> tuple[fmr.Run, nn.Module, Structure]:
    torch.manual_seed(0)
    model = Stack(layer, Plain, 1).eval()
    run = fmr.run(model, torch.randint(11, (examples, steps)))
    return run, model.attention[0], fmr.locate(run)


def reach(layer: nn.Module, x: Tensor) -> Tensor:
    """Which positions of a layer hear which, asked of the layer itself."""
    y, rows = layer(x), []
    for place in range(x.shape[1]):
        other = x.clone()
        other[:, place] += torch.randn_like(other[:, place])
        rows.append((layer(other) - y).abs().amax((0, 2)) > 1e-6)
    return torch.stack(rows, 1)


def ways(heard: Tensor) -> str:
    later, earlier = bool(heard.tril(-1).any()), bool(heard.triu(1).any())
    return "both" if later and earlier else "causal" if later else "anticausal"


@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("mixing", MIXING)
@torch.no_grad()
def test_what_is_claimed_is_what_is_written(mixing: str, way: str) -> None:
    before, after = AROUND[way]
    run, layer, found = located(lambda: Around(Parts(MIXING[mixing]), before, after))
    truth = reach(layer, run["norms.0"])
    assert [(one.direction, one.reach(run).tolist()) for one in found.mixers] in ([(ways(truth), truth.tolist())], [])
    if not found.mixers:
        (why,) = (one.reason for one in found.rejected if one.what == "mixer")
        said = "does not follow what is read anywhere" if way == "gone" else f"hear one another there ({ways(truth)})"
        assert said in why
        assert why in found.explain(next(one.id for one in found.rejected if one.what == "mixer")).text
    moved_on = way == "shifted after" and mixing in ("fft", "window")  # a gate that acts at the next position
    assert bool(found.mixers) == (way != "gone" and not moved_on)


def test_a_claim_of_what_is_moved_on_is_refused() -> None:
    run, _, found = located(lambda: Around(Parts(parallel), lambda x: x.flip(1), lambda y: y.flip(1)))
    (mixer,) = found.mixers
    assert mixer.check(run)
    claim = replace(mixer, output=fmr.Site("attention.0.layer"), direction="both")
    assert "what it writes is moved or lost on the way to the sum" in claim.check(run).why


class Dead(Parts):
    """A mixer that is multiplied with zero, beside a memory."""

    def __init__(self) -> None:
        super().__init__(parallel)
        self.memory, self.none = Plain(), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.memory(x) + self.none * super().forward(x)


class Examples(Parts):
    """Examples hear one another, as far as they were read."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.g(x).sigmoid() * m.v(x).cumsum(0))


class Both(Parts):
    """Positions and examples hear one another."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.g(x).sigmoid() * (m.v(x) + m.k(x).mean(0)).cumsum(1))


class ByPlace(Parts):
    """A loop over positions, each of which is by itself."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: torch.stack([m.v(x[:, t]).tanh() * m.k(x[:, t]) for t in range(x.shape[1])], 1))


class Depth(Parts):
    """A loop over depth that hands on a state of its own position."""

    def __init__(self) -> None:
        super().__init__(Depth.deeper)

    def deeper(self, x: Tensor) -> Tensor:
        h = u = self.v(x)
        for _ in range(x.shape[1]):
            h = torch.tanh(self.k(h) + u)
        return h


class Across(Parts):
    """Sums over units, and products of heads at one position."""

    def __init__(self) -> None:
        super().__init__(Across.units)

    def units(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, -1)) for layer in (self.q, self.k, self.v))
        return (q @ k.mT @ v).flatten(2).cumsum(-1)


def selected(m: Parts, x: Tensor) -> Tensor:
    """Steps that select by what they read, after a short convolution."""
    u = F.silu(m.window(m.v(x).mT)[..., : x.shape[1]].mT)
    rate, key, query = F.softplus(m.q(u)), m.narrow(u), m.narrow(u).flip(-1)
    h, made = torch.zeros(*u[:, 0].shape, 4), []
    for t in range(x.shape[1]):
        h = h * (-rate[:, t, :, None]).exp() + rate[:, t, :, None] * key[:, t, None] * u[:, t, :, None]
        made.append((h * query[:, t, None]).sum(-1))
    return torch.stack(made, 1) * F.silu(m.g(x))


def scanned_after(m: Parts, x: Tensor) -> Tensor:
    return scanned(m, m.window(x.mT)[..., : x.shape[1]].mT)


@pytest.mark.parametrize("mixing", [selected, scanned_after])
def test_a_convolution_before_other_mixing_is_not_all_of_it(mixing: Callable[[Parts, Tensor], Tensor]) -> None:
    _, _, found = located(lambda: Parts(mixing))
    assert "convolution" not in [one.kind for one in found.mixers]


REFUSED = {Dead: "does not follow what is read", Examples: "nothing tells whether", Both: "of one example is made of others"}


@pytest.mark.parametrize("size", [(2, STEPS), (1, STEPS), (4, 4), (32, 32)])
@pytest.mark.parametrize("kind", [Dead, Examples, Both, ByPlace, Depth, Across])
def test_impostors_are_no_mixers(kind: type[nn.Module], size: tuple[int, int]) -> None:
    _, _, found = located(kind, *size)
    if kind is Both and size[0] == 1:
        assert [one.direction for one in found.mixers] == ["causal"]  # of one example it is true
        return
    assert found.mixers == ()
    if kind in REFUSED and (kind, size[0]) != (Examples, 1):
        assert any(REFUSED[kind] in one.reason for one in found.rejected if one.what == "mixer")


class Places(nn.Module):
    """A network over positions."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(steps, 9), nn.Linear(9, steps)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.mT))).mT


class Gating(Parts):
    """Gates of which one half is projected over positions."""

    def __init__(self, steps: int) -> None:
        super().__init__(lambda m, x: m.g(x) * m.over(m.v(x).mT).mT)
        self.over = nn.Linear(steps, steps)


class Near(Parts):
    """A window of three positions between two projections."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: F.gelu(m.window(m.v(x).mT)[..., : x.shape[1]].mT))


def scanned(m: Parts, x: Tensor) -> Tensor:
    """A scan in steps that double."""
    a, b, k = m.q(x).sigmoid(), m.v(x), 1
    while k < x.shape[1]:
        earlier, shorter = (F.pad(one, (0, 0, k, 0), value=to)[:, : x.shape[1]] for one, to in ((b, 0.0), (a, 1.0)))
        b, a, k = b + a * earlier, a * shorter, 2 * k
    return b


def in_logarithms(m: Parts, x: Tensor) -> Tensor:
    z = m.q(x).sigmoid()
    kept = torch.log1p(-z).cumsum(1)
    return kept.exp() * (z * m.v(x) * (-kept).exp()).cumsum(1)


def complex_steps(m: Parts, x: Tensor) -> Tensor:
    decay = torch.polar(m.decay.sigmoid(), m.decay)
    u, h, made = m.v(x).to(decay.dtype), 0.0, []
    for t in range(x.shape[1]):
        h = decay * h + u[:, t]
        made.append(h)
    return torch.stack(made, 1).real


def normalised(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.q(x).exp(), m.k(x).exp(), m.v(x)
    states, total = (k[..., None] * v[..., None, :]).cumsum(1), k.cumsum(1)
    return torch.einsum("btd,btde->bte", q, states) / (q * total).sum(-1, keepdim=True)


MORE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "network": (lambda: Places(STEPS), "network", "both"),
    "gating": (lambda: Gating(STEPS), "fixed", "both"),
    "window": (Near, "convolution", "causal"),
    "means so far": (lambda: Parts(lambda m, x: m.v(x).cumsum(1) / torch.arange(1, 7)[:, None]), "recurrence", "causal"),
    "largest so far": (lambda: Parts(lambda m, x: m.v(x).cummax(1).values), "recurrence", "causal"),
    "logarithms": (lambda: Parts(in_logarithms), "recurrence", "causal"),
    "complex": (lambda: Parts(complex_steps), "recurrence", "causal"),
    "normalised": (lambda: Parts(normalised), "linear attention", "causal"),
}


@pytest.mark.parametrize("name", MORE)
def test_more_kinds_are_located(name: str) -> None:
    make, kind, direction = MORE[name]
    _, _, found = located(make)
    assert [(one.kind, one.direction) for one in found.mixers] == [(kind, direction)]
    assert [one.scope for one in found.mlps] == ["memory.0"]
    if name == "normalised":
        (mixer,) = found.mixers
        form = [found.graph[one].op for one in mixer.operands]
        assert (len(mixer.operands), mixer.product is not None) == (3, True), form
        assert mixer.state is not None
        assert found.graph[mixer.state.id].shape == (2, STEPS, WIDTH, WIDTH)


def test_a_scan_is_said_to_bring_positions_together() -> None:
    _, _, found = located(lambda: Parts(scanned))
    (why,) = (one.reason for one in found.rejected if one.what == "mixer")
    assert why == "positions hear one another there (causal), in no way that is known"


@pytest.mark.parametrize("mixing", ["recurrence", "cells", "window"])
def test_in_half_precision_the_same_is_found(mixing: str) -> None:
    torch.manual_seed(0)
    model = Stack(lambda: Parts(MIXING[mixing]), Plain, 1).eval().bfloat16()
    found = fmr.locate(fmr.run(model, torch.randint(11, (2, STEPS))))
    assert [one.direction for one in found.mixers] == ["causal"]


def gated_steps(m: Parts, x: Tensor) -> Tensor:
    made, h = [], torch.zeros(len(x), WIDTH)
    for n in range(x.shape[1]):
        gate = m.g(x[:, n]).sigmoid()
        h = gate * h + (1 - gate) * m.v(x[:, n])
        made.append(h)
    return torch.stack(made, 1)


def windowed(m: Parts, x: Tensor) -> Tensor:
    return F.silu(m.window(m.v(x).mT)[..., : x.shape[1]].mT) * m.g(x)


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (1, 4)])
def test_a_recurrence_over_few_positions_is_no_memory(size: tuple[int, int]) -> None:
    def bent(m: Parts, x: Tensor) -> Tensor:
        made, h = [], torch.zeros_like(x[:, 0])
        for u in m.v(x).unbind(1):
            h = m.decay.sigmoid() * h + u
            made.append(h)
        return F.gelu(torch.stack(made, 1))

    _, _, found = located(lambda: Parts(bent), *size)
    assert [one.scope for one in found.mlps] == ["memory.0"]
    assert [one.kind for one in found.mixers] == ["recurrence"]


ALONG: dict[str, tuple[Callable[[Parts, Tensor], Tensor], str]] = {
    "recurrence": (gated_steps, "weighs attention.0/zeros#0, the state before the first of these"),
    "window": (windowed, "attention.0.window/conv1d#0 is a window over these"),
    "turned round": (lambda m, x: m.v(x).relu().flip(1), "attention.0/flip#0 turns these round"),
    "moved on": (lambda m, x: m.v(x).relu().roll(1, 1), "attention.0/roll#0 turns these round"),
}


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("name", ALONG)
def test_what_goes_along_positions_is_no_memory_in_a_run_of_one(name: str, examples: int) -> None:
    mixing, why = ALONG[name]
    _, _, found = located(lambda: Parts(mixing), examples, 1)
    assert [one.scope for one in found.mlps] == ["memory.0"]
    (reason,) = {one.reason for one in found.rejected if one.what == "memory" and "other positions" in one.reason}
    assert reason.startswith("its coefficients are made of other positions, too: attention.0")
    assert reason.endswith(why)
