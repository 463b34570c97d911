"""Feature visualisation as a user calls it: what it finds in networks made by hand, leaves alone, and refuses."""

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers import AnalyzerError, FeatureVisualization, StyleTransfer, TopImages, Visualized, images
from analyzers.images.ascent import adam
from analyzers.images.viewing import photo
from tests.analyzers.images.models import ANGLES, Chain, Dead, Edges, Named, Patches, orientation
from tests.residue import model_state, random_state, torch_state

matplotlib.use("Agg")
IMAGE = torch.rand(1, 3, 24, 24)
FEW: dict[str, Any] = {"steps": 5, "progress": False}


def edges(**settings: Any) -> FeatureVisualization:
    return FeatureVisualization(Edges(), size=32, channels=1, **settings)


def chain(channels: int = 3) -> nn.Module:
    return Chain(channels).eval()


def setup(model: nn.Module | None = None, size: int = 24) -> FeatureVisualization:
    return FeatureVisualization(chain() if model is None else model.eval(), size=size)


def named() -> FeatureVisualization:
    others = {"scale": torch.tensor(2.0)}
    return FeatureVisualization(Named().eval(), size=8, argument="pixel_values", others=others)


class Idle(torch.optim.SGD):
    """An optimizer that asks for nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return


# ---- what it finds


@pytest.mark.parametrize("kind", ["fft", "pixels"])
def test_the_direction_of_a_filter_is_found_again(kind: str) -> None:
    eye = FeatureVisualization(Edges().eval(), size=32, channels=1)
    asked = [images.Channel("act", n) for n in range(len(ANGLES))]
    found = eye.run(asked, steps=60, parameterization=kind, progress=False)
    for angle, image in zip(ANGLES, found.images, strict=True):
        apart = abs(orientation(image[0]) - angle) % 180
        assert min(apart, 180 - apart) < 8
    assert (found.score > 5 * found.start.clip(min=1e-3)).all()
    smooth = np.apply_along_axis(lambda one: np.convolve(one, np.ones(12) / 12, "valid"), 0, found.curve)
    assert (np.diff(smooth[::6], axis=0) > -0.1 * np.ptp(smooth, axis=0)).all()


def test_a_network_of_places_becomes_what_is_looked_for() -> None:
    found = setup().run(images.Channel("late", 2), parameterization="cppn", steps=30, progress=False)
    assert found.score[0] > found.start[0] + 0.1
    assert found.images.std() > 0.1


def test_transformations_make_an_image_that_stands_more() -> None:
    eye = FeatureVisualization(fmr.zoo.load("digits-cnn").model, size=8, channels=1)
    logits = [images.Logit(n) for n in range(10)]
    with_, without = (eye.run(logits, steps=60, progress=False, transformations=put) for put in (None, ()))
    assert (with_.robust > without.robust).mean() >= 0.8
    assert without.score.mean() > with_.score.mean()


def test_scores_are_those_of_the_model() -> None:
    model = chain()
    eye = FeatureVisualization(model, size=24, mean=(0.4, 0.5, 0.6), std=0.25)
    found = eye.run(images.Channel("late", 2), **FEW)
    mean = torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    late = fmr.run(model, (found.images - mean) / 0.25)["late"]
    assert found.score[0] == pytest.approx(float(late[0, 2].mean()), rel=1e-5)
    assert eye.scores(images.Channel("late", 2), found.images)[0] == pytest.approx(found.score[0], rel=1e-6)
    assert eye.scores("late", found.images)[0] == pytest.approx(float(late.mean()), rel=1e-5)
    start = eye.run(images.Channel("late", 2), start=found.images, **FEW)
    assert start.start[0] == pytest.approx(found.score[0], abs=1e-3)


def test_one_step_of_the_optimizer_is_one_step_of_its_formula() -> None:
    """Plain gradient ascent by hand, in the parameters of pixels."""
    model = chain()
    found = FeatureVisualization(model, size=12).run(
        images.Channel("stem", 1), steps=3, parameterization="pixels", transformations=(), progress=False,
        optimizer=lambda params: torch.optim.SGD(params, lr=2.0),
    )  # fmt: skip
    pixels = images.Pixels((12, 12)).pixels.detach()
    for _ in range(3):
        pixels = pixels.detach().requires_grad_()
        model.stem(pixels.sigmoid())[:, 1].mean().backward()
        pixels = pixels + 2.0 * pixels.grad
    torch.testing.assert_close(found.images, pixels.sigmoid().detach())
    assert len(found.curve) == 3


def test_the_closure_serves_an_optimizer_that_asks_several_times() -> None:
    found = setup().run(
        images.Channel("late", 2) - images.TotalVariation(), steps=4, transformations=(), progress=False,
        optimizer=lambda params: torch.optim.LBFGS(params, max_iter=5, line_search_fn="strong_wolfe"),
    )  # fmt: skip
    assert found.curve.shape == (4, 1)
    assert (np.diff(found.curve[:, 0]) > 0).all()
    assert found.score[0] > found.curve[-1, 0]


def test_each_image_is_made_for_its_own_objective() -> None:
    eye = setup()
    both = [images.Channel("late", 2), images.Logit(1)]
    found = eye.run(both, steps=30, progress=False, transformations=())
    scores = np.stack([eye.scores(one, found.images) for one in both])
    assert scores[0, 0] > scores[0, 1]
    assert scores[1, 1] > scores[1, 0]
    assert found.objectives == ("Channel('late', 2)", "Logit(1)")
    np.testing.assert_allclose(np.diag(scores), found.score, rtol=1e-6)


def test_joint_objectives_serve_both_and_a_negative_one_is_avoided() -> None:
    eye, channel, other = setup(), images.Channel("late", 2), images.Channel("late", 3)
    settings: dict[str, Any] = {"steps": 40, "progress": False, "transformations": ()}
    alone, both, against = (eye.run(one, **settings).images for one in (channel, channel + other, channel - other))
    assert eye.scores(other, both) > eye.scores(other, alone)
    assert eye.scores(other, against) < eye.scores(other, alone)
    smooth = eye.run(channel - 20 * images.TotalVariation(), **settings).images
    variation = [float(images.TotalVariation()(images.Seen(one, lambda site: IMAGE))) for one in (smooth, alone)]
    assert variation[0] < 0.5 * variation[1]


def test_diverse_images_differ() -> None:
    eye, channel = setup(), images.Channel("late", 2)
    plain, diverse = (
        eye.run(one, images=3, steps=40, progress=False) for one in (channel, channel + images.Diversity("stem"))
    )
    alike = [float(-eye.scores(images.Diversity("stem"), one.images).mean()) for one in (plain, diverse)]
    assert alike[1] < alike[0]
    assert len(diverse.objectives) == 3


@pytest.mark.parametrize("site", ["act", "act/relu#0"])
def test_a_dead_unit_is_woken_by_a_redirected_gradient(site: str) -> None:
    eye = FeatureVisualization(Dead().eval(), size=8, channels=1)
    found = eye.run(images.Channel(site, 0), steps=40, progress=False)
    assert found.start[0] == 0
    assert found.curve[0, 0] == 0
    assert found.score[0] > 0.05
    with pytest.raises(AnalyzerError, match=r"No gradient reaches the image from Channel\('act.*', 0\)"):
        eye.run(images.Channel(site, 0), redirect=False, **FEW)


def test_a_step_that_needs_no_redirection_is_the_plain_one() -> None:
    runs = [setup().run(images.Channel("late", 2), redirect=redirect, **FEW) for redirect in (True, False)]
    assert torch.equal(runs[0].images, runs[1].images)


@pytest.mark.parametrize(
    ("model", "size", "objective"),
    [
        (Patches(), 16, images.Channel("layers[1].resid_post", 3)),
        (Patches(), 16, images.Neuron("blocks.0", 3, 5)),
        (Patches(), 16, images.Direction("layers[0].resid_post", torch.ones(8))),
        (Patches(), 16, images.Channel("mlps[0].post", 11)),
        (Patches(), 16, images.Logit(1)),
        (Chain(), 24, images.Neuron("late/conv2d#0", 1, (0, 1))),
        (Chain(), 24, images.Layer("/max_pool2d#0", power=2)),
        (Chain(), 24, "middle"),
        (Chain(), 24, fmr.Site("/mean#0", units=[1, 2])),
    ],
)
def test_any_site_is_an_objective(model: nn.Module, size: int, objective: Any) -> None:
    found = FeatureVisualization(model.eval(), size=size).run(objective, steps=20, progress=False)
    assert found.score[0] > found.start[0]
    assert np.isfinite(found.curve).all()


def test_other_inputs_are_given_by_name_and_logits_are_found() -> None:
    eye = named()
    assert eye.run(images.Logit(1), steps=20, progress=False).score > eye.run(images.Logit(1), steps=1, progress=False).score
    hidden = eye.run(images.Channel(":hidden", 1), steps=5, progress=False)
    assert hidden.score == pytest.approx(eye.scores(images.Logit(1), hidden.images), rel=1e-5)


def test_a_module_of_ones_own_makes_the_image_and_keeps_what_it_learns() -> None:
    class Stripes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.fixed = nn.Parameter(torch.zeros(32)), nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self) -> Tensor:
            noise = 0.0 * torch.randn(1)  # from torch's own random numbers
            return (self.rows + noise).sigmoid()[None, None, :, None].expand(1, 1, 32, 32)

    made = Stripes()
    made.rows.grad = torch.full((32,), 7.0)
    found = FeatureVisualization(Edges().eval(), size=32, channels=1).run(
        images.Channel("act", 2), parameterization=made, steps=40, progress=False
    )
    assert found.score[0] > 3 * max(found.start[0], 1e-3)
    assert torch.equal(found.images, made().detach())
    assert torch.equal(made.rows.grad, torch.full((32,), 7.0))
    assert found.settings["parameterization"] == "Stripes"


def test_a_contact_sheet_has_an_image_for_each_channel() -> None:
    eye = setup()
    whole = eye.sheet("stem", **FEW)
    assert whole.objectives == tuple(f"Channel('stem', {n})" for n in range(6))
    assert whole.curve.shape == (5, 6)
    many = FeatureVisualization(nn.Conv2d(1, 20, 3).eval(), size=8, channels=1).sheet("", steps=2, progress=False)
    assert many.images.shape == (20, 1, 8, 8)
    assert many.null.shape == (20,)
    assert eye.sheet("stem", [4], **FEW).objectives == ("Channel('stem', 4)",)


def test_transformations_of_ones_own_are_called_in_their_order() -> None:
    asked: list[str] = []

    def first(given: Tensor, draw: Random) -> Tensor:
        asked.append("first")
        return given

    def second(given: Tensor, draw: Random) -> Tensor:
        asked.append("second")
        return given.flip(-1)

    setup().run(images.Logit(0), transformations=[first, second], steps=2, progress=False)
    assert asked == ["first", "second"] * 2


# ---- what it leaves alone


def test_nothing_is_left_behind() -> None:
    model = chain()
    model.stem.weight.requires_grad_(False)
    model.middle.weight.grad = torch.ones_like(model.middle.weight)
    model.stem.register_forward_hook(lambda *_: None)
    flags = [(one.requires_grad, one.grad) for one in model.parameters()]
    weights = copy.deepcopy(model.state_dict())
    before = torch_state(), model_state(model), random_state()
    eye = FeatureVisualization(model, size=24)
    eye.run(images.Logit(1), **FEW)
    with pytest.raises(AnalyzerError):
        eye.run(images.Channel("late", 77), **FEW)
    with pytest.raises(ZeroDivisionError):
        eye.run(images.Logit(1), transformations=[lambda given, draw: 1 // 0], **FEW)
    assert before == (torch_state(), model_state(model), random_state())
    assert all(
        one.requires_grad == flag and one.grad is grad for one, (flag, grad) in zip(model.parameters(), flags, strict=True)
    )
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_a_block_without_gradients_changes_nothing(block: Callable[[], Any]) -> None:
    eye = setup()
    plain = eye.run(images.Logit(1), **FEW)
    with block():
        inside = eye.run(images.Logit(1), **FEW)
        assert eye.scores(images.Logit(1), inside.images) == pytest.approx(inside.score)
    assert torch.equal(plain.images, inside.images)


def test_the_same_seed_makes_the_same_image() -> None:
    eye = setup()
    one, again, other = (eye.run(images.Logit(1), seed=seed, **FEW) for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images)
    assert (one.curve == again.curve).all()
    assert (one.robust, one.null) == (again.robust, again.null)
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_and_double_precision_make_nearly_the_same_image(dtype: torch.dtype) -> None:
    found, plain = (
        FeatureVisualization(chain().to(kind), size=24).run(images.Channel("late", 2), steps=20, progress=False)
        for kind in (dtype, torch.float32)
    )
    assert found.images.dtype == torch.promote_types(dtype, torch.float32)
    assert found.score[0] == pytest.approx(plain.score[0], rel=0.1)


@pytest.mark.parametrize("kind", ["fft", "pixels", "cppn"])
def test_a_model_in_double_precision_is_shown_such_images(kind: str) -> None:
    model = chain().double()
    found = FeatureVisualization(model, size=24).run(images.Logit(1), steps=4, parameterization=kind, progress=False)
    assert found.images.dtype == torch.float64
    assert found.score[0] == pytest.approx(float(model(found.images)[0, 1].detach()), rel=1e-12)
    assert FeatureVisualization(model, size=24).scores(images.Logit(1), found.images)[0] == found.score[0]


def test_small_gradients_do_not_vanish_in_half_precision() -> None:
    small = 1e-5 * images.Channel("late", 2)
    half, single = (
        FeatureVisualization(chain().to(kind), size=24).run(small, steps=20, progress=False)
        for kind in (torch.float16, torch.float32)
    )
    assert half.score[0] == pytest.approx(single.score[0], rel=0.005)  # 3 % less where they do


def test_a_pass_stops_at_the_deepest_site() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.mid, self.far = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.far_called = 0
            self.far.register_forward_hook(self.note)

        def note(self, *_: Any) -> None:
            self.far_called += 1

        def forward(self, given: Tensor) -> Tensor:
            return self.far(self.mid(self.near(given)))

    model = Deep().eval()
    eye = FeatureVisualization(model, size=12)
    eye.run(images.Channel("mid", 0) + images.Channel("near", 1), **FEW)
    assert model.far_called == 1  # the look at the model before the first step
    eye.run(images.Channel("far", 0), **FEW)
    assert model.far_called > 1 + 5


def test_random_numbers_of_python_numpy_and_torch_go_on() -> None:
    class Drawn(Chain):
        def forward(self, images: Tensor) -> Tensor:
            random.random(), np.random.rand(), torch.rand(1)
            return super().forward(images)

    def draw(given: Tensor, source: Random) -> Tensor:
        return given + 0.01 * (random.random() + float(np.random.rand()) + torch.rand(1))

    model = Drawn().eval()
    before = random.getstate(), np.random.get_state()[1].tobytes(), random_state()
    one, again = (setup(model).run(images.Logit(1), transformations=[draw], **FEW) for _ in range(2))
    setup(model).scores(images.Logit(1), IMAGE)
    setup(model).sheet("stem", [1], steps=1, progress=False)
    TopImages(model, "stem", k=1).update(IMAGE).result()
    StyleTransfer(model, "stem", "stem", size=24).run(IMAGE[0], IMAGE[0].flip(1), **FEW)
    assert before == (random.getstate(), np.random.get_state()[1].tobytes(), random_state())
    assert torch.equal(one.images, again.images)


def test_a_model_may_write_to_what_it_is_given() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, given: Tensor, *, scale: Tensor) -> Tensor:
            given.sub_(0.5).mul_(scale.add_(1))
            return self.conv(given)

    model, batch, scale = Writes().eval(), IMAGE.clone(), torch.ones(1)
    eye = FeatureVisualization(model, size=24, others={"scale": scale})
    assert eye.run(images.Channel("conv", 1), steps=20, progress=False).score > eye.scores(images.Channel("conv", 1), IMAGE)
    top = TopImages(model, "conv", k=1, others={"scale": scale}).update(batch).result()
    assert torch.equal(batch, IMAGE)
    assert float(scale) == 1
    wanted = model.conv((IMAGE - 0.5) * 2).amax((0, 2, 3)).detach()
    np.testing.assert_allclose(top.values[:, 0], wanted, rtol=1e-5)


def test_settings_are_the_same_in_another_process() -> None:
    found = setup().run(
        images.Logit(1), transformations=[lambda given, draw: given * 1.0, images.Jitter(1)],
        optimizer=lambda params: torch.optim.Adam(params, lr=0.01), **FEW,
    )  # fmt: skip
    assert found.settings["transformations"] == ("<lambda>", "Jitter(pixels=1)")
    assert found.settings["optimizer"] == "<lambda>"
    assert setup().run(images.Logit(1), **FEW).settings["optimizer"] == "Adam(lr=0.1)"
    cppn = setup().run(images.Logit(1), parameterization="cppn", **FEW)
    assert cppn.settings["optimizer"] == "Adam(lr=0.005)"


# ---- results


def test_a_result_is_saved_tabled_and_drawn(tmp_path: Path) -> None:
    found = setup().run([images.Logit(n) for n in range(3)], **FEW)
    found.save(tmp_path / "found.safetensors")
    again = Visualized.load(tmp_path / "found.safetensors")
    assert torch.equal(again.images, found.images)
    assert (again.settings, again.objectives, repr(again)) == (found.settings, found.objectives, repr(found))
    table = found.table()
    assert list(table.objective) == ["Logit(0)", "Logit(1)", "Logit(2)"]
    assert list(table.score) == list(found.score)
    assert "Logit(0): " in repr(found)
    figure = found.plot()
    assert len(figure.axes) == 4
    assert figure.axes[0].get_title().startswith("Logit(0)\n")
    ax = matplotlib.figure.Figure().add_subplot()
    assert found.plot(ax) is ax.figure
    assert len(setup().sheet("late", **FEW).plot().axes) == 6


def test_photographs_are_cut_and_resized() -> None:
    made = np.zeros((60, 100, 3), np.uint8)
    made[:, 20:80] = (255, 128, 0)
    found = photo(made, 30)
    assert found.shape == (1, 3, 30, 30)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.tensor([1.0, 128 / 255, 0.0]))
    assert photo(made, (10, 40)).shape == (1, 3, 10, 40)
    eye = setup()
    one, two = eye.scores(images.Logit(0), made), eye.scores(images.Logit(0), [made, made])
    assert two == pytest.approx([one[0]] * 2)


# ---- what is refused


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: setup().run(images.Channel("late", 9), **FEW), r"which is 5 channels, and no channel 9"),
        (lambda: setup().run(images.TotalVariation(), **FEW), r"TotalVariation\(\) reads nothing of the model"),
        (lambda: setup().run(3, **FEW), "The objective is 3, expected one of analyzers.images"),
        (lambda: setup().run(None, **FEW), "The objective is None, expected one of analyzers.images"),
        (lambda: setup().scores(None, IMAGE), "The objective is None, expected one of analyzers.images"),
        (lambda: setup().scores(LATE, torch.rand(1, 3, 24, 24, device="meta")), "images is on the device meta and has no"),
        (lambda: setup().scores(LATE, IMAGE.to_sparse()), "images is of layout torch.sparse_coo, expected a dense tensor"),
        (lambda: FeatureVisualization(chain(), argument=3), "argument=3, expected the name of an argument of the model"),
        (lambda: FeatureVisualization(chain(), others={3: IMAGE}), "others has the name 3, expected the name of an"),
        (lambda: FeatureVisualization(chain(), argument="a", others={"a": 1}), "'a' is both argument= and in others="),
        (lambda: setup().run([], **FEW), r"The objective is \[\], expected one of analyzers.images"),
        (lambda: setup().run(images.Logit(0), steps=0), "steps=0: expected a whole number from 1 on"),
        (lambda: setup().run(images.Logit(0), seed=-1), "seed=-1: expected a whole number from 0 on"),
        (lambda: setup().run([images.Logit(0)] * 2, images=3), "images=3 with 2 objectives: expected one image for each"),
        (lambda: setup().run(images.Logit(0), parameterization="gan"), "parameterization='gan': expected 'fft'"),
        (lambda: setup().run(images.Logit(0), parameterization="cppn", start=torch.rand(3, 24, 24)), "CPPN cannot begin"),
        (lambda: setup().run(images.Logit(0), start=torch.rand(3, 9, 9)), r"start has shape \(3, 9, 9\), expected"),
        (lambda: setup().run(images.Logit(0), start=torch.ones(3, 24, 24) * 255), "start holds float32 from 255 to 255"),
        (lambda: setup().run(images.Logit(0), start=torch.ones(3, 24, 24).byte()), "start holds uint8 from 1 to 1"),
        (lambda: setup().scores(images.Logit(0), np.ones((9, 9))), r"A photograph was expected, not ndarray of shape"),
        (lambda: setup().run(images.Logit(0), optimizer=lambda p: p, **FEW), "optimizer gave a list, expected a function"),
        (lambda: setup().run(images.Logit(0), optimizer=Idle, **FEW), r"Idle.step\(closure\) did not call its closure"),
        (lambda: setup().run([images.Logit(0)] * 3, parameterization=images.Pixels((24, 24), 2), **FEW),
         "The parameterization makes 2 images, expected one for each objective"),
        (lambda: setup().scores([images.Logit(0)] * 2, IMAGE), "The objective is .*, expected one of analyzers.images"),
        (lambda: setup().run("layers[7].resid_post", **FEW), r"Chain has no 'layers\[7\].resid_post'. Expected an ID"),
        (lambda: FeatureVisualization(chain(1), size=24).run("late", **FEW),
         r"Chain does not take images of shape \(1, 3, 24, 24\): .* Expected size=, channels="),
        (lambda: FeatureVisualization(chain(), size=0), "size=0: expected the side of an image in pixels"),
        (lambda: FeatureVisualization(chain(), channels="rgb"), "channels='rgb': expected how many colours"),
        (lambda: FeatureVisualization(chain(), mean=(0.5, 0.5)), r"mean=\(0.5, 0.5\): expected a number, or one for each"),
        (lambda: FeatureVisualization(chain(), std=0.0), "std=0.0: expected numbers above 0"),
        (lambda: FeatureVisualization(chain(), mean=(123.7, 116, 103)), r"mean=\(123.7, 116, 103\): expected numbers from"),
        (lambda: FeatureVisualization("cnn"), "FeatureVisualization got 'cnn' for its model"),
        (lambda: FeatureVisualization(chain().train(), size=24).run("late", **FEW), "Chain is in train mode"),
        (lambda: setup().sheet("late", [], **FEW), r"channels=\[\]: expected numbers of channels"),
        (lambda: setup().sheet("late", 3, **FEW), "channels=3: expected numbers of channels"),
        (lambda: setup().run("late", transformations=[3], **FEW), r"transformations=\[3\]: expected functions of images"),
        (lambda: setup().run("late", transformations="pad", **FEW), "transformations='pad': expected functions of images"),
        (lambda: setup().run("late", optimizer=3, **FEW), "optimizer is a int, expected a function of parameters"),
        (lambda: setup().run("late", optimizer=adam(list(chain().parameters()))), "optimizer is a Adam, expected"),
        (lambda: setup().run(images.Channel(chain().late, 1), **FEW), "Conv2d is a module, not a key: expected its path"),
        (lambda: images.Direction("late", "up"), "Direction got a str, expected a tensor of a number a channel"),
        (lambda: FeatureVisualization(chain(), others=[3]), "others is a list, expected what else the model is given"),
        (lambda: images.FFT((0, 3)), r"size=\(0, 3\): expected the side of an image"),
        (lambda: images.Pad(-1), "pixels=-1: expected a whole number from 0 on"),
        (lambda: images.Jitter("a"), "pixels='a': expected a whole number from 0 on"),
        (lambda: images.Pad(24, None)(IMAGE, Random(0)), r"Pad\(.*\) mirrors more than images of 24 x 24 have"),
        (lambda: setup().run(images.Channel("lates", 1), **FEW), "No pass reached 'lates'.*Nearest that exist: .*late"),
        (lambda: named().run(images.Channel(":rounded", 1), **FEW), "':rounded' holds int64, which no gradient passes"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_what_was_expected(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(fmr.FmrError, match=message):
        mistake()


def test_a_site_that_no_gradient_reaches_is_named() -> None:
    class Cut(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            return given.detach().mean((2, 3)) + given.round().mean((2, 3))

    for site in ("/detach#0", "/round#0", ""):
        with pytest.raises(
            AnalyzerError, match=re.escape(f"No gradient reaches the image from Channel('{site}', 0). Expected")
        ):
            FeatureVisualization(Cut().eval(), size=8).run(images.Channel(site, 0), **FEW)


def test_an_image_out_of_range_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self) -> Tensor:
            return torch.zeros(1, 3, 24, 24)

    class Wide(nn.Module):
        def __init__(self, colours: int) -> None:
            super().__init__()
            self.pixels = nn.Parameter(torch.randn(1, colours, 24, 24))

        def forward(self) -> Tensor:
            return self.pixels

    with pytest.raises(
        AnalyzerError, match=r"returns numbers from -\d.* to \d.*, expected 0 to 1. End it with .sigmoid\(\)"
    ):
        setup().run(images.Logit(0), parameterization=Wide(3), **FEW)
    with pytest.raises(AnalyzerError, match=r"returns shape \(1, 2, 24, 24\), expected images \(images, 3, height, width\)"):
        setup().run(images.Logit(0), parameterization=Wide(2), **FEW)

    class Cut(Wide):
        def forward(self) -> Tensor:
            return self.pixels.sigmoid().detach()

    with pytest.raises(AnalyzerError, match="No gradient comes from the images to the parameters of Cut"):
        setup().run(images.Logit(0), parameterization=Cut(3), **FEW)
    with pytest.raises(AnalyzerError, match="The parameterization has no parameters to optimise"):
        setup().run(images.Logit(0), parameterization=Fixed(), **FEW)


def test_an_objective_that_leaves_all_numbers_is_told() -> None:
    class Blown(nn.Module):
        def forward(self, given: Tensor) -> Tensor:
            return (given * float("inf")).mean((2, 3))

    with pytest.raises(AnalyzerError, match=r"At step 0 the objective is .* not finite throughout. Expected smaller steps"):
        FeatureVisualization(Blown().eval(), size=8).run(images.Logit(0), **FEW)


LATE: Any = images.Channel("late", 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": torch.rand(2, 3, 24, 24)}, r"start has shape \(2, 3, 24, 24\), and FFT makes images of shape \(1, 3, 24"),
        ({"start": IMAGE, "parameterization": images.FFT(16)}, r"and FFT makes images of shape \(1, 3, 16, 16\)"),
        ({"redirect": "no"}, "redirect='no': expected True or False"),
        ({"progress": "x"}, "progress='x': expected True or False or None"),
        ({"parameterization": nn.Linear(2, 2)}, r"Linear.forward asks for arguments, expected .* alone: forward\(self\)"),
        ({"transformations": [lambda given, draw: given.mul_(0.5)]}, "<lambda> writes into the images that it is given"),
        ({"seed": 2**70}, r"seed=\d*: expected a whole number below"),
        ({"transformations": [lambda given: given]}, "<lambda> does not take two arguments, expected a function of images"),
        ({"transformations": [lambda given, draw: None]}, r"<lambda> makes NoneType of images of shape \(1, 3, 24, 24\)"),
        ({"transformations": [lambda given, draw: given[0]]}, r"<lambda> makes shape \(3, 24, 24\) of torch.float32"),
        ({"transformations": [lambda given, draw: torch.cat([given] * 2)]}, r"makes shape \(2, 3, .* as many images"),
        ({"transformations": [lambda given, draw: given.detach()]}, "No gradient passes the transformation <lambda>"),
        ({"transformations": [lambda given, draw: given * 255]}, "make numbers from .* of images from .* Expected"),
        ({"transformations": [lambda given, draw: given / 0]}, "make numbers from .* Expected images from 0 to 1 again"),
        ({"transformations": [lambda given, draw: given * 0]}, "At step 0 the gradient of .* is 0 at all parameters of FFT"),
        ({"optimizer": lambda params: torch.optim.SGD(params, lr=0.0)}, "5 steps of SGD changed nothing of the image"),
        ({"optimizer": lambda params: torch.optim.Adam(chain().parameters())}, "optimizer gave a Adam of other parameters"),
    ],
)  # fmt: skip
def test_steps_that_cannot_change_the_image_or_are_none_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        setup().run(LATE, **{**FEW, **settings})


@pytest.mark.parametrize("how", ["inference", "meta", "statistics", "cut", "without gradients"])
def test_a_model_that_no_gradient_passes_is_told(how: str) -> None:
    class Cut(Chain):
        def forward(self, images: Tensor) -> Tensor:
            if how == "cut":
                return super().forward(images.detach())
            with torch.no_grad():
                return super().forward(images)

    with torch.inference_mode(how == "inference"), torch.device("meta" if how == "meta" else "cpu"):
        model = {"statistics": lambda: Normed(), "inference": Chain, "meta": Batched}.get(how, Cut)().eval()
    message = {
        "inference": "Chain.stem.weight was made in torch.inference_mode",
        "meta": "Batched.late.weight is on the device meta",
        "statistics": "late.1/batch_norm#0 takes mean and spread over the batch in eval mode too",
    }.get(
        how,
        r"No gradient reaches the image from Channel\('late', 1\). .* switches gradients off on the way, by torch.no_grad",
    )
    with pytest.raises(AnalyzerError, match=message):
        setup(model).run(LATE, **FEW)
    if "gradient" not in message or how == "inference":
        with pytest.raises(AnalyzerError, match=message):
            TopImages(model, "late").update(IMAGE)


class Batched(nn.Module):
    """A convolution alone."""

    def __init__(self) -> None:
        super().__init__()
        self.late: nn.Module = nn.Conv2d(3, 4, 3)

    def forward(self, given: Tensor) -> Tensor:
        return self.late(given)


class Normed(Batched):
    """A norm that knows no statistics but those of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
