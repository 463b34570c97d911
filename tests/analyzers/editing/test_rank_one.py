"""Rank-one editing: its algebra holds to the last digits, it is undone to the bit, and edited facts are what was asked."""

import random
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, Covariance, EditScores, FactEdit, KeyCovariance, RankOneEdit
from analyzers.editing.memories import Values, memory_of, values_of
from analyzers.editing.rows import entropy, padded, written
from analyzers.editing.update import Update
from fmr.zoo import world
from tests.models import build

matplotlib.use("Agg")

TEXTS = [fact.prompt for fact in world.facts()[::3]]
FACT = world.facts()[0]
TARGET = "Oranby"
EVERY = world.facts() + world.facts(taught=False)
PARAPHRASES = [
    one.prompt for one in EVERY if (one.subject, one.relation) == (FACT.subject, FACT.relation) and one.prompt != FACT.prompt
]
NEIGHBOURS = [(one.prompt, one.answer) for one in EVERY[5::300] if one.subject != FACT.subject]


@pytest.fixture(scope="module")
def editing(loaded: tuple[nn.Module, Any]) -> RankOneEdit:
    return RankOneEdit(*loaded, texts=TEXTS, prefixes=world.OPENINGS[:3])


@pytest.fixture(scope="module")
def edit(editing: RankOneEdit) -> FactEdit:
    return editing.run(FACT.prompt, FACT.subject, TARGET, progress=False)


@pytest.fixture(scope="module")
def scores(edit: FactEdit) -> EditScores:
    return edit.scores(PARAPHRASES, NEIGHBOURS, words=12)


def weight_of(loaded: tuple[nn.Module, Any], edit: FactEdit) -> Tensor:
    return loaded[0].get_parameter(edit.update.parameter).detach()


# ---- the algebra


def test_the_edited_matrix_maps_the_key_to_the_new_value_and_is_of_rank_one_away(
    loaded: tuple[nn.Module, Any], edit: FactEdit
) -> None:
    update, weight = edit.update, weight_of(loaded, edit).double()
    change = update.of(weight) - weight
    torch.testing.assert_close(update.key @ update.of(weight), update.key @ weight + update.delta, atol=1e-10, rtol=1e-10)
    assert int(torch.linalg.matrix_rank(change)) == 1
    assert update.ratio <= update.clamp + 1e-6
    assert float(change.norm()) == pytest.approx(update.weight_ratio * update.weight_norm)


def test_keys_that_are_orthogonal_under_the_covariance_keep_their_values(
    loaded: tuple[nn.Module, Any], editing: RankOneEdit, edit: FactEdit
) -> None:
    update, weight = edit.update, weight_of(loaded, edit).double()
    key = torch.randn(len(update.key), generator=torch.Generator().manual_seed(0)).double()
    key -= (key @ update.direction) * update.key  # no share of the change: u^T key = 0
    torch.testing.assert_close(key @ update.of(weight), key @ weight, atol=1e-9, rtol=1e-9)
    solved = editing.known[update.layer].solve(update.key)
    torch.testing.assert_close(solved / (solved @ update.key), update.direction)


def test_the_key_is_what_the_memory_reads_and_the_model_computes_the_new_value(
    loaded: tuple[nn.Module, Any], edit: FactEdit
) -> None:
    model, tokenizer = loaded
    texts = [FACT.prompt, *(f"{opening} {FACT.prompt}" for opening in editing_prefixes())]
    keys, values = [], []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        memory = fmr.locate(run := fmr.run(model, **inputs)).mlps[edit.update.layer]
        at = len(inputs["input_ids"][0]) - 4  # "Dunoth grew up in"
        keys.append(run[memory.post][0, at].double())
        before = run[memory.out][0, at].double()
        with edit:
            values.append(fmr.run(model, **inputs)[memory.out][0, at].double() - before)
    torch.testing.assert_close(torch.stack(keys).mean(0), edit.update.key, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.stack(values).mean(0), edit.update.delta, atol=1e-4, rtol=1e-3)


def editing_prefixes() -> list[str]:
    return list(world.OPENINGS[:3])


@pytest.mark.parametrize("kind", ["Conv1D", "Linear", "gated"])
def test_either_orientation_and_a_gate(kind: str, loaded: tuple[nn.Module, Any]) -> None:
    model = loaded[0] if kind == "Conv1D" else (Small(gated=kind == "gated").eval())
    ids = torch.tensor([[1, 2, 3, 4]])
    run = fmr.run(model, ids)
    number, memory = memory_of(fmr.locate(run), 0)
    values = values_of(memory, model)
    weight = values.weight(model)
    assert values.dim == (0 if kind == "Conv1D" else 1)
    assert (memory.w_gate is not None) == (kind == "gated")
    key = run[memory.post][0, 1].detach().double()
    delta = torch.randn(values.of(weight).shape[1], generator=torch.Generator().manual_seed(0)).double()
    edit = FactEdit(model, None, update_of(values, number, key, key / (key @ key), delta))
    with edit:
        after = fmr.run(model, ids)
    torch.testing.assert_close(after[memory.out][0, 1] - run[memory.out][0, 1], delta.float(), atol=1e-4, rtol=1e-3)


class Small(nn.Module):
    """Two layers of a stream, each an attention and a memory with or without a gate."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.embed, self.layers = nn.Embedding(20, 8), nn.ModuleList(Layer(gated) for _ in range(2))
            self.out = nn.Linear(8, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Layer(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.gate = nn.Linear(8, 12) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj((q @ k.mT / 8**0.5).softmax(-1) @ v)
        hidden = torch.nn.functional.silu((self.gate or self.up)(x))
        return x + self.down(hidden * self.up(x) if self.gate else hidden)


def update_of(values: Values, layer: int, key: Tensor, direction: Tensor, delta: Tensor) -> Update:
    return Update(
        "prompt", "subject", "target", "answer", layer, values.parameter, values.dim, values.first, key, direction, delta,
        1.0, 1.0, 4.0, (0.0,), 0.0, 1.0, 1, 1.0, 0,
    )  # fmt: skip


# ---- applied and undone


def test_an_edit_is_undone_to_the_bit_and_leaves_nothing_on_the_model(loaded: tuple[nn.Module, Any], edit: FactEdit) -> None:
    model = loaded[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    held = {name: dict(vars(module)) for name, module in model.named_modules()}
    with edit:
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
        assert changed == [edit.update.parameter]
        assert "applied\n" in repr(edit)
        assert all(vars(module).keys() == held[name].keys() for name, module in model.named_modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    edit.apply().revert()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_edits_that_overlap_are_reverted_the_last_one_first(loaded: tuple[nn.Module, Any], edit: FactEdit) -> None:
    other = FactEdit(loaded[0], loaded[1], edit.update)
    before = weight_of(loaded, edit).clone()
    edit.apply()
    other.apply()
    with pytest.raises(AnalyzerError, match=r"has been changed since the edit of 'Junel Dunoth' was applied. Revert later"):
        edit.revert()
    other.revert()
    edit.revert()
    assert torch.equal(weight_of(loaded, edit), before)


def test_an_edit_comes_back_from_its_file(loaded: tuple[nn.Module, Any], edit: FactEdit, tmp_path: Path) -> None:
    edit.save(tmp_path / "edit.safetensors")
    again = FactEdit.load(tmp_path / "edit.safetensors", *loaded)
    assert repr(again) == repr(edit)
    assert torch.equal(again.update.of(weight_of(loaded, edit)), edit.update.of(weight_of(loaded, edit)))
    with pytest.raises(AnalyzerError, match=r"has as 'transformer.h.0.mlp.c_proj.weight' none, expected a matrix with 512"):
        FactEdit.load(tmp_path / "edit.safetensors", nn.Linear(2, 2)).apply()


# ---- what it does


def test_an_edited_fact_is_answered_in_any_words_and_others_stay(scores: EditScores) -> None:
    rates = scores.rates
    assert rates["edited"]["efficacy"] == 1
    assert rates["edited"]["paraphrase"] > 0.9
    assert rates["edited"]["neighbourhood"] >= 0.95
    assert rates["before"] | {"fluency": 0} == {"efficacy": 0, "paraphrase": 0, "neighbourhood": 1, "fluency": 0}
    assert rates["random"]["efficacy"] == rates["random"]["paraphrase"] == 0
    assert scores.compared["edited"]["paraphrase"] == 1
    assert all(0 < rates[state]["fluency"] < 4 for state in rates)


@pytest.mark.long
def test_other_facts_are_edited_as_well(editing: RankOneEdit) -> None:
    found = []
    for fact in random.Random(0).sample(EVERY, 8):
        target = next(one for one in world.relations()[fact.relation] if one != fact.answer)
        same = [one.prompt for one in EVERY if (one.subject, one.relation) == (fact.subject, fact.relation)]
        edit = editing.run(fact.prompt, fact.subject, target, progress=False)
        others = [(one.prompt, one.answer) for one in EVERY[7::300] if one.subject != fact.subject]
        found.append(edit.scores([text for text in same if text != fact.prompt], others, words=0).rates["edited"])
    assert np.mean([one["efficacy"] for one in found]) == 1
    assert np.mean([one["paraphrase"] for one in found]) >= 0.9
    assert np.mean([one["neighbourhood"] for one in found]) >= 0.95


def test_what_is_named_as_the_essence_of_a_subject_stays_more(loaded: tuple[nn.Module, Any], edit: FactEdit) -> None:
    others = [(one.prompt, one.answer) for one in EVERY if one.subject == FACT.subject and one.relation != FACT.relation]
    essence = [phrasings[0] for relation, phrasings in world.PHRASINGS.items() if relation != FACT.relation]
    careful = RankOneEdit(*loaded, texts=TEXTS, prefixes=world.OPENINGS[:3], clamp=2, essence=essence, kl=1.0)
    kept = careful.run(FACT.prompt, FACT.subject, TARGET, progress=False).scores((), others, words=0).rates["edited"]
    assert kept["efficacy"] == 1
    assert kept["neighbourhood"] > edit.scores((), others, words=0).rates["edited"]["neighbourhood"]


def test_the_tighter_the_clamp_the_smaller_the_change(loaded: tuple[nn.Module, Any], edit: FactEdit) -> None:
    tight = RankOneEdit(*loaded, texts=TEXTS, prefixes=world.OPENINGS[:3], clamp=0.5, steps=3)
    update = tight.run(FACT.prompt, FACT.subject, TARGET, progress=False).update
    assert update.ratio <= 0.5 + 1e-6
    assert update.weight_ratio < edit.update.weight_ratio


# ---- results


def test_an_edit_and_its_scores_print_tabulate_and_draw(edit: FactEdit, scores: EditScores, tmp_path: Path) -> None:
    assert repr(edit).startswith(
        "FactEdit of 'Junel Dunoth grew up in': 'Brigost' -> 'Oranby', transformer.h.0.mlp.c_proj.weight (layer 0), not"
    )
    assert "|delta| / |v| " in repr(edit)
    assert "(clamp 2), |dW| / |W| " in repr(edit)
    table = scores.table()
    assert list(table.columns) == ["state", "kind", "prompt", "answer", "right", "p_target", "p_old"]
    assert len(table) == 3 * (1 + len(PARAPHRASES) + len(NEIGHBOURS))
    assert [bar.get_text() for bar in scores.plot().axes[0].get_xticklabels()] == ["efficacy", "paraphrase", "neighbourhood"]
    assert "random change of that length: efficacy 0.00" in repr(scores)
    scores.save(tmp_path / "scores.safetensors")
    assert repr(EditScores.load(tmp_path / "scores.safetensors")) == repr(scores)


def test_scores_leave_the_model_as_it_was_and_are_the_same_again(
    loaded: tuple[nn.Module, Any], edit: FactEdit, scores: EditScores
) -> None:
    before = weight_of(loaded, edit).clone()
    again = edit.scores(PARAPHRASES, NEIGHBOURS, words=12)
    assert torch.equal(weight_of(loaded, edit), before)
    np.testing.assert_array_equal(again.target, scores.target)
    np.testing.assert_array_equal(again.fluency, scores.fluency)


# ---- keys


def batches(loaded: tuple[nn.Module, Any], texts: list[str]) -> list[dict[str, Tensor]]:
    return [dict(loaded[1](texts[at : at + 8], return_tensors="pt", padding=True)) for at in range(0, len(texts), 8)]


@pytest.mark.long
def test_the_covariance_is_of_all_real_tokens_however_they_are_cut(loaded: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    texts = TEXTS[::30]
    whole = KeyCovariance(model, 1).over(batches(loaded, texts), progress=False).result()
    parts = [KeyCovariance(model, 1).over(batches(loaded, part), progress=False) for part in (texts[:5], texts[5:])]
    merged = KeyCovariance(model).merge(parts[0].merge(parts[1])).result()
    with pytest.raises(AnalyzerError, match=r"merge of layer 0 at None with .*: expected one memory"):
        KeyCovariance(model, 0).merge(parts[1])
    keys = []
    for text in texts:
        run = fmr.run(model, **tokenizer(text, return_tensors="pt"))
        keys.append(run[fmr.locate(run).mlps[1].post][0].detach().double())
    every = torch.cat(keys)
    assert whole.tokens == merged.tokens == len(every)
    torch.testing.assert_close(whole.matrix, every.mT @ every / len(every), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(merged.matrix, whole.matrix, atol=1e-7, rtol=1e-5)
    whole.save(tmp_path / "keys.safetensors")
    assert torch.equal(Covariance.load(tmp_path / "keys.safetensors").matrix, whole.matrix)
    assert len(whole.table()) == 512
    assert whole.plot().axes[0].get_ylabel() == "mean square of keys"
    assert repr(whole).startswith("Covariance of 512 keys at transformer.h.1.mlp")


def test_a_covariance_is_read_from_the_cache_of_the_same_weights_and_texts(
    loaded: tuple[nn.Module, Any], edit: FactEdit, tmp_path: Path
) -> None:
    def made(texts: list[str]) -> None:
        editing = RankOneEdit(*loaded, texts=texts, prefixes=1, cache=tmp_path, steps=1, ridge=1e-3)
        editing.run(FACT.prompt, FACT.subject, TARGET, progress=False)

    made(TEXTS[:40])
    (path,) = tmp_path.iterdir()
    first = path.stat().st_mtime_ns
    made(TEXTS[:40])
    assert path.stat().st_mtime_ns == first
    made(TEXTS[:41])
    with edit:
        made(TEXTS[:40])
    assert len(list(tmp_path.iterdir())) == 3


# ---- rows


def test_rows_of_unequal_length_are_each_alone(loaded: tuple[nn.Module, Any]) -> None:
    model, rows = loaded[0], [torch.tensor([1, 5, 9, 30]), torch.tensor([1, 7])]
    with torch.no_grad():
        together = model(**padded(rows, model)).logits
        for row, ids in enumerate(rows):
            torch.testing.assert_close(together[row, : len(ids)], model(ids[None]).logits[0], atol=1e-4, rtol=1e-4)
    assert padded(rows, Small(gated=False)).keys() == {"input_ids"}
    assert written(model, rows, 3, seed=0) == written(model, rows, 3, seed=0) != written(model, rows, 3, seed=1)


def test_the_entropy_of_a_text() -> None:
    assert entropy([1] * 9) == 0
    assert entropy([1, 2, 3, 4, 5]) == pytest.approx((2 / 3 * 2 + 4 / 3 * np.log2(3)) / 2)


# ---- bad input


def test_bad_input_is_one_clear_error(loaded: tuple[nn.Module, Any], editing: RankOneEdit, edit: FactEdit) -> None:
    model, tokenizer = loaded
    with pytest.raises(AnalyzerError, match=r"The subject 'Velin' is 0 times in 'Junel Dunoth grew up in'"):
        editing.run(FACT.prompt, "Velin", TARGET)
    with pytest.raises(AnalyzerError, match=r"The answer '' has no token"):
        editing.run(FACT.prompt, FACT.subject, "")
    with pytest.raises(AnalyzerError, match=r"works on text: expected a tokenizer, and lists of texts"):
        RankOneEdit(model, None)
    with pytest.raises(AnalyzerError, match=r"clamp=0: expected a number above 0."):
        RankOneEdit(model, tokenizer, clamp=0)
    with pytest.raises(AnalyzerError, match=r"layer=9: GPT2LMHeadModel has memories in layers \[0, 1, 2, 3\]. Expected one"):
        RankOneEdit(model, tokenizer, layer=9).run(FACT.prompt, FACT.subject, TARGET)
    with pytest.raises(AnalyzerError, match=r"is of another memory than layer 1 with 512. Expected KeyCovariance"):
        RankOneEdit(model, tokenizer, layer=1, covariance=editing.known[0]).run(FACT.prompt, FACT.subject, TARGET)
    few = RankOneEdit(model, tokenizer, texts=TEXTS[:9], prefixes=1, steps=1, ridge=0.0)
    with pytest.raises(AnalyzerError, match=r"keys of 512 memories has no inverse. Expected several times as many"):
        few.run(FACT.prompt, FACT.subject, TARGET, progress=False)
    with pytest.raises(AnalyzerError, match=r"The edit of 'Junel Dunoth' is not applied. Call apply\(\) before revert"):
        edit.revert()
    with edit:
        with pytest.raises(AnalyzerError, match=r"The edit of 'Junel Dunoth' is applied already. Call revert\(\) before"):
            edit.apply()
        with pytest.raises(AnalyzerError, match=r"Scores compare the model before and after: call revert\(\) first."):
            edit.scores()
    with pytest.raises(AnalyzerError, match=r"No token has been counted yet"):
        KeyCovariance(model).result()
    one, other = (KeyCovariance(model, layer).update(tokenizer(FACT.prompt, return_tensors="pt")) for layer in (0, 1))
    with pytest.raises(AnalyzerError, match=r"merge of layer 0 at .* with 1 at .*: expected one memory."):
        one.merge(other)


def test_experts_are_no_matrix_that_is_edited() -> None:
    model, args, kwargs = build("mixtral")
    structure = fmr.locate(fmr.run(model, *args, **kwargs))
    with pytest.raises(AnalyzerError, match=r"which is no matrix of \d+ rows or columns that could be changed"):
        values_of(structure.mlps[0], model)
