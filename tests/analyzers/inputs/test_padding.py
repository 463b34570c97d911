"""Padding counts nowhere: a padded text gives what it gives alone, whatever is asked of it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, InputAttribution
from analyzers.inputs.methods import METHODS
from tests.analyzers.inputs.models import Words, numbers, own

IDS = torch.tensor([[23, 9, 45, 10]])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.4, **sizes)
    made: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return made


def padded(ids: Tensor, pads: int, left: bool = False) -> dict[str, Tensor]:
    """Token ids behind or before padding of other ids than zero."""
    pad, real = torch.full((1, pads), 7), torch.ones_like(ids)
    parts, masks = [ids, pad], [real, torch.zeros_like(pad)]
    if left:
        parts, masks = parts[::-1], masks[::-1]
    return {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1)}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
@pytest.mark.parametrize("method", METHODS)
def test_attributions_are_those_of_the_text_alone(model: nn.Module, method: str, baseline: str, left: bool) -> None:
    if method in ("saliency", "input-x-gradient") and baseline != "zero":
        pytest.skip("it goes from no baseline")
    settings: dict[str, Any] = {"baseline": baseline, **own(method, samples=30, steps=16, seed=3)}
    alone, found = (InputAttribution(model).run(padded(IDS, n, left), 2, method, **settings) for n in (0, 5))
    assert np.allclose(alone.of_tokens()[1], found.of_tokens()[1], atol=2e-4)
    assert "deeplift" in method or alone.how == found.how
    assert alone.base.allclose(found.base, atol=1e-5)
    if method in ("occlusion", "lime", "kernel-shap"):
        assert float(found.scores[~found.real].abs().max()) == 0


def test_a_rollout_and_cells_of_ones_own_leave_padding_out(model: nn.Module) -> None:
    asking = InputAttribution(model)
    alone, found = (asking.run(padded(IDS, n), 2, "rollout") for n in (0, 5))
    assert np.allclose(alone.of_tokens()[1], found.of_tokens()[1], atol=1e-6)
    cells = torch.arange(9).view(9, 1).expand(9, 16) // 2
    found = asking.run(padded(IDS, 5), 2, "kernel-shap", cells=cells)
    assert found.how == "all 4 sets of 2 cells"


@pytest.mark.parametrize("method", ["deeplift", "rollout"])
def test_curves_are_those_of_the_text_alone(model: nn.Module, method: str) -> None:
    asking = InputAttribution(model)
    alone, found = (asking.curves(padded(IDS, n), 2, method, points=3, draws=9) for n in (0, 6))
    assert (alone.cells, found.cells) == (4, 4)
    for name, area in alone.areas().items():
        assert np.allclose(area, found.areas()[name], atol=1e-4)
    assert alone.better == found.better
    both = {"input_ids": torch.cat([padded(IDS, 3)["input_ids"], torch.arange(1, 8)[None]])}
    both["attention_mask"] = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    mixed = asking.curves(both, 2, method, points=3, draws=9)
    assert mixed.cells == 7
    assert mixed.areas()["deletion"][0] == pytest.approx(alone.areas()["deletion"][0], abs=1e-4)
    assert mixed.better[0] == alone.better[0]


def test_sanity_is_that_of_the_text_alone(model: nn.Module) -> None:
    alone, found = (InputAttribution(model).sanity(padded(IDS, n), 2, "deeplift", stages=2) for n in (0, 10))
    assert np.allclose(alone.signed, found.signed)
    assert np.allclose(alone.sizes, found.sizes)
    assert alone.chance == found.chance == pytest.approx(3**-0.5)


def test_baselines_are_for_the_tokens_alone(model: nn.Module) -> None:
    asking, other = InputAttribution(model, Words()), {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    alone = asking.run(padded(IDS, 0), 2, "deeplift", baseline=other)
    rows = model.get_parameter("model.embed_tokens.weight").detach()
    for baseline in (
        other,
        padded(other["input_ids"], 3, left=True),
        rows[[1, 2, 3, 4]],
        rows[[1, 2, 3, 4, 9, 9]],
        rows[[1, 2, 3, 4, 9, 9]][None],
    ):
        found = asking.run(padded(IDS, 2), 2, "deeplift", baseline=baseline)
        assert np.allclose(alone.of_tokens()[1], found.of_tokens()[1], atol=1e-4)
    with pytest.raises(AnalyzerError, match=r"The baseline has shape \[1, 3, 16\], and the value \[1, 4, 16\]"):
        asking.run(padded(IDS, 2), 2, "deeplift", baseline={"input_ids": IDS[:, :3]})
    uneven = {"input_ids": IDS.expand(2, -1), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    with pytest.raises(
        AnalyzerError, match=r"values of the baselines have shapes \[4, 16\], \[2, 16\]: expected one, that of the input"
    ):
        asking.run(padded(IDS, 2), 2, "deeplift", baseline=uneven)


@pytest.mark.parametrize("at", ["attention[1].z", "attention[1].pattern", "attention[0].v"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_mean_of_heads_is_that_of_the_text_alone(model: nn.Module, at: str, left: bool) -> None:
    asking = InputAttribution(model)
    alone, found = (asking.run(padded(IDS, n, left), 2, "deeplift", at=at, baseline="mean") for n in (0, 3))
    assert alone.base.allclose(found.base, atol=1e-5)
    assert alone.values.sum().allclose(found.values.sum(), atol=1e-5)
    if at == "attention[1].z":
        z = fmr.locate(fmr.run(model, input_ids=IDS)).attention[1].z
        value = fmr.run(model, keep=[z], input_ids=IDS)[z]
        mean = value.mean(2, keepdim=True).expand_as(value)
        edited = fmr.run(model, edits={z: lambda value, context: mean}, input_ids=IDS).output.logits
        assert float(found.base) == pytest.approx(float(edited[0, -1, 2]), abs=1e-5)
        with pytest.raises(AnalyzerError, match=r"baseline='mean' of .* nothing says over which dimensions a mean goes"):
            asking.run(padded(IDS, 3, left), 2, "deeplift", at=z.id, baseline="mean")


def test_positions_may_lie_in_front() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            turned = x.transpose(0, 1).tanh()
            return (turned * attention_mask.T[..., None]).sum(0).square()

    x, mask = numbers(1, 5, 3), torch.tensor([[1, 1, 1, 0, 0]])
    site = fmr.Site("/tanh#0", layout=("positions", "examples", "units"))
    asking = InputAttribution(Turned().eval())
    short = asking.run({"x": x[:, :3], "attention_mask": mask[:, :3]}, 1, "deeplift", at=site, baseline="mean")
    found = asking.run({"x": x, "attention_mask": mask}, 1, "deeplift", at=site, baseline="mean")
    assert short.base.allclose(found.base, atol=1e-6)
    assert torch.allclose(short.values[:, :3], found.values[:, :3], atol=1e-6)


def test_a_part_of_a_value_of_heads_has_its_own_positions(model: nn.Module) -> None:
    asking, z = InputAttribution(model), fmr.locate(fmr.run(model, input_ids=IDS)).attention[1].z
    for site, kind in ((z.at(heads=1), "tokens"), (z.at(units=2), "values"), (z.at(heads=[0, 2]), "values")):
        alone, found = (asking.run(padded(IDS, n), 2, "deeplift", at=site, baseline="mean") for n in (0, 3))
        assert found.kind == alone.kind == kind
        assert alone.base.allclose(found.base, atol=1e-5)


def test_padding_of_other_inputs_is_not_mistaken() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    asking = InputAttribution(transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=50, **sizes)).eval())

    def last(output: Any) -> Tensor:
        found: Tensor = output.logits[:, -1, 3]
        return found

    given = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0, 0]]), "decoder_input_ids": IDS}
    place = "decoder.block.0.layer.0:0"
    with pytest.raises(
        AnalyzerError, match=r"has 4 positions, and so have several inputs of the model that are padded diff"
    ):
        asking.run(given, last, "saliency", at=place)
    given |= {"decoder_input_ids": IDS[:, :3], "decoder_attention_mask": torch.tensor([[1, 1, 0]])}
    assert asking.run(given, last, "saliency", at=place).real.tolist() == [[True, True, False]]
