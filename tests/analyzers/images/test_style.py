"""Style transfer: what falls and what is kept, its nulls, its files, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor

import fmr
from analyzers import AnalyzerError, StyleTransfer, Stylized, images
from tests.analyzers.images.models import Chain, Edges
from tests.residue import model_state, random_state, torch_state

matplotlib.use("Agg")
FEW: dict[str, Any] = {"steps": 5, "progress": False}


def block() -> Tensor:
    """A white block on black."""
    image = torch.full((1, 32, 32), 0.2)
    image[:, 10:22, 10:22] = 0.8
    return image


def stripes() -> Tensor:
    """Waves that change across."""
    return (0.5 + 0.1 * torch.cos(torch.arange(32) * torch.pi / 2)).expand(1, 32, 32).clone()


def transfer(**settings: Any) -> StyleTransfer:
    return StyleTransfer(Edges().eval(), "filters/conv2d#0", ["act"], size=32, channels=1, **settings)


def test_style_falls_and_content_stays_bounded() -> None:
    found = transfer().run(block(), stripes(), steps=100, progress=False)
    assert found.falls > 10
    assert found.content_loss[0] < 0.5 * found.content_null[0]
    assert found.curve[-1] < 0.2 * found.curve[0]
    texture = images.gram(Edges()(found.image[None]))[0].diagonal()
    assert texture.argmax() == 0  # waves that change across


def test_without_style_the_content_is_found_again_and_the_other_way_round() -> None:
    content = transfer().run(block(), stripes(), start="noise", style_weight=0, steps=80, progress=False)
    assert content.content_loss[0] < 0.05 * content.content_start[0]
    style = transfer().run(
        block(), stripes(), start="noise", content_weight=0, parameterization="pixels", steps=80, progress=False
    )
    assert style.falls > 100
    assert style.content_loss[0] > content.content_loss[0]


def test_losses_are_the_formula() -> None:
    model = Chain(1).eval()
    made = StyleTransfer(model, "middle", ["stem", "late"], size=32, channels=1)
    found = made.run(block(), stripes(), content_weight=2.0, style_weight=3.0, transformations=(), **FEW)
    runs = {name: fmr.run(model, one[None]) for name, one in (("image", found.image), ("c", block()), ("s", stripes()))}
    apart, size = runs["image"]["middle"] - runs["c"]["middle"], runs["c"]["middle"]
    assert found.content_loss[0] == pytest.approx(float(apart.square().sum() / size.square().sum()), rel=1e-4)
    for n, site in enumerate(("stem", "late")):
        ours, theirs = (images.gram(runs[name][site]) for name in ("image", "s"))
        assert found.style_loss[n] == pytest.approx(float((ours - theirs).square().sum() / theirs.square().sum()), rel=1e-4)
    first = 2.0 * found.content_start.sum() + 3.0 * found.style_start.mean()
    assert found.curve[0] == pytest.approx(first, rel=1e-4)


def test_a_penalty_is_taken_off_and_nothing_is_left_behind() -> None:
    model = Edges().eval()
    before = torch_state(), model_state(model), random_state()
    made = StyleTransfer(model, "act", "act", size=32, channels=1)
    smooth, plain = (
        made.run(block(), stripes(), penalty=one, steps=30, progress=False) for one in (30 * images.TotalVariation(), None)
    )
    assert before == (torch_state(), model_state(model), random_state())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert smooth.image.diff().abs().mean() < plain.image.diff().abs().mean()
    again = made.run(block(), stripes(), steps=30, progress=False)
    assert torch.equal(again.image, plain.image)


def test_a_result_is_saved_tabled_and_drawn(tmp_path: Path) -> None:
    found = transfer().run(block(), stripes(), start=stripes(), **FEW)
    found.save(tmp_path / "found.safetensors")
    again = Stylized.load(tmp_path / "found.safetensors")
    assert torch.equal(again.image, found.image)
    assert (again.settings, repr(again)) == (found.settings, repr(found))
    table = found.table()
    assert list(table.what) == ["content", "style"]
    assert list(table.loss) == [found.content_loss[0], found.style_loss[0]]
    assert len(found.plot().axes) == 4
    ax = matplotlib.figure.Figure().add_subplot()
    assert found.plot(ax) is ax.figure


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: transfer().run(block() * 255, stripes()),
            "content holds float32 from 51 to 204, expected",
        ),
        (
            lambda: transfer().run(block(), stripes()[:, :9]),
            r"style has shape \(1, 9, 32\), expected \(1, 32, 32\)",
        ),
        (lambda: transfer().run(block(), torch.rand(2, 1, 32, 32)), "style holds 2 images, expected one"),
        (
            lambda: transfer().run(block(), stripes(), content_weight=0, style_weight=0),
            r"content_weight and style_weight are both 0, and nothing is compared. Expected one above 0",
        ),
        (lambda: transfer().run(block(), stripes(), style_weight=-1), "style_weight=-1: expected a number from 0 on"),
        (lambda: transfer().run(block(), stripes(), content_weight="x"), "content_weight='x': expected a number from 0 on"),
        (lambda: transfer().run(block(), stripes(), penalty=0.1), "penalty is 0.1, expected an objective"),
        (
            lambda: transfer().run(block(), stripes(), start="black"),
            "start is 'black', expected 'content', 'noise'",
        ),
        (
            lambda: transfer().run("a.png", stripes()),
            "content is a str, expected a tensor from 0 to 1",
        ),
        (lambda: transfer().run(torch.zeros(1, 32, 32), stripes(), **FEW), "got values that are all 0"),
        (lambda: StyleTransfer(Edges(), [], "act"), r"\[\] is no site. Expected an ID"),
        (lambda: StyleTransfer(Edges(), "act", 3), "3 is no site. Expected an ID"),
    ],
)
def test_a_mistake_is_told_what_was_expected(mistake: Callable[[], Any], message: str) -> None:
    with pytest.raises(AnalyzerError, match=message):
        mistake()
