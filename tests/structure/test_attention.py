"""Attention is found by dataflow, is what the model itself computes, and is proven or rejected with a reason."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fmr
from fmr.errors import StructureError
from fmr.ids import TensorId
from fmr.structure.attention.certify import certify
from tests.models import build

LENGTH = 7


def _bert(attn: str) -> nn.Module:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return BertModel._from_config(config, attn_implementation=attn)


def _gpt2(attn: str) -> nn.Module:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel._from_config(config, attn_implementation=attn)


def _llama(attn: str) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, pad_token_id=0, bos_token_id=0, eos_token_id=0, **sizes, **heads)
    return LlamaForCausalLM._from_config(config, attn_implementation=attn)


FAMILIES: dict[str, Callable[[str], nn.Module]] = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}


def made(family: str, attn: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = FAMILIES[family](attn).eval()
    ids = torch.randint(1, 64, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return model, {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_are_the_ones_the_model_returns(family: str, attn: str) -> None:
    model, inputs = made(family, attn)
    run = fmr.run(model, **inputs)
    found = fmr.locate(run)
    eager, _ = made(family, "eager")
    with torch.no_grad():
        truth = eager(**inputs, output_attentions=True).attentions
    assert len(found.attention) == len(truth) == 2
    assert not found.rejected
    for block, expected in zip(found.attention, truth, strict=True):
        real = inputs["attention_mask"].bool()[:, None, :, None].expand_as(expected)
        close = 0.0 if attn == "eager" else 1e-6
        assert float((run[block.pattern] - expected)[real].abs().max()) <= close
        assert (block.n_heads, block.head_dim, block.kind) == (4, 8, "self")
        assert block.n_kv_heads == (2 if family == "llama" else 4)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_heads_that_are_none_are_not_certified(attn: str) -> None:
    model, inputs = made("llama", attn)
    run = fmr.run(model, **inputs)
    block = fmr.locate(run).attention[0]
    assert block.pattern.layout is not None
    turned = tuple({"heads": "positions", "positions": "heads"}.get(name, name) for name in block.pattern.layout)
    found = replace(block, pattern=replace(block.pattern, layout=turned))
    assert not certify(block.graph, found, run.__getitem__).ok
    for n in (1, 2, 7, 64):
        with pytest.raises(StructureError, match=f"(4 heads, not {n}$|{n} heads cannot share those of 2)"):
            certify(block.graph, replace(block, n_heads=n), run.__getitem__)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_large_scores_in_half_precision_are_certified_and_wrong_ones_are_not(attn: str) -> None:
    model, inputs = made("llama", attn)
    for name, parameter in model.named_parameters():
        parameter.data *= 100.0 if "q_proj" in name or "k_proj" in name else 1.0
    run = fmr.run(model.to(torch.bfloat16), **inputs)
    found = fmr.locate(run)
    assert len(found.attention) == 2
    assert not found.rejected
    for block in found.attention:
        scores = run[block.scores]
        assert scores[scores.isfinite()].max() > 20

        def louder(name: TensorId, scores: TensorId = block.scores.id) -> Tensor:
            return run[name] * 1.1 if name == scores else run[name]

        off = certify(block.graph, block, louder)
        assert not off.ok
        assert off.errors["pattern"] > 0.05


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_finding_is_certified_from_its_parts(family: str, attn: str) -> None:
    model, inputs = made(family, attn)
    structure = fmr.locate(fmr.run(model, **inputs))
    assert len(structure.attention) == 2
    for block in structure.attention:
        assert block.certified is not None
        assert set(block.certified.errors) == {"pattern", "rows", "z", "heads", "layout", "out"}
        assert max(block.certified.errors.values()) < 1e-5
        assert "certified: pattern" in repr(block)


def test_a_graph_alone_finds_and_proves_nothing() -> None:
    model, inputs = made("gpt2", "sdpa")
    run = fmr.run(model, **inputs)
    block = fmr.locate(run.graph).attention[1]
    assert block.certified is None
    assert "not computed" in repr(block)
    assert block.check(run).ok


def test_a_check_fails_on_a_run_whose_values_do_not_belong_together() -> None:
    model, inputs = made("gpt2", "eager")
    run = fmr.run(model, **inputs)
    block = fmr.locate(run).attention[0]
    other = fmr.run(model, **{**inputs, "input_ids": inputs["input_ids"].flip(1)})
    run.last.values[block.pattern.id] = other[block.pattern]
    certificate = block.check(run)
    assert not certificate.ok
    assert repr(certificate).startswith("NOT certified: pattern")


def test_the_same_sites_read_a_later_run_and_a_loaded_one(tmp_path: Path) -> None:
    model, inputs = made("llama", "sdpa")
    run = fmr.run(model, **inputs)
    block = fmr.locate(run).attention[1]
    later = fmr.run(model, keep=[block.pattern], stop=True, **inputs)
    assert torch.equal(later[block.pattern], run[block.pattern])
    run.save(tmp_path / "run.fmr", params=True)
    loaded = fmr.load(tmp_path / "run.fmr")
    again = fmr.locate(loaded).attention[1]
    assert again.certified == block.certified
    assert torch.equal(loaded[again.pattern], run[block.pattern])


def test_a_head_is_the_slice_of_its_block() -> None:
    model, inputs = made("gpt2", "eager")
    run = fmr.run(model, **inputs)
    block = fmr.locate(run).attention[0]
    head = block.head(2)
    assert torch.equal(run[head.pattern], run[block.pattern][:, 2])
    assert run[head.z].shape == (2, LENGTH, 8)
    with pytest.raises(StructureError, match=r"Head 4 of 'transformer.h.0.attn': expected 0 to 3"):
        block.head(4)


def test_cross_attention_is_told_from_self_attention() -> None:
    model, args, kwargs = build("transformer")
    kinds = [block.kind for block in fmr.locate(fmr.run(model, *args, **kwargs)).attention]
    assert kinds == ["self", "self", "cross"]


def test_active_dropout_is_a_reason_that_names_the_remedy() -> None:
    model, inputs = made("gpt2", "eager")
    structure = fmr.locate(fmr.run(model.train(), **inputs))
    assert not structure.attention
    assert "dropout is active" in repr(structure.rejected[0])
    assert "run the model in eval mode" in repr(structure.rejected[0])


class Block(nn.Module):
    """Attention in one forward without submodules; `mix` is the spelling under test."""

    def __init__(
        self, mix: Callable[[Tensor, Tensor, Tensor], Tensor], norm: Callable[[Tensor], Tensor] = lambda z: z
    ) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, 4, 16, 4) / 4)
        self.o = nn.Parameter(torch.randn(16, 16) / 4)
        self.mix, self.norm = mix, norm

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.stack([x @ w for w in heads], 1) for heads in self.qkv)
        z = self.mix(q, k, v)
        return x + self.norm(z.transpose(1, 2).reshape(x.shape)) @ self.o


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 2, -1) @ v


def method(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * 0.5).matmul(k.transpose(-1, -2)).softmax(-1).matmul(v)


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (
        torch.baddbmm(torch.ones(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.5)
        .softmax(-1)
        .bmm(v.flatten(0, 1))
        .unflatten(0, q.shape[:2])
    )


@pytest.mark.parametrize("mix", [plain, method, biased], ids=lambda mix: mix.__name__)
def test_one_forward_without_submodules(mix: Any) -> None:
    torch.manual_seed(0)
    run = fmr.run(Block(mix), torch.randn(2, 5, 16))
    structure = fmr.locate(run)
    assert [(b.n_heads, b.head_dim) for b in structure.attention] == [(4, 4)], structure
    assert structure.attention[0].certified
    assert run[structure.attention[0].pattern].shape[-1] == 5
    assert structure.attention[0].kind == "self"
    assert structure.attention[0].out is not None


def causal_mask(length: int) -> Any:
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("masked", [False, True])
def test_flexible_attention_is_seen_through(masked: bool) -> None:
    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = flex_attention(q, k, v, block_mask=causal_mask(q.shape[-2]) if masked else None)
        return found

    model, x = Block(mix), torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)
        run = fmr.run(model, x)
    assert torch.equal(run.output, expected)
    (block,) = fmr.locate(run).attention
    assert block.certified
    assert (block.n_heads, block.head_dim, run[block.pattern].shape) == (4, 4, (2, 4, 5, 5))
    assert bool((run[block.pattern].triu(1) == 0).all()) == masked


def test_the_tolerance_is_that_of_the_least_precise_value() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run = fmr.run(Block(lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float32) @ v), torch.randn(2, 5, 16))
    (block,) = fmr.locate(run).attention
    assert (run[block.pattern].dtype, run[block.z].dtype) == (torch.float32, torch.bfloat16)
    assert block.certified
    assert block.certified.tolerance == 4e-2


class Upcast(nn.Module):
    """The stream and the inside of attention have more digits than the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            y = self.norm(x.to(torch.bfloat16))
            q, k, v = self.qkv(y).float().unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
            z = (q @ k.mT / 2).softmax(-1) @ v
            x = x + self.o(z.transpose(1, 2).flatten(2).to(torch.bfloat16))
        return x.float()


def test_what_has_many_digits_may_be_made_of_what_has_few() -> None:
    found = fmr.locate(fmr.run(Upcast().to(torch.bfloat16), torch.randn(2, 5, 16).to(torch.bfloat16)))
    assert (len(found.attention), len(found.residual.writes), found.rejected) == (2, 2, ())


class OneKey(nn.Module):
    """One key head under four heads of values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (self.q(x), self.v(x)))
        return x + self.o(((q @ self.k(x).unsqueeze(1).mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_key_that_all_heads_share_is_that_of_each_head() -> None:
    run = fmr.run(OneKey(), torch.randn(2, 5, 16))
    (block,) = fmr.locate(run).attention
    assert torch.equal(run[block.head(2).k], run[block.k])
    assert torch.equal(run[block.head(2).v], run[block.v][:, 2])


class Choosing(nn.Module):
    """Attention to the keys that are nearest to the mean query, chosen from many in half precision; or to those of each
    query whose scores are not below the third of its largest."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each = each
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (mat(x).unflatten(-1, (4, 4)).transpose(1, 2) for mat in (self.q, self.k, self.v))
        scores = q @ k.mT
        if self.each:
            pattern = scores.masked_fill(scores < scores.topk(3).values[..., -1:], -1e4)
            return x + self.o((pattern.softmax(-1) @ v).transpose(1, 2).flatten(2))
        chosen = scores.mean(-2, keepdim=True).topk(3).indices
        pattern = scores.masked_fill(
            ~torch.zeros_like(scores).bool().scatter(-1, chosen.expand(-1, -1, q.shape[2], -1), True), -1e4
        )
        return x + self.o((pattern.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("each", [False, True])
def test_what_rounding_made_the_model_choose_is_taken_as_it_was(each: bool) -> None:
    torch.manual_seed(0)
    (block,) = fmr.locate(fmr.run(Choosing(each).bfloat16(), torch.randn(2, 200, 16).bfloat16())).attention
    assert block.certified


class Turned(nn.Module):
    """Attention whose keys are made transposed from the start, as in the first GPT: no node holds them as the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (mat(x).unflatten(-1, (4, 4)) for mat in (self.q, self.k, self.v))
        z = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v.transpose(1, 2)
        return x + self.o(z.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("length", [1, 4, 5])
def test_keys_are_told_whatever_sizes_coincide(length: int) -> None:
    """Of as many positions as heads, the dimensions before and after a permutation look alike."""
    (block,) = fmr.locate(fmr.run(Turned(), torch.randn(4, length, 16))).attention
    assert (block.k.id, block.k.layout) == ("/permute#0", ("examples", "heads", "units", "positions"))


class Places(nn.Module):
    """Attention in which each position has matrices of its own, looked up by an input."""

    def __init__(self) -> None:
        super().__init__()
        self.mats = nn.Parameter(torch.randn(4, 8, 16, 16) / 4)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        def project(x: Tensor, n: int) -> Tensor:
            return (x[:, :, None] @ self.mats[n].index_select(0, places)).squeeze(2)

        q, k, v = (project(x, n).unflatten(-1, (4, 4)).transpose(1, 2) for n in range(3))
        return x + project(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2), 3)


@pytest.mark.parametrize("examples", [3, 4])
@pytest.mark.parametrize("length", [4, 5])
def test_heads_are_told_where_each_position_has_its_own_projection(length: int, examples: int) -> None:
    (block,) = fmr.locate(fmr.run(Places(), torch.randn(examples, length, 16), torch.arange(length))).attention
    assert (block.n_heads, block.head_dim) == (4, 4)
    sites = (block.q, block.k, block.v, block.scores, block.pattern, block.z)
    assert {site.layout for site in sites} == {("examples", "heads", "positions", "units")}


def written_out(z: Tensor) -> Tensor:
    z = z - z.mean(-1, keepdim=True)
    return z / torch.sqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("norm", [written_out, lambda z: F.layer_norm(z, (16,))], ids=["written_out", "one_op"])
def test_a_norm_between_the_heads_and_their_projection(norm: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    block = fmr.locate(fmr.run(Block(plain, norm), torch.randn(2, 5, 16))).attention[0]
    assert block.out is not None
    assert (block.n_heads, block.head_dim, block.out.id) == (4, 4, "/matmul#14")
    assert block.certified is not None
    assert set(block.certified.errors) == {"pattern", "rows", "z", "heads", "layout", "out"}


class Router(nn.Module):
    """A mixture of two experts with a softmax gate: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate(x).softmax(-1)
        return (torch.stack([expert(x) for expert in self.experts], -1) * weight.unsqueeze(-2)).sum(-1)


@pytest.mark.parametrize("name", ["cnn", "gru", "mamba"])
def test_no_attention_where_there_is_none(name: str) -> None:
    model, args, kwargs = build(name)
    assert not fmr.locate(fmr.run(model, *args, **kwargs)).attention


def test_a_router_is_rejected_with_a_reason() -> None:
    structure = fmr.locate(fmr.run(Router(), torch.randn(3, 4, 8)))
    assert not structure.attention
    told = "/softmax#0 is no attention: no product of two activations lies above the softmax, up to gate/linear#0"
    assert repr(structure.rejected[0]) == told


def test_a_run_without_values_says_what_to_keep() -> None:
    model, inputs = made("gpt2", "eager")
    for keep in ("none", "*softmax*"):
        with pytest.raises(
            fmr.IdError, match=r"this one kept \d+ of \d+\. Expected a run with keep='all'; fmr.locate\(run.graph\)"
        ):
            fmr.locate(fmr.run(model, keep=keep, **inputs))


def test_a_pattern_without_a_kernel_is_told_of_the_kernel() -> None:
    (eager, inputs), (fused, _) = made("gpt2", "eager"), made("gpt2", "sdpa")
    pattern = fmr.locate(fmr.run(eager, **inputs)).attention[0].pattern
    run = fmr.run(fused, **inputs)
    where = pattern.id.scope
    words = rf"'{where}' runs a kernel here, {where}/scaled_dot_product_attention#0, .*Locate it in a run of this model"
    for ask in (
        lambda: run[pattern],
        lambda: fmr.run(fused, keep=[pattern], **inputs),
        lambda: fmr.run(fused, edits={pattern: fmr.edits.Zero()}, **inputs),
    ):
        with pytest.raises(fmr.FmrError, match=words):
            ask()
    assert [node.op for node in run.graph.find(f"{where}/*softmax#*")] == ["softmax"]


def test_the_sites_of_an_attention_know_how_many_heads_it_has() -> None:
    model, inputs = made("gpt2", "eager")
    block = fmr.locate(fmr.run(model, **inputs)).attention[0]
    assert {getattr(block, role).n_heads for role in ("q", "k", "v", "scores", "pattern", "z")} == {block.n_heads}
    with pytest.raises(StructureError, match=r"fmr.locate got GPT2LMHeadModel, expected a run or a graph"):
        fmr.locate(model)  # type: ignore[arg-type]
