"""Objectives: what they score, their arithmetic in numbers, and the closed forms of penalties and Gram matrices."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fmr
from analyzers import AnalyzerError, FeatureVisualization, images
from analyzers.images import Objective, Seen
from fmr.ids import Site

VALUES = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def seen(values: Tensor = VALUES, pictures: Tensor = IMAGES) -> Seen:
    return Seen(pictures, lambda site: values)


def test_parts_of_a_value_are_scored_by_their_means() -> None:
    torch.testing.assert_close(images.Layer("a")(seen()), VALUES.mean((1, 2, 3)))
    torch.testing.assert_close(images.Layer("a")(seen(VALUES[:, 0, 0, 0])), VALUES[:, 0, 0, 0])
    torch.testing.assert_close(images.Layer("a", power=2)(seen()), VALUES.square().mean((1, 2, 3)))
    torch.testing.assert_close(images.Channel("a", 1)(seen()), VALUES[:, 1].mean((1, 2)))
    last = Site("a", layout=("examples", "rows", "columns", "units"))
    torch.testing.assert_close(images.Channel(last, 1)(seen()), VALUES[..., 1].mean((1, 2)))
    torch.testing.assert_close(images.Neuron("a", 1, (3, 0))(seen()), VALUES[:, 1, 3, 0])
    torch.testing.assert_close(images.Neuron("a", 1)(seen()), VALUES[:, 1, 2, 2])
    torch.testing.assert_close(images.Logit(2)(seen(VALUES[:, :, 0, 0])), VALUES[:, 2, 0, 0])
    tokens = VALUES[:, :, :, 0]  # (images, positions, channels)
    torch.testing.assert_close(images.Channel("a", 3)(seen(tokens)), tokens[..., 3].mean(1))
    torch.testing.assert_close(images.Neuron("a", 3, 1)(seen(tokens)), tokens[:, 1, 3])
    site = Site("a/x#0", layout=("examples", "positions", "units", "heads"))
    torch.testing.assert_close(images.Channel(site, 3)(seen()), VALUES[:, :, 3].mean((1, 2)))


def test_a_direction_is_a_product_with_the_channels() -> None:
    vector = torch.tensor([1.0, -2.0, 0.5])
    products = torch.einsum("nchw,c->nhw", VALUES, vector)
    torch.testing.assert_close(images.Direction("a", vector)(seen()), products.mean((1, 2)))
    unit = torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(images.Direction("a", unit)(seen()), images.Channel("a", 1)(seen()))
    cosines = (products / (VALUES.norm(dim=1) * vector.norm())).clamp(min=0.1)
    torch.testing.assert_close(images.Direction("a", vector, cosine=2.0)(seen()), (products * cosines**2).mean((1, 2)))
    torch.testing.assert_close(images.Direction("a", vector)(seen(VALUES[..., 0, 0])), VALUES[..., 0, 0] @ vector)


@pytest.mark.parametrize(
    ("made", "number", "told"),
    [
        (lambda a, b: a + b, 5.0, "2 + 3"),
        (lambda a, b: a * b, 6.0, "2 * 3"),
        (lambda a, b: a - b, -1.0, "2 - 3"),
        (lambda a, b: -a, -2.0, "-2"),
        (lambda a, b: sum([a, b]), 5.0, "2 + 3"),
        (lambda a, b: 2 * (a + b) - 1, 9.0, "2 * (2 + 3) - 1"),
        (lambda a, b: 7 - a * b, 1.0, "7 - 2 * 3"),
        (lambda a, b: -(a + b) * b, -15.0, "-(2 + 3) * 3"),
        (lambda a, b: a - (b - a), 1.0, "2 - (3 - 2)"),
    ],
)
def test_arithmetic_is_that_of_numbers(made: Callable[[Objective, Objective], Objective], number: float, told: str) -> None:
    """Sums and products of 2 and 3 are 5 and 6, whatever stands around them."""
    from analyzers.images.objectives import Constant

    objective = made(Constant(2.0), Constant(3.0))
    assert objective(seen()).tolist() == [number, number]
    assert str(objective) == told


def test_sites_of_all_parts_are_known() -> None:
    objective = images.Channel("a", 0) * images.Layer("b") - 3 * images.TotalVariation() + images.Diversity("c")
    assert objective.sites == ("a", "b", "c")
    assert str(objective) == "Channel('a', 0) * Layer('b') - 3 * TotalVariation() + Diversity('c')"


def test_penalties_of_a_constant_image_are_known() -> None:
    grey = torch.full((2, 3, 8, 8), 0.5)
    assert images.TotalVariation()(seen(pictures=grey)).tolist() == [0.0, 0.0]
    assert images.TotalVariation()(seen(pictures=torch.ones(1, 3, 1, 1))).tolist() == [0.0]
    assert images.Contrast()(seen(pictures=grey)).tolist() == [0.0, 0.0]
    assert images.Contrast(power=4)(seen(pictures=torch.ones(1, 3, 8, 8))).tolist() == [0.5**4]
    ramp = torch.linspace(0, 0.7, 8).expand(1, 3, 8, 8)
    torch.testing.assert_close(images.TotalVariation()(seen(pictures=ramp)), torch.tensor([0.1]))
    torch.testing.assert_close(images.TotalVariation()(seen(pictures=ramp.mT)), torch.tensor([0.1]))


def test_gram_matrices_of_constant_channels_are_their_products() -> None:
    levels = torch.tensor([2.0, -1.0, 0.5])
    for places in ((1, 1), (5, 7)):
        flat = levels[None, :, None, None].expand(1, 3, *places)
        torch.testing.assert_close(images.gram(flat)[0], torch.outer(levels, levels))
    torch.testing.assert_close(images.gram(levels[None])[0], torch.outer(levels, levels))
    torch.testing.assert_close(images.gram(VALUES)[1, 0, 2], (VALUES[1, 0] * VALUES[1, 2]).mean())
    shuffled = VALUES.flatten(2)[..., torch.randperm(20)].view_as(VALUES)  # style is where nothing stands
    torch.testing.assert_close(images.gram(shuffled), images.gram(VALUES))


def test_a_difference_is_by_the_size_of_what_is_wanted() -> None:
    assert images.Difference("a", VALUES)(seen()).tolist() == [0.0, 0.0]
    torch.testing.assert_close(images.Difference("a", VALUES)(seen(3 * VALUES)), torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(images.Difference("a", VALUES, power=1)(seen(3 * VALUES)), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(images.Difference("a", VALUES, images.gram)(seen(2 * VALUES)), torch.tensor([9.0, 9.0]))
    one = images.Difference("a", VALUES[:1])(seen())
    torch.testing.assert_close(one[1], (VALUES[1] - VALUES[0]).square().mean() / VALUES[0].square().mean())
    assert str(images.Difference("a", VALUES, images.gram)) == "Difference('a', of=gram)"


def test_images_that_are_alike_are_not_diverse() -> None:
    alike, apart = VALUES[:1].expand(2, -1, -1, -1), torch.zeros(2, 3, 4, 5)
    apart[0, 0], apart[1, 1] = 1.0, 1.0
    torch.testing.assert_close(images.Diversity("a")(seen(alike)), torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(images.Diversity("a")(seen(apart)), torch.zeros(2))


@pytest.mark.parametrize(
    ("objective", "values", "message"),
    [
        (
            images.Channel("a", 3),
            VALUES,
            r"'a' has shape \(2, 3, 4, 5\), which is 3 channels, and no channel 3. Expected 0 to 2",
        ),
        (images.Channel("a", "red"), VALUES, "no channel 'red'. Expected 0 to 2"),  # type: ignore[arg-type]
        (images.Channel("a", 0), VALUES[..., 0, 0, 0], "of these dimensions the ops tell none that alone counts channels"),
        (
            images.Neuron("a", 0, (4, 0)),
            VALUES,
            r"place=\(4, 0\): a channel of 'a' has places of shape \(4, 5\). Expected 2 indices",
        ),
        (images.Neuron("a", 0, 1), VALUES, r"place=1: a channel of 'a' has places of shape \(4, 5\)"),
        (images.Direction("a", torch.ones(4)), VALUES, r"has shape \(4,\), and 'a' has 3 channels. Expected a vector of 3"),
        (images.Diversity("a"), VALUES[:1], r"Diversity got one image, expected several .* run\(objective, images=4\)"),
        (images.Difference("a", VALUES[:, :2]), VALUES, r"compares shape \(2, 3, 4, 5\) with \(2, 2, 4, 5\)"),
        (images.Difference("a", torch.zeros(1, 3, 4, 5)), VALUES, "got values that are all 0"),
    ],
)
def test_what_does_not_fit_is_told(objective: Objective, values: Tensor, message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        objective(seen(values))


def test_only_objectives_and_numbers_are_put_together() -> None:
    for wrong in ("layer", None, True, torch.ones(2)):
        with pytest.raises(AnalyzerError, match=re.escape(f"by a {type(wrong).__name__}, expected one or a number")):
            images.Channel("a", 0) + wrong  # type: ignore[operator]


def test_a_site_is_scored_as_it_is_narrowed() -> None:
    model = fmr.zoo.load("digits-cnn").model
    run = fmr.run(model, IMAGES[:, :1])
    narrowed = Site("/flatten#0", units=[3, 4])
    part = Seen(IMAGES, lambda site: run[narrowed])
    torch.testing.assert_close(images.Layer(narrowed)(part), run["/flatten#0"][:, 3:5].mean(1))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: images.Channel(["a"], 1), r"\['a'\] names no value: expected an ID, the path of a module"),
        (lambda: images.Channel("*conv*", 1), r"'\*conv\*' is a pattern, and one site is read"),
        (lambda: images.Layer(torch.nn.ReLU()), "ReLU is a module, not a key: expected its path"),
        (lambda: images.Layer("a", power=3), "power=3: expected 1 or 2"),
        (lambda: images.Contrast(float("nan")), "power=nan: expected a finite number above 0"),
        (lambda: float("nan") * images.Layer("a"), "number=nan: expected a finite number"),
        (lambda: images.Layer("a") / 0, "An objective was divided by 0"),
        (lambda: images.Layer("a") / float("inf"), "divisor=inf: expected a finite number"),
        (
            lambda: images.Direction("a", torch.tensor([1.0, float("nan")])),
            "Direction got a vector with numbers that",
        ),
        (
            lambda: images.Direction("a", torch.ones(2), cosine=float("inf")),
            "cosine=inf: expected a finite number",
        ),
        (lambda: images.Difference("a", VALUES, of="gram"), "of='gram': expected a function of values"),
        (lambda: images.Difference("a", VALUES, power=3), "power=3: expected 1 or 2"),
        (lambda: images.Difference("a", VALUES * float("inf")), "Difference at 'a' got numbers that are not finite"),
        (lambda: images.Difference("a", 3.0), "Difference at 'a' got a float, expected the values"),
        (lambda: images.gram(torch.ones(3)), r"gram got shape \(3,\), expected values \(images, channels, ...\)"),
    ],
)
def test_settings_without_a_meaning_are_told(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        mistake()


def test_an_objective_is_divided_by_a_number() -> None:
    assert str(images.Logit(3) / 2) == "0.5 * Logit(3)"


class Own(Objective):
    """An objective of one's own."""

    def __init__(self, function: Callable[[Seen], Any]) -> None:
        self.function = function

    @property
    def sites(self) -> tuple[str, ...]:
        return ("0",)

    def __call__(self, seen: Seen) -> Any:
        return self.function(seen)

    def __repr__(self) -> str:
        return "Own()"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda one: one.read("0").mean(), r"Own\(\) gives shape \(\) of torch.float32 for 3 images, expected a number"),
        (lambda one: one.channel("0", 1), r"gives shape \(3, 4, 4\) of torch.float32 for 3 images, expected"),
        (lambda one: one.read("0").flatten(1).mean(1)[:1], r"gives shape \(1,\) of torch.float32 for 3 images"),
        (lambda one: None, "gives a NoneType for 3 images, expected a number for each"),
        (lambda one: 1.0, "gives a float for 3 images, expected a number for each"),
        (lambda one: one.read("0").flatten(1).argmax(1), r"gives shape \(3,\) of torch.int64 for 3 images"),
        (lambda one: one.read("1").flatten(1).mean(1), "'1' is read and not named: expected it among the sites .* are '0'"),
        (lambda one: one.channel("0", 1).flatten(1).mean(1) * torch.nan, "of image 0 is NaN, which is neither more nor"),
    ],
)  # fmt: skip
def test_an_objective_of_ones_own_gives_a_number_for_each_image(function: Callable[[Seen], Any], message: str) -> None:
    eye = FeatureVisualization(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval(), size=6)
    for objective in (Own(function), Own(function) - 0.1 * images.TotalVariation()):
        with pytest.raises(AnalyzerError, match=message):
            eye.scores(objective, IMAGES[:1, :, :6, :6].repeat(3, 1, 1, 1))
        with pytest.raises(AnalyzerError, match="not finite" if "NaN" in message else message):
            eye.run(objective, images=3, steps=1, progress=False)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda value: value.mean(), r"compares shape \(\) that <lambda> makes of 2 images, expected a row for each"),
        (lambda value: value[:1], r"compares shape \(1, 3, 4, 5\) that <lambda> makes of 2 images"),
        (lambda value: None, "compares a NoneType that <lambda> makes of 2 images"),
    ],
)
def test_what_is_compared_has_a_row_for_each_image(of: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        images.Difference("a", VALUES, of)(seen())
