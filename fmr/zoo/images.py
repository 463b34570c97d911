"""Photographs for a classifier that was trained on them: two to look at, and what makes its input of one.

Reading and resizing is done by Pillow, which matplotlib needs anyway.

>>> fmr.zoo.photos()["flower"].shape
(427, 640, 3)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fmr.errors import ZooError

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, SHARE = 224, 0.875
"""Of the model's input: its height and width, and how much of the shorter side of a photograph it shows."""
MEAN, SPREAD = 127.0, 128.0
"""What is subtracted from a value between 0 and 255, and what the rest is divided by."""


def photos() -> dict[str, npt.NDArray[np.uint8]]:
    """The two photographs that scikit-learn ships, height x width x 3, from 0 to 255: a Chinese palace and a flower.

    >>> list(fmr.zoo.photos())
    ['china', 'flower']
    """
    try:
        from sklearn.datasets import load_sample_images

        found = load_sample_images()
    except ImportError as error:
        raise ZooError(
            "The photographs come with scikit-learn and are read by Pillow: pip install 'fmr[analysis]'"
        ) from error
    names = [os.path.splitext(os.path.basename(path))[0] for path in found.filenames]
    return _Photos((name, np.array(image)) for name, image in zip(names, found.images, strict=True))


class _Photos(dict[str, npt.NDArray[np.uint8]]):
    """Photographs by name."""

    def __missing__(self, name: str) -> npt.NDArray[np.uint8]:
        raise ZooError(f"There is no photograph {name!r}. Expected one of {', '.join(self)}.")


def preprocess(image: Any) -> Tensor:
    """A photograph as the classifier was shown them in training: (1, 3, 224, 224), about -1 to 1.

    >>> fmr.zoo.load("efficientnet").preprocess(fmr.zoo.photos()["flower"]).shape
    torch.Size([1, 3, 224, 224])

    image: a picture of Pillow, an array of height x width x 3 with values of type uint8, or the path of a file. The square
    in its middle, seven eighths of the shorter side wide, is resized (bicubic) to 224 x 224; 127 is subtracted, and the
    rest divided by 128.
    """
    photo = _opened(image)
    side = max(1, int(SHARE * min(photo.size)))
    left, top = ((length - side + 1) // 2 for length in photo.size)
    square = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), _bicubic())
    return (torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() - MEAN) / SPREAD


def _bicubic() -> Any:
    from PIL.Image import Resampling

    return Resampling.BICUBIC


def _opened(image: Any) -> Image:
    """The picture, upright and in three colors."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ZooError("A photograph is read by Pillow, which is not installed: pip install 'fmr[analysis]'") from error
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return Image.fromarray(image)
    if isinstance(image, (str, os.PathLike)):
        try:
            with Image.open(image) as file:
                return ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ZooError(f"{os.fspath(image)} cannot be read as a picture ({error}). Give the path of one.") from error
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    raise ZooError(f"A photograph was expected, not {_shown(image)}. {WANTED}")


def _shown(image: Any) -> str:
    of = f" of shape {tuple(image.shape)} and type {image.dtype}" if isinstance(image, np.ndarray | Tensor) else ""
    return f"{type(image).__name__}{of}"


WANTED = "Give a picture of Pillow, an array of height x width x 3 with values of type uint8, or the path of a file."
