"""What matters is what an output is another without; zeros, gates and padding are counted as they are."""

from pathlib import Path

import numpy as np
import pytest
import torch

import analyzers
import fmr
from analyzers.sparsity.activation import measured
from tests.analyzers.surgery.models import Looped, made
from tests.models import build

TOKENS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(0))


def test_measures_are_those_of_leaving_each_coefficient_out() -> None:
    draw = torch.Generator().manual_seed(0)
    post, values = torch.randn(5, 12, generator=draw).relu(), torch.randn(12, 4, generator=draw)
    active, zero, effective, hoyer = measured(post, values, eps=0.1)
    for row in range(5):
        whole = post[row] @ values
        without = [(whole - (post[row] @ values - post[row, n] * values[n])).norm() > 0.1 * whole.norm() for n in range(12)]
        adds = post[row] * values.norm(dim=1)
        assert active[row] == pytest.approx(np.mean(without))
        assert zero[row] == pytest.approx(float((post[row] == 0).float().mean()))
        assert effective[row] == pytest.approx(float(adds.sum() ** 2 / adds.square().sum()), rel=1e-5)
        assert hoyer[row] == pytest.approx(float((12**0.5 - adds.sum() / adds.norm()) / (12**0.5 - 1)), rel=1e-4)


def test_one_alone_and_all_alike_are_the_ends() -> None:
    one, alike = torch.eye(8)[:1], torch.ones(1, 8)
    assert measured(one, torch.eye(8), 0.01)[:, 0].tolist() == pytest.approx([1 / 8, 7 / 8, 1, 1])
    assert measured(alike, torch.eye(8), 0.01)[:, 0].tolist() == pytest.approx([1, 0, 8, 0], abs=1e-6)


def test_zeros_of_a_rectifier_are_counted() -> None:
    model = made(Looped)
    structure = fmr.locate(run := fmr.run(model, TOKENS))
    found = analyzers.ActivationSparsity(model).update({"tokens": TOKENS}).result()
    zeros = [float((run[memory.post] == 0).float().mean()) for memory in structure.mlps]
    assert found.zero.tolist() == pytest.approx(zeros)
    assert found.zero.min() > 0.3
    assert found.active.max() < 1 - found.zero.min() + 1e-9
    assert set(found.words) == set(map(str, TOKENS.unique().tolist()))


def test_gated_coefficients_are_not_zero_and_few_may_matter() -> None:
    model, _, inputs = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 4:] *= 1e-4
    found = analyzers.ActivationSparsity(model).update(inputs).result()
    assert found.gated == (True, True)
    assert found.zero.max() == 0
    assert found.active.max() <= 4 / 24
    assert found.effective.max() < 4.1
    assert found.effective_null.max() < 4.1


def test_shards_and_padding_change_nothing() -> None:
    model, _, inputs = build("gpt2_eager")
    whole = analyzers.ActivationSparsity(model).update(inputs)
    rows = [ids[mask.bool()][None] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    parts = [analyzers.ActivationSparsity(model).update(row) for row in rows]
    merged = parts[0].merge(parts[1])
    assert whole.counted == merged.counted == "10 tokens"
    one, other = whole.result(), merged.result()
    for name in ("active", "zero", "effective", "hoyer", "active_null", "effective_null"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)
    assert one.words == other.words
    assert torch.allclose(one.by_word, other.by_word)


def test_first_tokens_are_left_out() -> None:
    model, _, inputs = build("gpt2_eager")
    found = analyzers.ActivationSparsity(model, skip=1).update(inputs).result()
    rows = [ids[mask.bool()][None] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    every = [analyzers.ActivationSparsity(model).update(row).result() for row in rows]
    first = [analyzers.ActivationSparsity(model).update(row[:, :1]).result() for row in rows]  # of a causal model
    whole = sum(one.active * one.seen for one in every) - sum(one.active for one in first)
    assert found.active == pytest.approx(whole / found.seen, rel=1e-4)
    assert found.seen == sum(one.seen for one in every) - len(rows) == 8
    assert "over 8 tokens without the first token of each" in repr(found)
    with pytest.raises(analyzers.AnalyzerError, match="expected an analyzer of the same settings"):
        analyzers.ActivationSparsity(model, skip=1).merge(analyzers.ActivationSparsity(model))
    with pytest.raises(analyzers.AnalyzerError, match=r"yet.*The first 99 tokens of each text are left out"):
        analyzers.ActivationSparsity(model, skip=99).update(inputs).result()


def test_a_result_has_tables_a_picture_and_a_file(tmp_path: Path) -> None:
    model, _, inputs = build("gpt2")
    found = analyzers.ActivationSparsity(model).over([inputs], progress=False).result()
    assert found.table()["active"].tolist() == found.active.tolist()
    shares = found.word_table(least=1)[["layer 0", "layer 1"]].mean(axis=1)
    assert shares.is_monotonic_decreasing
    assert found.plot().axes
    found.save(tmp_path / "found")
    assert np.array_equal(analyzers.Sparsity.load(tmp_path / "found").active, found.active)


def test_what_has_no_coefficients_by_token_is_refused() -> None:
    with pytest.raises(analyzers.AnalyzerError, match="eps=2: expected a share of the output's length"):
        analyzers.ActivationSparsity(made(Looped), eps=2)
    with pytest.raises(analyzers.AnalyzerError, match="Nothing has been counted yet"):
        analyzers.ActivationSparsity(made(Looped)).result()
    model, _, inputs = build("mixtral")
    with pytest.raises(analyzers.AnalyzerError, match="The memories of layer 0 are several experts"):
        analyzers.ActivationSparsity(model).update(inputs)
    with pytest.raises(analyzers.AnalyzerError, match="expected an analyzer of the same settings"):
        analyzers.ActivationSparsity(made(Looped)).merge(analyzers.ActivationSparsity(made(Looped), eps=0.1))
    one, other = analyzers.ActivationSparsity(made(Looped)), made(Looped)
    with pytest.raises(analyzers.AnalyzerError, match="merge got the same ActivationSparsity once more"):
        one.merge(one)
    torch.nn.init.ones_(other.blocks[0].up.weight)
    with pytest.raises(analyzers.AnalyzerError, match="what was counted on a Looped with other weights"):
        one.merge(analyzers.ActivationSparsity(other))


def test_a_model_may_call_its_token_ids_what_it_likes() -> None:
    found = analyzers.ActivationSparsity(made(Looped)).update(TOKENS).result()
    assert sum(found.counts) == TOKENS.numel()
    assert set(found.words) == set(map(str, TOKENS.unique().tolist()))
