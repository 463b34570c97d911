"""Direct logit attribution: the parts add up to what the model says, whatever its blocks are like."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, LogitAttribution, LogitParts
from fmr.zoo import world
from tests.models import build

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40}
TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = TINY | {"num_key_value_heads": 2, "head_dim": 8}
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 40},
    "Llama": TINY | {"num_key_value_heads": 2},
    "Qwen3": GROUPED,
    "Gemma2": GROUPED | {"final_logit_softcapping": 3.0},
    "GPTNeoX": TINY,
    "Mixtral": TINY | {"num_key_value_heads": 2, "num_local_experts": 4},
    "Granite": TINY | {"logits_scaling": 8.0, "residual_multiplier": 0.3},
    "Phi": TINY,
    "Olmo2": TINY,
    "Bloom": {"n_layer": 2, "hidden_size": 32, "n_head": 4, "vocab_size": 40},
    "OPT": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Mamba": {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 40},
}
"""Grouped queries, norms of queries, norms on what is written, soft caps, parallel blocks, experts, scales, heads in the
batch, tokens as rows, and no attention at all."""


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)  # norms and biases that matter
    return model.to(dtype), torch.randint(3, 40, (3, 7))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_add_up_to_what_the_model_says(name: str) -> None:
    model, ids = made(name)
    found = LogitAttribution(model).run(ids, [4, 5, 6], [7, 8, 9])
    with torch.no_grad():
        logits = model(ids).logits[:, -1].double()
    logits = torch.atanh(logits / 3.0) * 3.0 if found.capped else logits
    rows = torch.arange(3)
    told = logits[rows, torch.tensor([4, 5, 6])] - logits[rows, torch.tensor([7, 8, 9])]
    assert torch.allclose(found.total, told, atol=1e-4)
    assert torch.allclose(found.values.sum(0), told, atol=1e-4)
    assert found.error < 1e-5
    assert found.capped is (name == "Gemma2")
    assert ("head" in found.kinds) is (name != "Mamba")
    assert bool(found.whole) is (name in ("Mamba", "Mixtral"))


def test_a_head_is_what_its_columns_of_the_projection_write() -> None:
    """By hand: z of a head through its part of the output matrix, over the size of the stream, times two rows of words."""
    model, ids = made("Llama")
    found = LogitAttribution(model).run(ids, 4, 7)
    run = fmr.run(model, ids)
    structure = fmr.locate(run)
    end = run[structure.layers[-1].resid_post].detach()[:, -1].double()
    norm, words = model.model.norm, model.lm_head.weight.double()
    scale = (end.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight
    block = structure.attention[1]
    z = run[block.z].detach().double().movedim(block.z.layout.index("heads"), 1)[:, 2, -1]
    written = z @ model.model.layers[1].self_attn.o_proj.weight.double()[:, 16:24].T
    by_hand = (written * scale) @ (words[4] - words[7])
    assert torch.allclose(found.values[found.names.index("head 1.2")], by_hand.detach(), atol=1e-8)


def test_single_memories_add_up_to_their_layer() -> None:
    model, ids = made("Llama")
    found = LogitAttribution(model).run(ids, 4, memories=True)
    for layer in (0, 1):
        part = found.values[found.names.index(f"mlp {layer}")]
        assert found.memories[str(layer)].shape == (48, 3)
        assert torch.allclose(found.memories[str(layer)].sum(0), part, atol=1e-9)
    strongest = found.memory_table(1).iloc[0]
    values = found.memories[str(int(strongest["layer"]))].mean(1)
    assert float(values[int(strongest["memory"])]) == pytest.approx(strongest["share"])
    with pytest.raises(AnalyzerError, match=r"No single memories were told apart. Expected run\(\.\.\., memories=True\)"):
        LogitAttribution(model).run(ids, 4).memory_table()


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mamba"])
def test_half_precision_adds_up_as_far_as_it_is_precise(name: str) -> None:
    model, ids = made(name, torch.bfloat16)
    found = LogitAttribution(model).run(ids, [4, 5, 6], [7, 8, 9])
    exact = LogitAttribution(made(name)[0]).run(ids, [4, 5, 6], [7, 8, 9])
    assert found.error < 0.05
    assert torch.allclose(found.values, exact.values, atol=0.05)


def test_padding_and_the_size_of_a_batch_change_nothing(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    gifts = world.ioi(6, seed=0)
    texts, right = [gift.prompt for gift in gifts], [gift.answer for gift in gifts]
    assert len({len(text.split()) for text in texts}) > 1
    attribution = LogitAttribution(model, tokenizer)
    together = attribution.run(texts, right, position=-2)
    for row, (text, answer) in enumerate(zip(texts, right, strict=True)):
        alone = attribution.run(text, answer, position=-2)
        assert torch.allclose(alone.values[:, 0], together.values[:, row], atol=1e-4)


@pytest.mark.parametrize("name", ["GPT2", "Bloom", "OPT"])
def test_one_example_after_several_is_taken_apart_as_by_itself(name: str) -> None:
    """With one example, or one position, dimensions mean other things."""
    model, ids = made(name)
    attribution = LogitAttribution(model)
    for some in (ids[:1], ids, ids[:, :1], ids[:1]):
        found, alone = attribution.run(some, 4), LogitAttribution(model).run(some, 4)
        assert torch.allclose(found.values, alone.values, atol=1e-6)
    assert "head 1.3" in found.names


def test_heads_that_look_at_an_encoder_have_names_of_their_own() -> None:
    model, _, kwargs = build("t5")
    found = LogitAttribution(model).run(kwargs, 3)
    assert found.error < 1e-5
    assert {"head 0.0", "cross head 0.0"} <= set(found.names)
    assert len(set(found.names)) == len(found.names)


def test_the_answers_name_movers_are_found_and_shuffled_answers_find_none(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    gifts = [gift for gift in world.ioi(60, seed=0) if len(gift.prompt.split()) == 14][:12]
    found = LogitAttribution(model, tokenizer).run(
        [gift.prompt for gift in gifts], [gift.answer for gift in gifts], [gift.giver for gift in gifts]
    )
    heads = [n for n, kind in enumerate(found.kinds) if kind == "head"]
    best = max(heads, key=lambda n: found.shares[n])
    assert found.control == "answers of other prompts"
    assert float(found.values[best].min()) > 0
    assert found.shares[best] > 5 * abs(float(found.others[best].mean()))
    assert found.by_kind()["heads"] > 0.5 * float(found.total.mean())


def test_one_prompt_is_compared_with_random_tokens_and_the_seed_decides() -> None:
    model, ids = made("GPT2")
    one, again, other = (LogitAttribution(model).run(ids[:1], 4, 7, seed=seed) for seed in (0, 0, 1))
    assert one.control == "random tokens"
    assert torch.equal(one.others, again.others)
    assert not torch.equal(one.others, other.others)
    assert torch.equal(one.values, other.values)


def test_a_result_is_told_drawn_and_kept(tmp_path: Path, loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    found = LogitAttribution(model, tokenizer).run("Junel Dunoth grew up in", "Oskus", memories=True)
    said = repr(found)
    assert "LogitParts of 1 prompt: logit of 'Oskus'" in said
    assert "= embedding" in said
    assert "heads for it" in said
    assert "in random tokens" in said
    table = found.table()
    assert table["share"].sum() == pytest.approx(float(found.total.mean()), abs=1e-4)
    assert np.isnan(table["low"]).all()  # one example has no interval
    figure = found.plot()
    assert [ax.get_title() for ax in figure.axes[:2]] == ["single heads", "by layer"]
    found.save(tmp_path / "parts.safetensors")
    read = LogitParts.load(tmp_path / "parts.safetensors")
    assert repr(read) == said
    assert torch.equal(read.values, found.values)


class Memories(nn.Module):
    """A stream with two memories and nothing that tells its examples from its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.ups = nn.ModuleList(nn.Linear(16, 24) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(24, 16) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def test_a_model_written_by_hand_is_taken_apart() -> None:
    torch.manual_seed(0)
    found = LogitAttribution(Memories().eval()).run(torch.randint(20, (2, 5)), 3)
    assert found.error < 1e-5
    assert list(dict.fromkeys(found.kinds)) == ["mlp", "embedding", "bias"]
    assert found.strongest(1, "mlp")[0][0] in ("mlp 0", "mlp 1")


def test_what_cannot_be_taken_apart_says_why(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    attribution = LogitAttribution(model, tokenizer)
    with pytest.raises(AnalyzerError, match=r"position=9: the shortest prompt has 6 tokens, expected -6 to 5"):
        attribution.run("Junel Dunoth grew up in", "Oskus", position=9)
    with pytest.raises(AnalyzerError, match="right=None: expected a token"):
        attribution.run("Junel Dunoth grew up in", None)
    with pytest.raises(AnalyzerError, match=r"kind='neuron': expected one of .*'head'"):
        attribution.run("Junel Dunoth grew up in", "Oskus").strongest(1, "neuron")
    bert, args, kwargs = build("bert")
    with pytest.raises(AnalyzerError, match=r"Nothing can be read out of .*Expected pre-norm layers and logits"):
        LogitAttribution(bert).run(kwargs or {"input_ids": args[0]}, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_are_told_apart_at_any_length_and_number(name: str) -> None:
    """With one position, tokens as rows are examples."""
    model, ids = made(name)
    whole = LogitAttribution(model).run(ids, [4, 5, 6], position=0)
    single = LogitAttribution(model).run(ids[:, :1], [4, 5, 6])
    assert single.names == whole.names
    assert single.error < 1e-5
    assert torch.allclose(single.values, whole.values, atol=1e-5)


class Looped(nn.Module):
    """Attention whose heads are called one after the other, each with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(20, 16), nn.Embedding(8, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(16, 12) for _ in range(4)) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place(torch.arange(ids.shape[1]))
        for norm, heads, out in zip(self.norms, self.qkv, self.out, strict=False):
            made = []
            for head in heads:
                q, k, v = head(norm(x)).chunk(3, -1)
                made.append(torch.softmax(q @ k.mT / 2, -1) @ v)
            x = x + out(torch.cat(made, -1))
        return self.head(self.norms[2](x))


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (3, 1), (1, 1)])
def test_heads_in_a_loop_are_heads_of_one_layer(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, ids = Looped().eval(), torch.randint(20, shape)
    found = LogitAttribution(model).run(ids, 4)
    assert found.error < 1e-5
    assert not found.whole
    assert {f"head {layer}.{place}" for layer in range(2) for place in range(4)} <= set(found.names)
    assert len(set(found.names)) == len(found.names)
    run = fmr.run(model, ids)
    end = run[fmr.locate(run).residual.writes[-1].after].detach()[:, -1].double()
    scale = (end.var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()
    with torch.no_grad():
        q, k, v = model.qkv[1][2](model.norms[1](run[fmr.locate(run).residual.writes[0].after])).chunk(3, -1)
        z = (torch.softmax(q @ k.mT / 2, -1) @ v)[:, -1].double()
        written = z @ model.out[1].weight.double()[:, 8:12].T
        direction = model.norms[2].weight * model.head.weight.double()[4]
        by_hand = ((written - written.mean(-1, keepdim=True)) * scale) @ direction
    assert torch.allclose(found.values[found.names.index("head 1.2")], by_hand, atol=1e-6)
