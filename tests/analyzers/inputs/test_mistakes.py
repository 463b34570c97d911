"""What cannot be attributed is refused in words."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, Attribution, InputAttribution
from tests.analyzers.inputs.models import Additive, Twice, Words, gated, made, numbers, reused

X, PICTURE = numbers(2, 4, 6), numbers(1, 3, 8, 8)
IDS = {"input_ids": torch.tensor([[3, 5, 1]])}


class Two(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.layer(left) + right
        return out


def values() -> Any:
    return asking(nn.Linear(5, 3).eval()).run(numbers(3, 5), 1, "deeplift")


def asking(model: nn.Module | None = None) -> InputAttribution:
    return InputAttribution(gated() if model is None else model)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: asking(torch.compile(gated(), backend="eager")).run(X, 1),
            "The model is compiled, and .* underneath, model._orig_mod.",
        ),
        (lambda: asking().run(X, 3), "There is no class 3: the output has 3. Expected one from 0 to 2"),
        (lambda: asking().run(X, -1), "There is no class -1: the output has 3"),
        (lambda: asking().run(X, 1.5), r"target=1\.5 is no class: expected a class or a token id, a word, a pair"),
        (lambda: asking().run(X, True), "target=True is no class"),
        (lambda: asking().run(X, "dog"), "The answer 'dog' is text, and there is no tokenizer"),
        (lambda: asking().run(X, (0, 1, 2)), r"target=\(0, 1, 2\): expected a class"),
        (lambda: asking().run(X, [0, 1, 2]), "target has 3 entries for 2 examples: expected one for all of them, or a list"),
        (lambda: asking().run(X, {"class": 1}), "is no class"),
        (lambda: asking().run(X, fmr.sweeps.logit_diff), "metric is logit_diff itself, not what it returns"),
        (lambda: asking().run(X, lambda output: output), r"The target returned shape \(1, 3\), expected one number"),
        (lambda: asking().run(X, lambda output: "a"), "The target returned str, expected one number or one for each"),
        (lambda: asking().run(torch.tensor(1.0), 1), "The tensor given is of no dimension: expected a dense one"),
        (lambda: asking().run(X.to("meta"), 1), "The tensor given is on meta, without numbers: expected a dense one"),
        (lambda: asking().run({"x": X.to_sparse()}, 1), r"The tensor x is torch.sparse_coo: expected a dense one"),
        (
            lambda: asking(Two().eval()).run({"left": numbers(3, 4), "right": numbers(2, 2)}, 1),
            r"The target returned shape \(2,\).* The inputs have different numbers of rows, left 3, right 2",
        ),
        (lambda: values().strongest("a"), "many='a': expected a whole number from 0 on"),
        (lambda: values().strongest(1.5), r"many=1\.5: expected a whole number from 0 on"),
        (lambda: values().strongest(-1), "many=-1: expected a whole number from 0 on"),
        (lambda: values().of_tokens(), r"An attribution to values has no tokens: its numbers are scores\[0\], or table\(\)"),
        (lambda: values().plot("x"), "ax is a str: expected axes of matplotlib, or None"),
        (lambda: asking().sanity(X, 1, "deeplift", stages=1).plot("x"), "ax is a str: expected axes of matplotlib"),
        (lambda: asking().curves(X, 1, "deeplift", draws=1).plot("x"), "ax is a str: expected axes of matplotlib"),
        (lambda: Attribution.of_circuit(3), "circuit is a int: expected a Circuit"),
        (lambda: asking().sanity(X, 1, bogus=3), "There is no setting bogus: expected some of steps, most, within"),
        (lambda: asking().curves(X, 1, bogus=3), "There is no setting bogus"),
        (lambda: asking().sanity(X, 1, asking().run(X, 1, "deeplift")), "method=a Attribution: expected one of 'ig'"),
        (lambda: asking().run(X, 1, at="layers[-1].resid_post"), r"fmr.locate found no layers\[-1\].resid_post in Gated"),
        (
            lambda: asking().curves(X, 2, asking().run(X, 1, "deeplift")),
            "method is an attribution of class 1, and the target of example 0 is class 2. Expected the same: target=",
        ),
        (
            lambda: asking().curves(X, 1, asking().run(X, 1, "deeplift", at="up"), at="gate"),
            r"method is an attribution to Site\('up'\), and the place is Site\('gate'\)",
        ),
        (lambda: asking().run(X, 1, "gradcam"), "method='gradcam': expected one of 'ig'.* 'rollout'"),
        (lambda: asking().run(X, 1, steps=0), "steps=0: expected a whole number from 1 on"),
        (lambda: asking().run(X, 1, within=0), "within=0: expected the share that a sum may be off"),
        (lambda: asking().run(X, 1, samples=1.5), r"samples=1\.5: expected a whole number"),
        (lambda: asking().run(X, 1, baseline="black"), "baseline='black': expected 'zero', 'mean', 'blur', 'padding'"),
        (lambda: asking().run(X, 1, baseline=numbers(4, 5)), r"The baseline has shape \[4, 5\], and the value \[1, 4, 6\]"),
        (lambda: asking().run(X, 1, baseline=numbers(0, 4, 6)), r"The baseline has shape \[0, 4, 6\]"),
        (
            lambda: asking().run(X, 1, baseline=None),
            "baseline=None: expected 'zero', 'mean', 'blur', 'padding', a number, a t",
        ),
        (lambda: asking().run(X, 1, baseline=True), "baseline=True: expected 'zero'"),
        (lambda: asking().run(X, 1, baseline=[X[0], X[:, 0]]), "baseline=a list: expected 'zero'"),
        (lambda: asking().run(X, 1, baseline=float("nan")), "The baseline holds what is no number"),
        (lambda: asking().run(X, 1, baseline=X[:1] / 0), "The baseline holds what is no number"),
        (lambda: asking().run(X, 1, baseline=X[:1].to_sparse()), r"The baseline is torch.sparse_coo: expected a dense"),
        (
            lambda: asking().run(X, 1, baseline=X[:1].to("meta")),
            "The baseline is on meta, without numbers: expected a dense",
        ),
        (lambda: asking().run(X, 1, baseline="blur"), r"baseline='blur' of a value of shape \[1, 4, 6\]: expected pictures"),
        (lambda: asking().run(X, 1, baseline="padding"), "there is no tokenizer with one. Take baseline='zero'"),
        (lambda: asking().run(X, 1, at="nowhere"), "nowhere"),
        (lambda: asking().run(X, 1, at="layers[7].resid_post"), r"fmr.locate found no layers\[7\].resid_post in Gated"),
        (lambda: asking().run(X, fmr.Site("up")), r"The target Site\('up'\) holds 48 numbers: expected one, as .at\("),
        (lambda: asking(reused()).run(PICTURE, 1, "occlusion", cells=0), "cells=0: expected how many lie along a side"),
        (lambda: asking(reused()).run(PICTURE, 1, "lime", cells=PICTURE), "cells is a float32 tensor of shape"),
        (lambda: asking(reused()).run(PICTURE, 1, "kernel-shap", cells=1), "There is one cell"),
        (lambda: asking(reused()).run(PICTURE, 1, "lime", samples=10), "samples=10 for 49 cells"),
        (
            lambda: asking(nn.Linear(300, 2).eval()).run(numbers(1, 300), 1, "occlusion"),
            "300 numbers, and each would be a cell",
        ),
        (lambda: asking(nn.Linear(4, 2)).run(numbers(1, 4), 1), r"Linear is in train mode.* call model.eval\(\)"),
        (lambda: asking(Twice().eval()).run(IDS, 1), "fmr.locate found no embedding of tokens in Twice. Say where"),
        (
            lambda: asking(made(lambda x: x.round())).run(torch.tensor([[3.0, 1.0]]), 0),
            "The gradient of class 0 is zero at all .* goes in steps",
        ),
        (lambda: asking().run(X, 1, most=8), "most=8 is less than steps=64, to begin with. Expected as many"),
        (lambda: asking().curves(X, 1, points=1), "points=1: expected a whole number from 2 on"),
        (lambda: asking(Additive().eval()).run(IDS, 1, at="input:input_ids"), "holds int64, which has no derivative"),
        (
            lambda: asking(Additive().eval()).run(
                {"input_ids": IDS["input_ids"]}, 1, at="table", baseline={"input_ids": IDS["input_ids"][:, :2]}
            ),
            r"The baseline has shape \[1, 2, 4\], and the value \[1, 3, 4\].*as many tokens",
        ),
        (
            lambda: asking(reused()).run(PICTURE, 1, "rollout"),
            "fmr.locate found no layers in Reused, along which a rollout goes",
        ),
        (lambda: asking().run(X, 1, "rollout", at="up"), "at='up': a rollout goes from the end of the stream"),
        (
            lambda: asking().curves(X, 1, asking().run(X[:1], 1, "deeplift")),
            r"of shape \[1, 4, 6\], and the value at .* is \[2, 4, 6\]",
        ),
        (lambda: asking().curves(X, 1, points=0), "points=0: expected a whole number"),
        (lambda: asking().sanity(X, 1, stages=0), "stages=0: expected a whole number"),
        (lambda: asking(made(lambda x: x)).sanity(numbers(1, 3), 1), "Single reads no parameter in this run"),
        (
            lambda: asking(made(lambda x: x)).curves(numbers(1, 3), 1, "deeplift", baseline=numbers(1, 3)),
            "is .* at the input and at the baseline",
        ),
    ],
)
def test_a_mistake_is_told_what_was_expected(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(fmr.FmrError, match=message):
        mistake()


DEAD: dict[str, Callable[[Tensor], Tensor]] = {
    "argmax": lambda x: x.argmax(1, keepdim=True).float(),
    "detached": lambda x: x.detach() * 2,
    "rounded": lambda x: x.long().float(),
    "compared": lambda x: (x > 0).float(),
}


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("method", ["ig", "saliency", "gradient-shap"])
def test_what_is_not_differentiable_is_refused(name: str, method: str) -> None:
    with pytest.raises(AnalyzerError, match=r"has no gradient at Site\('input:x'\).*method='occlusion' needs no gradient"):
        InputAttribution(made(DEAD[name])).run(numbers(1, 3), 0, method)
    found = InputAttribution(made(DEAD[name])).run(numbers(1, 3), 0, "occlusion")
    assert len(found.values) == 1


class Aside(nn.Module):
    """A layer whose output is not used for anything, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        out: Tensor = self.used(x)
        return out


@pytest.mark.parametrize("method", ["ig", "saliency"])
def test_a_place_that_the_gradient_does_not_reach_is_refused(method: str) -> None:
    with pytest.raises(
        AnalyzerError, match=r"The gradient of class 1 does not reach Site\('idle'\)|has no gradient at Site\('idle'\)"
    ):
        InputAttribution(Aside().eval()).run(numbers(1, 3), 1, method, at="idle")
    with pytest.raises(AnalyzerError, match=r"class 1 does not depend on Site\('idle'\) through any operation"):
        InputAttribution(Aside().eval()).run(numbers(1, 3), 1, "deeplift", at="idle")


def test_a_baseline_on_another_path_is_refused() -> None:
    model = made(lambda x: x.relu() if x.sum() > 0 else x.tanh())
    with pytest.raises(AnalyzerError, match="computes the baseline by other operations than the input: its Python goes by"):
        InputAttribution(model).run(numbers(1, 3).abs(), 0, "deeplift")


def test_where_tokens_go_to_other_experts_is_told() -> None:
    def routed(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        first = (x[0, :, 0] > 0).nonzero()[:, 0]
        return out.index_add(1, first, x[:, first] * 2).sum((1, 2))[:, None]

    x, base = numbers(1, 4, 6), numbers(1, 4, 6)
    x[0, :, 0], base[0, :, 0] = torch.tensor([1.0, -1, 1, 1]), torch.tensor([1.0, -1, -1, -1])
    told = r"as where tokens are sent to experts; first \S+ \(\w+ \[3.*\]\), and \S+ \(\w+ \[1.*\]\) there"
    with pytest.raises(AnalyzerError, match=told):
        InputAttribution(made(routed)).run(x, 0, "deeplift", baseline=base)


@pytest.mark.parametrize("method", ["deeplift", "deeplift-reveal-cancel", "ig"])
def test_a_leaky_relu_that_draws_in_train_mode_alone_is_followed(method: str) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.RReLU(), nn.Linear(4, 2)).eval()
    plain = nn.Sequential(model[0], nn.LeakyReLU((1 / 8 + 1 / 3) / 2), model[2]).eval()
    found, expected = (InputAttribution(one).run(numbers(2, 5), 1, method) for one in (model, plain))
    assert found.complete
    assert found.notes == ()
    assert torch.allclose(found.values, expected.values, atol=1e-6)


def test_targets_of_an_array_are_taken() -> None:
    model, x = nn.Linear(5, 3).eval(), numbers(3, 5)
    found = InputAttribution(model).run(x, np.array([0, 1, 2]), "deeplift")
    assert torch.equal(found.values, InputAttribution(model).run(x, [0, 1, 2], "deeplift").values)


def test_what_draws_or_hides_is_refused() -> None:
    drawing = made(lambda x: nn.functional.dropout(x, 0.5, True))
    with pytest.raises(AnalyzerError, match="drew random numbers, so that nothing can be followed back through it"):
        InputAttribution(drawing).run(numbers(1, 3), 0, "deeplift")


def test_words_need_to_be_tokens() -> None:
    with pytest.raises(AnalyzerError, match="The answer '1 2' is 2 tokens"):
        InputAttribution(Additive().eval(), Words()).run("3 5 1", "1 2", at="table")


def test_captum_that_is_not_there_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(AnalyzerError, match=r"done by captum, which is not installed.*fmr\[analysis\]"):
        asking().run(X, 1)
    assert asking().run(X, 1, "deeplift").complete
