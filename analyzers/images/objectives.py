"""What an image is made for: small values that score images by what a model makes of them, and their arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from analyzers.images.given import check_choice, check_number, check_site, name_of
from analyzers.images.seen import Seen, gram, spread
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of, whole_number
from fmr.ids import Site
from fmr.nodes import Key, id_of


class Objective(ABC):
    """A score of each image, of which more is better; objectives and numbers are added, subtracted and multiplied.

    >>> analyzers.images.Channel("conv2", 3) - 0.5 * analyzers.images.TotalVariation()
    Channel('conv2', 3) - 0.5 * TotalVariation()

    Whoever writes one names the `sites` that it reads, and answers for `Seen` images with a number for each, (images,).
    """

    @property
    def sites(self) -> tuple[Key, ...]:
        """The sites that are read; none for a penalty of the image alone."""
        return ()

    @abstractmethod
    def __call__(self, seen: Seen) -> Tensor:
        """The score of each image, (images,)."""

    def __add__(self, other: Objective | float) -> Objective:
        return Sum(self, _objective(other))

    def __radd__(self, other: Objective | float) -> Objective:
        return self if isinstance(other, int) and other == 0 else Sum(_objective(other), self)  # as sum() begins

    def __mul__(self, other: Objective | float) -> Objective:
        return Product(self, _objective(other))

    def __rmul__(self, other: Objective | float) -> Objective:
        return Product(_objective(other), self)

    def __truediv__(self, other: float) -> Objective:
        check_number("divisor", other)
        if not other:
            raise AnalyzerError("An objective was divided by 0.")
        return Product(Constant(1 / other), self)

    def __neg__(self) -> Objective:
        return Product(Constant(-1.0), self)

    def __sub__(self, other: Objective | float) -> Objective:
        return Sum(self, -_objective(other))

    def __rsub__(self, other: Objective | float) -> Objective:
        return Sum(_objective(other), -self)


def scored(objective: Objective, seen: Seen) -> Tensor:
    """The score of each image as an objective gives them, checked: (images,)."""
    found, images = objective(seen), len(seen.images)
    if not isinstance(found, Tensor) or found.shape != (images,) or not found.is_floating_point():
        what = f"shape {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise AnalyzerError(
            f"{name_of(objective)} gives {what} for {number_of(images, 'image')}, expected a number for each, shape "
            f"({images},): as seen.channel(site, 3).flatten(1).mean(1)."
        )
    return found


def _objective(given: Objective | float) -> Objective:
    if isinstance(given, Objective):
        return given
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return Constant(float(given))
    raise AnalyzerError(f"An objective was added to or multiplied by a {type(given).__name__}, expected one or a number.")


@dataclass(frozen=True, repr=False)
class Constant(Objective):
    """A number, the score of every image."""

    number: float

    def __post_init__(self) -> None:
        check_number("number", self.number)

    def __call__(self, seen: Seen) -> Tensor:
        return torch.full((len(seen.images),), self.number, device=seen.images.device)

    def __repr__(self) -> str:
        return f"{self.number:g}"


@dataclass(frozen=True, repr=False)
class _Pair(Objective):
    """Two objectives put together."""

    one: Objective
    other: Objective

    @property
    def sites(self) -> tuple[Key, ...]:
        return (*self.one.sites, *self.other.sites)


class Sum(_Pair):
    """The scores of two objectives added: an image that serves both."""

    def __call__(self, seen: Seen) -> Tensor:
        return scored(self.one, seen) + scored(self.other, seen)

    def __repr__(self) -> str:
        other = self.other
        if isinstance(other, Product) and isinstance(other.one, Constant) and other.one.number == -1.0:
            return f"{self.one} - {_within(other.other)}"
        return f"{self.one} + {other}"


class Product(_Pair):
    """The scores of two objectives multiplied."""

    def __call__(self, seen: Seen) -> Tensor:
        return scored(self.one, seen) * scored(self.other, seen)

    def __repr__(self) -> str:
        if isinstance(self.one, Constant) and self.one.number == -1.0:
            return f"-{_within(self.other)}"
        return f"{_within(self.one)} * {_within(self.other)}"


def _within(one: Objective) -> str:
    return f"({one})" if isinstance(one, Sum) else str(one)


@dataclass(frozen=True, repr=False)
class AtSite(Objective):
    """An objective that reads one site."""

    site: Key

    def __post_init__(self) -> None:
        check_site(self.site)

    @property
    def sites(self) -> tuple[Key, ...]:
        return (self.site,)

    def _told(self, *rest: object) -> str:
        site = repr(self.site) if isinstance(self.site, Site) else repr(str(id_of(self.site)))
        return f"{type(self).__name__}({', '.join([site, *map(str, rest)])})"

    def __repr__(self) -> str:
        return self._told()


@dataclass(frozen=True, repr=False)
class Layer(AtSite):
    """All that a site holds: its mean, or with power=2 the mean of its squares (DeepDream).

    >>> analyzers.images.Layer("conv2", power=2)
    Layer('conv2', power=2)
    """

    power: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("power", self.power, 1, 2)

    def __call__(self, seen: Seen) -> Tensor:
        return seen.read(self.site)[..., None].flatten(1).pow(self.power).mean(1)

    def __repr__(self) -> str:
        return self._told(*([f"power={self.power}"] if self.power != 1 else []))


@dataclass(frozen=True, repr=False)
class Channel(AtSite):
    """One channel of a layer, its mean over all places.

    >>> analyzers.images.Channel("conv2", 3)
    Channel('conv2', 3)

    Channels are counted by the dimension that the ops tell, else by the second, or the last of three; a `fmr.Site` with a
    layout says which one is called units.
    """

    channel: int

    def __call__(self, seen: Seen) -> Tensor:
        return seen.channel(self.site, self.channel)[..., None].flatten(1).mean(1)

    def __repr__(self) -> str:
        return self._told(self.channel)


@dataclass(frozen=True, repr=False)
class Neuron(AtSite):
    """One channel at one place: row and column, or a position; without one, the place in the middle.

    >>> analyzers.images.Neuron("conv2", 3, (1, 2))
    Neuron('conv2', 3, (1, 2))

    Of an attention pattern, Neuron("attention[2].pattern", key, (head, query)).
    """

    channel: int
    place: int | tuple[int, ...] | None = None

    def __call__(self, seen: Seen) -> Tensor:
        values = seen.channel(self.site, self.channel)
        shape = tuple(values.shape[1:])
        given = tuple(size // 2 for size in shape) if self.place is None else self.place
        numbers = [whole_number(n) for n in (given if isinstance(given, (tuple, list)) else (given,))]
        fits = len(numbers) == len(shape) and all(
            n is not None and -size <= n < size for n, size in zip(numbers, shape, strict=True)
        )
        if not fits:
            raise AnalyzerError(
                f"place={self.place!r}: a channel of {str(id_of(self.site))!r} has places of shape {shape}. Expected "
                f"{len(shape)} indices within it, as place={tuple(size // 2 for size in shape)}."
            )
        return values[(slice(None), *numbers)]

    def __repr__(self) -> str:
        return self._told(self.channel, *([self.place] if self.place is not None else []))


class Logit(Channel):
    """The score of one class before the softmax: a channel of what the model returns.

    >>> analyzers.images.Logit(7)
    Logit(7)

    number: of the class. site: where logits stand, if the model returns something else.
    """

    def __init__(self, number: int, site: Key = "") -> None:
        super().__init__(site, number)

    def __repr__(self) -> str:
        return f"Logit({self.channel})" if self.site == "" else self._told(self.channel)


@dataclass(frozen=True, eq=False, repr=False)
class Direction(AtSite):
    """A direction in the space of a layer's channels: the mean over places of its product with what stands there.

    >>> analyzers.images.Direction("conv2", torch.randn(32))
    Direction('conv2', 32 numbers)

    vector: a number for each channel. cosine: how strongly the angle counts; the product is multiplied by this power of the
    cosine, from 0.1 on.
    """

    vector: Tensor
    cosine: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("cosine", self.cosine, least=0)
        if not isinstance(self.vector, Tensor):
            raise AnalyzerError(f"Direction got a {type(self.vector).__name__}, expected a tensor of a number a channel.")
        if not bool(self.vector.isfinite().all()):
            raise AnalyzerError("Direction got a vector with numbers that are not finite, expected a number a channel.")

    def __call__(self, seen: Seen) -> Tensor:
        values = spread(seen.channels(self.site))
        vector = self.vector.to(values)
        if vector.shape != values.shape[1:2]:
            raise AnalyzerError(
                f"The direction has shape {tuple(vector.shape)}, and {str(id_of(self.site))!r} has {values.shape[1]} "
                f"channels. Expected a vector of {values.shape[1]} numbers."
            )
        products = torch.einsum("ncp,c->np", values, vector)
        if not self.cosine:
            return products.mean(1)
        cosines = products / (values.norm(dim=1) * vector.norm()).clamp(min=1e-6)
        found: Tensor = (products * cosines.clamp(min=0.1) ** self.cosine).mean(1)
        return found

    def __repr__(self) -> str:
        return self._told(f"{self.vector.numel()} numbers")


@dataclass(frozen=True, repr=False)
class Diversity(AtSite):
    """How little several images are alike: less the mean cosine of an image's Gram matrix and those of the others.

    >>> analyzers.images.Channel("conv2", 3) + 2 * analyzers.images.Diversity("conv1")
    Channel('conv2', 3) + 2 * Diversity('conv1')

    Source: C. Olah, A. Mordvintsev, L. Schubert, "Feature visualization", Distill, 2017.
    """

    def __call__(self, seen: Seen) -> Tensor:
        values = seen.channels(self.site)
        many = len(values)
        if many < 2:
            raise AnalyzerError("Diversity got one image, expected several that can differ: run(objective, images=4).")
        flat = gram(values).flatten(1)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
        cosines = flat @ flat.T
        found: Tensor = (cosines.diagonal() - cosines.sum(1)) / (many - 1)
        return found


@dataclass(frozen=True)
class TotalVariation(Objective):
    """How much an image differs from pixel to pixel, a penalty: the mean of absolute differences, down plus across.

    >>> analyzers.images.Channel("conv2", 3) - 0.1 * analyzers.images.TotalVariation()
    Channel('conv2', 3) - 0.1 * TotalVariation()
    """

    def __call__(self, seen: Seen) -> Tensor:
        parts = (seen.images.diff(dim=dim).abs().flatten(1) for dim in (2, 3))
        return torch.stack([part.mean(1) if part.shape[1] else part.sum(1) for part in parts]).sum(0)


@dataclass(frozen=True)
class Contrast(Objective):
    """How far an image lies from grey, a penalty: the mean of |image - 0.5| to a power.

    >>> analyzers.images.Logit(7) - analyzers.images.Contrast(power=4)
    Logit(7) - Contrast(power=4)
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        check_number("power", self.power, above=0)

    def __call__(self, seen: Seen) -> Tensor:
        return (seen.images - 0.5).abs().pow(self.power).flatten(1).mean(1)
