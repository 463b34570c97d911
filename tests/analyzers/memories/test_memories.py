"""Key-value memories on models where they are known, on many architectures, and in the face of bad input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, KeyValueMemories, Memories
from analyzers.memories.vocabulary import logits_of, value_vectors
from fmr.zoo import world
from tests.analyzers.memories.planted import WORDS, Planted, counting_texts, random_texts

TEXTS = [gift.prompt for gift in world.ioi(24, seed=0)] + [fact.prompt for fact in world.facts()[:8]]


def over(model: nn.Module, ids: Tensor, rows: int = 10, **settings: Any) -> KeyValueMemories:
    return KeyValueMemories(model, **settings).over(ids.split(rows))


def same(one: Memories, other: Memories) -> None:
    """Two results are one, to the bit but for the last bits of moments."""
    for name in ("coefficients", "texts", "positions", "following", "corpus", "starts", "words", "agreement", "among"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), name
    assert np.allclose(one.means, other.means, rtol=1e-12)
    assert np.allclose(one.deviations, other.deviations, rtol=1e-10)


# ---- what is known


def test_planted_keys_and_values_are_found() -> None:
    found = over(Planted(), counting_texts()).result()
    assert found.signs == (1,)
    assert found.agreement.tolist() == [[1.0]]
    assert found.chance[0, 0] == pytest.approx(1 / WORDS, abs=0.01)
    assert found.p_values[0, 0] < 0.01
    for memory in range(WORDS):
        text, position = found.texts[memory, 0, 0], found.positions[memory, 0, 0]
        assert found.corpus[found.starts[text] + position] == memory
        assert found.words[memory, 0, 0] == (memory + 1) % WORDS


def test_with_a_gate_negative_triggers_are_answered_by_what_values_speak_against() -> None:
    found = over(Planted(gated=True), counting_texts()).result()
    assert found.signs == (1, -1)
    assert found.agreement.tolist() == [[1.0, 1.0]]
    best = found.coefficients[:, :, 0]
    assert (best[::2, 0] > 0).all()
    assert (best[1::2, 1] < 0).all()
    assert (best[::2, 1] == 0).all()
    assert found.triggers(0, 3, sign=-1)["next"].head(1).tolist() == ["4"]
    assert found.says(0, 3, sign=-1)["word"][0] == "4"
    only = over(Planted(gated=True), counting_texts(), signs=1).result()
    assert only.signs == (1,)


@pytest.mark.parametrize("seed", range(3))
def test_values_that_say_nothing_of_what_follows_agree_by_chance_alone(seed: int) -> None:
    """The null must hold: random values, or texts in which tokens follow by no rule."""
    random_values = over(Planted(seed=seed), counting_texts()).result(seed=seed)
    random_words = over(Planted(), random_texts(seed=seed)).result(seed=seed)
    for found in (random_values, random_words):
        assert found.agreement[0, 0] <= 4 / WORDS
        assert found.p_values[0, 0] > 0.02


def test_moments_and_z_are_those_of_all_tokens() -> None:
    model, ids = Planted(gated=True), random_texts()
    found = over(model, ids).result()
    run = fmr.run(model, ids)
    values = run[fmr.locate(run).mlps[0].post].flatten(0, 1).double()
    assert np.allclose(found.means, values.mean(0))
    assert np.allclose(found.deviations, values.std(0))
    memory = found.row(0, 3)
    assert found.z[memory, 1, 0] == pytest.approx((values[:, 3].min() - values[:, 3].mean()) / values[:, 3].std())
    assert np.isnan(found.z[memory, 0, 0])


def test_the_words_of_values_are_those_of_the_final_norm_and_the_unembedding(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    memories = KeyValueMemories(model, tokenizer, k=3).update(TEXTS[:2])
    found = memories.result(words=5)
    run = fmr.run(model, **tokenizer(TEXTS[:1], return_tensors="pt"))
    block = fmr.locate(run).mlps[2]
    said = model.lm_head(model.transformer.ln_f(block.memory(7)[1]))
    nothing = model.lm_head(model.transformer.ln_f(torch.zeros(128)))
    expected = (said - nothing).topk(5)
    row = found.row(2, 7)
    assert found.words[row, 0].tolist() == expected.indices.tolist()
    assert np.allclose(found.scores[row, 0], expected.values.detach(), atol=1e-5)
    assert torch.allclose(memories.distribution(2, 7), (said - nothing).softmax(-1), atol=1e-6)
    vector = value_vectors(block)[7:8]
    assert torch.allclose(next(logits_of(memories._located().structure, -vector)), nothing - said, atol=1e-5)


def test_in_a_trained_model_upper_layers_agree_more_than_the_lowest(loaded: tuple[nn.Module, Any]) -> None:
    facts = [fact.prompt for fact in world.facts()[::4]] + TEXTS
    found = KeyValueMemories(*loaded, k=3).over(facts, progress=False).result(words=1, seed=0)
    lowest, _, third, last = found.agreement[:, 0]
    assert min(third, last) > 3 * lowest
    assert (found.agreement[2:, 0] > 5 * found.chance[2:, 0]).all()
    assert (found.p_values[2:, 0] < 0.01).all()


# ---- batches, padding, positions


def test_how_data_come_changes_nothing() -> None:
    model, ids = Planted(gated=True), random_texts(40)
    whole = over(model, ids, k=4).result(seed=1)
    batches = ids.split(10)
    same(KeyValueMemories(model, k=4).over([batches[n] for n in (2, 0, 3, 1)]).result(seed=1), whole)
    same(over(model, ids, rows=1, k=4).result(seed=1), whole)
    one, two = (KeyValueMemories(model, k=4).over(batches[n::2]) for n in (0, 1))
    same(two.merge(one).result(seed=1), whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_counted_nor_a_trigger(side: str) -> None:
    model, ids = Planted(gated=True), random_texts(6)
    wide = torch.full((6, 10), 5)
    mask = torch.zeros(6, 10, dtype=torch.long)
    columns = slice(4, None) if side == "left" else slice(0, 6)
    wide[:, columns], mask[:, columns] = ids, 1
    padded = KeyValueMemories(model, k=4).update({"input_ids": wide, "attention_mask": mask}).result()
    same(padded, KeyValueMemories(model, k=4).update(ids).result())
    assert padded.n_tokens == 36


@pytest.mark.parametrize(("position", "expected"), [(0, 0), (2, 2), (-1, 5), (-2, 4)])
def test_one_position_can_be_counted_alone(position: int, expected: int) -> None:
    ids = random_texts(8)
    found = KeyValueMemories(Planted(), position=position).update(ids).result(words=0)
    assert found.n_tokens == 8
    assert set(found.positions[found.coefficients > 0].tolist()) == {expected}
    assert KeyValueMemories(Planted(), position=7).update(ids).result(words=0).n_tokens == 0


def test_texts_go_in_as_they_are(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    texts = KeyValueMemories(model, tokenizer, k=3).over(TEXTS).result(words=1)
    lists = KeyValueMemories(model, tokenizer, k=3).over([TEXTS[:16], TEXTS[16:]]).result(words=1)
    same(texts, lists)
    assert texts.prefix(0, 3).startswith("<bos>")
    assert all(word.strip() for word in texts.triggers(3, 7)["next"])


def test_some_layers_can_be_counted_alone(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    whole = KeyValueMemories(model, tokenizer, k=3).over(TEXTS[:16]).result(words=2)
    some = KeyValueMemories(model, tokenizer, k=3, layers=[3, 1]).over(TEXTS[:16]).result(words=2)
    assert some.layers == (1, 3)
    for layer in some.layers:
        assert whole.triggers(layer, 9).equals(some.triggers(layer, 9))
        assert whole.says(layer, 9).equals(some.says(layer, 9))


def test_a_text_that_comes_again_is_one_trigger() -> None:
    ids = random_texts(5)
    once, twice = (KeyValueMemories(Planted(), k=6).over([ids] * times).result() for times in (1, 2))
    assert np.array_equal(once.coefficients, twice.coefficients)
    assert np.array_equal(once.texts, twice.texts)
    assert (once.n_texts, twice.n_texts) == (5, 10)
    assert np.allclose(once.means, twice.means)
    within = KeyValueMemories(Planted(), k=6).update(torch.cat([ids, ids])).result()
    assert np.array_equal(once.coefficients, within.coefficients)


# ---- architectures

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40}
TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL: dict[str, dict[str, Any]] = {
    "GPT2": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2},
    "Llama": TINY | {"num_key_value_heads": 2},
    "Qwen3": TINY | {"num_key_value_heads": 2, "head_dim": 16},
    "Gemma2": TINY | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
    "GPTNeoX": TINY,
    "OPT": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 40,
            "word_embed_proj_dim": 32},
}  # fmt: skip


def causal(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**CAUSAL[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for tensor in model.parameters():  # norms of ones would hide where they are left out
        torch.nn.init.normal_(tensor, std=0.3)
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_coefficients_equal_those_of_hooks_and_words_those_of_the_model(name: str) -> None:
    model = causal(name)
    ids = torch.randint(3, 40, (5, 7), generator=torch.Generator().manual_seed(1))
    memories = KeyValueMemories(model, k=4).over([ids[:1], ids[1:]])
    found = memories.result(words=3)
    run = fmr.run(model, ids)
    structure = fmr.locate(run)
    for layer, block in enumerate(structure.mlps):
        value = run[block.post].reshape(5, 7, -1).flatten(0, 1)
        row = found.row(layer, 11)
        best = value[:, 11].clamp(min=0).topk(4).values
        assert np.allclose(found.coefficients[row, 0], best, atol=1e-5)
        assert np.allclose(found.means[row], value[:, 11].mean(), atol=1e-6)
    assert found.signs == ((1, -1) if structure.mlps[0].w_gate or structure.mlps[0].fused_gate else (1,))
    assert not found.unread


def test_a_norm_of_what_a_layer_writes_weighs_its_values() -> None:
    """A sandwich of norms: a value passes that of its layer before it is added to the stream."""
    model = causal("Gemma2")
    memories = KeyValueMemories(model).update(torch.randint(3, 40, (2, 7)))
    found = memories.result(words=3)
    layer = model.model.layers[1]
    value = layer.mlp.down_proj.weight[:, 5]
    said = model.lm_head(model.model.norm(layer.post_feedforward_layernorm(value)))
    assert found.words[found.row(1, 5), 0].tolist() == said.topk(3).indices.tolist()
    plain = model.lm_head(model.model.norm(value))
    assert found.words[found.row(1, 5), 0].tolist() != plain.topk(3).indices.tolist()


def test_an_encoder_decoder_is_counted_one_stack_at_a_time() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=40, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.randint(3, 40, (3, 7)), "decoder_input_ids": torch.randint(3, 40, (3, 4))}
    names = {"tokens": "decoder_input_ids", "mask": "decoder_attention_mask"}
    found = KeyValueMemories(model, scope="decoder.*", **names).update(batch).result(words=2)
    assert found.layers == (2, 3)
    assert found.n_tokens == 12
    assert KeyValueMemories(model, scope="encoder.*").update(batch).result(words=0).n_tokens == 21
    alike = batch | {"decoder_input_ids": torch.randint(3, 40, (3, 7))}
    for two in (batch, alike):
        with pytest.raises(
            AnalyzerError, match=r"at 'decoder.block.0.* are at other tokens than input_ids. Of a model with"
        ):
            KeyValueMemories(model).update(two)
    with pytest.raises(AnalyzerError, match=r"at 'encoder.block.0.* are at other tokens than decoder_input_ids"):
        KeyValueMemories(model, tokens="decoder_input_ids").update(alike)


def test_an_encoder_has_triggers_and_no_words() -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    found = KeyValueMemories(model).update(torch.randint(3, 40, (3, 7))).result()
    assert "values without words" in repr(found)
    assert np.isnan(found.agreement).all()
    assert len(found.triggers(1, 4)) == 10
    with pytest.raises(AnalyzerError, match=r"The values have no words: .*"):
        found.says(1, 4)
    with pytest.raises(AnalyzerError, match=r"There is no agreement to draw"):
        found.plot()


def test_images_have_positions_in_the_place_of_tokens() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    found = KeyValueMemories(model).update({"pixel_values": torch.randn(3, 3, 16, 16)}).result(words=0)
    assert found.n_tokens == 15
    assert (found.following == -1).all()
    assert found.positions.max() == 4


def test_half_precision_finds_nearly_the_same(loaded: tuple[nn.Module, Any]) -> None:
    whole = KeyValueMemories(*loaded, k=3).over(TEXTS).result(words=3)
    model, tokenizer = fmr.zoo.load("facts")
    half = KeyValueMemories(model.to(torch.bfloat16), tokenizer, k=3).over(TEXTS).result(words=3)
    assert np.allclose(half.coefficients[:, 0, 0], whole.coefficients[:, 0, 0], atol=0.15)
    assert (half.words[:, 0, 0] == whole.words[:, 0, 0]).mean() > 0.9


class PositionsFirst(nn.Module):
    """A model of one's own: positions before examples inside, tokens under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(40, 32), nn.MultiheadAttention(32, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.up, self.down, self.out = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 40)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words).mT.permute(2, 0, 1)
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.out(self.norms[2](x)).transpose(0, 1)


@pytest.mark.parametrize("cuts", [[6], [1, 2, 3], [3, 3]])
def test_positions_may_lie_before_examples(cuts: list[int]) -> None:
    torch.manual_seed(0)
    model, ids = PositionsFirst().eval(), torch.randint(40, (6, 9))
    found = KeyValueMemories(model, k=4).over(ids.split(cuts)).result(words=0)
    run = fmr.run(model, ids)
    value = run[fmr.locate(run).mlps[0].post]
    assert value.shape == (9, 6, 48)
    for memory in range(48):
        best = value[:, :, memory].flatten().argmax()
        position, example = int(best) // 6, int(best) % 6
        text = found.texts[memory, 0, 0]
        assert found.positions[memory, 0, 0] == position
        assert found.corpus[found.starts[text] : found.starts[text + 1]].tolist() == ids[example].tolist()


def test_triggers_are_told_where_no_vector_has_logits_of_its_own() -> None:
    torch.manual_seed(0)
    memories = KeyValueMemories(PositionsFirst().eval()).update(ids := torch.randint(40, (6, 9)))
    found = memories.result()
    assert "has no logits for each vector of the stream, [9, 2, 32], so that vectors alone cannot be read out" in repr(found)
    assert len(found.triggers(0, 0))
    with pytest.raises(AnalyzerError, match=r"The values of PositionsFirst have no words: .* has no logits for each vector"):
        memories.run(ids)


def test_a_residual_net_of_vectors_has_memories_too() -> None:
    torch.manual_seed(0)

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    found = KeyValueMemories(Vectors().eval(), k=2).over([{"x": torch.randn(5, 8)} for _ in range(2)]).result()
    assert found.sizes == (16, 16, 16)
    assert found.n_texts == found.n_tokens == 10
    assert "values without words" in repr(found)


# ---- results


def test_a_result_is_read_as_it_was_saved(tmp_path: Path, loaded: tuple[nn.Module, Any]) -> None:
    found = KeyValueMemories(*loaded, k=3).over(TEXTS).result(words=3)
    found.save(tmp_path / "memories.safetensors")
    again = Memories.load(tmp_path / "memories.safetensors")
    same(found, again)
    assert repr(again) == repr(found)
    assert again.table().equals(found.table())
    assert again.triggers(1, 5).equals(found.triggers(1, 5))


def test_tables_say_what_the_arrays_hold() -> None:
    found = over(Planted(gated=True), counting_texts()).result()
    table = found.table()
    assert len(table) == 2 * WORDS
    assert table.query("sign == 1 and memory % 2 == 0")["agrees"].all()
    assert table.query("sign == -1 and memory % 2 == 1")["agrees"].all()
    assert not table.query("coefficient == 0")["agrees"].any()
    by_layer = found.by_layer()
    assert by_layer["agreement"].tolist() == [1.0, 1.0]


def test_pictures_show_what_was_found(loaded: tuple[nn.Module, Any]) -> None:
    found = KeyValueMemories(*loaded, k=3).over(TEXTS).result(words=3)
    (ax,) = found.plot().axes
    assert np.allclose(ax.lines[0].get_ydata(), 100 * found.agreement[:, 0])
    assert ax.get_xlabel() == "layer"
    figure = found.plot_memory(3, 7)
    assert len(figure.axes[0].patches) == 3
    assert "memory 7 of layer 3" in figure.axes[0].get_title()


def test_words_that_the_font_lacks_are_drawn_by_number() -> None:
    found = over(Planted(), counting_texts()).result()
    words = {**found.spelled, "4": "\u5230", "3": "$x$"}
    figure = replace(found, spelled=words).plot_memory(0, 3)
    figure.canvas.draw()
    assert "<5230>" in figure.axes[0].get_title()
    assert any("<5230>" in text.get_text() for text in figure.axes[0].texts)


def test_blanks_of_tokens_are_seen_in_pictures() -> None:
    found = over(Planted(), counting_texts()).result()
    figure = replace(found, spelled={**found.spelled, "4": " four"}).plot_memory(0, 3)
    assert "says: ' four', '" in figure.axes[0].get_title()
    assert "' four'" in [text.get_text() for text in figure.axes[0].texts]


# ---- bad input


def test_what_cannot_be_counted_is_told() -> None:
    with pytest.raises(AnalyzerError, match=r"k=0: expected a whole number from 1 on"):
        KeyValueMemories(Planted(), k=0)
    with pytest.raises(AnalyzerError, match=r"signs=3: expected 1 for positive coefficients, 2 for both signs"):
        KeyValueMemories(Planted(), signs=3)
    with pytest.raises(AnalyzerError, match=r"position='last': expected the number of a token, such as 0 or -1"):
        KeyValueMemories(Planted(), position="last")  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"No text has been counted yet. Call update"):
        KeyValueMemories(Planted()).result()
    with pytest.raises(
        AnalyzerError, match=r"The loader gave no batch. Expected some: a list, or a loader that is not used"
    ):
        KeyValueMemories(Planted()).over([])
    with pytest.raises(AnalyzerError, match=r"has no model to run. Make it with"):
        KeyValueMemories().update(random_texts())
    with pytest.raises(AnalyzerError, match=r"Planted is in train mode, .*Expected eval mode: call model.eval\(\)"):
        KeyValueMemories(Planted().train()).update(random_texts())
    with pytest.raises(AnalyzerError, match=r"words=-1: expected how many words of each value are kept, from 0 on"):
        KeyValueMemories(Planted()).update(random_texts()).result(words=-1)
    with pytest.raises(AnalyzerError, match=r"The prompts have shape \[2, 0\]: expected an example with a token"):
        KeyValueMemories(Planted()).update(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(AnalyzerError, match=r"layers=\[4\]: Planted has memories in layers \[0\]"):
        KeyValueMemories(Planted(), layers=[4]).update(random_texts())
    with pytest.raises(AnalyzerError, match=r"scope='other\.\*' matches none of the memories of Planted"):
        KeyValueMemories(Planted(), scope="other.*").update(random_texts())
    with pytest.raises(AnalyzerError, match=r"batches is one Tensor, expected several batches"):
        KeyValueMemories(Planted()).over(random_texts())
    with pytest.raises(AnalyzerError, match=r"draws=-1: expected a whole number from 0 on"):
        KeyValueMemories(Planted()).update(random_texts()).result(draws=-1)
    with pytest.raises(AnalyzerError, match=r"tokens='words' and the batch holds 'input_ids': expected token ids"):
        KeyValueMemories(Planted(), tokens="words").update(random_texts())
    one = KeyValueMemories(Planted()).update(torch.tensor([[3]])).result()
    assert "no token follows any of them" in repr(one)
    found = over(Planted(), counting_texts()).result()
    with pytest.raises(AnalyzerError, match=r"layer=1, memory=0: expected one of the layers 0, and a memory from 0 to 23"):
        found.triggers(1, 0)
    with pytest.raises(AnalyzerError, match=r"sign=-1: expected one of \(1,\); KeyValueMemories\(model, signs=2\)"):
        found.triggers(0, 0, sign=-1)
    with pytest.raises(AnalyzerError, match=r"sign=0: expected 1, or -1 for what is said by a negative coefficient"):
        found.says(0, 0, sign=0)
    coefficients = torch.tensor([-1.0, 0.0]).expand(1, 3, 2)
    silent = KeyValueMemories(signs=2).update_coefficients([coefficients], torch.ones(1, 3, dtype=torch.long)).result()
    for memory, remedy in enumerate(("sign=-1, of which it has some", "one with triggers")):
        with pytest.raises(AnalyzerError, match=rf"has no trigger of sign \+1 among 3 tokens. Expected {remedy}: see table"):
            silent.plot_memory(0, memory)


class Bare(nn.Module):
    """Attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        return x + self.attention(x, x, x)[0]


def test_a_model_without_memories_is_refused() -> None:
    with pytest.raises(
        AnalyzerError, match=r"Bare has no memories that could be counted.*Expected layers of two projections"
    ):
        KeyValueMemories(Bare().eval()).update(torch.randint(9, (2, 5)))


def mixture(how: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4, experts_implementation=how)
    return transformers.MixtralForCausalLM(config).eval()


def test_memories_of_experts_are_counted_expert_by_expert() -> None:
    model, ids = mixture("grouped_mm"), torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(1))
    found = KeyValueMemories(model, k=3).over(ids.split(2)).result(words=3)
    assert found.sizes == (4 * 48, 4 * 48)
    layer = model.model.layers[1]
    read = fmr.run(model, ids, keep=["model.layers.1.post_attention_layernorm"])["model.layers.1.post_attention_layernorm"]
    tokens = read.flatten(0, 1).detach()
    chosen = layer.mlp.gate.weight.matmul(tokens.mT).mT.topk(2).indices
    dense = torch.zeros(28, 4, 48)
    for expert in range(4):
        gate, up = (layer.mlp.experts.gate_up_proj[expert] @ tokens.mT).mT.detach().chunk(2, -1)
        goes = (chosen == expert).any(1)
        dense[goes, expert] = (nn.functional.silu(gate) * up)[goes]
    values = dense.flatten(1)
    own = slice(found.row(1, 0), None)
    assert np.allclose(found.means[own], values.mean(0), atol=1e-6)
    assert np.allclose(found.coefficients[own, 0], values.clamp(min=0).topk(3, 0).values.mT, atol=1e-6)
    said = model.lm_head(model.model.norm(layer.mlp.experts.down_proj[2][:, 5]))
    assert found.words[found.row(1, 2 * 48 + 5), 0].tolist() == said.topk(3).indices.tolist()
    with pytest.raises(AnalyzerError, match=r"Layers \[0, 1\] have experts, whose shares in one prompt are not told apart"):
        KeyValueMemories(model).promotion(ids[:1], 9)


def test_experts_that_are_read_in_other_ways_are_refused_with_the_reason() -> None:
    ids = torch.randint(3, 40, (2, 5))
    with pytest.raises(AnalyzerError, match=r"have one matrix for each of several experts, not read by one grouped product"):
        KeyValueMemories(mixture("batched_mm")).update(ids)
    with pytest.raises(AnalyzerError, match=r"Layer 0 of MixtralForCausalLM has memories at .* Expected one a layer"):
        KeyValueMemories(mixture("eager")).update(ids)


def test_no_more_words_are_kept_than_there_are() -> None:
    found = KeyValueMemories(Planted()).update(counting_texts()).result(words=1000)
    assert found.words.shape == (WORDS, 2, WORDS)
    assert (np.sort(found.words, -1) == np.arange(WORDS)).all()


class Scaled(Planted):
    """What memories make is multiplied with a vector of the token on its way into the stream."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        return self.out(self.norm(x + self.values(torch.relu(self.keys(x))) * x.roll(1, -1).exp()))


def test_values_that_meet_other_vectors_on_their_way_have_no_words() -> None:
    memories = KeyValueMemories(Scaled()).update(counting_texts())
    assert len(memories.result(words=0)) == WORDS
    with pytest.raises(AnalyzerError, match=r"meets /exp#0 on its way into the stream, which is another vector for each"):
        memories.result()


def test_coefficients_that_are_no_numbers_are_refused() -> None:
    values = torch.full((1, 2, 3), float("inf"))
    with pytest.raises(AnalyzerError, match=r"Layer 0 has coefficients that are no finite numbers"):
        KeyValueMemories().update_coefficients([values], torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(
        AnalyzerError, match=r"shapes \(1, 2, 3\) and the tokens \(1, 5\). Expected \(examples, positions, mem"
    ):
        KeyValueMemories().update_coefficients([values], torch.zeros(1, 5, dtype=torch.long))


def test_counts_of_different_things_are_not_merged() -> None:
    one = KeyValueMemories(Planted(), k=3).update(counting_texts())
    with pytest.raises(AnalyzerError, match=r"merge got int, expected another KeyValueMemories"):
        one.merge(3)  # type: ignore[arg-type]
    with pytest.raises(AnalyzerError, match=r"merge got the same KeyValueMemories once more"):
        one.merge(one)
    with pytest.raises(AnalyzerError, match=r"merge of k=4 where k=3 was asked for"):
        one.merge(KeyValueMemories(Planted(), k=4))
    with pytest.raises(AnalyzerError, match=r"merge of k=4 where k=3 was asked for"):
        one.merge(KeyValueMemories(Planted(), k=4).update(counting_texts()))
    with pytest.raises(AnalyzerError, match=r"merge of other weights: expected counts of one model"):
        one.merge(KeyValueMemories(Planted(seed=1), k=3).update(counting_texts()))
    with pytest.raises(AnalyzerError, match=r"merge of the same counts twice"):
        one.merge(KeyValueMemories(Planted(), k=3).update(counting_texts()))
    assert one.merge(KeyValueMemories(Planted(), k=3)) is one
    for asked in ({"layers": [0]}, {"scope": "other.*"}):
        with pytest.raises(
            AnalyzerError, match=r"merge of (layers=\(0,\) with None|scope='other\.\*' with '\*'): expected one"
        ):
            KeyValueMemories(Planted(), k=3, **asked).merge(one)  # type: ignore[arg-type]
    assert KeyValueMemories(k=3).merge(one).counted
