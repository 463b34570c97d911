"""Which dimension counts images: it is proven on two of them, wherever it stands, and what is not proven is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, FeatureVisualization, StyleTransfer, TopImages, images

GIVEN = torch.rand(8, 1, 8, 6, generator=torch.Generator().manual_seed(0))  # as many images as rows


class Rows(nn.Module):
    """Rows of pixels as tokens, of which a function makes something."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.line, self.out, self.function = nn.Linear(6, 4), nn.Identity(), function
        with torch.no_grad():
            for one in self.line.parameters():
                one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(1)))

    def forward(self, given: Tensor) -> Tensor:
        return self.out(self.function(self, self.line(given.squeeze(1))))


MOVED: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sequence first": (lambda m, t: t.transpose(0, 1) * 1, lambda v: v[..., 1].mean(0)),
    "sequence first, projected": (
        lambda m, t: m.line(t.transpose(0, 1).repeat(1, 1, 2)[..., :6]),
        lambda v: v[..., 1].mean(0),
    ),
    "last": (lambda m, t: t.permute(1, 2, 0).relu(), lambda v: v[:, 1].mean(0)),
    "logits, turned": (lambda m, t: t.mean(1).T, lambda v: v[1]),
    "rows and columns first": (lambda m, t: t[:, None].permute(2, 0, 1, 3) + 0, lambda v: v[..., 1].mean((0, 2))),
}


@pytest.mark.parametrize("name", MOVED)
def test_scores_are_those_of_images_wherever_they_stand(name: str) -> None:
    function, by_hand = MOVED[name]
    model = Rows(function).eval()
    eye = FeatureVisualization(model, size=(8, 6), channels=1)
    with torch.no_grad():
        wanted = by_hand(model(GIVEN))
    for given, expected in ((GIVEN, wanted), (GIVEN[:3], wanted[:3]), (GIVEN[4:5], wanted[4:5])):
        found = eye.scores(images.Channel("out", 1), given)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    made = eye.run([images.Channel("out", n % 4) for n in range(8)], steps=3, progress=False)
    shown = [eye.scores(images.Channel("out", n % 4), one[None])[0] for n, one in enumerate(made.images)]
    np.testing.assert_allclose(made.score, shown, rtol=1e-4)


def test_a_layout_that_names_the_images_is_obeyed_and_one_that_is_wrong_refused() -> None:
    model = Rows(MOVED["sequence first"][0]).eval()
    eye = FeatureVisualization(model, size=(8, 6), channels=1)
    site = fmr.Site("out", layout=("positions", "examples", "units"))
    run = fmr.run(model, GIVEN)["out"]
    np.testing.assert_allclose(eye.scores(images.Channel(site, 1), GIVEN), run[..., 1].mean(0), rtol=1e-5)
    np.testing.assert_allclose(eye.scores(images.Channel(site.at(positions=[2, 5]), 1), GIVEN), run[[2, 5], :, 1].mean(0))
    np.testing.assert_allclose(eye.scores(images.Channel(site.at(positions=2), 1), GIVEN), run[2, :, 1])
    wrong = fmr.Site("out", layout=("examples", "positions", "units"))
    with pytest.raises(
        AnalyzerError, match=r"'out' counts images by dimension 1, and its layout says dimension 0. Expected a"
    ):
        eye.scores(images.Channel(wrong, 1), GIVEN)
    with pytest.raises(
        AnalyzerError, match=r"and without a layout it would be dimension 0. Expected a fmr.Site whose layout"
    ):
        eye.scores(images.Channel(fmr.Site("out", positions=[2]), 1), GIVEN)
    with pytest.raises(AnalyzerError, match="is narrowed to some examples, and each image has a score"):
        eye.scores(images.Channel(fmr.Site("out", examples=0), 1), GIVEN)


def test_images_that_come_second_are_looked_for_and_compared() -> None:
    model = Rows(MOVED["sequence first"][0]).eval()
    run = fmr.run(model, GIVEN)["out"]
    top = TopImages(model, "out", k=1).update(GIVEN).result()
    np.testing.assert_allclose(top.values[:, 0], run.amax((0, 1)), rtol=1e-5)
    assert (top.numbers[:, 0] == run.amax(0).argmax(0).numpy()).all()
    eye = FeatureVisualization(model, size=(8, 6), channels=1)
    apart = eye.scores(images.Difference("out", run[:, 3:4]), GIVEN)
    assert int(apart.argmin()) == 3
    assert apart[3] == pytest.approx(0, abs=1e-6)
    style = StyleTransfer(model, "out", "out", size=(8, 6), channels=1).run(GIVEN[0], GIVEN[1], steps=1, progress=False)
    flat = [run[:, n] for n in (0, 1)]
    wanted = (flat[1] - flat[0]).square().mean() / flat[0].square().mean()
    np.testing.assert_allclose(style.content_null[0], wanted, rtol=1e-4)


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "turned round": (lambda m, t: t.flip(0), "'out' holds something else of an image beside another one than of it alone"),
    "less their mean": (lambda m, t: t - t.mean(0), "the images stand in another order there, or depend on each other"),
    "all in one": (lambda m, t: t.sum(0), r"'out' has shape \(8, 4\) for one image and \(8, 4\) for two, expected a row"),
    "rows of all": (lambda m, t: t.flatten(0, 1), r"has shape \(8, 4\) for one image and \(16, 4\) for two"),
    "pairs": (lambda m, t: t.mean(1) @ t.mean(1).T, r"has shape \(1, 1\) for one image and \(2, 2\) for two"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_row_for_each_image_is_refused(name: str) -> None:
    function, message = REFUSED[name]
    model = Rows(function).eval()
    eye = FeatureVisualization(model, size=(8, 6), channels=1)
    for ask in (
        lambda: eye.scores(images.Channel("out", 1), GIVEN),
        lambda: eye.run("out", steps=1, progress=False),
        lambda: TopImages(model, "out").update(GIVEN),
    ):
        with pytest.raises(AnalyzerError, match=message):
            ask()


def test_a_model_that_draws_numbers_or_takes_one_image_is_taken() -> None:
    noisy = FeatureVisualization(Rows(lambda m, t: t + torch.randn_like(t)).eval(), size=(8, 6), channels=1)
    assert np.isfinite(noisy.scores(images.Channel("out", 1), GIVEN)).all()
    single = FeatureVisualization(Rows(lambda m, t: t.view(1, 8, 4)).eval(), size=(8, 6), channels=1)
    assert single.run(images.Channel("out", 1), steps=2, progress=False).score.shape == (1,)


def test_a_model_that_counts_its_passes_is_refused() -> None:
    def counted(model: Any, value: Tensor) -> Tensor:
        model.passes = getattr(model, "passes", 0) + 1
        return value + model.passes

    eye = FeatureVisualization(Rows(counted).eval(), size=(8, 6), channels=1)
    with pytest.raises(AnalyzerError, match="'out' differs from pass to pass over the same images, by what the model keeps"):
        eye.scores(images.Channel("out", 1), GIVEN)
