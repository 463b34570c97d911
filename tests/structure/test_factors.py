"""The weights of single heads: read off any layout, equal to the slices cut by hand, and proven or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

import fmr
from fmr.errors import StructureError
from fmr.structure.attention.factors import Factors
from fmr.structure.parts import Attention
from fmr.structure.streams.fold import fold_between

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
SIZES |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SHORT: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}
CONFIGS: dict[str, Any] = {
    "one weight for q, k and v, turned": GPT2Config(**SHORT),
    "rotated, shared keys": LlamaConfig(**SIZES, num_key_value_heads=2),
    "normalised queries": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "one key, norms after": Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=16),
    "centred queries": CohereConfig(**SIZES, use_qk_norm=True),
    "interleaved, parallel": GPTNeoXConfig(**SIZES),
    "rotated in pairs, in part": GPTJConfig(**SHORT, rotary_dim=4),
    "heads in the batch": BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=1),
    "experts": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2),
    "sinks, halves turned": GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_local_experts=4),
    "post-norm": BertConfig(**SIZES),
}


def made(config: Any, attn: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    if isinstance(config, BertConfig):
        model: nn.Module = BertModel._from_config(config, attn_implementation=attn)
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # so that gains and biases count
    return model.eval()


def first_block(model: nn.Module, *args: Any, **inputs: Any) -> tuple[fmr.Run, Attention]:
    with torch.no_grad():
        run = fmr.run(model, *args, **inputs)
    return run, fmr.locate(run).attention[0]


def written(run: fmr.Run, block: Attention, factors: Factors) -> Tensor:
    """The output of an attention, from its patterns, its weights and what it reads alone."""
    x = run[factors.v.of].double()
    if x.shape[0] != block.maps(run).shape[0]:
        x = x.transpose(0, 1)
    values = torch.einsum("btw,huw->bhtu", x, factors.v.matrix.double()) + factors.v.bias.double()[None, :, None]
    mixed = block.maps(run).double() @ values
    return torch.einsum("bhtu,huw->btw", mixed, factors.out.matrix.double()) + factors.out.bias.double()


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_attention_is_made_again_from_its_factors(kind: str) -> None:
    run, block = first_block(made(CONFIGS[kind]), input_ids=torch.randint(2, 64, (2, 7)))
    factors = block.factors(run)
    assert factors.certified
    assert block.out is not None
    assert factors.q.matrix.shape == factors.k.matrix.shape == (4, block.head_dim, 32)
    torch.testing.assert_close(
        written(run, block, factors).float().reshape(-1), run[block.out].reshape(-1), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", ["rotated, shared keys", "normalised queries", "one weight for q, k and v, turned"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_kernels_dtypes_and_padding_change_nothing(kind: str, attn: str) -> None:
    model, ids = made(CONFIGS[kind], attn), torch.randint(2, 64, (3, 7))
    run, block = first_block(model, input_ids=ids[:1])
    plain = block.factors(run)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    run, block = first_block(model, input_ids=ids, attention_mask=mask)
    for role in ("q", "k", "v", "out"):
        torch.testing.assert_close(getattr(block.factors(run), role).matrix, getattr(plain, role).matrix)
    run, block = first_block(model.to(torch.bfloat16), input_ids=ids)
    torch.testing.assert_close(block.factors(run).k.matrix, plain.k.matrix, atol=0.01, rtol=0.02)


def test_they_are_the_slices_that_one_would_cut() -> None:
    model = made(CONFIGS["rotated, shared keys"])
    run, block = first_block(model, input_ids=torch.randint(2, 64, (1, 7)))
    own, factors = model.model.layers[0].self_attn, block.factors(run)
    assert torch.equal(factors.q.matrix, own.q_proj.weight.detach().unflatten(0, (4, 8)))
    assert torch.equal(factors.k.matrix, own.k_proj.weight.detach().unflatten(0, (2, 8)).repeat_interleave(2, 0))
    assert torch.equal(factors.out.matrix, own.o_proj.weight.detach().T.unflatten(0, (4, 8)))
    model = made(CONFIGS["one weight for q, k and v, turned"])
    run, block = first_block(model, input_ids=torch.randint(2, 64, (1, 7)))
    fused, factors = model.transformer.h[0].attn, block.factors(run)
    assert torch.equal(factors.k.matrix, fused.c_attn.weight.detach().T[32:64].unflatten(0, (4, 8)))
    assert torch.allclose(factors.k.bias, fused.c_attn.bias.detach()[32:64].unflatten(0, (4, 8)), atol=1e-7)
    assert torch.allclose(factors.out.bias, fused.c_proj.bias.detach(), atol=1e-7)


def test_as_many_positions_as_heads_share_a_key_are_no_heads() -> None:
    """Four positions of one key for four heads have the shape of four queries that stand at one step."""
    config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, bias=False)
    model = made(config)
    four, seven = (first_block(model, input_ids=torch.randint(2, 64, (3, n))) for n in (4, 7))
    torch.testing.assert_close(four[1].factors(four[0]).k.matrix, seven[1].factors(seven[0]).k.matrix)


def test_the_gain_of_normalised_queries_is_theirs() -> None:
    model = made(CONFIGS["normalised queries"])
    run, block = first_block(model, input_ids=torch.randint(2, 64, (1, 7)))
    own = model.model.layers[0].self_attn
    expected = own.q_proj.weight.detach().unflatten(0, (4, 16)) * own.q_norm.weight.detach()[None, :, None]
    torch.testing.assert_close(block.factors(run).q.matrix, expected, atol=1e-5, rtol=1e-5)


class ByHand(nn.Module):
    """One attention, each head's weights a slice of a parameter of its own order; `change` is done to what heads mixed."""

    def __init__(self, change: Callable[["ByHand", Tensor, Tensor], Tensor] | None = None, beside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.gate = nn.Embedding(20, 24), nn.LayerNorm(24), nn.Linear(24, 3)
        self.read = nn.Parameter(0.2 * torch.randn(3, 24, 3, 8))
        self.write, self.update = nn.Parameter(0.2 * torch.randn(3, 8, 24)), nn.Linear(24, 24)
        self.after, self.change, self.beside = nn.LayerNorm(8), change, beside

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        x = self.norm(h)
        q, k, v = torch.einsum("btd,sdhe->sbthe", x, self.read)
        if self.beside:
            v = v + self.update(x).unflatten(-1, (3, 8))
        z = torch.einsum("bqhk,bkhe->bqhe", (torch.einsum("bqhe,bkhe->bqhk", q, k)).softmax(-1), v)
        z = z if self.change is None else self.change(self, z, x)
        return h + torch.einsum("bqhe,hed->bqd", z, self.write)


def test_a_model_that_nobody_registered_is_read_alike() -> None:
    model = ByHand().eval()
    run, block = first_block(model, torch.randint(0, 20, (2, 5)))
    factors = block.factors(run)
    assert torch.equal(factors.v.matrix, model.read.detach()[2].permute(1, 2, 0))
    assert torch.equal(factors.out.matrix, model.write.detach())


@pytest.mark.parametrize("first", [True, False])
def test_a_fused_module_is_read_in_either_layout(first: bool) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 3, batch_first=first)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x = Fused().eval(), torch.randn(2, 5, 24)
    run, block = first_block(model, x if first else x.transpose(0, 1))
    own = model.attention.in_proj_weight.detach().unflatten(0, (3, 3, 8))
    factors = block.factors(run)
    assert all(torch.equal(getattr(factors, role).matrix, own[n]) for n, role in enumerate("qkv"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            ByHand(lambda own, z, x: own.after(z)),
            r"no weights of single heads: its values are not what these make: its ",
        ),
        (ByHand(lambda own, z, x: z * own.gate(x).sigmoid()[..., None]), r"no weights of single heads"),
        (ByHand(beside=True), r"is made by 2 projections \(.*\), expected one"),
    ],
    ids=["a norm after the heads", "a gate of the token", "a second projection"],
)
def test_what_does_more_than_its_weights_say_is_refused(model: nn.Module, reason: str) -> None:
    run, block = first_block(model.eval(), torch.randint(0, 20, (2, 5)))
    with pytest.raises(StructureError, match=reason):
        block.factors(run)


def test_cross_attention_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    run = fmr.run(model, torch.randn(2, 5, 16), torch.randn(2, 3, 16))
    block = next(one for one in fmr.locate(run).attention if one.kind == "cross")
    with pytest.raises(StructureError, match="is cross-attention, expected self-attention between projections"):
        block.factors(run)


# ---- norms


class Normed(nn.Module):
    """A value and that value normalised in some way."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inside, self.way = nn.Linear(7, 7), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.inside(x)).mul(1.0)


GAIN, BIAS = torch.linspace(-1, 2, 7), torch.linspace(0, 1, 7)
WAYS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "layer norm": (lambda x: nn.functional.layer_norm(x, (7,), GAIN, BIAS), True),
    "layer norm by hand, without eps": (lambda x: (x - x.mean(-1, True)) / x.std(-1, keepdim=True) * GAIN + BIAS, True),
    "root mean square by hand": (lambda x: x * (x.pow(2).mean(-1, True) + 1e-6).rsqrt() * GAIN + BIAS, False),
    "a scale": (lambda x: x * GAIN + BIAS, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_norm_is_folded_however_it_is_written(way: str) -> None:
    torch.manual_seed(0)
    run = fmr.run(Normed(WAYS[way][0]), torch.randn(2, 3, 7))
    graph = run.graph.unfused
    fold = fold_between(graph, graph["inside/linear#0"].id, graph.nodes[-1].id, run.__getitem__)
    assert fold.centred is WAYS[way][1]
    torch.testing.assert_close(fold.bias, BIAS.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(fold.gain / fold.gain.norm(), GAIN.double() / GAIN.double().norm(), atol=1e-3, rtol=0)


def test_a_norm_that_differs_by_token_is_refused() -> None:
    scales = torch.rand(2, 3, 7) + 0.5
    run = fmr.run(Normed(lambda x: nn.functional.layer_norm(x, (7,)) * scales), torch.randn(2, 3, 7))
    graph = run.graph.unfused
    with pytest.raises(StructureError, match="is not inside/linear#0 normalised by one weight for all tokens"):
        fold_between(graph, graph["inside/linear#0"].id, graph.nodes[-1].id, run.__getitem__)
