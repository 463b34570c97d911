"""Feed-forward memories: keys, coefficients and values are the ones that the model computes with."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.structure.memories.memory import certify_memory
from tests.models import build
from tests.structure import blocks, experts, memories
from tests.structure.idioms import HIDDEN, WIDTH, Stack

MADE = (
    memories.Merged,
    memories.Ternary,
    memories.UnitRows,
    memories.Spectral,
    memories.ForEachExample,
    memories.WeightFirst,
    memories.ByInner,
)
"""Layers whose weights are made of their parameters, or read in another place than usual."""


class Residual(nn.Module):
    """x + mlp(x), twice, so that there is a stream to write to."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Plain(nn.Module):
    def __init__(self, bend: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.up, self.down, self.bend = nn.Linear(6, 10), nn.Linear(10, 6), bend

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.bend(self.up(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b, bias=False) for a, b in ((6, 10), (6, 10), (10, 6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FusedGate(nn.Module):
    def __init__(self, bend: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.both, self.down, self.bend = nn.Linear(6, 20, bias=False), nn.Linear(10, 6), bend

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(self.bend(gate) * up)


Take = Callable[[Tensor], tuple[Tensor, Tensor]]


class Halves(FusedGate):
    """The halves are taken in some way."""

    def __init__(self, take: Take) -> None:
        super().__init__()
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.take(self.both(x))
        return self.down(self.bend(gate) * up)


def by_bound(h: Tensor) -> tuple[Tensor, Tensor]:
    half = torch.IntTensor([10])[0]
    return h[..., :half], h[..., half:]


def by_start(h: Tensor) -> tuple[Tensor, Tensor]:
    return h.narrow(-1, torch.IntTensor([0])[0], 10), h.narrow(-1, torch.IntTensor([10])[0], 10)


def by_index(h: Tensor) -> tuple[Tensor, Tensor]:
    return h.index_select(-1, torch.LongTensor(range(10))), h.index_select(-1, torch.LongTensor(range(10, 20)))


class Transposed(nn.Module):
    """Weights stored (in, out), as some libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.w_in) @ self.w_out


class Einsum(nn.Module):
    """Both layouts, named by subscripts."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(10, 6)), nn.Parameter(torch.randn(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btf,fd->btd", torch.relu(torch.einsum("btd,fd->btf", x, self.w_in)), self.w_out)


class Stacked(nn.Module):
    """One parameter for the keys of all layers, one for their values, of which each layer reads its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(torch.randn(2, 6, 10)), nn.Parameter(torch.randn(2, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        for w_in, w_out in zip(self.w_in, self.w_out, strict=True):
            x = x + torch.relu(x @ w_in) @ w_out
        return x


class Windows(nn.Module):
    """A memory for each place of a picture, whose coefficients are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class GateInTwo(nn.Module):
    """One projection for gate and gated, taken apart by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(6, 20, bias=False), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x).view(*x.shape[:2], 2, -1)
        return self.down(F.silu(both[..., 0, :]) * both[..., 1, :])


def by_hand(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x.pow(3))))


def in_pieces(x: Tensor) -> Tensor:
    return torch.where(x > 0, 0.8 * x * x + 0.5 * x, (torch.expm1(torch.min(x, torch.tensor(-1e-6))) - x) * 0.8 + 0.5 * x)


FORMS = {
    "plain": (Plain, "up.weight", None, "down.weight"),
    "written out": (lambda: Plain(by_hand), "up.weight", None, "down.weight"),
    "in pieces": (lambda: Plain(in_pieces), "up.weight", None, "down.weight"),
    "gated": (Gated, "up.weight", "gate.weight", "down.weight"),
    "fused gate": (FusedGate, "both.weight", None, "down.weight"),
    "gate in two": (GateInTwo, "both.weight", None, "down.weight"),
    "by subscripts": (Einsum, "w_in", None, "w_out"),
    "transposed": (Transposed, "w_in", None, "w_out"),
}


@pytest.mark.parametrize("form", FORMS)
def test_keys_coefficients_and_values(form: str) -> None:
    torch.manual_seed(0)
    make, w_in, w_gate, w_out = FORMS[form]
    model = Residual(make(), make())
    posts: list[Tensor] = []
    for block in model.blocks:
        if hasattr(block, "down"):
            block.down.register_forward_pre_hook(lambda module, args: posts.append(args[0]))
    x = torch.randn(2, 3, 6)
    run = fmr.run(model, x)
    structure = fmr.locate(run)
    assert [block.scope for block in structure.mlps] == ["blocks.0", "blocks.1"], structure
    for number, block in enumerate(structure.mlps):
        assert block.certified
        assert block.n == 10
        names = [f"param:blocks.{number}.{name}" if name else None for name in (w_in, w_gate, w_out)]
        assert [block.w_in, block.w_gate, block.w_out] == names
        if posts:
            assert torch.equal(run[block.post], posts[number])
        values = torch.stack([block.memory(i)[1] for i in range(block.n)])
        written = run[block.post] @ values
        bias = getattr(getattr(model.blocks[number], "down", None), "bias", None)
        torch.testing.assert_close(written + (0 if bias is None else bias.detach()), run[block.out])


@pytest.mark.parametrize("form", ["plain", "transposed", "by subscripts"])
def test_a_key_is_what_the_stream_is_multiplied_with(form: str) -> None:
    torch.manual_seed(0)
    model = Residual(FORMS[form][0]())
    x = torch.randn(2, 3, 6)
    run = fmr.run(model, x)
    block = fmr.locate(run).mlps[0]
    bias = model.blocks[0].up.bias[4] if form == "plain" else 0
    torch.testing.assert_close(run[block.pre][..., 4], (x @ block.memory(4)[0] + bias).detach())


def test_experts_are_memories_and_their_router_is_no_attention() -> None:
    model, args, kwargs = build("mixtral")
    structure = fmr.locate(fmr.run(model, *args, **kwargs))
    assert structure.mlps
    assert all(block.certified for block in structure.mlps)
    assert len(structure.attention) == len(structure.layers)
    block, experts = structure.mlps[0], model.model.layers[0].mlp.experts
    assert torch.equal(block.memory(3, expert=1)[0], experts.gate_up_proj[1, block.n + 3])
    assert torch.equal(block.memory(3, expert=1)[1], experts.down_proj[1, :, 3])
    with pytest.raises(StructureError, match=r"has 3 experts. Name one: block.memory\(0, expert=0\)"):
        block.memory(0)
    with pytest.raises(StructureError, match=r"Expert 3 of .*: expected 0 to 2"):
        block.memory(0, expert=3)


@pytest.mark.parametrize("kind", MADE)
def test_a_weight_that_is_made_on_the_way_holds_the_vectors(kind: type[memories.Squared]) -> None:
    layer = kind()
    block = fmr.locate(fmr.run(Residual(layer), torch.randn(2, 5, WIDTH))).mlps[0]
    key, value = block.memory(7)
    assert torch.equal(key, layer.made(layer.up.weight)[7])
    assert torch.equal(value, layer.made(layer.down.weight)[:, 7])
    merged = kind is memories.Merged
    assert block.n == HIDDEN
    assert block.w_in.startswith("param:") != merged
    assert block.w_out.endswith("down.weight") != merged


def test_the_vectors_of_an_expert_that_is_looked_up_are_those_of_its_matrix() -> None:
    layer = experts.ExpertsChosen()
    block = fmr.locate(fmr.run(Residual(layer), torch.randn(2, 5, WIDTH))).mlps[0]
    key, value = block.memory(7, expert=2)
    assert torch.equal(key, layer.up[2, :, 7])
    assert torch.equal(value, layer.down[2, 7])


@pytest.mark.parametrize("take", [by_bound, by_start, by_index])
def test_a_tensor_that_says_where_a_half_lies_is_no_part_of_a_memory(take: Take) -> None:
    torch.manual_seed(0)
    found = fmr.locate(fmr.run(Residual(Halves(take), Halves(take)), torch.randn(2, 3, 6))).mlps
    assert [(bool(one.certified), one.n) for one in found] == [(True, 10)] * 2
    with pytest.raises(StructureError, match="no row or column is known to be that of one memory"):
        found[1].memory(7)  # no op made the number that says where


def test_a_gate_that_a_view_took_apart_leaves_the_second_half_as_keys() -> None:
    model = Residual(GateInTwo())
    (block,) = fmr.locate(fmr.run(model, torch.randn(2, 3, 6))).mlps
    assert torch.equal(block.memory(4)[0], model.blocks[0].both.weight[14])


@pytest.mark.parametrize(("scale", "shift"), [(1, 1), (2, 0), (-1, 0), (0.5, -1)])
def test_a_gate_that_is_scaled_and_shifted_leaves_the_second_half_as_keys(scale: float, shift: float) -> None:
    model = Residual(FusedGate(lambda gate: torch.sigmoid(gate * scale + shift)))
    (block,) = fmr.locate(fmr.run(model, torch.randn(2, 3, 6))).mlps
    assert [torch.equal(block.memory(n)[0], model.blocks[0].both.weight[10 + n]) for n in range(10)] == [True] * 10


def test_the_op_of_gates_takes_the_second_half_as_gates() -> None:
    layer = memories.FusedOp()
    (block,) = fmr.locate(fmr.run(Residual(layer), torch.randn(2, 5, WIDTH))).mlps
    assert torch.equal(block.memory(7)[0], layer.both.weight[7])
    assert torch.equal(block.memory(7)[1], layer.down.weight[:, 7])


def test_a_layer_reads_its_own_matrices_of_a_stack() -> None:
    torch.manual_seed(0)
    model = Stacked()
    blocks = fmr.locate(fmr.run(model, torch.randn(2, 3, 6))).mlps
    assert [block.w_in for block in blocks] == ["param:w_in"] * 2
    for layer, block in enumerate(blocks):
        key, value = block.memory(7)
        assert torch.equal(key, model.w_in[layer, :, 7])
        assert torch.equal(value, model.w_out[layer, 7])
    with pytest.raises(StructureError, match=r"one matrix for all: expected block.memory\(7\) without expert="):
        blocks[0].memory(7, expert=0)


@pytest.mark.parametrize("kind", [blocks.OneProjection, blocks.OneProjectionGated])
def test_keys_are_told_from_queries_of_the_same_projection(kind: type[blocks.OneProjection]) -> None:
    model = blocks.Layers(kind())
    (block,) = fmr.locate(fmr.run(model, torch.arange(5)[None])).mlps
    key, value = block.memory(7)
    assert torch.equal(key, model.blocks[0].enter.weight[3 * WIDTH + 7])
    assert torch.equal(value, model.blocks[0].memory.down.weight[:, 7])


def test_values_are_told_from_the_heads_that_the_same_projection_reads() -> None:
    model = blocks.Layers(blocks.OneOutput())
    (block,) = fmr.locate(fmr.run(model, torch.arange(5)[None])).mlps
    key, value = block.memory(7)
    assert block.certified
    assert torch.equal(key, model.blocks[0].memory.up.weight[7])
    assert torch.equal(value, model.blocks[0].leave.weight[:, WIDTH + 7])


def test_memories_of_a_picture_are_its_channels() -> None:
    torch.manual_seed(0)
    model = Windows()
    (block,) = fmr.locate(fmr.run(model, torch.randn(2, 6, 5, 7))).mlps
    key, value = block.memory(9)
    assert block.n == 10
    assert torch.equal(key, model.up.weight[9].flatten())
    assert torch.equal(value, model.down.weight[:, 9].flatten())


def test_a_gate_for_channels_that_no_stream_reads_is_rejected() -> None:
    structure = fmr.locate(fmr.run(Plain(), torch.randn(2, 3, 6)))
    assert not structure.mlps
    assert "down/linear#0 is no memory: its output is not written to a residual stream" in repr(structure)


def test_questions_that_cannot_be_answered() -> None:
    run = fmr.run(Residual(Plain()), torch.randn(2, 3, 6))
    with pytest.raises(StructureError, match=r"Memory 10 of 'blocks.0': expected 0 to 9"):
        fmr.locate(run).mlps[0].memory(10)
    with pytest.raises(StructureError, match=r"found in a graph alone, which holds no weights. Use fmr.locate\(run\)"):
        fmr.locate(run.graph).mlps[0].memory(0)


def test_keys_that_are_none_are_not_certified() -> None:
    model, args, kwargs = build("llama")
    run = fmr.run(model, *args, **kwargs)
    memory = fmr.locate(run).mlps[0]
    assert memory.certified
    assert set(memory.certified.errors) == {"post", "places", "keys", "out"}
    lies = {
        "dimension of its keys": replace(memory, key_dim=1 - memory.key_dim),
        "dimension of its values": replace(memory, value_dim=1 - memory.value_dim),
        "tensor of its keys is param:model.layers.0.mlp.up_proj.weight, and not": replace(memory, keys=memory.values),
        "tensor of its keys": replace(memory, keys=memory.w_gate),
    }
    for words, other in lies.items():
        with pytest.raises(StructureError, match=words):
            certify_memory(memory.graph, other, run.__getitem__)


def test_experts_are_memories_too_where_their_product_is_done_by_an_op_of_another_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)
    model, args, kwargs = build("mixtral")
    run = fmr.run(model, *args, **kwargs)
    assert run.graph.find("*/grouped_mm#*")
    assert [bool(one.certified) for one in fmr.locate(run).mlps] == [True, True]


class InHalves(nn.Module):
    """The second projection is done in two halves of the units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).relu().chunk(2, -1)
        left, right = self.down.weight.chunk(2, 1)
        return F.linear(first, left) + F.linear(second, right, self.down.bias)


def test_units_that_another_projection_reads_gate_nothing() -> None:
    found = fmr.locate(fmr.run(Stack(InHalves, InHalves, 1).eval(), torch.randint(11, (2, 6))))
    assert [(one.size, one.fused_gate) for one in found.mlps[:2]] == [(f"{HIDDEN // 2} memories", False)] * 2


def test_units_that_are_bent_in_two_ways_enter_as_they_are_projected() -> None:
    """What is laid beside is bent of the same numbers and of their negatives: neither alone enters."""
    block = Plain(lambda x: torch.cat([F.relu(x), F.relu(-x)], -1))
    block.down = nn.Linear(20, 6)
    run = fmr.run(Residual(block), torch.randn(2, 3, 6))
    (found,) = fmr.locate(run).mlps
    assert (found.pre.id, found.n) == ("blocks.0.up/linear#0", 20)


def test_units_that_are_scaled_before_they_are_bent_in_two_ways_enter_so() -> None:
    def bend(x: Tensor) -> Tensor:
        x = 0.5 * x
        return torch.cat([F.relu(x), F.relu(-x)], -1)

    block = Plain(bend)
    block.down = nn.Linear(20, 6)
    (found,) = fmr.locate(fmr.run(Residual(block), torch.randn(2, 3, 6))).mlps
    assert (found.pre.id, found.n) == ("blocks.0/mul#0", 20)


def test_halves_that_are_bent_otherwise_are_one_memory() -> None:
    def bend(x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat([F.relu(one), torch.tanh(other)], -1)

    (found,) = fmr.locate(fmr.run(Residual(Plain(bend)), torch.randn(2, 3, 6))).mlps
    assert found.n == 10


def test_what_a_constant_of_its_own_shape_scales_is_a_memory() -> None:
    (found,) = fmr.locate(fmr.run(Residual(Plain(lambda x: F.gelu(x) * torch.full_like(x, 0.5))), torch.randn(2, 3, 6))).mlps
    assert (found.n, found.post.id) == (10, "blocks.0/mul#0")


def test_units_that_are_turned_round_where_they_lie_before_positions_are_of_one_memory() -> None:
    (found,) = fmr.locate(fmr.run(Residual(Plain(lambda x: F.gelu(x).mT.roll(1, 1).mT)), torch.randn(2, 3, 6))).mlps
    assert found.n == 10


@pytest.mark.parametrize(("rows", "hears"), [(5, 4), (6, 2), (7, 2), (8, 7)])
def test_coefficients_of_one_row_that_hears_one_other_are_none(rows: int, hears: int) -> None:
    def bend(x: Tensor) -> Tensor:
        return F.gelu(x).index_add(-2, torch.tensor([hears]), 0.5 * x[..., :1, :])

    for shape in ((rows, 6), (1, rows, 6)):
        found = fmr.locate(fmr.run(Residual(Plain(bend)), torch.randn(shape)))
        assert not found.mlps
        assert "its coefficients are made of other positions" in found.rejected[0].reason


@pytest.mark.parametrize("rows", [9, 16, 17, 40])
@pytest.mark.parametrize("heard", [0, 1, -1])
def test_coefficients_of_rows_that_all_hear_one_are_none(rows: int, heard: int) -> None:
    def bend(x: Tensor) -> Tensor:
        return F.gelu(x + x[..., heard, None, :])

    for shape in ((rows, 6), (1, rows, 6), (3, rows, 6)):
        found = fmr.locate(fmr.run(Residual(Plain(bend)), torch.randn(shape)))
        assert not found.mlps
        assert "its coefficients are made of other positions" in found.rejected[0].reason
