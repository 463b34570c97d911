"""Which key each coefficient of a memory is made of, where units change places or are laid side by side."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.structure.memories.memory import Memory
from tests.structure.test_memory import FusedGate, Gated, Plain, Residual

Move = Callable[[Tensor], Tensor]

CHANGES: list[Move] = [lambda h: h.flip(-1), lambda h: h.roll(1, -1), lambda h: h.unflatten(-1, (2, 5)).mT.flatten(-2)]


@pytest.mark.parametrize("moved", CHANGES)
def test_the_key_of_a_memory_is_its_own_where_units_change_places(moved: Move) -> None:
    torch.manual_seed(0)
    block = Plain(lambda h: moved(F.gelu(h)))
    found = fmr.locate(fmr.run(Residual(block), torch.randn(2, 4, 6))).mlps[0]
    places = moved(torch.arange(10.0)[None])[0].long()
    for n in range(10):
        key, value = found.memory(n)
        assert torch.equal(key, block.up.weight[places[n]])
        assert torch.equal(value, block.down.weight[:, n])


@pytest.mark.parametrize("gate", ["first", "second", "of torch"])
@pytest.mark.parametrize("moved", [lambda h: h, *CHANGES])
def test_the_key_of_a_memory_is_its_own_where_gated_units_change_places(moved: Move, gate: str) -> None:
    torch.manual_seed(0)
    block = FusedGate()
    halves = {
        "first": lambda h: moved(F.silu(h[..., :10]) * h[..., 10:]),
        "second": lambda h: moved(h[..., :10] * F.silu(h[..., 10:])),
        "of torch": lambda h: F.glu(torch.cat([moved(one) for one in h.chunk(2, -1)], -1), -1),
    }
    block.forward = lambda x: block.down(halves[gate](block.both(x)))  # type: ignore[method-assign]
    (found,) = fmr.locate(fmr.run(Residual(block), torch.randn(2, 4, 6))).mlps
    units = {"first": torch.arange(10.0, 20), "second": torch.arange(10.0), "of torch": torch.arange(10.0)}[gate]
    for n, place in enumerate(moved(units[None])[0].long()):
        assert torch.equal(found.memory(n)[0], block.both.weight[place])


def test_the_key_of_a_part_of_a_projection_is_its_own_where_units_change_places() -> None:
    block = Plain(lambda h: F.gelu(h[..., 3:]).flip(-1))
    block.up = nn.Linear(6, 13)
    (found,) = fmr.locate(fmr.run(Residual(block), torch.randn(2, 4, 6))).mlps
    assert torch.equal(found.memory(0)[0], block.up.weight[12])


def test_where_numbers_say_which_unit_goes_where_no_key_is_told() -> None:
    torch.manual_seed(0)
    order = torch.randperm(10)
    found = fmr.locate(fmr.run(Residual(Plain(lambda h: F.gelu(h)[..., order])), torch.randn(2, 4, 6))).mlps[0]
    with pytest.raises(StructureError, match="no row or column is known to be that of one memory"):
        found.memory(0)


@pytest.mark.parametrize("join", [lambda *two: torch.cat(two, -1), lambda *two: torch.stack(two, -1).flatten(-2)])
def test_two_projections_side_by_side_are_no_gated_memory(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    block = Gated()
    block.gate, block.up = nn.Linear(6, 5), nn.Linear(6, 5)
    block.forward = lambda x: block.down(join(F.gelu(block.gate(x)), F.relu(block.up(x))))  # type: ignore[method-assign]
    found = fmr.locate(fmr.run(Residual(block), torch.randn(2, 4, 6)))
    assert not found.mlps
    assert "make is laid side by side, and neither gates the other" in repr(found)


def test_a_gate_and_what_it_gates_may_be_laid_side_by_side_first() -> None:
    block = Gated()
    block.forward = lambda x: block.down(F.glu(torch.cat([block.up(x), block.gate(x)], -1)))  # type: ignore[method-assign]
    assert fmr.locate(fmr.run(Residual(block), torch.randn(2, 4, 6))).mlps[0].certified


class Tall(nn.Module):
    """Memories that two convolutions of one place read, as large as the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(6, 6, 1), nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.mT))).mT


Lie = Callable[[Memory], Memory]

LIES: dict[str, tuple[Callable[[], nn.Module], Lie, str]] = {
    "keys as a gate": (Plain, lambda one: replace(one, w_gate=one.w_in), "up.weight makes no gate beside"),
    "keys as a gate of halves": (FusedGate, lambda one: replace(one, w_gate=one.w_in), "both.weight makes no gate beside"),
    "gate and keys": (
        Gated,
        lambda one: replace(one, keys=one.w_gate, w_in=one.w_gate, w_gate=one.w_in, up=one.pre.id),
        "gate/linear#0 is not computed from param:blocks.0.up.weight",
    ),
    "examples as units": (Plain, lambda one: replace(one, axis=0), "the dimension of its coefficients is 2, and not 0"),
    "keys as values": (
        Tall,
        lambda one: replace(one, values=one.keys, w_out=one.w_in),
        "the weight of its values is param:blocks.0.down.weight, and not param:blocks.0.up.weight",
    ),
    "values as keys": (
        Tall,
        lambda one: replace(one, keys=one.values, w_in=one.w_out),
        "the weight of its keys is param:blocks.0.up.weight, and not param:blocks.0.down.weight",
    ),
    "keys of channels turned": (Tall, lambda one: replace(one, key_dim=1), "the dimension of its keys is 0, and not 1"),
    "values of channels turned": (Tall, lambda one: replace(one, value_dim=0), "of its values is 1, and not 0"),
    "halves that are none": (
        FusedGate,
        lambda one: replace(one, fused_gate=False),
        "both/linear#0 gates its coefficients",
    ),
    "a gate of channels": (Tall, lambda one: replace(one, fused_gate=True), "is no gate and what it gates, for 6 memories"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_memory_of_which_a_part_is_another_one_is_refused(lie: str) -> None:
    torch.manual_seed(0)
    make, turn, words = LIES[lie]
    run = fmr.run(Residual(make()), torch.randn(1, 4, 6))
    (found,) = fmr.locate(run).mlps
    assert found.check(run)
    with pytest.raises(StructureError, match=words):
        turn(found).check(run)
