"""The cost of each part is the loss of the model without it, by surgery and by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import analyzers
import fmr
from analyzers.surgery.ablation import Turned
from tests.analyzers.surgery.models import Looped, Shared, made
from tests.models import build

TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0))


def by_hand(logits: Tensor) -> Tensor:
    return torch.stack([F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, TOKENS, strict=True)])


def loss(output: Tensor) -> Tensor:
    return by_hand(output)


@pytest.fixture(scope="module")
def costs() -> analyzers.LayerCosts:
    return analyzers.Ablation(made(Looped)).run(TOKENS, loss, progress=False)


def test_a_cost_is_that_of_surgery(costs: analyzers.LayerCosts) -> None:
    model = made(Looped)
    structure, plain = fmr.locate(fmr.run(model, TOKENS)), by_hand(model(TOKENS)).mean().detach()
    assert costs.names[:4] == ["layer 0", "memory 0", "head 0.0", "head 0.1"]
    assert costs.base == pytest.approx(float(plain), abs=1e-6)
    surgery = analyzers.Surgery(model, structure)
    for name, operated in (
        ("layer 1", surgery.delete(1)),
        ("head 2.1", surgery.delete(2, heads=1)),
        ("head 0.0", surgery.delete(0, heads=0)),
    ):
        with operated:
            cost = float(by_hand(model(TOKENS)).mean().detach() - plain)
        assert costs.cost[costs.names.index(name)] == pytest.approx(cost, abs=1e-5)


def test_what_costs_least_is_what_surgery_takes(costs: analyzers.LayerCosts) -> None:
    model = made(Looped)
    surgery = analyzers.Surgery(model, fmr.locate(fmr.run(model, TOKENS)))
    layer, heads = costs.cheapest(1)[0], costs.cheapest(2, "head")
    number = int(layer.removeprefix("layer "))
    by_name, by_number = surgery.delete(layer), surgery.delete(number)
    with by_name:
        one = model(TOKENS)
    with by_number:
        assert torch.equal(one, model(TOKENS))
    told = surgery
    for head in heads:
        at, place = head.removeprefix("head ").split(".")
        told = told.delete(int(at), heads=int(place))
    with surgery.delete(*heads):
        one = model(TOKENS)
    with told:
        assert torch.equal(one, model(TOKENS))
    assert repr(surgery.delete("layer 1", 2)) == "Surgery of Looped: without layers 1, 2"
    assert repr(surgery.delete("head 1.0", "layer 1", "head 0.1")) == (
        "Surgery of Looped: without layer 1; layer 0 without head 1"
    )
    for name in ("memory 1", "layer -1", "head 1", "2"):
        with pytest.raises(
            analyzers.AnalyzerError, match=rf"delete got '{name}': expected the number of a layer, 'layer 2' or"
        ):
            surgery.delete(name)
    with pytest.raises(analyzers.AnalyzerError, match=r"kind='heads': expected 'layer' or 'memory' or 'head'"):
        costs.cheapest(2, "heads")


def test_the_control_is_a_change_as_long_in_another_direction() -> None:
    value = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    changed = Turned(seed=2)(value, None)  # type: ignore[arg-type]
    assert torch.allclose((changed - value).norm(dim=-1), value.norm(dim=-1), rtol=1e-5)
    assert not torch.allclose(F.cosine_similarity(changed - value, value, dim=-1).abs(), torch.ones(3, 5), atol=0.05)
    assert torch.equal(changed, Turned(seed=2)(value, None))  # type: ignore[arg-type]


def test_costs_have_maps_a_table_a_picture_and_a_file(costs: analyzers.LayerCosts, tmp_path: Path) -> None:
    assert {kind: one.shape for kind, one in costs.maps.items()} == {"layer": (3, 1), "memory": (3, 1), "head": (3, 2)}
    assert costs.table()["control"].abs().sum() > 0
    assert len(costs.plot().axes) == 3
    costs.save(tmp_path / "costs")
    again = analyzers.LayerCosts.load(tmp_path / "costs")
    assert again.names == costs.names
    assert np.array_equal(again.cost, costs.cost)
    assert costs.cheapest(3) == [costs.names[n] for n in np.argsort(costs.cost) if costs.kinds[n] == "layer"]
    assert "cost more than a random change as large" in repr(costs)


def test_padding_counts_for_nothing() -> None:
    model, _, inputs = build("gpt2_eager")
    padded = {"input_ids": inputs["input_ids"][1:], "attention_mask": inputs["attention_mask"][1:], "use_cache": False}
    alone = {"input_ids": inputs["input_ids"][1:, :4], "use_cache": False}
    found = [analyzers.Ablation(model).run(given, progress=False) for given in (padded, alone)]
    assert found[0].cost == pytest.approx(found[1].cost, abs=1e-5)
    assert found[0].base == pytest.approx(found[1].base, abs=1e-5)


def test_a_model_may_call_its_token_ids_what_it_likes(costs: analyzers.LayerCosts) -> None:
    for given in (TOKENS, {"tokens": TOKENS}):
        assert np.allclose(analyzers.Ablation(made(Looped)).run(given, progress=False).cost, costs.cost, atol=1e-5)


def test_what_cannot_be_measured_is_refused() -> None:
    model, _, _ = build("gpt2_eager")
    with pytest.raises(analyzers.AnalyzerError, match="no token ids whose next tokens"):
        analyzers.Ablation(model).run({"inputs_embeds": torch.randn(1, 4, model.config.hidden_size)}, progress=False)
    with pytest.raises(analyzers.AnalyzerError, match="in train mode"):
        analyzers.Ablation(made(Shared).train()).run(TOKENS, loss, progress=False)
