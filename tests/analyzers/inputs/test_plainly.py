"""What cannot be known is said plainly, and what can be taken is: inputs, targets and baselines as users have them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from analyzers import AnalyzerError, InputAttribution
from analyzers.inputs.perturbed import regression, shapley
from tests.analyzers.inputs.models import TOKENS, Additive, Words, gated, made, numbers
from tests.small import Fn

X, LINEAR = numbers(2, 6), nn.Linear(6, 3).eval()
DEEPLIFTS = ["deeplift", "deeplift-reveal-cancel"]


def total(output: Tensor) -> Tensor:
    return output.reshape(len(output), -1).sum(1)


# ---- how far sampled values are off


def test_the_standard_error_of_kernel_shap_is_that_of_other_draws() -> None:
    model, x = gated(), numbers(1, 4, 6)
    cells = torch.arange(24).view(4, 6) // 3
    asking = InputAttribution(model)
    exact = asking.run(x, 1, "kernel-shap", cells=cells, samples=256).values.flatten()[::3] * 3
    found = [asking.run(x, 1, "kernel-shap", cells=cells, samples=80, seed=seed) for seed in range(24)]
    off = torch.stack([one.values.flatten()[::3] * 3 - exact for one in found]).square().mean(0).sqrt().mean()
    told = np.mean([float(one.how.split("off by ")[1].split()[0]) for one in found])
    assert 0.6 < told / float(off) < 1.7
    assert all(one.complete for one in found)  # by construction, and yet off


def test_shapley_values_of_a_game() -> None:
    assert torch.allclose(shapley(torch.tensor([0.0, 1.0, 2.0, 5.0])), torch.tensor([2.0, 3.0]))
    worth = torch.tensor([0.0, 0, 0, 1, 0, 1, 0, 1])  # the first and any other
    assert torch.allclose(shapley(worth), torch.tensor([4, 1, 1]) / 6)


def test_a_regression_that_fits_has_no_standard_error() -> None:
    sets = torch.cat([torch.ones(1, 3), torch.zeros(1, 3), (numbers(30, 3) > 0).float()]).double()
    weights = torch.tensor([1e6, 1e6, *[1.0] * 30]).double()
    worth = sets @ torch.tensor([1.0, -2.0, 0.5]).double() + 2
    found, errors = regression(sets, worth, weights)
    assert torch.allclose(found, torch.tensor([1.0, -2.0, 0.5]).double(), atol=1e-6)
    assert errors is not None
    assert float(errors.max()) < 1e-6
    _, errors = regression(sets, worth + numbers(32, seed=1).double(), weights)
    assert errors is not None
    assert float(errors.min()) > 0.05
    assert regression(sets[:7], worth[:7], weights[:7])[1] is None  # fewer than two for each
    same = torch.cat([sets[:2], sets[2:3].expand(30, -1)])
    assert regression(same, same @ found + 2, weights)[1] is None  # cells that are never apart


@pytest.mark.parametrize("bent", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("samples", [26, 48, 200])
def test_the_standard_error_is_real_also_where_a_model_nearly_adds_up(bent: float, samples: int) -> None:
    weigh, pairs = numbers(12), numbers(12, 12, seed=1)
    asking = InputAttribution(made(lambda x: (x * weigh + bent * (x @ pairs) * x / 12).sum(1, keepdim=True)))
    x = numbers(1, 12, seed=2)
    exact = x * weigh + bent * (x * (x @ pairs) + x * (x @ pairs.T)) / 24
    found = [asking.run(x, 0, "kernel-shap", samples=samples, seed=seed) for seed in range(10)]
    off = torch.stack([one.values - exact for one in found]).square().mean().sqrt()
    told = np.mean([float(one.how.split("off by ")[1].split()[0]) for one in found])
    assert 0.6 * float(off) - 1e-6 < told < 1.5 * float(off) + 1e-6


@pytest.mark.parametrize(("many", "samples"), [(40, 41), (40, 60), (16, 20)])
def test_of_too_few_samples_no_standard_error_is_told(many: int, samples: int) -> None:
    found = InputAttribution(nn.Linear(many, 2).eval()).run(numbers(1, many), 1, "kernel-shap", samples=samples)
    assert "off by" not in found.how
    assert found.notes == (
        f"how far each of {many} cells is off is not known from {samples} samples. Take more, some times as many",
    )


# ---- places of whole numbers


@pytest.mark.parametrize("method", ["occlusion", "kernel-shap", "lime"])
def test_whole_numbers_are_attributed_in_fractions(method: str) -> None:
    model, ids = Additive().eval(), torch.tensor([[3, 5, 1]])
    table = model.table.weight.detach()
    found = InputAttribution(model).run(ids, 1, method, at="input:input_ids", baseline=7)
    assert torch.allclose(found.values, table[ids, 1] - table[7, 1], atol=1e-4)
    assert found.strongest(1) == [str(int(ids[0, found.values[0].abs().argmax()]))]
    picture = (numbers(1, 3, 8, 8) * 40).clamp(0, 255).to(torch.uint8)
    weigh = numbers(3, 8, 8, seed=1)
    bright = Fn(lambda self, x: (x.float() * weigh).sum((1, 2, 3))[:, None]).eval()
    seen = InputAttribution(bright).run({"x": picture}, 0, method, at="input:x", cells=2)
    assert seen.kind == "image"
    expected = torch.nn.functional.avg_pool2d((picture[0] * weigh).sum(0, keepdim=True), 4)[0]
    got = torch.nn.functional.avg_pool2d(seen.scores, 4)[0]
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("baseline", "told"),
    [
        ("mean", "baseline='mean' of int64: expected floating-point numbers, which have a mean"),
        (0.5, "The baseline holds float64, and the value int64: expected numbers of its kind"),
        (1j, "The baseline holds complex128, and the value int64"),
    ],
)
def test_baselines_that_whole_numbers_cannot_hold_are_refused(baseline: Any, told: str) -> None:
    asking, ids = InputAttribution(Additive().eval()), torch.tensor([[3, 5, 1]])
    with pytest.raises(AnalyzerError, match=told):
        asking.run(ids, 1, "occlusion", at="input:input_ids", baseline=baseline)
    with pytest.raises(AnalyzerError, match="The baseline holds complex128, and the value float32"):
        InputAttribution(LINEAR).run(X, 1, baseline=1j)


# ---- what is nothing, and what has no derivative


@pytest.mark.parametrize("method", DEEPLIFTS)
@pytest.mark.parametrize("how", ["written", "fused", "cleaned"])
def test_a_row_that_sees_nothing_is_not_lost(how: str, method: str) -> None:
    mask, weigh = torch.ones(5, 5).tril().bool(), numbers(8, 8, seed=3)
    mask[0] = False

    def attend(x: Tensor) -> Tensor:
        if how == "fused":
            return F.scaled_dot_product_attention(x @ weigh, x, x, attn_mask=mask)[:, -1]
        pattern = (x @ weigh @ x.mT).masked_fill(~mask, float("-inf")).softmax(-1)
        pattern = pattern.masked_fill(~mask, 0.0) if how == "cleaned" else pattern
        return (pattern @ x)[:, -1]

    found = InputAttribution(made(attend)).run(numbers(1, 5, 8), 0, method, at=TOKENS)
    assert found.notes == ()
    assert found.complete


ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "a comparison of whole numbers": lambda x: (x.long() > 0).float(),
    "an index": lambda x: torch.arange(18.0).view(6, 3)[x.argmax(-1)],
    "whole numbers": lambda x: x.long().float(),
    "truth values": lambda x: ((x > 0) & (x < 1)).float(),
}


@pytest.mark.parametrize("method", DEEPLIFTS)
@pytest.mark.parametrize("name", ONLY)
def test_the_only_way_without_a_derivative_is_named(name: str, method: str) -> None:
    with pytest.raises(
        AnalyzerError, match=r"class 0 depends on Site\('input:x'\) through comparisons, indices or whole numbers alone: /"
    ):
        InputAttribution(made(ONLY[name])).run(X[:1], 0, method)
    with pytest.raises(AnalyzerError, match=r"whole numbers alone: /\w+#\d \(\w+\) in the target reads them"):
        InputAttribution(made(lambda x: x)).run(X[:1], lambda output: ONLY["whole numbers"](output)[:, 0], method)


@pytest.mark.parametrize("method", DEEPLIFTS)
def test_a_step_is_shared(method: str) -> None:
    x, base = torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([[-2.0, -3.0, 1.0]])
    step = made(lambda x: torch.heaviside(x, torch.tensor(0.5)))
    assert torch.allclose(
        InputAttribution(step).run(x, total, method, baseline=base).values, torch.tensor([[1.0, 0.0, 0.0]])
    )
    gate = made(lambda x: x * torch.heaviside(x, torch.tensor(0.0)))
    assert InputAttribution(gate).run(x, total, method, baseline=base).complete


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda x: torch.fft.rfft(torch.tanh(x)).abs(),
    "filter": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(x.roll(1, -1).relu()), n=6),
    "parts": lambda x: torch.fft.fft(x).real.relu() + torch.view_as_real(torch.fft.fft(x)).square().sum(-1),
}


@pytest.mark.parametrize("method", DEEPLIFTS)
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_are_followed(name: str, method: str) -> None:
    weigh = numbers(6, seed=2)
    model = made(lambda x: (COMPLEX[name](x) * weigh[: COMPLEX[name](x).shape[1]]).sum(1, keepdim=True))
    found = InputAttribution(model).run(X[:1], 0, method, baseline=numbers(1, 6, seed=5))
    assert found.notes == ()
    assert found.gap[0] < 1e-5


@pytest.mark.parametrize("method", ["ig", *DEEPLIFTS, "kernel-shap"])
def test_a_target_that_stays_the_same_is_complete(method: str) -> None:
    found = InputAttribution(made(lambda x: x[:, :1] - x[:, 1:])).run(torch.tensor([[2.0, 2.0]]), total, method)
    assert torch.allclose(found.values, torch.tensor([[2.0, -2.0]]))
    assert found.gap[0] == 0
    assert found.complete
    assert "the target is the same at input and baseline" in found.notes[0]
    assert "NOT complete" not in repr(found)


def test_rounding_of_half_precision_is_told_as_such() -> None:
    model, x = gated().bfloat16(), numbers(1, 4, 6).bfloat16()
    found = InputAttribution(model).run(x, 1, "deeplift")
    assert found.rounding == 2**-7
    assert found.gap[0] > 1e-3
    assert found.complete
    assert "complete up to rounding: the model computes in numbers that are no finer than the gap" in repr(found)
    assert InputAttribution(gated()).run(numbers(1, 4, 6), 1, "deeplift").rounding == 2**-23
    broken = InputAttribution(made(lambda x: x.gather(1, x.argsort(1)) * torch.tensor([1.0, 3.0]))).run(
        torch.tensor([[2.0, 0.5]]), total, "deeplift", baseline=torch.tensor([[0.7, 0.8]])
    )
    assert "NOT complete: the sum is not the difference; see the notes\n" in repr(broken)


def test_a_sum_that_needs_more_gradients_says_so() -> None:
    short = InputAttribution(made(lambda x: torch.relu(40 * x - 39.1))).run(torch.tensor([[1.0]]), 0, steps=8, most=8)
    assert "see the notes, or take more gradients, most=" in repr(short)


# ---- inputs


class Unnamed(nn.Module):
    def __init__(self, words: bool) -> None:
        super().__init__()
        self.layer, self.words = nn.Linear(6, 3), words

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = self.layer(args[0])
        return out


class UnnamedToo(Unnamed):
    def forward(self, *args: Tensor, **settings: Any) -> Tensor:
        out: Tensor = self.layer(args[0])
        return out


@pytest.mark.parametrize(("kind", "told"), [(Unnamed, r"\*args: torch.Tensor"), (UnnamedToo, r"\*\*settings")])
def test_a_tensor_for_arguments_without_a_name_is_refused(kind: type[Unnamed], told: str) -> None:
    with pytest.raises(AnalyzerError, match=f"forward of {kind.__name__} takes .*{told}.*: no argument has a name"):
        InputAttribution(kind(True).eval()).run(X, 0)


MISFITS: list[tuple[Any, str]] = [
    (numbers(2, 5), r"Linear does not take these inputs, input float32 \[1, 5\]: mat1 and mat2.*of its widths and dtype"),
    (X.double(), r"does not take these inputs, input float64 \[1, 6\]"),
    (X * float("nan"), r"Site\('input:input'\) holds what is no finite number in example 0"),
    (X / 0, "holds what is no finite number"),
]


@pytest.mark.parametrize("method", ["ig", "deeplift", "occlusion", "saliency"])
@pytest.mark.parametrize(("given", "told"), MISFITS)
def test_inputs_that_do_not_fit_are_told(given: Tensor, told: str, method: str) -> None:
    with pytest.raises(AnalyzerError, match=told):
        InputAttribution(LINEAR).run(given, 0, method)


def test_a_target_that_is_no_number_is_told() -> None:
    with pytest.raises(AnalyzerError, match="class 0 is nan at the input: expected a finite number"):
        InputAttribution(made(lambda x: x.log())).run(-X[:1].abs(), 0, baseline=1.0)
    with pytest.raises(AnalyzerError, match="class 0 is -inf at the baseline: expected a finite number"):
        InputAttribution(made(lambda x: x.log())).run(X[:1].abs(), 0)


def test_inference_mode_outside_and_inside() -> None:
    expected = InputAttribution(LINEAR).run(X, 1).values
    with torch.inference_mode():
        inner = X * 1
        assert torch.equal(InputAttribution(LINEAR).run(X, 1).values, expected)
        assert torch.equal(InputAttribution(LINEAR).run(X, 1, baseline=inner[:1] * 0).values, expected)
        frozen = nn.Linear(6, 3).eval()
        with pytest.raises(
            AnalyzerError, match="The weights of Linear were made in inference mode, where torch takes no gr"
        ):
            InputAttribution(frozen).run(X, 1)
        assert InputAttribution(frozen).run(X, 1, "deeplift").complete
    assert torch.equal(InputAttribution(LINEAR).run(inner, 1).values, expected)


# ---- targets


def test_a_number_for_each_example_is_a_target() -> None:
    model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)).eval()
    found = InputAttribution(model).run(X, method="deeplift")
    assert torch.allclose(found.values, X * model[0].weight.detach(), atol=1e-6)
    assert found.target == ("the output", "the output")
    with pytest.raises(AnalyzerError, match="A number for each example is asked for by target=None"):
        InputAttribution(model).run(X, 0)


def test_outputs_by_name() -> None:
    def with_loss(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        scores = x @ numbers(6, 3)
        return {"loss": scores.sum(), "scores": scores}

    asking = InputAttribution(Fn(with_loss).eval())
    with pytest.raises(AnalyzerError, match=r"of loss \[\], scores \[1, 3\]. Expected .* lambda output: output\['scores'\]"):
        asking.run({"x": X}, 1)
    assert asking.run({"x": X}, lambda output: output["scores"][:, 1], "deeplift").complete

    def with_logits(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"loss": x.sum(), "logits": x @ numbers(6, 3)}

    found = InputAttribution(Fn(with_logits).eval()).run({"x": X}, 1, "deeplift")
    assert torch.allclose(found.values, X * numbers(6, 3)[:, 1], atol=1e-6)


def test_a_sum_over_examples_is_noted() -> None:
    found = InputAttribution(LINEAR).run(X, lambda output: output[:, 0].sum())
    assert found.complete
    assert found.notes == (
        "rows were run one by one: the target gives one number for several rows, as if their sum or mean were asked for",
    )


# ---- baselines


@pytest.mark.parametrize(
    "given",
    [
        0.5,
        np.float64(0.5),
        [0.5] * 6,
        (0.5,) * 6,
        [[0.5] * 6],
        np.full(6, 0.5),
        np.full(6, 0.5, ">f4"),
        [torch.full((6,), 0.5)],
        [torch.full((1, 6), 0.5)] * 2,
        torch.tensor(0.5),
    ],
    ids=[
        "number",
        "numpy number",
        "list",
        "tuple",
        "rows",
        "array",
        "array of another byte order",
        "tensors",
        "rows of tensors",
        "tensor of one",
    ],
)
def test_baselines_as_they_come(given: Any) -> None:
    expected = (X - 0.5) * LINEAR.weight[1].detach()
    for method in ("ig", "deeplift", "occlusion"):
        found = InputAttribution(LINEAR).run(X[:1], 1, method, baseline=given)
        assert torch.allclose(found.values, expected[:1], atol=1e-6)
        assert found.baseline == "given"


def test_as_many_baselines_in_a_list_as_examples_are_refused() -> None:
    with pytest.raises(AnalyzerError, match="baseline has 2 rows, and so many are the examples"):
        InputAttribution(LINEAR).run(X, 1, baseline=[X[0], X[1]])


# ---- what was given and would not be read, and what was assumed


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("deeplift", {"steps": 8}, "'deeplift' has no setting steps: expected some of rows, seed, progress"),
        ("ig", {"samples": 8, "cells": 2}, "'ig' has no setting samples, cells: expected some of steps, most, within, rows"),
        ("occlusion", {"within": 0.1}, "'occlusion' has no setting within: expected some of cells, rows, seed, progress"),
        ("lime", {"most": 9999}, "'lime' has no setting most: expected some of samples, cells"),
        ("saliency", {"cells": torch.arange(6)}, "'saliency' has no setting cells"),
        ("rollout", {"steps": 8}, "'rollout' has no setting steps"),
    ],
)
def test_settings_of_other_methods_are_refused(method: str, settings: dict[str, Any], told: str) -> None:
    asking = InputAttribution(LINEAR)
    for ask in (asking.run, asking.sanity):
        with pytest.raises(AnalyzerError, match=told):
            ask(X, 1, method, **settings)
    if "cells" not in settings:
        with pytest.raises(AnalyzerError, match=told.split(":")[0]):
            asking.curves(X, 1, method, **settings)
    with pytest.raises(AnalyzerError, match="'an attribution' has no setting steps: expected some of cells, rows"):
        asking.curves(X, 1, asking.run(X, 1, "deeplift"), steps=8)


@pytest.mark.parametrize("baseline", ["mean", 0.5])
@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("rollout", "'rollout' multiplies attention patterns"),
        ("saliency", "'saliency' is the gradient at the input"),
        ("input-x-gradient", "'input-x-gradient' is the gradient at the input"),
    ],
)
def test_methods_that_go_from_no_baseline_say_so(method: str, told: str, baseline: Any) -> None:
    asking = InputAttribution(gated())
    for ask in (asking.run, asking.sanity):
        with pytest.raises(AnalyzerError, match=told + r" and goes from no baseline. Leave baseline= out."):
            ask(numbers(1, 4, 6), 1, method, baseline=baseline)
    if method != "rollout":  # what is taken away there becomes the baseline
        assert len(asking.curves(numbers(1, 4, 6), 1, method, draws=2, baseline=baseline).deletion) == 1


def test_arrays_are_taken_in_the_numbers_of_the_model() -> None:
    asking, x = InputAttribution(gated()), numbers(2, 4, 6)
    wanted = asking.run(x, 1, "deeplift")
    for given in (x.numpy(), x.double().numpy(), x.numpy().astype(">f4"), {"x": x.double().numpy()}):
        assert torch.equal(asking.run(given, 1, "deeplift").values, wanted.values)
    ids = np.array([[3, 5, 1]])
    tokens = InputAttribution(Additive().eval()).run({"input_ids": ids}, 2, "deeplift").tokens
    assert tokens == (("3", "5", "1"),)
    with pytest.raises(AnalyzerError, match="Prompts are ndarray"):
        asking.run(np.array(["text"]), 1)


class Counted(Additive):
    """How often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(input_ids)


@pytest.mark.parametrize(("examples", "calls"), [(1, 7), (2, 1 + 2 * 6 + 1), (3, 1 + 3 * 6 + 1)])
def test_an_example_of_deeplift_costs_six_passes(examples: int, calls: int) -> None:
    """The place; of each example one with its value, two ends, both together, two recorded; all examples at once."""
    model, ids = Counted().eval(), torch.tensor([[3, 5, 1]]).expand(examples, -1)
    InputAttribution(model).run({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 2, "deeplift")
    assert model.calls == calls


@pytest.mark.parametrize("text", ["gate", "/silu#0", "input:x", "layers[0].resid_post", "embedding"])
def test_text_that_names_a_value_is_no_word(text: str) -> None:
    for target in (text, (text, 1), [text]):
        with pytest.raises(AnalyzerError, match=r"names a value of Gated, and text as a target is a word. Expected a site"):
            InputAttribution(gated(), Words()).run(numbers(1, 4, 6), target, "deeplift")


@pytest.mark.parametrize("method", ["ig", "deeplift", "occlusion", "kernel-shap", "saliency", "gradient-shap"])
def test_double_precision_stays(method: str) -> None:
    x, model = numbers(1, 6).double(), made(lambda x: x.pow(3).sum(1, keepdim=True)).double()
    found = InputAttribution(model).run(x, 0, method)
    assert found.values.dtype == torch.float64
    if method in ("deeplift", "occlusion"):
        assert torch.allclose(found.values, x**3, rtol=1e-13)
    whole = InputAttribution(Additive().eval().double()).run(torch.tensor([[3, 5]]), 1, "occlusion", at="input:input_ids")
    assert whole.values.dtype == torch.float64
    assert InputAttribution(LINEAR).run(X, 1, method).values.dtype == torch.float32


def test_what_three_dimensions_are_taken_for_is_told() -> None:
    asking, x = InputAttribution(gated()), numbers(1, 4, 6)
    told = "Site('input:x') [1, 4, 6] is taken for (examples, positions, units), with a score for each position"
    assert asking.run(x, 1, "deeplift").notes[0].startswith(told)
    assert asking.run(x, 1, "deeplift", at=TOKENS).notes == ()


# ---- what belongs to all examples, and what lies as a picture


class Placed(Additive):
    """Tokens by the weights of their positions, which belong to all examples."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        return (self.table(input_ids) * (position_ids + 1)[..., None]).sum(1)


def test_what_belongs_to_all_examples_is_not_cut_up() -> None:
    asking, ids = InputAttribution(Placed().eval()), torch.tensor([[1, 2, 3], [4, 5, 6], [7, 0, 1]])
    with pytest.raises(
        AnalyzerError, match=r"something else of the last example alone than among the others.*or position_ids"
    ):
        asking.run({"input_ids": ids, "position_ids": torch.arange(3)}, 1, "deeplift")
    several = asking.run({"input_ids": ids, "position_ids": torch.arange(3)[None]}, 1, "deeplift")
    alone = asking.run({"input_ids": ids[2:], "position_ids": torch.arange(3)}, 1, "deeplift")
    assert torch.equal(several.values[2:], alone.values)
    each = asking.run({"input_ids": ids, "position_ids": torch.arange(3).expand(3, -1)}, 1, "deeplift")
    assert torch.equal(each.values, several.values)


def test_four_dimensions_in_a_model_of_pictures_are_pictures_where_the_operations_tell() -> None:
    convolve = nn.Conv2d(3, 4, 3)

    def heads(picture: Tensor) -> Tensor:
        return (convolve(picture).flatten(2).mT.unflatten(2, (2, 2)).transpose(1, 2) * 1.5).tanh().sum((2, 3))

    asking = InputAttribution(made(heads))
    asking.model.add_module("convolve", convolve.eval())
    found = asking.run(numbers(1, 3, 6, 6), 1, "deeplift", at="convolve")
    assert (found.kind, found.scores.shape) == ("image", (1, 4, 4))
    found = asking.run(numbers(1, 3, 6, 6), 1, "deeplift", at="/mul#0")
    assert (found.kind, found.scores.shape) == ("values", (1, 2, 16, 2))
    with pytest.raises(AnalyzerError, match=r"baseline='mean' of Site\('/mul#0'\) .* nothing says over which dimensions"):
        asking.run(numbers(1, 3, 6, 6), 1, "deeplift", at="/mul#0", baseline="mean")


def test_cells_that_are_not_there_are_none() -> None:
    asking = InputAttribution(LINEAR)
    for cells in (torch.tensor([0, 0, 2, 7, 7, 7]), np.array([0, 0, 2, 7, 7, 7])):
        assert asking.run(X, 1, "occlusion", cells=cells).how == "3 cells"
        assert asking.run(X, 1, "kernel-shap", cells=cells).how == "all 8 sets of 3 cells"
