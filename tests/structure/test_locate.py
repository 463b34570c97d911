"""The whole of a structure: idioms beyond the dot product, models that have none, structure without weights."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fmr
from fmr.structure.attention.deformable import deformable
from fmr.structure.normal.form import form_of
from tests.structure import heads


class Einsum(nn.Module):
    """Heads in the third dimension, written with einsum; keys and values shared by all heads where asked."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 2 if shared else 8), nn.Linear(8, 2 if shared else 8)
        self.o, self.shared = nn.Linear(8, 8), shared

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], 4, 2)
        k, v = self.k(x), self.v(x)
        if self.shared:
            pattern = torch.einsum("bqhd,bkd->bhqk", q, k).softmax(-1)
            z = torch.einsum("bhqk,bkd->bqhd", pattern, v)
        else:
            k, v = k.view(q.shape), v.view(q.shape)
            pattern = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 2**0.5).softmax(-1)
            z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        return x + self.o(z.reshape(x.shape))


@pytest.mark.parametrize("shared", [False, True])
def test_einsum_with_heads_in_the_middle(shared: bool) -> None:
    torch.manual_seed(0)
    run = fmr.run(Einsum(shared), torch.randn(2, 5, 8))
    block = fmr.locate(run).attention[0]
    assert block.certified
    assert (block.n_heads, block.n_kv_heads, block.head_dim) == (4, 1 if shared else 4, 2)
    assert run[block.pattern].shape == (2, 4, 5, 5)
    assert torch.equal(run[block.head(3).pattern], run[block.pattern][:, 3])
    assert torch.equal(run[block.head(3).q], run[block.q][:, :, 3])


class Deformable(nn.Module):
    """Each query weighs three places of a map that it chooses itself; the heads come before the queries or after them."""

    def __init__(self, heads_first: bool) -> None:
        super().__init__()
        self.places, self.weights, self.heads_first = nn.Linear(4, 2 * 3 * 2), nn.Linear(4, 2 * 3), heads_first

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        batch, length, _ = x.shape
        grid = self.places(x).view(batch, length, 2, 3, 2).tanh().transpose(1, 2).flatten(0, 1)
        scores = self.weights(x).view(batch, length, 2, 3)
        pattern = scores.transpose(1, 2).softmax(-1) if self.heads_first else scores.softmax(-1).transpose(1, 2)
        weights = pattern.reshape(batch * 2, 1, length, 3)
        sampled = F.grid_sample(seen.repeat(2, 1, 1, 1), grid, align_corners=False)
        return (sampled * weights).sum(-1).view(batch, -1, length).transpose(1, 2)


@pytest.mark.parametrize("heads_first", [False, True])
def test_deformable_attention(heads_first: bool) -> None:
    torch.manual_seed(0)
    run = fmr.run(Deformable(heads_first), torch.randn(1, 5, 4), torch.randn(1, 2, 6, 6))
    (block,) = fmr.locate(run).attention
    assert (block.kind, block.n_heads) == ("deformable", 2)
    order = ("heads", "positions") if heads_first else ("positions", "heads")
    assert block.pattern.layout == ("examples", *order, "units")
    assert block.certified


def test_of_one_query_it_is_not_told_which_dimension_counts_the_heads() -> None:
    run = fmr.run(Deformable(False), torch.randn(1, 1, 4), torch.randn(1, 2, 6, 6))
    (softmax,) = form_of(run.graph).of_kind("softmax")
    assert "which of its dimensions count queries and heads cannot be told" in str(deformable(run.graph, softmax))
    assert not fmr.locate(run).attention


class Placed(nn.Module):
    """Tokens and their places are looked up, both given by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.kinds, self.places = nn.Embedding(9, 8), nn.Embedding(2, 8), nn.Embedding(16, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        x = self.tokens(ids) + self.kinds(torch.zeros_like(ids)) + self.places(places)
        return x + self.down(F.gelu(self.up(x)))


def test_the_embedding_is_that_of_the_tokens_where_places_are_given_too() -> None:
    structure = fmr.locate(fmr.run(Placed(), torch.randint(9, (2, 5)), torch.arange(5).expand(2, 5)))
    assert structure.embedding is not None
    assert structure.embedding.id == "tokens/embedding#0"


def test_structure_without_weights_on_the_meta_device() -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 1000}
    config = LlamaConfig(num_attention_heads=16, num_key_value_heads=4, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
        graph = fmr.run(model, torch.zeros(1, 16, dtype=torch.long), keep="none").graph
    structure = fmr.locate(graph)
    assert [(layer.attention.n_heads, layer.attention.n_kv_heads, layer.mlp.n) for layer in structure.layers] == [
        (16, 4, 2048)
    ] * 6
    assert all(block.certified is None for block in structure.attention)
    assert "not computed" in repr(structure)


def test_a_structure_prints_on_one_screen() -> None:
    torch.manual_seed(0)
    structure = fmr.locate(fmr.run(Einsum(False), torch.randn(2, 5, 8)))
    assert repr(structure).splitlines()[0] == "Structure of Einsum: 1 layer, 1 attention, 0 memories, 0 rejected"
    assert structure.roles[structure.attention[0].pattern.id] == "pattern"


def test_of_many_plain_stacks_the_longest_are_printed() -> None:
    stacks = [nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4 + n // 4))) for n in range(6)]

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(stacks)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [head(x) for head in self.heads]

    structure = fmr.locate(fmr.run(Heads(), torch.randn(2, 4)))
    assert len(structure.streams) == 6
    lines = [line for line in str(structure).splitlines() if line.startswith("  stack")]
    assert len(lines) == 5
    assert lines[-1] == "  stack         ... and 2 shorter ones"
    assert any("heads.5" in line for line in lines)


def test_a_certificate_is_computed_for_other_sizes_too() -> None:
    torch.manual_seed(0)
    model = heads.MultiQueryBroadcast()
    block = fmr.locate(fmr.run(model, torch.randn(1, 6, 32))).attention[0]
    assert block.check(fmr.run(model, torch.randn(3, 9, 32))).ok


def test_what_a_kernel_drops_at_random_is_a_reason() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    structure = fmr.locate(fmr.run(layer, torch.randn(1, 4, 32)))
    assert not structure.attention
    assert "random mask" in structure.rejected[0].reason


def test_the_key_of_an_interleaved_gate() -> None:
    class Interleaved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(6, 20, bias=False), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.both(x)
            return x + self.down(F.silu(y[..., ::2]) * y[..., 1::2])

    torch.manual_seed(0)
    model = Interleaved()
    (block,) = fmr.locate(fmr.run(model, torch.randn(2, 3, 6))).mlps
    assert torch.equal(block.memory(3)[0], model.both.weight[7])


def test_a_kernel_on_rows_of_different_lengths_is_named_with_its_remedy() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for nested in (True, False):
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that nested tensors may change
            found = fmr.locate(fmr.run(encoder, torch.randn(2, 5, 32), src_key_padding_mask=mask))
        assert len(found.attention) == (0 if nested else 2)
        assert len(found.rejected) == (2 if nested else 0)
        assert all("enable_nested_tensor=False" in one.reason for one in found.rejected)


class Ragged(nn.Module):
    """Attention and a memory, which take rows of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.up, self.down = (nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, [2, 8]).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.relu(self.up(x)))


def test_rows_of_different_lengths_are_the_one_reason_why_nothing_is_found_in_them() -> None:
    rows = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    found = fmr.locate(fmr.run(Ragged(), rows))
    assert [one.id for one in found.rejected] == ["/scaled_dot_product_attention#0", "out/linear#0", "down/linear#0"]
    (reason,) = {one.reason for one in found.rejected}
    assert reason.startswith("its rows differ in length (a nested tensor), which fmr does not take apart;")
