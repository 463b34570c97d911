"""A relation that is planted in one head is found there and nowhere else; random weights tell of none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import analyzers
from analyzers.sparsity.relations import rotated
from fmr.zoo import world
from tests.analyzers.surgery.models import Block, Looped

SUBJECTS, OBJECTS = [f"s{n}" for n in range(6)], [f"o{n}" for n in range(6)]
TRUTH = {subject: OBJECTS[(n + 2) % 6] for n, subject in enumerate(SUBJECTS)}


class Words:
    """A tokenizer of twelve words, a token each."""

    known = (*SUBJECTS, *OBJECTS)

    def __call__(self, texts: str | Sequence[str], **told: Any) -> dict[str, Any]:
        several = [
            [self.known.index(word) for word in text.split()] for text in ([texts] if isinstance(texts, str) else texts)
        ]
        rows = several[0] if isinstance(texts, str) else several
        return {"input_ids": torch.tensor(several) if told.get("return_tensors") else rows}

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.known[n] for n in ids)


class Reader(Looped):
    """Layers whose input has the name that tokenizers give it."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)


def model_of(planted: bool) -> nn.Module:
    """Two layers with one head each; planted: the values of the first are what the objects of subjects are read by."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = Reader(2)
        model.blocks = nn.ModuleList(Block(32, 1) for _ in range(2))
        model.embed, model.norm, model.head = nn.Embedding(12, 32), nn.LayerNorm(32), nn.Linear(32, 12, bias=False)
    if planted:
        block = model.blocks[0]
        with torch.no_grad():
            block.qkv.weight[64:] = torch.eye(32)
            read = torch.nn.functional.layer_norm(model.embed.weight[:6], (32,))
            objects = model.head.weight[[6 + (n + 2) % 6 for n in range(6)]]
            block.out.weight.copy_(5 * (torch.linalg.pinv(read) @ objects).T)
    return model.eval()


@pytest.mark.parametrize("source", ["token", "stream"])
def test_a_planted_relation_is_found_where_it_is(source: str) -> None:
    found = analyzers.TokenRelations(model_of(planted=True), Words()).run(SUBJECTS, OBJECTS, source)
    told = found.against(TRUTH).set_index("part")
    assert told.loc["head 0.0", "first"] == 1
    assert told.loc["head 0.0", "p"] < 0.01
    assert told.loc["head 0.0", "null"] < 0.4
    assert told.loc["head 1.0", "first"] < 0.7
    edges = [(one, other) for one, other, part in found.graph().edges(data="part") if part == "head 0.0"]
    assert sorted(edges) == sorted(TRUTH.items())


def test_random_weights_tell_of_none() -> None:
    found = analyzers.TokenRelations(model_of(planted=False), Words()).run(SUBJECTS, OBJECTS)
    assert found.graph(fdr=0.01).number_of_edges() <= 1
    assert (found.p < 0.05).mean() < 0.12
    assert found.against(TRUTH)["q"].min() > 0.05


def test_a_random_direction_has_the_cosines_that_the_null_says() -> None:
    draw = torch.randn(20_000, 24, generator=torch.Generator().manual_seed(0))
    cosines = (draw[:, 0] / draw.norm(dim=1)).numpy()
    for level in (-0.2, 0.0, 0.1, 0.4):
        assert rotated(np.array([level]), 24)[0] == pytest.approx((cosines >= level).mean(), abs=0.01)


def test_a_relation_is_a_graph_a_table_a_picture_and_a_file(tmp_path: Path) -> None:
    found = analyzers.TokenRelations(model_of(planted=True), Words()).run(SUBJECTS, OBJECTS)
    graph = found.graph()
    assert isinstance(graph, nx.DiGraph)
    assert {kind for _, kind in graph.nodes(data="kind")} == {"subject", "object"}
    assert len(found.table()) == graph.number_of_edges()
    assert found.table()["q"].max() <= 0.05
    assert found.plot(part="head 0.0").axes[0].get_title().startswith("head 0.0")
    found.save(tmp_path / "found")
    assert np.array_equal(analyzers.Relations.load(tmp_path / "found").p, found.p)


def test_names_and_towns_of_a_trained_model(loaded: tuple[nn.Module, Any]) -> None:
    truth = {fact.subject: fact.answer for fact in world.facts() if fact.relation == "city"}
    subjects = world.subjects()[:60]
    told = analyzers.TokenRelations(*loaded).run(subjects, sorted(set(truth.values()))).against(truth).set_index("part")
    assert told.loc["head 1.0", "first"] > 3 * told.loc["head 1.0", "null"]
    assert told.loc["head 1.0", "q"] < 0.05
    assert told["first"].max() < 0.5


@pytest.mark.parametrize(
    ("subjects", "objects", "told", "message"),
    [
        (["s0"], OBJECTS, {}, r"subjects=.*: expected two texts or more"),
        (SUBJECTS, ["o1", "o1"], {}, r"objects=.*: expected two texts or more"),
        (SUBJECTS, OBJECTS, {"source": "weights"}, "source='weights': expected 'token' or 'stream'"),
    ],
)
def test_what_has_no_relation_is_refused(
    subjects: list[str], objects: list[str], told: dict[str, Any], message: str
) -> None:
    with pytest.raises(analyzers.AnalyzerError, match=message):
        analyzers.TokenRelations(model_of(planted=False), Words()).run(subjects, objects, **told)


def test_what_is_asked_of_a_result_is_checked() -> None:
    found = analyzers.TokenRelations(model_of(planted=False), Words()).run(SUBJECTS, OBJECTS)
    with pytest.raises(analyzers.AnalyzerError, match="fdr=0: expected a share of false discoveries"):
        found.graph(fdr=0)
    with pytest.raises(analyzers.AnalyzerError, match="The truth has 0 of the pairs"):
        found.against({"x": "y"})
    with pytest.raises(analyzers.AnalyzerError, match=r"part='head 9': expected one of head 0\.0"):
        found.plot(part="head 9")
