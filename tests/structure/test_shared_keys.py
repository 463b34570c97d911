"""Keys and values of other layers: to look at an earlier value of one stream is self-attention, and its proof says so."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.runs.run import Run
from fmr.structure.parts import Attention, Structure
from tests.structure.idioms import HEADS, TOKENS, WIDTH, Plain, joined, split, weight
from tests.structure.proof.test_lies import of_attention


class Projections(nn.Module):
    """The four projections of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))


def pattern(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)


class Layers(nn.Module):
    """Layers that take keys and values from where `how` says; a kernel, or by hand."""

    def __init__(self, how: str, fused: bool = False, depth: int = 3) -> None:
        super().__init__()
        self.how, self.fused = how, fused
        self.tokens, self.values = nn.Embedding(TOKENS, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.looks = nn.ModuleList(Projections() for _ in range(depth))
        self.mlps = nn.ModuleList(Plain() for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * depth + 1))
        self.mix, self.logits = weight(depth, 2), nn.Linear(WIDTH, 50, bias=False)

    def keys(self, n: int, y: Tensor, ids: Tensor, first: list[Tensor]) -> tuple[Tensor, Tensor]:
        layer = self.looks[n]
        if self.how == "keys of the first layer" or (self.how == "keys of the middle" and n == 2):
            if len(first) < 2 or (n == 1 < len(first) and self.how == "keys of the middle"):
                first[:] = [split(layer.k(y)), split(layer.v(y))]
            return first[0], first[1]
        if self.how == "an earlier state":
            first[:] = first or [y]
            y = first[0]
        k, v = split(layer.k(y)), split(layer.v(y))
        if self.how == "values of the first layer":
            first[:] = first or [v]
            v = self.mix[n, 0] * v + self.mix[n, 1] * first[0]
        if self.how == "values of tokens":
            v = self.mix[n, 0] * v + self.mix[n, 1] * split(self.values(ids))
        if self.how == "keys of the middle":
            first[:] = [k, v]
        return k, v

    def forward(self, ids: Tensor) -> Tensor:
        x, first = self.tokens(ids), list[Tensor]()
        for n, (look, mlp) in enumerate(zip(self.looks, self.mlps, strict=True)):
            y = self.norms[2 * n](x)
            q, (k, v) = split(look.q(y)), self.keys(n, y, ids, first)
            z = F.scaled_dot_product_attention(q, k, v) if self.fused else pattern(q, k) @ v
            x = x + look.out(joined(z))
            x = x + mlp(self.norms[2 * n + 1](x))
        return self.logits(self.norms[-1](x))


class Normed(nn.Module):
    """Layers whose norms stand on the stream itself, and that all look at what it began with."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.tokens, self.logits = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 50)
        self.looks = nn.ModuleList(Projections() for _ in range(depth))
        self.mlps = nn.ModuleList(Plain() for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = first = self.tokens(ids)
        for n, (look, mlp) in enumerate(zip(self.looks, self.mlps, strict=True)):
            z = pattern(split(look.q(x)), split(look.k(first))) @ split(look.v(first))
            x = self.norms[2 * n](x + look.out(joined(z)))
            x = self.norms[2 * n + 1](x + mlp(x))
        return self.logits(x)


class Translator(nn.Module):
    """A second stream over the same tokens looks at the end of a first one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.first, self.second = nn.Embedding(TOKENS, WIDTH), Projections(), Projections()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.mlps, self.logits = nn.ModuleList(Plain() for _ in range(2)), nn.Linear(WIDTH, 50)

    def look(self, layer: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = split(layer.q(x)), split(layer.k(seen)), split(layer.v(seen))
        return layer.out(joined(pattern(q, k) @ v))

    def forward(self, ids: Tensor) -> Tensor:
        x = y = self.tokens(ids)
        x = x + self.look(self.first, self.norms[0](x), self.norms[0](x))
        x = self.norms[4](x + self.mlps[0](self.norms[1](x)))
        y = y + self.look(self.second, self.norms[2](y), x)
        return self.logits(y + self.mlps[1](self.norms[3](y)))


def located(model: nn.Module) -> tuple[Run, Structure]:
    torch.manual_seed(0)
    run = fmr.run(model.eval(), torch.randint(TOKENS, (2, 6)))
    return run, fmr.locate(run)


HOW = (
    "keys of the first layer",
    "keys of the middle",
    "an earlier state",
    "values of the first layer",
    "values of tokens",
)


def holds(claim: Attention, run: Run) -> bool:
    try:
        return bool(claim.check(run))
    except StructureError:
        return False


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_layers_that_share_keys_or_values_are_self_attention_on_one_stream(how: str, fused: bool) -> None:
    run, found = located(Layers(how, fused))
    assert [one.kind for one in found.attention] == ["self"] * 3
    assert [len(layer.attentions) for layer in found.layers] == [1, 1, 1]
    assert (len(found.streams), len(found.mlps), found.rejected) == (1, 3, ())
    of_layers = [one.k.id for one in found.attention]
    shared = {"keys of the first layer": 1, "keys of the middle": 2}.get(how, 3)
    assert len({*of_layers}) == shared
    assert not any(holds(replace(one, kind="cross"), run) for one in found.attention)


@pytest.mark.parametrize("how", HOW)
def test_no_wrong_field_of_a_layer_that_looks_at_an_earlier_one_is_certified(how: str) -> None:
    run, found = located(Layers(how))
    *_, other, last = found.attention
    shared = {f"{role} of another" for role in "kv" if getattr(last, role) == getattr(other, role)}
    lies = [(what, lie) for what, lie in of_attention(last, other, HEADS) if what not in shared]
    assert [what for what, lie in lies if holds(lie, run)] == []


def test_the_end_of_another_stream_is_looked_at_across() -> None:
    run, found = located(Translator())
    assert [one.kind for one in found.attention] == ["self", "cross"]
    assert not holds(replace(found.attention[1], kind="self"), run)


def test_a_stream_goes_on_through_its_norms() -> None:
    run, found = located(Normed())
    assert [one.kind for one in found.attention] == ["self"] * 3
    assert not any(holds(replace(one, kind="cross"), run) for one in found.attention)
