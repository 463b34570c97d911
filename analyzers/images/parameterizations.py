"""What an image is made of while it is optimised: pixels, a spectrum, or a small network of the place."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.images.given import check_number
from analyzers.protocol import AnalyzerError, check_counts
from fmr.errors import whole_number

COLOURS = ((0.639, -0.274, 0.021), (0.548, 0.080, -0.072), (0.540, 0.243, 0.048))
"""How the colours of a photograph go together: the principal components of red, green and blue over the pixels of
scikit-learn's two photographs, one a column, times their standard deviations, the largest of which is set to 1."""

_ROOM = 1e-3
"""How near to black and white an image is taken: at both its logit is infinite."""

Size = int | tuple[int, int]
"""The side of an image in pixels, or its height and width."""


def sides(size: Any) -> tuple[int, int]:
    """Height and width of an image, checked.

    >>> sides(24), sides((8, 12))
    ((24, 24), (8, 12))
    """
    given = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    numbers = [number for number in map(whole_number, given) if number is not None and number > 0]
    if len(numbers) != 2 or len(given) != 2:
        raise AnalyzerError(f"size={size!r}: expected the side of an image in pixels, or its height and width.")
    return numbers[0], numbers[1]


class Parameterization(nn.Module):
    """A module that returns images (images, colours, height, width) from 0 to 1; its parameters are optimised.

    `rate` is the learning rate of Adam where no other optimiser is asked for.
    """

    rate = 0.1

    def of(self, images: Tensor) -> Parameterization:
        """The same module with parameters that make these images."""
        raise AnalyzerError(
            f"{type(self).__name__} cannot begin with a given image. Expected parameterization='fft' or 'pixels'."
        )

    @abstractmethod
    def forward(self) -> Tensor:
        """The images."""


def _begun(made: Parameterization, images: Any) -> Tensor:
    """Images to begin with, checked."""
    with torch.no_grad():
        shape = tuple(made().shape)
    found = images[None] if isinstance(images, Tensor) and images.dim() == 3 else images
    if not isinstance(found, Tensor) or found.shape[1:] != shape[1:] or len(found) not in (1, shape[0]):
        what = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise AnalyzerError(
            f"{type(made).__name__}.of got {what}, expected images of shape {shape}, or one of these, from 0 to 1."
        )
    return found


class Pixels(Parameterization):
    """Images by their pixels: the logistic function of a number for each.

    >>> analyzers.images.Pixels((8, 12))().shape
    torch.Size([1, 3, 8, 12])

    size: height and width. std: of the numbers at the start, which are normal.
    """

    def __init__(self, size: Size, images: int = 1, channels: int = 3, *, std: float = 0.01, seed: int = 0) -> None:
        super().__init__()
        check_counts(1, images=images, channels=channels)
        check_number("std", std, least=0)
        draw = torch.Generator().manual_seed(seed)
        self.pixels = nn.Parameter(std * torch.randn(images, channels, *sides(size), generator=draw))

    def of(self, images: Tensor) -> Pixels:
        """The same module with the pixels of these images."""
        images = _begun(self, images).to(self.pixels)
        with torch.no_grad():
            self.pixels.copy_(images.logit(_ROOM).expand_as(self.pixels))
        return self

    def forward(self) -> Tensor:
        """The images."""
        return self.pixels.sigmoid()


class FFT(Parameterization):
    """Images by their spectrum, with larger numbers for lower frequencies, and colours that go together as photographs'.

    >>> analyzers.images.FFT((8, 12))().shape
    torch.Size([1, 3, 8, 12])

    image = sigmoid(C irfft2(s L max(f, 1)^-decay) / saturation): L is the longer side, f the frequency in cycles along it
    (photographs have a decay of about 1), s normal with standard deviation `std`, and C holds the principal components of
    colours (decorrelate=True, three channels).

    Source: C. Olah, A. Mordvintsev, L. Schubert, "Feature visualization", Distill, 2017.
    """

    scale: Tensor
    colours: Tensor

    def __init__(
        self, size: Size, images: int = 1, channels: int = 3, *,
        decorrelate: bool = True, decay: float = 1.5, std: float = 0.01, saturation: float = 4.0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_counts(1, images=images, channels=channels)
        check_number("decay", decay)
        check_number("std", std, least=0)
        check_number("saturation", saturation, above=0)
        self.size, self.saturation = sides(size), saturation
        draw = torch.Generator().manual_seed(seed)
        down, across = torch.fft.fftfreq(self.size[0])[:, None], torch.fft.rfftfreq(self.size[1])
        frequency = max(self.size) * (down.square() + across.square()).sqrt()
        colours = torch.tensor(COLOURS) if decorrelate and channels == 3 else torch.eye(channels)
        self.register_buffer("scale", max(self.size) * frequency.clamp(min=1) ** -decay, persistent=False)
        self.register_buffer("colours", colours, persistent=False)
        self.spectrum = nn.Parameter(std * torch.randn(images, channels, *frequency.shape, 2, generator=draw))

    def of(self, images: Tensor) -> FFT:
        """The same module with the spectrum of these images."""
        images = _begun(self, images).to(self.colours)
        with torch.no_grad():
            apart = torch.linalg.solve(self.colours, images.logit(_ROOM).flatten(2)).view_as(images)
            spectrum = torch.fft.rfft2(apart * self.saturation, norm="ortho") / self.scale
            self.spectrum.copy_(torch.view_as_real(spectrum).expand_as(self.spectrum))
        return self

    def forward(self) -> Tensor:
        """The images."""
        spectrum = torch.view_as_complex(self.spectrum) * (self.scale / self.saturation)
        apart = torch.fft.irfft2(spectrum, s=self.size, norm="ortho")
        return torch.einsum("dc,nchw->ndhw", self.colours, apart).sigmoid()


class CPPN(Parameterization):
    """Images as a function of the place, by a small network: they have no resolution of their own.

    >>> analyzers.images.CPPN((8, 8)).at((64, 96)).shape
    torch.Size([1, 3, 64, 96])

    Places are those of the middles of pixels, from -sqrt 3 to sqrt 3. Each of `depth` layers of `width` numbers is followed
    by a = atan(x): both a / 0.67 and a^2 / 0.6 are handed on. The last layer is 0 at the start, and the image grey.

    Source: K. Stanley, "Compositional pattern producing networks", 2007.
    """

    rate = 0.005

    def __init__(
        self, size: Size, images: int = 1, channels: int = 3, *, width: int = 24, depth: int = 8, seed: int = 0
    ) -> None:
        super().__init__()
        check_counts(1, images=images, channels=channels, width=width, depth=depth)
        self.size = sides(size)
        draw = torch.Generator().manual_seed(seed)
        widths = [2, *[2 * width] * depth]
        self.weights = nn.ParameterList(
            torch.randn(images, wide, width, generator=draw) / math.sqrt(wide) for wide in widths[:-1]
        )
        self.last = nn.Parameter(torch.zeros(images, widths[-1], channels))

    def at(self, size: Size) -> Tensor:
        """The same images with another number of pixels."""
        places = [math.sqrt(3) * ((2 * torch.arange(length) + 1) / length - 1) for length in sides(size)]
        x = torch.cartesian_prod(*places).to(self.last).expand(len(self.last), -1, -1)
        for weight in self.weights:
            angle = torch.atan(x @ weight)
            x = torch.cat([angle / 0.67, angle.square() / 0.6], -1)
        images: Tensor = (x @ self.last).sigmoid().mT.unflatten(2, sides(size))
        return images

    def forward(self) -> Tensor:
        """The images at the size that they are optimised at."""
        return self.at(self.size)


KINDS: dict[str, type[Pixels] | type[FFT] | type[CPPN]] = {"fft": FFT, "pixels": Pixels, "cppn": CPPN}
"""The parameterizations by the words that ask for them."""
