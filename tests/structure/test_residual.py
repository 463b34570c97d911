"""The residual stream: every hidden state that a model returns is a point of it, and each write is found."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from tests.models import build
from tests.structure.branches import Parted, PartedPost
from tests.structure.idioms import TOKENS


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "mixtral", "t5", "vit"])
def test_returned_hidden_states_are_points(name: str) -> None:
    model, args, kwargs = build(name)
    run = fmr.run(model, *args, output_hidden_states=True, **kwargs)
    structure = fmr.locate(run)
    points = [run[point] for stream in structure.streams for point in stream.points]
    states = [t for key in run.output if "hidden_states" in key for t in run.output[key]]
    assert states
    for number, state in enumerate(states):
        assert any(point.shape == state.shape and torch.equal(point, state) for point in points), f"hidden state {number}"


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5"])
def test_layers_follow_one_another(name: str) -> None:
    model, args, kwargs = build(name)
    structure = fmr.locate(fmr.run(model, *args, **kwargs))
    assert len(structure.streams) == (2 if name == "t5" else 1)
    for stream in structure.streams:
        layers = [layer for layer in structure.layers if layer.resid_pre.id in stream.points]
        assert layers
        for before, after in pairwise(layers):
            assert before.resid_post.id == after.resid_pre.id
        for layer in layers:
            assert layer.attention is not None
            assert layer.mlp is not None
            assert layer.resid_mid is not None


class Layer(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.norms
        match self.order:
            case "pre":
                x = x + self.attend(a(x))
                return x + self.feed(b(x))
            case "post":
                x = a(x + self.attend(x))
                return b(x + self.feed(x))
            case "parallel":
                return x + self.attend(a(x)) + self.feed(a(x))
            case "parallel sum":
                return x + (self.attend(a(x)) + self.feed(b(x)))
            case "sandwich":
                x = x + b(self.attend(a(x)))
                return x + d(self.feed(c(x)))
        raise AssertionError(self.order)


@pytest.mark.parametrize("order", ["pre", "post", "parallel", "parallel sum", "sandwich"])
def test_every_order_of_norm_and_add(order: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), *(Layer(order) for _ in range(3)), nn.LayerNorm(8), nn.Linear(8, 9))
    run = fmr.run(model, torch.arange(6)[None])
    structure = fmr.locate(run)
    assert len(structure.layers) == 3, structure
    assert len(structure.streams) == 1
    assert structure.embedding is not None
    assert structure.embedding.id == "0/embedding#0"
    assert structure.final_norm is not None
    assert structure.unembedding is not None
    assert structure.unembedding.id == "5/linear#0"
    for layer in structure.layers:
        assert len(layer.attentions) == len(layer.mlps) == 1
        assert (layer.resid_mid is None) == order.startswith("parallel")
    for write in structure.residual.writes:
        torch.testing.assert_close(run[write.before] + run[write.added], run[write.after])
    writers = {name for names in structure.residual.writers for name in names}
    assert {f"{n}.o/linear#0" for n in (1, 2, 3)} | {f"{n}.down/linear#0" for n in (1, 2, 3)} == writers
    assert f"{3 if order == 'parallel sum' else 6} writes" in repr(structure.residual)


@pytest.mark.parametrize("kind", [Parted, PartedPost])
def test_parts_that_are_laid_side_by_side_end_in_the_norm_of_the_whole(kind: type[Parted]) -> None:
    run = fmr.run(kind().eval(), torch.randint(TOKENS, (2, 5)))
    stream = fmr.locate(run).residual
    assert stream.final_norm == "norm/layer_norm#0"
    with pytest.raises(StructureError, match="and no final norm is named"):
        replace(stream, final_norm=None).check(run)


def test_a_model_without_stream_says_so() -> None:
    structure = fmr.locate(fmr.run(nn.Linear(2, 2), torch.ones(1, 2)))
    with pytest.raises(StructureError, match="Linear has no residual stream"):
        _ = structure.residual


class Chosen(nn.Module):
    """The end is put into an empty tensor and normed, and rows of a table are added that another input chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm, self.last = nn.ModuleList(Layer("pre") for _ in range(2)), nn.LayerNorm(8), nn.LayerNorm(8)
        self.register_buffer("table", torch.randn(8, 8))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.feed(block.norms[0](x))
        out = x.new_empty(x.shape)
        out[:] = self.norm(x)
        return self.last(out) + (other > 0).float() @ self.table


def test_rows_that_choices_add_behind_the_end_take_no_stream_away() -> None:
    structure = fmr.locate(fmr.run(Chosen(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)))
    (stream,) = (one for one in structure.streams if one.writes)
    assert (len(stream.writes), stream.final_norm, len(structure.mlps)) == (2, "norm/layer_norm#0", 2)
    assert "/add#2" not in stream.points
