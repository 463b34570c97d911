"""Photographs: two that are there, and what makes a classifier's input of any."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fmr
from fmr.zoo import images

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def photo() -> Any:
    return fmr.zoo.photos()["flower"]


def error(image: Any) -> str:
    with pytest.raises(fmr.ZooError) as raised:
        images.preprocess(image)
    return str(raised.value)


def test_there_are_two_photographs_that_one_may_change() -> None:
    found = fmr.zoo.photos()
    assert {name: (photo.shape, photo.dtype) for name, photo in found.items()} == {
        "china": ((427, 640, 3), np.dtype("uint8")),
        "flower": ((427, 640, 3), np.dtype("uint8")),
    }
    found["china"][:] = 0
    assert fmr.zoo.photos()["china"].any()


def test_every_form_of_a_photograph_gives_the_same_input(photo: Any, tmp_path: Path) -> None:
    file = tmp_path / "flower.png"
    Image.fromarray(photo).save(file)
    expected = images.preprocess(photo)
    assert expected.shape == (1, 3, 224, 224)
    assert expected.dtype == torch.float32
    for form in (Image.fromarray(photo), file, str(file), Image.fromarray(photo).convert("RGBA")):
        assert torch.equal(images.preprocess(form), expected)


def test_a_value_of_0_to_255_becomes_about_minus_one_to_one() -> None:
    for value, expected in ((0, -127 / 128), (127, 0.0), (255, 1.0)):
        plain = np.full((50, 80, 3), value, dtype=np.uint8)
        assert torch.equal(images.preprocess(plain), torch.full((1, 3, 224, 224), expected))


def test_the_input_shows_seven_eighths_of_the_shorter_side_around_the_middle() -> None:
    photo = np.zeros((256, 512, 3), dtype=np.uint8)
    photo[16:240, 144:368] = 255
    assert bool((images.preprocess(photo) == 1).all())
    photo[16] = photo[:, 367] = 0
    shown = images.preprocess(photo)
    assert bool((shown[..., 0, :] < 1).all() and (shown[..., -1] < 1).all())
    assert bool((shown[..., 4:, :-4] == 1).all())


def test_a_file_is_turned_upright(photo: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    Image.fromarray(photo[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(images.preprocess(tmp_path / "turned.png"), images.preprocess(photo))


def test_grey_pictures_and_tiny_ones_are_photographs_too() -> None:
    grey = images.preprocess(Image.fromarray(np.arange(100, dtype=np.uint8).reshape(10, 10)))
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert images.preprocess(np.zeros((1, 1, 3), dtype=np.uint8)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        (np.zeros((3, 8, 8), dtype=np.uint8), "ndarray of shape (3, 8, 8) and type uint8"),
        (np.zeros((8, 8, 3)), "ndarray of shape (8, 8, 3) and type float64"),
        (np.zeros((8, 0, 3), dtype=np.uint8), "ndarray of shape (8, 0, 3) and type uint8"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "Tensor of shape (8, 8, 3) and type torch.uint8"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_photograph_is_refused(image: Any, shown: str) -> None:
    assert error(image) == (
        f"A photograph was expected, not {shown}. Give a picture of Pillow, an array of height x width x 3 with values of "
        f"type uint8, or the path of a file."
    )


def test_a_path_without_a_picture_is_refused(tmp_path: Path) -> None:
    assert "absent.jpg cannot be read as a picture ([Errno 2] No such file" in error(tmp_path / "absent.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    assert error(tmp_path / "text.jpg").endswith("Give the path of one.")


def test_missing_packages_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch, photo: Any) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert error(photo) == "A photograph is read by Pillow, which is not installed: pip install 'fmr[analysis]'"
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(fmr.ZooError, match=r"come with scikit-learn and are read by Pillow: pip install 'fmr\[analysis\]'"):
        fmr.zoo.photos()
