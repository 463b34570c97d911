"""Lenses of models that tell classes: each layer is read where the model's head reads, and the parts add up to its logit."""

import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import (
    AnalyzerError,
    KeyValueMemories,
    LensTranslator,
    LogitAttribution,
    LogitLens,
    ResidualDecomposition,
)
from tests.analyzers.lenses.test_attribution import made as made_of_words
from tests.analyzers.lenses.test_lens import LastAlone
from tests.structure.test_class_heads import MODELS, given, made

POOLED = [name for name in MODELS if "Beit" in name]
BENT = [name for name in MODELS if "T5" in name]
"""A mean over positions; a nonlinearity between two projections."""


def columns(name: str) -> Tensor:
    inputs = given(name)
    if "Image" in name:
        return torch.zeros(3, dtype=torch.long)
    return inputs.get("attention_mask", torch.ones(3, 7)).sum(1).long() - 1


@pytest.mark.parametrize("name", [name for name in MODELS if name not in POOLED])
def test_each_layer_is_read_where_the_head_reads(name: str) -> None:
    model, inputs = made(name), given(name)
    found = LogitLens(model).run(inputs, top=3)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert found.error == 0.0
    if "TokenClass" in name:
        assert torch.equal(found.read, inputs["attention_mask"].bool())
        assert torch.equal(found.answers[found.read], logits.argmax(-1)[found.read])
        return
    at = torch.arange(3), columns(name)
    assert int(found.read.sum()) == 3
    assert bool(found.read[at].all())
    assert torch.equal(found.answers[at], logits.argmax(-1))
    assert torch.allclose(found.probability["lens"][-1][at], logits.softmax(-1).amax(-1))
    assert not any(bool(values["lens"][:, found.read].isnan().any()) for values in (found.kl, found.entropy, found.rank))
    alone = [LogitLens(model).run({key: value[[row]] for key, value in inputs.items()}) for row in range(3)]
    for row, one in enumerate(alone):
        assert torch.allclose(
            one.entropy["lens"][:, one.read], found.entropy["lens"][:, [row], columns(name)[[row]]], atol=1e-5
        )


def test_an_earlier_row_is_the_model_without_the_layers_after_it() -> None:
    model, inputs = made("LlamaForSequenceClassification"), given("LlamaForSequenceClassification")
    found = LogitLens(model).run(inputs, [0, 1, 2])
    model.model.layers = model.model.layers[:1]
    with torch.no_grad():
        said = model(**inputs).logits.softmax(-1)
    assert torch.allclose(found.probability["lens"][0][found.read], said[torch.arange(3), torch.arange(3)], atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in BENT])
def test_the_parts_add_up_to_the_logit_of_a_class(name: str) -> None:
    model, inputs = made(name), given(name)
    found = LogitAttribution(model).run(inputs, [0, 1, 2], [1, 2, 0])
    with torch.no_grad():
        logits = model(**inputs).logits.double()
    logits = logits[torch.arange(3), columns(name)] if "TokenClass" in name else logits
    told = logits[torch.arange(3), torch.arange(3)] - logits[torch.arange(3), torch.tensor([1, 2, 0])]
    assert torch.allclose(found.total, told, atol=1e-4)
    assert torch.allclose(found.values.sum(0), told, atol=1e-4)
    assert {"head 0.0", "mlp 1", "embedding"} <= set(found.names)
    one = LogitAttribution(model).run({key: value[:1] for key, value in inputs.items()}, 0)
    assert one.control == "random classes"
    assert one.error < 1e-4


def test_a_class_is_a_number_and_a_position_the_one_that_is_read() -> None:
    name = "GPT2ForSequenceClassification"
    model, inputs = made(name), given(name)
    for method in (LogitLens(model), LogitAttribution(model)):
        with pytest.raises(
            AnalyzerError, match=r"'good' is text, and the logits of GPT2.* are of classes: expected numbers"
        ):
            method.run(inputs, "good")
        with pytest.raises(AnalyzerError, match=r"position=0: this model gives the logits of one column .*, 4, 5, 6, which"):
            method.run(inputs, 1, position=0)
        method.run(inputs, 1, position=-1)
    with pytest.raises(AnalyzerError, match=r"are made of 4 positions of each example at once, expected one: read_out"):
        LogitLens(made("BeitForImageClassification")).run(given("BeitForImageClassification"))
    with pytest.raises(fmr.FmrError, match="are no sum over what is written to its stream"):
        LogitAttribution(made("T5ForSequenceClassification")).run(given("T5ForSequenceClassification"), 1)


def test_memories_of_a_classifier_have_no_words() -> None:
    name = "LlamaForSequenceClassification"
    memories = KeyValueMemories(made(name)).update(given(name))
    assert memories.result().unread == "its logits are of classes, which are no words"
    with pytest.raises(AnalyzerError, match=r"No word is promoted in .*: its logits are of classes, which are no words"):
        memories.promotion(torch.tensor([[3, 4, 5]]), 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_translator_and_a_decomposition_ask_no_head(name: str) -> None:
    model, inputs = made(name), given(name)
    fitting = LensTranslator(model).update(inputs)
    assert ResidualDecomposition(model).run(inputs).error < 1e-5
    if name not in POOLED:
        lens = LogitLens(model, None, fitting.result(ridge=0.1)).run(inputs)
        assert lens.views == ("lens", "translated", "null")
        assert not bool(lens.kl["translated"][0][lens.read].isnan().any())


def test_a_model_that_says_its_last_column_alone_needs_padding_on_the_left() -> None:
    model, ids = made_of_words("Llama")
    last = Masked(model).eval()
    right = torch.ones_like(ids).index_put((torch.tensor([1]), torch.tensor([6])), torch.tensor(0))
    left = right.flip(1)
    with pytest.raises(
        AnalyzerError, match=r"those of column 6 alone, which is padding in example 1. Expected padding on the"
    ):
        LogitLens(last).run({"input_ids": ids, "attention_mask": right}, 4)
    found = LogitLens(last).run({"input_ids": ids, "attention_mask": left}, 4)
    assert not bool(found.kl["lens"][:, found.read].isnan().any())
    for mask in (left, right):
        shares = [LogitAttribution(one).run({"input_ids": ids, "attention_mask": mask}, 4).values for one in (last, model)]
        assert torch.allclose(*shares, atol=1e-6)


class Masked(LastAlone):
    """A model that gives the logits of its last column, and takes a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, logits_to_keep=1).logits


def test_an_example_without_a_token_is_told(loaded: tuple[nn.Module, object]) -> None:
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[1] = 0
    inputs = {"input_ids": torch.full((3, 4), 7), "attention_mask": mask}
    for ask in (
        lambda: LogitLens(*loaded).run(inputs),
        lambda: LogitAttribution(*loaded).run(inputs, 7),
        lambda: ResidualDecomposition(*loaded).run(inputs),
        lambda: KeyValueMemories(*loaded).run(inputs),
    ):
        with pytest.raises(AnalyzerError, match=r"The mask is 0 all along example 1 of 3: expected a token in each example"):
            ask()
    assert LensTranslator(*loaded).update(inputs).tokens == 8  # counts take it as nothing
