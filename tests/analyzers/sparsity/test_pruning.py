"""Pruned models are those with zeros by hand, and the same bits again after the block."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import analyzers
import fmr
from analyzers.sparsity.pruning import Keep, matrices_of
from tests.analyzers.surgery.models import Looped, made
from tests.models import build

TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0))
INPUTS = {"tokens": TOKENS}


def loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none").mean(1)


def weights(model: torch.nn.Module) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in model.state_dict().values()]


def test_each_token_keeps_its_largest_coefficients() -> None:
    value = torch.tensor([[[3.0, -2.0, 1.0, 0.5]]])
    assert Keep(0.5, torch.ones(4))(value, None).tolist() == [[[3, -2, 0, 0]]]  # type: ignore[arg-type]
    assert Keep(0.5, torch.tensor([1.0, 0.1, 5.0, 1.0]))(value, None).tolist() == [[[3, 0, 1, 0]]]  # type: ignore[arg-type]
    assert (Keep(0.5, None, seed=1)(value, None) != 0).sum() == 2  # type: ignore[arg-type]


def test_coefficients_are_pruned_as_by_hand() -> None:
    model = made(Looped)
    found = analyzers.Pruning(model).run(INPUTS, keep=[1.0, 0.25], metric=loss)
    assert found.loss[:, 0].tolist() == pytest.approx([found.base] * 3, abs=1e-6)

    def kept(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        scores = args[0].abs() * module.weight.norm(dim=0)
        least = scores.topk(8, dim=-1).values[..., -1:]
        return (torch.where(scores >= least, args[0], 0.0),)

    for block in model.blocks:
        block.down.register_forward_pre_hook(kept)
    assert found.loss[1, 1] == pytest.approx(float(loss(model(TOKENS)).mean().detach()), abs=1e-5)


def test_weights_are_pruned_for_a_block_alone() -> None:
    model = made(Looped)
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    before, pruning = weights(model), analyzers.Pruning(model)
    for by in ("magnitude", "effect", "random"):
        with pruning.pruned(0.25, by, INPUTS, loss) as pruned:
            shares = [float((block.up.weight != 0).float().mean()) for block in pruned.blocks]
            assert weights(pruned) != before
        assert shares == [0.25] * 3
        with pytest.raises(ZeroDivisionError), pruning.pruned(0.25, by, INPUTS, loss):
            raise ZeroDivisionError
        assert weights(model) == before
    assert [parameter.requires_grad for parameter in model.blocks[0].parameters()] == [False] * 12
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_largest_weights_stay() -> None:
    model = made(Looped)
    weight = model.blocks[1].qkv.weight.detach().clone()
    with analyzers.Pruning(model).pruned(0.5, texts=INPUTS):
        kept = model.blocks[1].qkv.weight != 0
    assert weight[kept].abs().min() >= weight[~kept].abs().max()


def test_the_effect_of_a_weight_is_what_the_loss_is_without_it_to_first_order() -> None:
    model = made(Looped)
    slopes = torch.autograd.grad(loss(model(TOKENS)).mean(), model.blocks[2].down.weight)[0]
    scores = (slopes * model.blocks[2].down.weight).abs().detach()
    with analyzers.Pruning(model).pruned(0.5, "effect", INPUTS, loss):
        kept = model.blocks[2].down.weight != 0
    assert scores[kept].min() >= scores[~kept].max()


def test_neither_embeddings_nor_logits_are_pruned() -> None:
    model, _, inputs = build("gpt2")
    names = matrices_of(model, fmr.locate(fmr.run(model, **inputs)))
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(names) == sorted(f"transformer.h.{n}.{part}.weight" for n in (0, 1) for part in parts)


def test_curves_say_how_few_are_enough(tmp_path: Path) -> None:
    found = analyzers.Pruning(made(Looped)).run(INPUTS, "weights", keep=[1.0, 0.5, 0.0], metric=loss)
    assert found.loss[:, 0].tolist() == pytest.approx([found.base] * 3)
    assert found.loss[:, 2].tolist() == pytest.approx([found.loss[0, 2]] * 3)
    assert found.least(more=1e-9)["random"] in (0.0, 0.5, 1.0)
    assert set(found.table().columns) == {"keep", "magnitude", "effect", "random"}
    assert found.plot().axes[0].get_ylabel() == "loss"
    found.save(tmp_path / "curves")
    assert np.array_equal(analyzers.PruningCurves.load(tmp_path / "curves").loss, found.loss)


def test_a_trained_model_needs_few_of_its_own_and_many_of_random_ones() -> None:
    from fmr.zoo import world

    model, tokenizer = fmr.zoo.load("facts")
    texts = [f"{fact.prompt} {fact.answer}" for fact in world.facts()[::360]]
    found = analyzers.Pruning(model, tokenizer).run(texts, keep=[0.5])
    assert found.loss[0, 0] < found.base + 0.1
    assert found.loss[1, 0] < found.base + 0.1
    assert found.loss[2, 0] > found.base + 1


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"what": "heads"}, "what='heads': expected 'coefficients' or 'weights'"),
        ({"keep": [1.5]}, "keep=1.5: expected a share of what is kept"),
        ({"keep": 0.5}, "keep=0.5: expected shares of what is kept, one or more"),
        ({"keep": []}, r"keep=\[\]: expected shares of what is kept, one or more"),
    ],
)
def test_what_cannot_be_pruned_is_refused(told: dict[str, object], message: str) -> None:
    with pytest.raises(analyzers.AnalyzerError, match=message):
        analyzers.Pruning(made(Looped)).run(INPUTS, **told)  # type: ignore[arg-type]


def test_a_loss_wants_next_tokens() -> None:
    pruning, tokens = analyzers.Pruning(made(Looped)), {"tokens": TOKENS[:, :1]}
    own = analyzers.Pruning(made(Looped)).run(INPUTS, keep=[1.0])
    assert own.base == pytest.approx(float(loss(made(Looped)(TOKENS)).mean().detach()), abs=1e-5)
    for what in ("coefficients", "weights"):
        with pytest.raises(analyzers.AnalyzerError, match="Example 0 has one real token, and no next one"):
            pruning.run(tokens, what, keep=[0.5])
    with pytest.raises(analyzers.AnalyzerError, match="Example 0 has one real token"), pruning.pruned(0.5, "effect", tokens):
        pass
    model, _, inputs = build("gpt2_eager")
    padded = {**inputs, "attention_mask": torch.zeros_like(inputs["input_ids"])}
    padded["attention_mask"][:, 0], padded["attention_mask"][0] = 1, 1
    for method in (analyzers.Pruning(model), analyzers.Ablation(model)):
        with pytest.raises(analyzers.AnalyzerError, match="Example 1 has one real token"):
            method.run(padded)


def test_an_effect_wants_gradients() -> None:
    pruning = analyzers.Pruning(made(Looped))
    with (
        torch.inference_mode(),
        pytest.raises(analyzers.AnalyzerError, match=r"takes gradients, and torch\.inference_mode"),
        pruning.pruned(0.5, "effect", INPUTS),
    ):
        pass


def test_an_order_that_is_none_is_refused() -> None:
    pruning = analyzers.Pruning(made(Looped))
    with pytest.raises(analyzers.AnalyzerError, match="by='size': expected one of 'magnitude'"), pruning.pruned(0.5, "size"):
        pass
    with pytest.raises(analyzers.AnalyzerError, match="texts=None: expected texts"), pruning.pruned(0.5):
        pass
