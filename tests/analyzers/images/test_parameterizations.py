"""What images are made of: sizes, ways there and back, no resolution, and colours that are those of photographs."""

from typing import Any

import pytest
import torch
from torch import nn

import fmr
from analyzers import FeatureVisualization, StyleTransfer, TopImages
from analyzers.images import CPPN, FFT, Pixels
from analyzers.images.parameterizations import COLOURS
from analyzers.protocol import AnalyzerError

SIZES = [(8, 12), (12, 8), (7, 9), (1, 5), (16, 16)]


@pytest.mark.parametrize("kind", [Pixels, FFT, CPPN])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_the_size_that_was_asked_for(kind: type[FFT], size: tuple[int, int], channels: int) -> None:
    made = kind(size, 2, channels)()
    assert made.shape == (2, channels, *size)
    assert bool(((made >= 0) & (made <= 1)).all())
    assert (made - 0.5).abs().max() < 0.3  # noise or grey


@pytest.mark.parametrize("kind", [Pixels, FFT])
@pytest.mark.parametrize("size", SIZES)
def test_an_image_goes_in_and_comes_out(kind: type[FFT], size: tuple[int, int]) -> None:
    images = 0.05 + 0.9 * torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kind(size, 2).of(images)(), images, atol=1e-5, rtol=0)
    again = kind(size, 2).of(images)
    torch.testing.assert_close(kind(size, 2).of(again())(), again(), atol=1e-5, rtol=0)
    assert bool(kind(size).of((images > 0.5).float()[:1])().isfinite().all())  # black and white, too


def test_the_spectrum_has_only_what_the_pixels_need() -> None:
    for height, width in SIZES:
        assert FFT((height, width)).spectrum.shape == (1, 3, height, width // 2 + 1, 2)


def test_low_frequencies_are_larger_by_the_decay() -> None:
    for decay in (1.0, 1.5):
        scale = FFT((16, 16), decay=decay).scale
        assert float(scale[0, 2] / scale[0, 4]) == pytest.approx(2**decay)
        assert float(scale[0, 0]) == float(scale[0, 1]) == 16


def test_a_seed_makes_the_image_and_leaves_other_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    for kind in (Pixels, FFT):
        assert torch.equal(kind((8, 8), seed=3)(), kind((8, 8), seed=3)())
        assert not torch.equal(kind((8, 8), seed=3)(), kind((8, 8), seed=4)())
    CPPN((8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_of_places_has_no_resolution() -> None:
    made = CPPN((5, 7), images=2, seed=1)
    with torch.no_grad():
        made.last.copy_(torch.randn(made.last.shape, generator=torch.Generator().manual_seed(0)))
    fine = made.at((15, 21))  # whose middle of each three is the middle of a pixel before
    torch.testing.assert_close(fine[..., 1::3, 1::3], made())
    assert fine.std() > 0.01


def test_the_colours_are_those_of_two_photographs() -> None:
    pixels = [torch.from_numpy(photo).double().reshape(-1, 3).T / 255 for photo in fmr.zoo.photos().values()]
    sizes, parts = torch.linalg.eigh(sum(torch.cov(one) for one in pixels) / 2)
    wanted = (parts * sizes.sqrt()).flip(1) / sizes.max().sqrt()
    ours = torch.tensor(COLOURS).double()
    torch.testing.assert_close(wanted.abs(), ours.abs(), atol=6e-4, rtol=0)
    torch.testing.assert_close((ours.T @ ours).fill_diagonal_(0), torch.zeros(3, 3).double(), atol=2e-3, rtol=0)


def test_each_has_a_rate_that_it_learns_by() -> None:
    assert (Pixels.rate, FFT.rate, CPPN.rate) == (0.1, 0.1, 0.005)


def test_settings_without_a_meaning_are_told() -> None:
    for wrong, message in (
        (lambda: CPPN(8, depth=0), "depth=0: expected a whole number from 1 on"),
        (lambda: FFT(8, decay=float("nan")), "decay=nan: expected a finite number"),
        (lambda: FFT(8, saturation=0), "saturation=0: expected a finite number above 0"),
        (lambda: Pixels(8, 0), "images=0: expected a whole number from 1 on"),
        (lambda: Pixels(8, std=float("inf")), "std=inf: expected a finite number from 0 on"),
    ):
        with pytest.raises(AnalyzerError, match=message):
            wrong()


def test_what_cannot_begin_with_an_image_says_so() -> None:
    with pytest.raises(
        AnalyzerError, match=r"CPPN cannot begin with a given image\. Expected parameterization='fft' or 'pixels'"
    ):
        CPPN((8, 8)).of(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("kind", [FFT, Pixels])
def test_images_to_begin_with_fit(kind: Any) -> None:
    for given, what in (
        (torch.rand(1, 3, 5, 5), r"shape \(1, 3, 5, 5\)"),
        (None, "a NoneType"),
        (torch.rand(4), r"shape \(4,\)"),
    ):
        with pytest.raises(AnalyzerError, match=rf"{kind.__name__}.of got {what}, expected images of shape \(1, 3, 4, 4\)"):
            kind((4, 4)).of(given)
    one = torch.rand(3, 4, 4)
    torch.testing.assert_close(kind((4, 4)).of(one)()[0], one, atol=2e-3, rtol=0)


def test_numbers_in_double_precision_by_default_change_nothing() -> None:
    model, given = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.rand(2, 3, 6, 6)
    plain = FeatureVisualization(model, size=6).run("0", steps=2, start=given[:1], progress=False)
    torch.set_default_dtype(torch.float64)
    try:
        double = FeatureVisualization(model, size=6).run("0", steps=2, start=given[:1], progress=False)
        StyleTransfer(model, "0", "0", size=6).run(given[0], given[1], steps=1, progress=False)
        TopImages(model, "0", k=1).update(given).result()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(double.images.float(), plain.images, atol=1e-3, rtol=0)
