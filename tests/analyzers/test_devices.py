"""What the analyzers find does not hang on the device, nor, but for rounding, on half precision."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fmr
from analyzers import (
    Ablation,
    ActivationPatching,
    ActivationSparsity,
    AttributionPatching,
    CausalTracing,
    CircuitSearch,
    Composition,
    FeatureVisualization,
    HeadClustering,
    Heads,
    KeyValueMemories,
    KnowledgeProbe,
    LensTranslator,
    LogitAttribution,
    LogitLens,
    Modularity,
    PathPatching,
    Pruning,
    RankOneEdit,
    ResidualDecomposition,
    StyleTransfer,
    Surgery,
    TokenRelations,
    TopImages,
    images,
)
from fmr.sweeps import logit_diff
from fmr.zoo import tasks, world

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ON = [pytest.param(device, dtype, id=f"{device}-{dtype}") for device in DEVICES for dtype in (torch.float32, torch.bfloat16)]
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""How far shares may lie from those in double precision."""

GIFTS = [gift for gift in world.ioi(40, seed=0) if len(gift.prompt.split()) == 14][:4]
TEXTS = [gift.prompt for gift in GIFTS], [gift.fresh for gift in GIFTS]
WHO = logit_diff([gift.answer for gift in GIFTS], [gift.giver for gift in GIFTS])


def loaded(device: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    model, tokenizer = fmr.zoo.load("facts")
    return model.to(device, dtype), tokenizer


def patched(where: tuple[nn.Module, Any]) -> dict[str, Any]:
    return {
        "activations": ActivationPatching(*where).run(*TEXTS, WHO, progress=False),
        "gradients": AttributionPatching(*where).run(*TEXTS, WHO),
        "paths": PathPatching(*where).run(*TEXTS, WHO, progress=False),
    }


@lru_cache(maxsize=1)
def exact() -> dict[str, Any]:
    return patched(loaded("cpu", torch.float64))


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_effects_of_patching_are_those_of_double_precision(device: str, dtype: torch.dtype) -> None:
    for name, found in patched(loaded(device, dtype)).items():
        assert found.how != "loop"
        np.testing.assert_allclose(found.effects, exact()[name].effects, atol=NEAR[dtype], err_msg=name)


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_a_circuit_of_all_edges_is_the_clean_run(device: str, dtype: torch.dtype) -> None:
    search = CircuitSearch(*loaded(device, dtype))
    found = search.run(*TEXTS, WHO, method="eap", edges=0.5, sizes=[1.0], random=1, progress=False)
    assert torch.equal(found.measured[-1], found.clean)
    assert abs(found.faithfulness() - 1) < max(0.2, NEAR[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_heads_are_clustered_alike(device: str) -> None:
    batches = [torch.randint(0, 500, (4, 12), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    model, _ = loaded(device, torch.float32)
    found = HeadClustering(model).over([{"input_ids": ids.to(device)} for ids in batches]).result()
    plain = HeadClustering(loaded("cpu", torch.float64)[0]).over([{"input_ids": ids} for ids in batches]).result()
    np.testing.assert_allclose(found.distances, plain.distances, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_of_heads_are_compared_alike(device: str) -> None:
    batches = [{"input_ids": torch.randint(0, 500, (4, 12), generator=torch.Generator().manual_seed(n))} for n in range(2)]
    kinds = ("beyond first", "output", "cka")
    found, plain = (
        HeadClustering(loaded(where, dtype)[0], distances=kinds).over(
            [{"input_ids": one["input_ids"].to(where)} for one in batches]
        )
        for where, dtype in ((device, torch.float32), ("cpu", torch.float64))
    )
    for kind in kinds:
        distances = (one.result(distance=kind, permutations=0).distances for one in (found, plain))
        np.testing.assert_allclose(*distances, atol=1e-3, err_msg=kind)


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_heads_have_the_same_jobs_and_compose_alike(device: str, dtype: torch.dtype) -> None:
    where, exact = loaded(device, dtype), loaded("cpu", torch.float64)
    found, plain = (Heads(*one, length=20).run() for one in (where, exact))
    for job in ("previous token", "induction", "copying"):
        np.testing.assert_allclose(found.score(job), plain.score(job), atol=NEAR[dtype], err_msg=job)
    assert {name for name, _ in found.best("induction")} == {name for name, _ in plain.best("induction")}
    ids = torch.arange(3, 12)[None]
    scores = [Composition(*one).run(ids, progress=False).scores for one in (where, exact)]
    np.testing.assert_allclose(*scores, atol=1e-2 * NEAR[dtype] + 1e-3 * (dtype is torch.bfloat16))


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_memories_are_counted_as_in_double_precision(device: str, dtype: torch.dtype) -> None:
    texts = [fact.prompt for fact in world.facts()[:24]]
    found, plain = (
        KeyValueMemories(*loaded(*where), k=3).over(texts, progress=False).result(words=1, draws=20)
        for where in ((device, dtype), ("cpu", torch.float64))
    )
    np.testing.assert_allclose(found.coefficients[..., 0], plain.coefficients[..., 0], atol=NEAR[dtype])
    np.testing.assert_allclose(found.means, plain.means, atol=NEAR[dtype])
    assert (found.words[:, 0, 0] == plain.words[:, 0, 0]).mean() > (0.9 if dtype == torch.bfloat16 else 0.999)
    added, exactly = (
        KeyValueMemories(*loaded(*where)).promotion(texts[0], world.facts()[0].answer, draws=3)
        for where in ((device, dtype), ("cpu", torch.float64))
    )
    np.testing.assert_allclose(added.by_layer, exactly.by_layer, atol=3 * NEAR[dtype])
    composed = KeyValueMemories(*loaded(device, dtype)).run(texts[:4])
    assert abs(composed.none - KeyValueMemories(*loaded("cpu", torch.float64)).run(texts[:4]).none).max() <= NEAR[dtype]


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_a_fact_is_recalled_where_double_precision_says(device: str, dtype: torch.dtype) -> None:
    asked = ("The mother tongue of Velin dal Millwick is", "Velin dal Millwick")
    found = CausalTracing(*loaded(device, dtype)).run(*asked, progress=False)
    plain = CausalTracing(*loaded("cpu", torch.float64)).run(*asked, progress=False)
    assert found.how != "loop"
    for kind, effects in plain.effects.items():
        np.testing.assert_allclose(found.effects[kind], effects, atol=NEAR[dtype], err_msg=kind)


@pytest.mark.parametrize("graph", ["weights", "activations", "correlations"])
@pytest.mark.parametrize(("device", "dtype"), ON)
def test_a_network_is_the_same_graph(device: str, dtype: torch.dtype, graph: str) -> None:
    ids = torch.randint(0, 500, (6, 12), generator=torch.Generator().manual_seed(0))
    settings = {"graph": graph, "layers": "memories", "scope": "*.h.2.*"}
    found = Modularity(loaded(device, dtype)[0], **settings).update({"input_ids": ids.to(device)}).net().adjacency()
    plain = Modularity(loaded("cpu", torch.float64)[0], **settings).update({"input_ids": ids}).net().adjacency()
    if graph == "correlations":
        assert np.corrcoef(found.toarray().ravel(), plain.toarray().ravel())[0, 1] > 0.98
    else:
        np.testing.assert_allclose(found.toarray(), plain.toarray(), rtol=NEAR[dtype], atol=NEAR[dtype] * plain.mean())


@pytest.mark.parametrize("device", DEVICES)
def test_a_fact_is_edited_and_put_back_to_the_bit(device: str) -> None:
    model, tokenizer = loaded(device, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    texts = [fact.prompt for fact in world.facts()[:200]]
    editing = RankOneEdit(model, tokenizer, texts=texts, prefixes=world.OPENINGS)
    with editing.run("Junel Dunoth grew up in", "Junel Dunoth", "Oranby", progress=False):
        inputs = {
            name: tensor.to(device) for name, tensor in tokenizer("Junel Dunoth grew up in", return_tensors="pt").items()
        }
        assert tokenizer.decode(model(**inputs).logits[0, -1].argmax()) == "Oranby"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_the_stream_is_read_and_taken_apart_alike(device: str, dtype: torch.dtype) -> None:
    """A lens with its translator, logits as a sum over parts, and who wrote what."""
    texts, right = TEXTS[0], [gift.answer for gift in GIFTS]
    found, plain = [], []
    for where, held in (((device, dtype), found), (("cpu", torch.float64), plain)):
        model, tokenizer = loaded(*where)
        translator = LensTranslator(model, tokenizer).update([fact.prompt for fact in world.facts()[:64]]).result(ridge=0.1)
        lens = LogitLens(model, tokenizer, translator).run(texts, right, position=-1)
        assert lens.error == 0.0
        shares, parts = (
            LogitAttribution(model, tokenizer).run(texts, right),
            ResidualDecomposition(model, tokenizer).run(texts),
        )
        held += [lens.probability[view][lens.probability[view] >= 0] for view in lens.views]
        held += [shares.shares / float(shares.total.abs().mean()), parts.share.nan_to_num()]
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=NEAR[dtype])


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_images_are_made_and_found_alike(device: str, dtype: torch.dtype) -> None:
    digits, told = tasks.digits().test.inputs, []
    for where, kind in ((device, dtype), ("cpu", torch.float64)):
        model = fmr.zoo.load("digits-cnn").model.to(where, kind)
        made = FeatureVisualization(model, size=8, channels=1).run(images.Logit(3), steps=20, progress=False)
        sites, shown = ("conv2", ["conv1"]), (digits[0], digits[1])
        styled = StyleTransfer(model, *sites, size=8, channels=1).run(*shown, steps=20, progress=False)
        top = TopImages(model, "conv2", [3], k=1).update(digits[:50]).result()
        told.append((made.images, styled.image, top.values / 10))
        assert top.boxes.tolist() == [[[0, 0, 7, 7]]]
    for one, other in zip(*told, strict=True):
        assert abs(np.asarray(one) - np.asarray(other)).mean() < NEAR[dtype]


@pytest.mark.parametrize(("device", "dtype"), ON)
def test_what_a_model_knows_and_can_do_without_is_alike(device: str, dtype: torch.dtype) -> None:
    facts, told = world.facts()[:48:3], []
    texts, cities = [f"{fact.prompt} {fact.answer}" for fact in facts[:3]], ["Brigost", "Oranby", "Quelm"]
    for where in ((device, dtype), ("cpu", torch.float64)):
        model, tokenizer = loaded(*where)
        costs = Ablation(model, tokenizer).run(texts, progress=False)
        sparse = ActivationSparsity(model, tokenizer, eps=0.05).update(texts).result()
        curves = [Pruning(model, tokenizer).run(texts, what, keep=[0.5]).loss[:2] for what in ("coefficients", "weights")]
        known = KnowledgeProbe(model, tokenizer).run(facts, progress=False)
        related = TokenRelations(model, tokenizer).run(world.subjects()[:8], cities)
        inputs = {name: value.to(where[0]) for name, value in tokenizer(texts[0], return_tensors="pt").items()}
        with Surgery(model, fmr.locate(fmr.run(model, **inputs))).delete(1).delete(2, heads=[0, 1]), torch.no_grad():
            operated = model(**inputs).logits.softmax(-1).double().cpu()
        told.append([costs.cost / 10, sparse.active, sparse.hoyer, *curves, known.p_true, related.scores, operated])
    for one, other in zip(*told, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=NEAR[dtype], rtol=NEAR[dtype])
