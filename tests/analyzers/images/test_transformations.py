"""Transformations: what they do to known images, that a draw decides all, and that gradients pass."""

from random import Random

import pytest
import torch
from torch import Tensor

from analyzers.images import Jitter, Pad, Rotate, Scale
from analyzers.images.transformations import Transformation, fitted, robust, through, unseen
from analyzers.protocol import AnalyzerError

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ALL = [Pad(2), Pad(2, None), Jitter(3), Scale(0.8, 1.2), Rotate(20)]


def corner(size: int = 15) -> Tensor:
    """A black image with a white block left of the middle."""
    image = torch.zeros(1, 1, size, size)
    image[..., 6:9, 1:4] = 1
    return image


def test_a_margin_is_grey_or_a_mirror() -> None:
    assert torch.equal(Pad(2)(IMAGES, Random(0))[..., 2:-2, 2:-2], IMAGES)
    assert bool((Pad(2)(IMAGES, Random(0))[..., :2, :] == 0.5).all())
    assert torch.equal(Pad(2, None)(IMAGES, Random(0))[..., 1, 2:-2], IMAGES[..., 1, :])


def test_a_shift_is_a_part_of_the_image() -> None:
    draws = [Jitter(2)(IMAGES, Random(n)) for n in range(30)]
    parts = [IMAGES[..., top : top + 14, left : left + 14] for top in range(3) for left in range(3)]
    assert all(any(torch.equal(one, part) for part in parts) for one in draws)
    assert all(any(torch.equal(one, part) for one in draws) for part in parts)


def test_a_turn_moves_what_lies_beside_the_middle() -> None:
    up = Rotate(90)

    class Most(Random):
        def uniform(self, a: float, b: float) -> float:
            return b

    turned = up(corner(), Most())
    assert float(turned[0, 0].argmax() // 15) in (1, 2, 3, 11, 12, 13)
    assert float(turned[0, 0].argmax() % 15) in (6, 7, 8)
    torch.testing.assert_close(Rotate(0)(IMAGES, Random(0)), IMAGES, atol=1e-5, rtol=0)
    wide = torch.zeros(1, 1, 9, 21)
    wide[..., 4, 6:9] = 1  # three left of the middle
    torch.testing.assert_close(up(wide, Most())[0, 0, :, 10].sum(), torch.tensor(3.0), atol=1e-3, rtol=0)


def test_a_size_lies_between_its_factors() -> None:
    sizes = {Scale(0.5, 1.5)(IMAGES, Random(n)).shape[-1] for n in range(60)}
    assert min(sizes) >= 8
    assert max(sizes) <= 24
    assert len(sizes) > 8


@pytest.mark.parametrize("one", ALL)
def test_a_draw_decides_all_and_gradients_pass(one: Transformation) -> None:
    assert torch.equal(one(IMAGES, Random(5)), one(IMAGES, Random(5)))
    given = IMAGES.clone().requires_grad_()
    one(given, Random(1)).sum().backward()
    assert given.grad is not None
    assert (given.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (5, 3), (224, 200)])
def test_what_comes_out_is_what_a_model_takes(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    for many in (robust(size), unseen(size), ()):
        assert through(images, many, Random(0), size).shape == images.shape
    assert torch.equal(fitted(images, size), images)
    larger = fitted(images, (size[0] + 3, size[1] + 4))
    assert torch.equal(fitted(larger, size), images)


def test_what_leaves_nothing_is_told() -> None:
    with pytest.raises(AnalyzerError, match=r"Jitter\(pixels=16\) leaves nothing of images of 16 x 16"):
        Jitter(16)(IMAGES, Random(0))
    for wrong, message in (
        (lambda: Rotate(float("nan")), "degrees=nan: expected a finite number from 0 on"),
        (lambda: Rotate(-1), "degrees=-1: expected a finite number from 0 on"),
        (lambda: Rotate("far"), "degrees='far': expected a finite number"),  # type: ignore[arg-type]
        (lambda: Scale(0.5, float("inf")), "high=inf: expected a finite number"),
        (lambda: Pad(1, float("nan")), "value=nan: expected a finite number"),
    ):
        with pytest.raises(AnalyzerError, match=message):
            wrong()
    with pytest.raises(
        AnalyzerError, match=r"Scale\(low=1.2, high=0.9\): expected two factors above 0, the smaller one first"
    ):
        Scale(1.2, 0.9)
