"""What a layer says against what its memories say, and what memories add to a word: sums that close, known answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import fmr
from analyzers import AnalyzerError, Composed, KeyValueMemories, Promotion
from analyzers.memories.vocabulary import value_vectors
from fmr.errors import FmrError
from fmr.zoo import world
from tests.analyzers.memories.planted import WORDS, Planted, counting_texts
from tests.analyzers.memories.test_memories import TINY, causal

FACT = world.facts()[0]


def test_one_memory_at_a_time_says_what_the_layer_says() -> None:
    composed = KeyValueMemories(Planted(gated=True)).run(counting_texts(5))
    assert composed.none.tolist() == [0.0]
    assert composed.voters.tolist() == [1.0]
    assert composed.n_tokens == 30


@pytest.mark.long
def test_what_is_composed_equals_counting_by_hand(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    composed = KeyValueMemories(model, tokenizer).run([FACT.prompt, "It rains"], seed=0)
    (none, voters), tokens = np.zeros((2, 4)), 0
    for text in (FACT.prompt, "It rains"):
        run = fmr.run(model, **tokenizer(text, return_tensors="pt"))
        structure = fmr.locate(run)
        empty = structure.read_out(torch.zeros(128))
        for layer, block in enumerate(structure.mlps):
            said = (structure.read_out(run, block.out)[0] - empty).argmax(-1)
            words = [(structure.read_out(block.memory(i)[1]) - empty) for i in range(block.n)]
            first = [(int(one.argmax()), int(one.argmin())) for one in words]
            for token, weights in zip(said.tolist(), run[block.post][0], strict=True):
                votes = sum(first[i][int(w < 0)] == token for i, w in enumerate(weights.tolist()) if w)
                none[layer] += votes == 0
                voters[layer] += votes
        tokens += len(said)
    assert composed.n_tokens == tokens
    assert np.allclose(composed.none, none / tokens)
    assert np.allclose(composed.voters, voters / tokens)


def test_shuffled_coefficients_lose_what_was_composed() -> None:
    """With one memory a token, its coefficient dealt to another leaves one voter, and the layer says what that says."""
    composed = KeyValueMemories(Planted()).run(counting_texts(5), seed=0)
    assert composed.shuffled.tolist() == [0.0]
    zoo = KeyValueMemories(*fmr.zoo.load("facts")).run([fact.prompt for fact in world.facts()[:6]], seed=0)
    assert zoo.none.mean() < zoo.shuffled.mean()
    assert zoo.voters.mean() > zoo.shuffled_voters.mean()


@pytest.mark.parametrize("name", ["GPT2", "Llama", "GPTNeoX", "OPT"])
def test_what_memories_add_is_what_their_layer_adds_but_for_its_bias(name: str) -> None:
    model, ids = causal(name), torch.randint(3, 40, (1, 7), generator=torch.Generator().manual_seed(1))
    promoted = KeyValueMemories(model).promotion(ids, 9, draws=3)
    run = fmr.run(model, ids)
    structure = fmr.locate(run)
    state = run[structure.readout.end].reshape(7, -1)[-1:]  # type: ignore[union-attr]
    (back,) = structure.frozen(state).back(nn.functional.one_hot(torch.tensor([9]), 40)).values()
    for layer, block in enumerate(structure.mlps):
        made = run[block.post].reshape(7, -1)[-1] @ value_vectors(block)
        added = promoted.added.reshape(2, -1)[layer].sum()
        assert added == pytest.approx(float((back[0] @ made.double()).detach()), abs=1e-5)
    assert np.allclose((promoted.added - promoted.average).reshape(2, -1).sum(1), promoted.by_layer)
    (mean,) = structure.frozen(state).back(torch.full((1, 40), 1 / 40)).values()
    assert promoted.average.reshape(2, -1)[1].sum() == pytest.approx(float((mean[0] @ made.double()).detach()), abs=1e-5)
    assert promoted.logit == pytest.approx(float((back[0] @ state[0].double()).detach()), abs=1e-4)
    assert promoted.probability == pytest.approx(float(run.output.logits[0, -1].softmax(-1)[9].detach()), abs=1e-5)


def test_all_writes_of_a_model_without_biases_sum_to_the_logit() -> None:
    """A hand-written stream of an embedding and memories alone: what memories add and what the token has is the logit."""
    model, ids = Planted(gated=True, seed=3), counting_texts(1)
    promoted = KeyValueMemories(model).promotion(ids, 4)
    state = model.table(ids)[0, -1]
    up = model.keys(state) * nn.functional.silu(model.gate(state))
    whole = state + model.values(up)
    scale = (whole.square().mean() + 1e-5).rsqrt()
    assert promoted.logit == pytest.approx(model(ids)[0, -1, 4].item(), abs=1e-5)
    assert promoted.added.sum() + (state[4] * scale).item() == pytest.approx(promoted.logit, abs=1e-5)
    expected = (model.values.weight[4] * up * scale).detach()
    assert np.allclose(promoted.added, expected, atol=1e-6)
    average = (model.values.weight[:WORDS].mean(0) * up * scale).detach()
    assert promoted.strongest() == (0, int((expected - average).argmax()))


def test_a_norm_on_the_way_into_the_stream_is_held_too() -> None:
    model, ids = causal("Gemma2"), torch.randint(3, 40, (1, 7), generator=torch.Generator().manual_seed(1))
    promoted = KeyValueMemories(model).promotion(ids, 9, draws=2)
    run = fmr.run(model, ids)
    structure = fmr.locate(run)
    state = run[structure.layers[-1].resid_post][:, -1]
    for layer, block in enumerate(structure.mlps):
        write = next(w for w in structure.residual.writes if block.out.id != w.added and f"layers.{layer}/add#1" in w.after)
        (back,) = structure.frozen(state).back(nn.functional.one_hot(torch.tensor([9]), 40)).values()
        assert float(back[0] @ run[write.added][0, -1].double()) == pytest.approx(
            promoted.added[48 * layer :][:48].sum(), rel=1e-4
        )


def test_the_memories_of_a_fact_add_more_to_its_answer_than_to_other_words(loaded: tuple[nn.Module, Any]) -> None:
    promoted = KeyValueMemories(*loaded).promotion(FACT.prompt, FACT.answer, seed=0)
    assert promoted.word == FACT.answer
    assert promoted.probability > 0.9
    assert promoted.added.sum() > 0.5 * promoted.logit
    assert promoted.by_layer[2] > 3 * promoted.spread[2]
    other = KeyValueMemories(*loaded).promotion(FACT.prompt, "the", seed=0)
    assert other.promoted.sum() < 0.3 * promoted.promoted.sum()
    assert other.by_layer[2] < 3 * other.spread[2]
    table = promoted.table()
    assert tuple(table.iloc[0][["layer", "memory"]]) == promoted.strongest()
    assert table["promoted"].is_monotonic_decreasing


def test_padding_changes_no_promotion(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    both = tokenizer([FACT.prompt, FACT.prompt + " a b c"], return_tensors="pt", padding=True, padding_side="left")
    inputs = {name: value[:1] for name, value in both.items()}
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    plain, padded = (KeyValueMemories(model, tokenizer).promotion(one, FACT.answer) for one in (FACT.prompt, inputs))
    assert np.allclose(plain.added, padded.added, atol=1e-5)
    assert plain.prompt == padded.prompt


def test_results_are_read_as_they_were_saved(tmp_path: Path, loaded: tuple[nn.Module, Any]) -> None:
    memories = KeyValueMemories(*loaded)
    for found in (memories.run(FACT.prompt), memories.promotion(FACT.prompt, FACT.answer)):
        found.save(tmp_path / "found.safetensors")
        again = type(found).load(tmp_path / "found.safetensors")
        assert repr(again) == repr(found)
        assert again.table().equals(found.table())
    assert isinstance(memories.run(FACT.prompt), Composed)


def test_pictures_show_the_null_beside_the_value(loaded: tuple[nn.Module, Any]) -> None:
    memories = KeyValueMemories(*loaded)
    composed = memories.run(FACT.prompt)
    (ax,) = composed.plot().axes
    assert np.allclose(ax.lines[0].get_ydata(), 100 * composed.none)
    assert np.allclose(ax.lines[1].get_ydata(), 100 * composed.shuffled)
    promoted = memories.promotion(FACT.prompt, FACT.answer)
    (ax,) = promoted.plot().axes
    assert np.allclose([bar.get_height() for bar in ax.patches[4:]], promoted.by_layer)
    assert np.allclose([bar.get_height() for bar in ax.patches[:4]], 4 * promoted.spread)
    assert "other words" in ax.get_legend().get_texts()[0].get_text()


def test_bad_input_is_told(loaded: tuple[nn.Module, Any]) -> None:
    memories = KeyValueMemories(*loaded)
    with pytest.raises(AnalyzerError, match=r"There are 2 prompts, expected one: a word is promoted at its last token"):
        memories.promotion(["It", "rains"], "the")
    with pytest.raises(AnalyzerError, match=r"The answer 'xyzzy' is no token of this tokenizer"):
        memories.promotion("It rains", "xyzzy")
    for number in (515, -1):
        with pytest.raises(FmrError, match=rf"There is no token {number}: the logits have 515. Expected 0 to 514"):
            memories.promotion("It rains", number)
    with pytest.raises(AnalyzerError, match=r"has no model to run"):
        KeyValueMemories().run("It rains")
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    with pytest.raises(AnalyzerError, match=r"The values of BertModel have no words: .*Expected pre-norm layers and logits"):
        KeyValueMemories(encoder).run(torch.randint(3, 40, (2, 5)))
    with pytest.raises(AnalyzerError, match=r"No word is promoted in BertModel: "):
        KeyValueMemories(encoder).promotion(torch.randint(3, 40, (1, 5)), 3)
    found = memories.promotion("It rains", 3)
    assert isinstance(found, Promotion)
    assert found.place(0) == (0, 0)
    for rank in (0, len(found.added) + 1, 1.5):
        with pytest.raises(AnalyzerError, match=rf"rank={rank}: expected 1 for the first, up to {len(found.added)}"):
            found.strongest(rank)  # type: ignore[arg-type]
    for row in (-1, len(found.added)):
        with pytest.raises(AnalyzerError, match=rf"row={row}: expected that of a memory, from 0 to {len(found.added) - 1}"):
            found.place(row)
