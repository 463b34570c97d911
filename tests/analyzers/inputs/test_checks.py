"""Rollout, random weights, deletion and insertion, and what results are to a user."""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import Attribution, Curves, InputAttribution, Sanity
from analyzers.inputs import attribution
from analyzers.inputs.curves import as_value
from analyzers.inputs.randomised import layers_from_the_top, randomised
from analyzers.inputs.rollout import rollout
from analyzers.inputs.sanity import rank_correlation
from tests.analyzers.inputs.models import gated, made, numbers, reused

matplotlib.use("Agg")
TEXT = "Junel Dunoth grew up in"


# ---- rollout


def test_a_rollout_is_the_product_of_half_pattern_and_half_stream(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    run = fmr.run(model, **tokenizer(TEXT, return_tensors="pt"))
    expected = torch.eye(6)
    for block in fmr.locate(run).attention:
        expected = (block.maps(run)[0].mean(0) / 2 + torch.eye(6) / 2) @ expected
    found = InputAttribution(model, tokenizer).run(TEXT, "Brigost", "rollout")
    assert torch.allclose(found.scores[0], expected[-1], atol=1e-6)
    assert found.tokens[0][1:3] == ("Junel", "Dunoth")
    assert found.complete is None


def test_a_rollout_of_known_patterns() -> None:
    shift = torch.tensor([[1.0, 0.0], [1.0, 0.0]])[None, None]
    assert torch.equal(rollout([shift]), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]))
    assert torch.equal(rollout([shift, shift])[0, 1], torch.tensor([0.75, 0.25]))


def test_patches_of_a_vision_transformer_lie_on_the_picture() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config).eval()
    picture = numbers(1, 3, 12, 12)
    found = InputAttribution(model).run(picture, 1, "rollout")
    run = fmr.run(model, picture)
    maps = [block.maps(run) for block in fmr.locate(run).attention]
    assert found.kind == "image"
    assert torch.allclose(found.scores[0], rollout(maps)[0, 0, 1:].view(3, 3), atol=1e-6)  # read at the first token
    assert found.images is not None
    assert found.images.shape == (1, 12, 12, 3)
    assert found.plot().axes


# ---- random weights


def test_weights_come_back_bit_by_bit_on_the_same_memory() -> None:
    model = gated()
    was, up = (
        [(one.data_ptr(), one.detach().clone(), one._version) for one in model.parameters()],
        model.get_parameter("up.weight"),
    )
    numbers_of_up = up.detach().flatten().sort().values
    with suppress(ZeroDivisionError), randomised(list(model.parameters()), 0):
        assert not any(torch.equal(one, before) for one, (_, before, _) in zip(model.parameters(), was, strict=True))
        assert torch.equal(up.flatten().sort().values, numbers_of_up)
        raise ZeroDivisionError
    for one, (where, before, version) in zip(model.parameters(), was, strict=True):
        assert (one.data_ptr(), one._version) == (where, version)
        assert torch.equal(one, before)


def test_a_failure_in_the_middle_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = gated(), []
    was = copy.deepcopy(model.state_dict())
    own = attribution.METHODS["deeplift"]

    def fails(asked: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return own(asked)

    monkeypatch.setattr(attribution, "METHODS", {**attribution.METHODS, "deeplift": fails})
    with pytest.raises(ZeroDivisionError):
        InputAttribution(model).sanity(numbers(1, 4, 6), 1, "deeplift")
    assert len(calls) == 3
    assert all(torch.equal(one, was[name]) for name, one in model.state_dict().items())


def test_layers_are_taken_from_the_top() -> None:
    model = reused()
    layers = layers_from_the_top(model, fmr.run(model, numbers(1, 3, 8, 8)).graph)
    assert [path for path, _ in layers] == ["out", "second", "norm", "first"]
    assert [len(several) for _, several in layers] == [2, 2, 2, 2]


def test_what_does_not_depend_on_weights_does_not_pass() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x.pow(2) + 0 * self.layer(x)

    def total(output: Tensor) -> Tensor:
        return output.sum(1)

    blind = InputAttribution(Blind().eval()).sanity(numbers(1, 8), total, "input-x-gradient")
    assert not blind.passed
    assert blind.signed.tolist() == [1.0, 1.0]
    assert "depends LITTLE on the weights" in repr(blind)
    seeing = InputAttribution(reused()).sanity(numbers(2, 3, 8, 8), None, "deeplift", stages=2)
    assert seeing.passed
    assert seeing.randomised.tolist() == [0, 2, 4]
    assert seeing.layers == ("none", "second", "first")
    assert seeing.signed[0] == 1.0
    assert "depends on the weights" in repr(seeing)


def test_a_rollout_is_checked_too(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    found = InputAttribution(model, tokenizer).sanity(TEXT, "Brigost", "rollout", stages=1)
    assert found.signed[0] == 1.0


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_that_of_scipy(ties: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    one, other = numbers(40), numbers(40, seed=1)
    if ties:
        one, other = one.round(), other.round()
    assert rank_correlation(one, other) == pytest.approx(stats.spearmanr(one, other)[0])
    assert rank_correlation(one, torch.ones(40)) == 0.0


# ---- deletion and insertion


def test_curves_of_what_adds_up_are_known() -> None:
    model = made(lambda x: x.sum(1, keepdim=True))
    x = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    found = InputAttribution(model).curves(x, lambda output: output[:, 0], "deeplift", draws=50)
    assert found.shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert np.allclose(found.deletion, [[1, 0.6, 0.3, 0.1, 0]])
    assert np.allclose(found.insertion, [[0, 0.4, 0.7, 0.9, 1]])
    assert found.areas()["deletion"][0] == pytest.approx(0.375)
    assert found.better[0] > 0.9
    assert abs(float(found.areas()["random deletion"][0]) - 0.5) < 0.05
    assert "area under deletion 0.38 (random 0." in repr(found)


def test_a_wrong_order_is_worse_than_random() -> None:
    model, x = made(lambda x: x.sum(1, keepdim=True)), torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    right = InputAttribution(model).run(x, lambda output: output[:, 0], "deeplift")
    wrong = Attribution(**{**vars(right), "values": -right.values})
    asking = InputAttribution(model)
    assert asking.curves(x, lambda output: output[:, 0], wrong).better[0] < 0.1
    assert asking.curves(x, lambda output: output[:, 0], right).better[0] > 0.8


def test_a_target_below_its_baseline_is_taken_down_by_what_lowers_it() -> None:
    model = made(lambda x: x.sum(1, keepdim=True))
    x = torch.tensor([[4.0, 1.0, 3.0, 2.0], [-4.0, -1.0, -3.0, -2.0], [-6.0, 3.0, -2.0, 1.0]])
    found = InputAttribution(model).curves(x, 0, "deeplift", draws=50)
    assert np.allclose(found.deletion[:2], [[1, 0.6, 0.3, 0.1, 0]] * 2)
    assert np.allclose(found.insertion[2], [0, 1.5, 2, 1.75, 1])
    assert np.allclose(found.better, found.better[0], atol=0.1)
    assert found.better.min() > 0.9


def test_curves_of_a_rollout_take_tokens_and_patches_away(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    asking = InputAttribution(model, tokenizer)
    found = asking.run(TEXT, "Brigost", "rollout")
    by_name, given = (asking.curves(TEXT, "Brigost", one, draws=4) for one in ("rollout", found))
    assert np.array_equal(by_name.deletion, given.deletion)
    assert by_name.cells == 6
    on_patches = as_value(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(1, 3, 4, 4))
    assert on_patches is not None
    assert on_patches[1, 1:3, 1:3].tolist() == [[1.0, 2.0], [3.0, 4.0]]


# ---- results


def _results() -> dict[str, Any]:
    asking, pictures = InputAttribution(reused()), numbers(2, 3, 8, 8)
    return {
        "image": asking.run(pictures, [1, (0, 2)], "deeplift"),
        "tokens": InputAttribution(gated()).run(numbers(2, 4, 6), 1, "deeplift"),
        "values": InputAttribution(nn.Linear(4, 2).eval()).run(numbers(3, 4), 1, "deeplift"),
        "sanity": asking.sanity(pictures[:1], 1, "saliency", stages=2),
        "curves": asking.curves(pictures, 1, "deeplift", cells=2, draws=3),
    }


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return _results()


@pytest.mark.parametrize("name", ["image", "tokens", "values", "sanity", "curves"])
def test_a_result_is_saved_drawn_and_a_table(name: str, results: dict[str, Any], tmp_path: Path) -> None:
    found = results[name]
    found.save(tmp_path / "found.safetensors")
    again = type(found).load(tmp_path / "found.safetensors")
    assert repr(again) == repr(found)
    assert again.table().equals(found.table())
    figure = again.plot()
    assert figure.axes
    ax = matplotlib.figure.Figure().subplots()
    assert found.plot(ax) is ax.figure
    with pytest.raises(AttributeError):
        found.method = "other"


def test_tables_and_names(results: dict[str, Any]) -> None:
    image, tokens, values = (results[name] for name in ("image", "tokens", "values"))
    assert len(image.table()) == 2 * 64
    assert image.strongest(1)[0] == image.table().query("example == 0").set_index("pixel")["score"].abs().idxmax()
    assert tokens.table().columns.tolist() == ["example", "token", "score"]
    assert tokens.scores.shape == (2, 4)
    assert len(values) == 3
    assert values.strongest(4, 1) != values.strongest(4, 0) or values.scores.shape == (3, 4)
    assert isinstance(results["sanity"], Sanity)
    assert isinstance(results["curves"], Curves)


def test_tokens_in_colours_are_escaped_in_a_notebook(results: dict[str, Any]) -> None:
    found = results["tokens"]
    marked = Attribution(**{**vars(found), "tokens": (("<b>", "&", "c", "$d$"), ("e", " ", "g", "h"))})
    shown = marked._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>&lt;" not in shown
    assert shown.count("<span") == 8
    assert "background:rgb(" in shown
    assert results["image"]._repr_html_().startswith("<pre>")
    marked.plot().canvas.draw()


def test_an_example_that_is_not_there_is_told(results: dict[str, Any]) -> None:
    with pytest.raises(fmr.FmrError, match="example=2: expected one of 0 to 1"):
        results["image"].plot(example=2)
    with pytest.raises(fmr.FmrError, match="example='a': expected one of 0 to 1"):
        results["tokens"].strongest(example="a")
