"""Attribution to inputs: exact where the answer is known, complete where it is promised, and nothing left behind."""

import copy
import warnings
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from analyzers import AnalyzerError, InputAttribution
from analyzers.inputs import methods
from analyzers.inputs.result import Attribution
from tests.analyzers.inputs.models import TOKENS, Additive, Words, gated, made, numbers, own, reused
from tests.residue import model_state, random_state, torch_state

SAMPLED = {"lime": 1e-4, "kernel-shap": 1e-4, "gradient-shap": 1e-4}


def first(output: Tensor) -> Tensor:
    return output[:, 0]


# ---- known answers


@pytest.mark.parametrize("method", [name for name in methods.METHODS if name != "saliency"])
def test_a_linear_model_rests_on_weight_times_input(method: str) -> None:
    model, x = nn.Linear(4, 2).eval(), numbers(2, 4)
    if method == "input-x-gradient":
        model.bias.data.zero_()
    found = InputAttribution(model).run(x, 1, method, **own(method, samples=64))
    assert torch.allclose(found.values, x * model.weight[1].detach(), atol=SAMPLED.get(method, 1e-5))
    assert found.complete in (True, None)


def test_saliency_is_the_gradient() -> None:
    found = InputAttribution(made(lambda x: (x**2).sum(1, keepdim=True))).run(torch.tensor([[1.0, -3.0]]), first, "saliency")
    assert torch.equal(found.values, torch.tensor([[2.0, -6.0]]))


def test_the_score_of_a_token_or_pixel_is_the_length_of_its_gradient() -> None:
    """Behind a norm gradients sum to nothing over units, and a sum of them is rounding."""
    weight = numbers(4, 6)
    behind = made(lambda x: (F.layer_norm(x, (6,)) @ weight.T).tanh().sum(1))
    found = InputAttribution(behind).run(numbers(1, 3, 6, seed=1), 2, "saliency")
    assert float(found.values.sum(2).abs().max()) < 1e-5
    assert found.scores.allclose(found.values.pow(2).sum(2).sqrt())
    assert float(found.scores.min()) > 0.01
    assert "sum" not in repr(found)
    asking, picture = InputAttribution(reused()), numbers(1, 3, 12, 12)
    found = asking.run(picture, 1, "saliency")
    assert found.scores.allclose(found.values.pow(2).sum(1).sqrt())
    _, bar = found.plot().axes
    assert bar.get_ylim()[0] == 0  # sizes have no other half
    by_name, given = (asking.curves(picture, 1, one, draws=2) for one in ("saliency", found))
    assert np.array_equal(by_name.deletion, given.deletion)
    assert "sizes of the gradient: class 1" in found.plot().axes[0].get_title()
    plt.close("all")


def test_integrated_gradients_of_a_product_and_of_a_power() -> None:
    model = made(lambda x: x[:, :1] * x[:, 1:2] + x[:, 2:] ** 4)
    found = InputAttribution(model).run(torch.tensor([[2.0, 3.0, 2.0]]), first)
    assert torch.allclose(found.values, torch.tensor([[3.0, 3.0, 16.0]]), atol=1e-4)


def test_more_gradients_are_taken_where_the_sum_is_off() -> None:
    model = made(lambda x: torch.relu(40 * x - 39.1).sum(1, keepdim=True))
    found = InputAttribution(model).run(torch.tensor([[1.0]]), first, steps=8, within=0.01)
    assert found.complete
    assert abs(float(found.values) - 0.9) < 0.01
    assert int(found.how.split()[2]) > 8
    short = InputAttribution(model).run(torch.tensor([[1.0]]), first, steps=8, most=8)
    assert short.complete is False
    assert short.gap[0] > 0.01
    assert "gradients at 8 points in 1 piece" in short.how
    assert "NOT complete" in repr(short)


def test_kernel_shap_gives_the_shapley_values_of_a_game() -> None:
    model = made(lambda x: (x[:, 0] * x[:, 1] + torch.relu(x[:, 2] - x[:, 3]) + x[:, 3])[:, None])
    x = torch.tensor([[2.0, 1.0, 3.0, 1.5]])
    worth = []
    for order in permutations(range(4)):
        here, gains = torch.zeros(1, 4), [0.0] * 4
        for player in order:
            before = float(model(here))
            here[0, player] = x[0, player]
            gains[player] = float(model(here)) - before
        worth.append(gains)
    found = InputAttribution(model).run(x, first, "kernel-shap")
    assert np.allclose(found.values[0], np.mean(worth, 0), atol=1e-6)
    assert found.how == "all 16 sets of 4 cells"
    assert found.complete
    some = InputAttribution(model).run(x, first, "kernel-shap", samples=15)
    assert some.complete
    assert not np.allclose(some.values[0], np.mean(worth, 0), atol=1e-3)
    assert some.how.startswith("15 samples of 4 cells, of which each is off by ")


def test_occlusion_of_cells_is_what_is_lost_without_them() -> None:
    model, picture = reused(), numbers(1, 3, 8, 8)
    found = InputAttribution(model).run(picture, 2, "occlusion", cells=2)
    for row, column in ((0, 0), (0, 4), (4, 4)):
        without = picture.clone()
        without[:, :, row : row + 4, column : column + 4] = 0
        lost = (model(picture) - model(without))[0, 2]
        assert torch.allclose(found.scores[0, row : row + 4, column : column + 4].sum(), lost, atol=1e-5)


@pytest.mark.parametrize("method", ["ig", "deeplift", "kernel-shap", "occlusion"])
def test_tokens_that_add_up_have_their_own_numbers(method: str) -> None:
    model = Additive().eval()
    ids = torch.tensor([[3, 5, 1], [2, 2, 7]])
    found = InputAttribution(model).run({"input_ids": ids}, [1, (0, 2)], method, at="table")
    table = model.table.weight.detach()
    expected = torch.stack([table[ids[0], 1], table[ids[1], 0] - table[ids[1], 2]])
    assert torch.allclose(found.scores, expected, atol=1e-5)
    assert found.kind == "tokens"
    assert found.target == ("class 1", "class 0 less class 2")


# ---- completeness of what captum's own cannot do


@pytest.mark.parametrize("build", [reused, gated], ids=["reused ReLU6 and maxima", "gates, norms and a softmax"])
def test_deeplift_is_complete_on_whole_networks(build: Any) -> None:
    model = build()
    x = numbers(2, 3, 8, 8) if build is reused else numbers(2, 4, 6)
    for baseline in ("zero", "mean"):
        at = None if build is reused else TOKENS
        found = InputAttribution(model).run(x, [2, (0, 1)], "deeplift", at=at, baseline=baseline)
        assert float(found.gap.max()) < 1e-4
        assert found.notes == ()
        assert found.complete


def test_captums_deeplift_misses_where_this_does_not() -> None:
    captum = pytest.importorskip("captum.attr")
    model, x = reused(), numbers(1, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.DeepLift(model).attribute(x, torch.zeros_like(x), target=2)
    difference = float((model(x) - model(torch.zeros_like(x))).detach()[0, 2])
    assert abs(float(theirs.detach().sum()) - difference) > 0.05 * abs(difference)


@pytest.mark.parametrize("method", ["ig", "deeplift"])
@pytest.mark.parametrize("at", ["transformer.wte", "layers[1].resid_post", "transformer.h.2.mlp", "attention[2].z"])
def test_any_place_has_a_complete_sum(loaded: tuple[nn.Module, Any], method: str, at: str) -> None:
    model, tokenizer = loaded
    settings = own(method, steps=16)
    found = InputAttribution(model, tokenizer).run(
        "Junel Dunoth grew up in", ("Brigost", "Oranby"), method, at=at, **settings
    )
    assert found.complete, found
    assert found.notes == ()
    assert found.kind == ("values" if at == "attention[2].z" else "tokens")


def test_a_part_of_a_value_is_a_place(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    structure = fmr.locate(fmr.run(model, **tokenizer("Junel Dunoth grew up in", return_tensors="pt")))
    site = structure.layers[2].resid_post.at(positions=-1)
    for method in ("ig", "deeplift", "occlusion"):
        settings = own(method, steps=16)
        found = InputAttribution(model, tokenizer).run("Junel Dunoth grew up in", "Brigost", method, at=site, **settings)
        assert found.values.shape == (1, 128)
        assert found.complete in (True, None)
        assert found.kind == "values"


def test_what_a_unit_rests_on(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    run = fmr.run(model, **tokenizer("Junel Dunoth grew up in", return_tensors="pt"))
    unit = fmr.locate(run).mlps[1].post.at(positions=2, units=7)
    asking = InputAttribution(model, tokenizer)
    for method in ("ig", "deeplift"):
        found = asking.run("Junel Dunoth grew up in", unit, method)
        assert found.complete
        assert torch.allclose(found.output[0], run[unit].double(), atol=1e-5)
        assert float(found.scores[0, 3:].abs().max()) < 1e-5  # later tokens are not seen


# ---- targets and baselines


def test_what_the_model_puts_first_is_the_target_where_none_is_given(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    found = InputAttribution(model, tokenizer).run(
        ["Junel Dunoth grew up in", "Junel Dunoth speaks"], method="input-x-gradient"
    )
    assert found.target[0] == "'Brigost'"
    assert len(set(found.target)) == 2


def test_padding_changes_nothing(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    short, long = "Junel Dunoth speaks", "Junel Dunoth grew up in"
    both = InputAttribution(model, tokenizer).run([short, long], "Brigost", "deeplift")
    alone = InputAttribution(model, tokenizer).run(short, "Brigost", "deeplift")
    assert both.of_tokens(0)[0] == alone.of_tokens(0)[0]
    assert np.allclose(both.of_tokens(0)[1], alone.of_tokens(0)[1], atol=1e-3)


def test_metrics_and_functions_are_targets(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    asking, text = InputAttribution(model, tokenizer), "Junel Dunoth grew up in"
    pair = asking.run(text, ("Brigost", "Oranby"), "deeplift")
    metric = asking.run(text, fmr.sweeps.logit_diff("Brigost", "Oranby"), "deeplift")
    assert torch.allclose(pair.values, metric.values, atol=1e-4)
    bent = asking.run(text, lambda output: output.logits[:, -1].softmax(-1)[:, 7] ** 2, "deeplift")
    assert bent.complete


def test_baselines_of_a_data_set_are_averaged() -> None:
    model, x = gated(), numbers(1, 4, 6)
    bases = numbers(3, 4, 6, seed=4)
    every = InputAttribution(model).run(x, 1, "deeplift", baseline=bases)
    single = [InputAttribution(model).run(x, 1, "deeplift", baseline=one) for one in bases]
    assert torch.allclose(every.values, torch.stack([one.values for one in single]).mean(0), atol=1e-6)
    assert torch.allclose(every.base[0], torch.stack([one.base[0] for one in single]).mean())
    assert "mean over 3 baselines" in every.how
    drawn = InputAttribution(model).run(x, 1, "gradient-shap", baseline=bases, samples=400)
    assert drawn.gap[0] < 0.25


def test_baselines_by_name(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    text = "Junel Dunoth grew up in"
    asking = InputAttribution(model, tokenizer)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    table = model.get_parameter("transformer.wte.weight").detach()
    padded = asking.run(text, 5, "deeplift", baseline="padding")
    given = asking.run(text, 5, "deeplift", baseline=table[torch.full_like(ids, tokenizer.pad_token_id)])
    assert torch.equal(padded.values, given.values)
    other = asking.run(text, 5, "deeplift", baseline=["Oskus Stridling grew up in", text])
    assert torch.allclose(
        other.base,
        (
            model(**tokenizer("Oskus Stridling grew up in", return_tensors="pt")).logits[0, -1, 5]
            + model(**tokenizer(text, return_tensors="pt")).logits[0, -1, 5]
        ).double()
        / 2,
    )
    picture = numbers(1, 3, 12, 12)
    blurred = InputAttribution(reused()).run(picture, 1, "deeplift", baseline="blur")
    assert blurred.complete


def test_a_blur_keeps_an_even_picture() -> None:
    from analyzers.inputs.baselines import blur

    assert torch.allclose(blur(torch.full((1, 3, 9, 12), 2.0)), torch.full((1, 3, 9, 12), 2.0), atol=1e-5)
    assert blur(numbers(1, 3, 30, 30)).std() < 0.75


# ---- models as they are


def test_rows_that_mix_are_run_one_by_one() -> None:
    model = made(lambda x: (x - x.mean(0)).pow(2).sum(1, keepdim=True) + x.sum(1, keepdim=True))
    found = InputAttribution(model).run(torch.tensor([[1.0, 2.0]]), first, "occlusion")
    assert torch.allclose(found.values, torch.tensor([[1.0, 2.0]]))
    assert found.notes == ("rows were run one by one: rows of the model are not independent",)


def test_a_model_that_takes_one_example_is_run_one_by_one() -> None:
    def alone(x: Tensor) -> Tensor:
        assert len(x) == 1, "one at a time"
        return (x**2).sum(1, keepdim=True)

    found = InputAttribution(made(alone)).run(torch.tensor([[1.0, 2.0]]), first)
    assert torch.allclose(found.values, torch.tensor([[1.0, 4.0]]), atol=1e-5)
    assert "one at a time" in found.notes[0]


@pytest.mark.parametrize("method", [*methods.METHODS, "rollout"])
def test_nothing_is_left_behind(loaded: tuple[nn.Module, Any], method: str) -> None:
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    model.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
    grads = [one.requires_grad for one in model.parameters()]
    weights = copy.deepcopy(model.state_dict())
    before = torch_state(), model_state(model), random_state(), np.random.get_state()[1].tolist()
    InputAttribution(model, tokenizer).run("Junel Dunoth speaks", "Brigost", method, **own(method, samples=20, steps=8))
    assert before[1] == model_state(model)
    assert before[0] == torch_state()
    assert before[2:] == (random_state(), np.random.get_state()[1].tolist())
    assert grads == [one.requires_grad for one in model.parameters()]
    assert all(one.grad is None for one in model.parameters())
    assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("method", methods.METHODS)
def test_nothing_is_left_behind_by_a_failure(loaded: tuple[nn.Module, Any], method: str) -> None:
    model, tokenizer = loaded
    before = torch_state(), model_state(model), random_state(), np.random.get_state()[1].tolist()
    calls = []

    def breaks(output: Any) -> Tensor:
        calls.append(1)
        if len(calls) > (0 if method == "saliency" else 3):
            raise ZeroDivisionError("a target of the user's")
        found: Tensor = output.logits[:, -1, 3]
        return found

    with pytest.raises(ZeroDivisionError):
        InputAttribution(model, tokenizer).run("Junel Dunoth speaks", breaks, method, **own(method, samples=20, rows=2))
    assert before == (torch_state(), model_state(model), random_state(), np.random.get_state()[1].tolist())


def test_the_same_seed_draws_the_same() -> None:
    asking, x = InputAttribution(gated()), numbers(1, 4, 6)
    for method in ("gradient-shap", "lime", "kernel-shap"):
        one, same, other = (asking.run(x, 1, method, samples=15, seed=seed).values for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_half_precision_is_attributed_too() -> None:
    model = gated().to(torch.bfloat16)
    found = InputAttribution(model).run(numbers(1, 4, 6).bfloat16(), 1, "deeplift")
    assert found.gap[0] < 0.1
    assert found.values.dtype == torch.float32


def test_words_in_place_of_a_tokenizer() -> None:
    found = InputAttribution(Additive().eval(), Words()).run("3 5 1", 2, "deeplift", at="table", baseline="padding")
    assert isinstance(found, Attribution)
    assert found.of_tokens()[0] == ("3", "5", "1")


@pytest.mark.parametrize("method", ["ig", "deeplift", "occlusion"])
def test_gradients_that_are_off_outside_are_on_inside(method: str) -> None:
    x, settings = numbers(1, 4, 6), own(method, cells=torch.arange(24).view(4, 6))
    expected = InputAttribution(gated()).run(x, 1, method, **settings).values
    with torch.no_grad():
        found = InputAttribution(gated()).run(x, 1, method, **settings)
    assert torch.equal(found.values, expected)
    model = gated()
    with torch.inference_mode():
        found = InputAttribution(model).run(x * 1, 1, method, **settings)
    assert torch.allclose(found.values, expected, atol=1e-6)


# ---- a user's own tensors, and models that keep a state


class InPlace(nn.Module):
    """A model that writes to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.mul_(2)).tanh()
        return out


@pytest.mark.parametrize("method", ["ig", "deeplift", "occlusion", "kernel-shap", "saliency", "gradient-shap"])
def test_a_model_that_writes_to_its_input_leaves_the_users(method: str) -> None:
    model, x, base = InPlace().eval(), numbers(3, 6), numbers(1, 6, seed=4)
    given, before = x.clone(), base.clone()
    start = {} if method == "saliency" else {"baseline": base}
    found = InputAttribution(model).run(given, 1, method, **start)
    assert torch.equal(given, x)
    assert torch.equal(base, before)
    plain = made(lambda y: model.layer(y * 2).tanh())
    assert torch.allclose(found.values, InputAttribution(plain).run(x, 1, method, **start).values, atol=1e-6)
    InputAttribution(model).curves(given, 1, "deeplift", draws=2)
    assert torch.equal(given, x)
    sane = InputAttribution(model).sanity(given, 1, method, stages=1, **start)
    assert torch.equal(given, x)
    assert sane.outputs[0] == pytest.approx(float(found.output[0]))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_gradients_at_drawn_points_of_half_precision(kind: torch.dtype) -> None:
    model, x = nn.Linear(6, 2).to(kind).eval(), numbers(2, 6).to(kind)
    found = InputAttribution(model).run(x, 1, "gradient-shap")
    assert torch.allclose(found.values, (x * model.weight[1]).detach().float(), atol=0.02)


def test_sanity_in_inference_mode() -> None:
    model, x = gated(), numbers(1, 4, 6)
    expected = InputAttribution(model).sanity(x, 1, "ig", stages=2, steps=8)
    with torch.inference_mode():
        found = InputAttribution(model).sanity(x * 1, 1, "ig", stages=2, steps=8)
        curves = InputAttribution(model).curves(x * 1, 1, "ig", draws=2, steps=8)
    assert np.allclose(found.signed, expected.signed)
    assert curves.cells == 4
    assert not any(one.is_inference() for one in model.parameters())


class Counting(nn.Module):
    """A model that counts how often it was run, and gives more each time or not."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.layer, self.used = nn.Linear(5, 2), used
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        out: Tensor = self.layer(x) * (self.count if self.used else 1)
        return out


AGAIN = (
    "rows were run one by one: the same input gives other numbers when it is run again, and attributions are off by as much"
)


def test_a_state_that_changes_the_answer_is_told() -> None:
    with pytest.raises(fmr.FmrError, match="Counting changes its buffer 'count' as it runs, and gives other numbers"):
        InputAttribution(Counting(True).eval()).run(numbers(2, 5), 1, "ig")
    assert InputAttribution(Counting(True).eval()).run(numbers(2, 5), 1, "occlusion").notes == (AGAIN,)
    quiet = InputAttribution(Counting(False).eval()).run(numbers(2, 5), 1, "ig")
    assert quiet.complete
    assert quiet.notes == ()


def test_noise_is_told_as_what_it_is() -> None:
    noisy = made(lambda x: nn.functional.dropout(x, 0.5, True).sum(1, keepdim=True))
    for method in ("ig", "occlusion"):
        assert (
            InputAttribution(noisy).run(numbers(1, 60), 0, method, **own(method, cells=torch.arange(60) // 9)).notes[0]
            == AGAIN
        )


def test_the_place_is_where_the_token_ids_are_looked_up() -> None:
    """In a model of which no structure is known, and in one that has two streams of tokens."""
    ids = torch.tensor([[3, 5, 1]])
    found = InputAttribution(Additive().eval()).run({"input_ids": ids}, 2, "deeplift")
    assert (found.place, found.tokens) == ("Site('table/embedding#0')", (("3", "5", "1"),))
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=20, **sizes)).eval()
    both = {"input_ids": ids, "decoder_input_ids": torch.tensor([[0, 4]])}
    found = InputAttribution(model).run(both, 2, "input-x-gradient")
    assert found.place == "Site('encoder.embed_tokens/embedding#0')"


def test_token_ids_of_another_name_are_looked_up_in_one_place() -> None:
    class Told(Additive):
        def forward(self, words: Tensor, kinds: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(words) if kinds is None else super().forward(words) + super().forward(kinds)

    model, ids = Told().eval(), torch.tensor([[3, 5, 1]])
    found = InputAttribution(model).run(ids, 2, "deeplift")
    assert (found.place, found.kind, found.notes) == ("Site('table/embedding#0')", "tokens", ())
    assert torch.allclose(found.scores[0], model.table.weight[ids[0], 2])
    assert found.tokens == (("3", "5", "1"),)
    with pytest.raises(AnalyzerError, match=r"none is called input_ids, and 2 places in Told look them up. Say where"):
        InputAttribution(model).run({"words": ids, "kinds": ids}, 2, "deeplift")


def test_a_model_that_overwrites_what_its_gradient_needs_is_told() -> None:
    def overwrites(x: Tensor) -> Tensor:
        y = x.exp()
        out = y.sum(1, keepdim=True)
        y += 1
        return out + y[:, :1]

    asking, x = InputAttribution(made(overwrites)), numbers(1, 4)
    with pytest.raises(
        AnalyzerError, match=r"takes no gradient of class 0 at .* modified by an inplace operation\. Expected"
    ):
        asking.run(x, 0, "ig")
    assert asking.run(x, 0, "deeplift").complete


def test_the_values_of_other_inputs_lie_as_those_of_the_input_do() -> None:
    class Before(Additive):
        """Positions in front of examples."""

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids.T.contiguous()).sum(0)

    asking, ids, other = InputAttribution(Before().eval(), Words()), torch.tensor([[3, 5, 1]]), torch.tensor([[2, 2, 7]])
    table = asking.model.table.weight
    found = asking.run({"input_ids": ids}, 2, "deeplift", baseline={"input_ids": other})
    assert torch.allclose(found.values[0, :, 0].sum(-1), table[ids[0], 2] - table[other[0], 2])
    padded = asking.run({"input_ids": ids}, 2, "deeplift", baseline="padding")
    assert torch.allclose(padded.values[0, :, 0].sum(-1), table[ids[0], 2] - table[0, 2])


def test_a_value_that_is_said_to_lie_in_another_way_is_not_summed() -> None:
    asking, sound = InputAttribution(made(lambda x: x.mean(2))), numbers(1, 2, 5)
    for layout, kind in ((("examples", "units", "positions"), "values"), (("examples", "positions", "units"), "tokens")):
        found = asking.run(sound, 1, "saliency", at=fmr.Site("input:x", layout=layout))
        assert (found.kind, found.scores.shape) == (kind, (1, 2, 5) if kind == "values" else (1, 2))
    last = InputAttribution(made(lambda x: x.mean((1, 2)))).run(numbers(1, 6, 6, 3), 1, "saliency")
    assert "is read as (examples, colours, height, width)" in last.notes[0]


def test_integrated_gradients_close_over_the_mean_of_baselines() -> None:
    model, x = made(lambda x: torch.relu(3 * x - 1).sum(1, keepdim=True)), torch.tensor([[0.9]])
    bases = torch.tensor([[0.0], [1.79], [0.02]])
    found = InputAttribution(model).run(x, 0, steps=8, baseline=bases)
    assert found.complete
