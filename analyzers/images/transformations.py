"""What an image is put through before a model sees it, so that it is made for more than one grid of pixels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from analyzers.images.given import check_number, name_of
from analyzers.protocol import AnalyzerError, check_counts

GREY = 0.5

Transformation = Callable[[Tensor, Random], Tensor]
"""A function of images (images, colours, height, width) and of a source of random numbers; one draw is of all images."""


@dataclass(frozen=True)
class Pad:
    """A grey margin of so many pixels, or with value=None one that mirrors the image.

    >>> analyzers.images.Pad(2)(torch.rand(1, 3, 8, 8), random.Random(0)).shape
    torch.Size([1, 3, 12, 12])
    """

    pixels: int
    value: float | None = GREY

    def __post_init__(self) -> None:
        check_counts(0, pixels=self.pixels)
        if self.value is not None:
            check_number("value", self.value)

    def __call__(self, images: Tensor, draw: Random) -> Tensor:
        margins = [self.pixels] * 4
        if self.value is None and self.pixels >= min(images.shape[-2:]):
            height, width = images.shape[-2:]
            raise AnalyzerError(f"{self!r} mirrors more than images of {height} x {width} have. Expected fewer pixels.")
        return F.pad(images, margins, "reflect") if self.value is None else F.pad(images, margins, value=self.value)


@dataclass(frozen=True)
class Jitter:
    """A random shift: of both sides so many pixels are cut off, some here and some there.

    >>> analyzers.images.Jitter(2)(torch.rand(1, 3, 8, 8), random.Random(0)).shape
    torch.Size([1, 3, 6, 6])
    """

    pixels: int

    def __post_init__(self) -> None:
        check_counts(0, pixels=self.pixels)

    def __call__(self, images: Tensor, draw: Random) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) <= self.pixels:
            raise AnalyzerError(f"{self!r} leaves nothing of images of {height} x {width}. Expected fewer pixels.")
        top, left = draw.randint(0, self.pixels), draw.randint(0, self.pixels)
        return images[..., top : top + height - self.pixels, left : left + width - self.pixels]


@dataclass(frozen=True)
class Scale:
    """A random size, between two factors.

    >>> analyzers.images.Scale(0.5, 0.5)(torch.rand(1, 3, 8, 8), random.Random(0)).shape
    torch.Size([1, 3, 4, 4])
    """

    low: float = 0.9
    high: float = 1.1

    def __post_init__(self) -> None:
        check_number("low", self.low)
        check_number("high", self.high)
        if not 0 < self.low <= self.high:
            raise AnalyzerError(f"{self!r}: expected two factors above 0, the smaller one first.")

    def __call__(self, images: Tensor, draw: Random) -> Tensor:
        factor = draw.uniform(self.low, self.high)
        size = [max(1, round(factor * length)) for length in images.shape[-2:]]
        return F.interpolate(images, size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Rotate:
    """A random turn by at most so many degrees, to either side; what lies outside the image is its border.

    >>> analyzers.images.Rotate(10)(torch.rand(1, 3, 8, 8), random.Random(0)).shape
    torch.Size([1, 3, 8, 8])
    """

    degrees: float = 5.0

    def __post_init__(self) -> None:
        check_number("degrees", self.degrees, least=0)

    def __call__(self, images: Tensor, draw: Random) -> Tensor:
        angle = math.radians(draw.uniform(-self.degrees, self.degrees))
        height, width = images.shape[-2:]
        cos, sin, tall = math.cos(angle), math.sin(angle), height / width
        turn = torch.tensor([[cos, -sin * tall, 0.0], [sin / tall, cos, 0.0]]).to(images)
        grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Affine:
    """A random shift by at most so many pixels, size and turn, in one resampling. What lies outside is grey.

    >>> analyzers.images.Affine(2)(torch.rand(1, 3, 8, 8), random.Random(0)).shape
    torch.Size([1, 3, 8, 8])
    """

    pixels: float
    low: float = 0.9
    high: float = 1.1
    degrees: float = 5.0

    def __post_init__(self) -> None:
        check_number("pixels", self.pixels, least=0)
        check_number("degrees", self.degrees, least=0)
        Scale(self.low, self.high)

    def __call__(self, images: Tensor, draw: Random) -> Tensor:
        height, width = images.shape[-2:]
        down, across = (draw.uniform(-self.pixels, self.pixels) for _ in range(2))
        angle, factor = math.radians(draw.uniform(-self.degrees, self.degrees)), draw.uniform(self.low, self.high)
        cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
        rows, columns = (_from_middle(length, images) for length in (height, width))
        of_rows = torch.stack([(across - sin * rows) * (2 / width), (down + cos * rows) * (2 / height)], -1)
        of_columns = torch.stack([cos * columns * (2 / width), sin * columns * (2 / height)], -1)
        grid = (of_rows[:, None] + of_columns).expand(len(images), -1, -1, -1)
        return F.grid_sample(images - GREY, grid, padding_mode="zeros", align_corners=False) + GREY


def _from_middle(length: int, like: Tensor) -> Tensor:
    """How many pixels the middle of each lies from the middle of all."""
    return torch.arange(length, dtype=like.dtype, device=like.device) - (length - 1) / 2


def robust(size: tuple[int, int]) -> tuple[Transformation, ...]:
    """What images are put through by default: a shift in parts of their side, a size and a turn."""
    return (Affine(0.75 * max(1, min(size) // 16)),)


def unseen(size: tuple[int, int]) -> tuple[Transformation, ...]:
    """What images are tried with afterwards: wider shifts, sizes and turns than those they were made with."""
    step = max(1, min(size) // 8)
    return Pad(step), Jitter(2 * step), Scale(0.8, 1.25), Rotate(15.0)


def checked(given: Any) -> tuple[Transformation, ...]:
    """Transformations as they were given, or an error for what are none."""
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if not all(map(callable, found)):
        raise AnalyzerError(
            f"transformations={given!r}: expected functions of images and random numbers, as [analyzers.images.Jitter(4)], "
            "or () for none."
        )
    for one in found:
        if not takes(one, 2):
            raise AnalyzerError(
                f"The transformation {name_of(one)} does not take two arguments, expected a function of images and of a "
                "random.Random: lambda images, draw: ..."
            )
    return found


def takes(function: Any, many: int) -> bool:
    """Whether a function can be called with so many arguments, as far as it says."""
    try:
        inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function).bind(*[None] * many)
    except TypeError:
        return False
    except ValueError:  # which says nothing
        return True
    return True


def through(images: Tensor, transformations: Sequence[Transformation], draw: Random, size: tuple[int, int]) -> Tensor:
    """Images after all of these, of the size that a model takes."""
    given = images
    for one in transformations:
        images = _transformed(images, one, draw)
    low, high = map(float, images.detach().aminmax())
    if transformations and not (low >= -1.0 and high <= 2.0):
        raise AnalyzerError(
            f"The transformations {', '.join(map(name_of, transformations))} make numbers from {low:.3g} to {high:.3g} of "
            f"images from {given.min():.3g} to {given.max():.3g}. Expected images from 0 to 1 again: what the model is "
            "given is said by mean= and std=."
        )
    return fitted(images, size)


def _transformed(images: Tensor, one: Transformation, draw: Random) -> Tensor:
    """Images after one transformation, which must be as many images, and pass gradients."""
    written = images._version
    made = one(images, draw)
    if images._version != written:
        raise AnalyzerError(
            f"The transformation {name_of(one)} writes into the images that it is given. Expected a function that returns "
            "others: images * 0.5, not images.mul_(0.5)."
        )
    if not isinstance(made, Tensor) or made.dim() != 4 or made.shape[:2] != images.shape[:2] or not made.is_floating_point():
        what = f"shape {tuple(made.shape)} of {made.dtype}" if isinstance(made, Tensor) else type(made).__name__
        raise AnalyzerError(
            f"The transformation {name_of(one)} makes {what} of images of shape {tuple(images.shape)}. Expected as many "
            "images of as many colours, of any size: (images, colours, height, width)."
        )
    if images.requires_grad and not made.requires_grad:
        raise AnalyzerError(
            f"No gradient passes the transformation {name_of(one)}, so that no step would change the image. Expected "
            "functions of torch with a slope, without detach() or no_grad()."
        )
    return made


def fitted(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images of another size: what is more is cut off around, what is less is grey."""
    for dim, length in zip((-2, -1), size, strict=True):
        more = images.shape[dim] - length
        if more > 0:
            images = images.narrow(dim, more // 2, length)
        elif more < 0:
            margins = [-more // 2, -more - -more // 2]
            images = F.pad(images, [0, 0, *margins] if dim == -2 else margins, value=GREY)
    return images
