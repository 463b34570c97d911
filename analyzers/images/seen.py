"""What an objective reads: the images as they stand, and what the model made of them, by site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.errors import whole_number
from fmr.ids import Site
from fmr.nests import leaves
from fmr.nodes import Key, id_of

_CHANNELS = {2: 1, 3: 2, 4: 1, 5: 1}
"""Which dimension counts channels, by how many there are: (images, channels), (images, positions, channels), and
(images, channels, height, width), with a depth or without."""


@dataclass(frozen=True)
class Seen:
    """Images (images, colours, height, width) from 0 to 1, before any transformation, and values by site; `sites` tells
    where a role is and how it is laid out.

    >>> seen = Seen(torch.rand(2, 1, 8, 8), lambda site: torch.ones(2, 16, 8, 8))
    >>> analyzers.images.Channel("conv1", 3)(seen)
    tensor([1., 1.])
    """

    images: Tensor
    read: Callable[[Key], Tensor]
    sites: Mapping[Key, Key] = field(default_factory=dict)

    def channels(self, site: Key, value: Tensor | None = None) -> Tensor:
        """What a site holds, or another value that is laid out alike, as (images, channels, ...)."""
        return by_channel(self.read(site) if value is None else value, self.sites.get(site, site))

    def channel(self, site: Key, channel: int) -> Tensor:
        """What one channel of a site holds, (images, ...)."""
        values, number = self.channels(site), whole_number(channel)
        if number is None or not -values.shape[1] <= number < values.shape[1]:
            raise AnalyzerError(
                f"{named(site)} has shape {tuple(self.read(site).shape)}, which is {values.shape[1]} channels, and no "
                f"channel {channel!r}. Expected 0 to {values.shape[1] - 1}."
            )
        return values[:, number]


def one_tensor(site: Key, value: object) -> Tensor:
    """The one tensor of floating-point numbers that a site holds; of several, the logits."""
    found = dict(leaves(value))
    if len(found) > 1 and "logits" in found:
        found = {"": found["logits"]}
    if len(found) != 1:
        remedy = f"name one by its position, as {f'{id_of(site)}:{next(iter(found))}'!r}" if found else "another site"
        raise AnalyzerError(f"{named(site)} holds {len(found)} tensors, expected one: {remedy}.")
    (tensor,) = found.values()
    if not tensor.is_floating_point():
        raise AnalyzerError(
            f"{named(site)} holds {str(tensor.dtype).removeprefix('torch.')}, which no gradient passes. "
            "Expected a site of floating-point values."
        )
    return tensor


def tensor_at(site: Key, value: object, images: int) -> Tensor:
    """The one tensor that a site holds, in single precision at least: a row for each image, narrowed as the site says."""
    tensor = one_tensor(site, value)
    rows = images_first(tensor, site) if tensor.dim() else tensor
    if not rows.dim() or len(rows) != images:
        raise AnalyzerError(
            f"{named(site)} has shape {tuple(tensor.shape)} for {images} images, expected a row for each image."
        )
    return rows if rows.dtype == torch.float64 else rows.float()


def images_first(value: Tensor, site: Key) -> Tensor:
    """A value as it stands at a site, with the dimension first that its layout calls examples."""
    names = _names(site)
    return value.movedim(names.index("examples"), 0) if "examples" in names and len(names) == value.dim() else value


def as_held(value: Tensor, site: Key) -> Tensor:
    """A value with a row for each image, laid out as it stands at a site."""
    names = _names(site)
    return value.movedim(0, names.index("examples")) if "examples" in names and len(names) == value.dim() else value


def _names(site: Key) -> list[str]:
    """The names of the dimensions that a site says, without those that an index drops."""
    if not isinstance(site, Site) or site.layout is None:
        return []
    return [name for name in site.layout if not isinstance(site.selection.get(name), int)]


def by_channel(value: Tensor, site: Key) -> Tensor:
    """A value with a row for each image as (images, channels, ...): the dimension that counts channels is the second one.

    It is the one that the site's layout calls units; of a site without one, which nothing was proven of, the last of three,
    and the second of all others.
    """
    if isinstance(site, Site) and site.layout is not None:
        names = sorted(_names(site), key=lambda name: name != "examples")
        axis = names.index("units") if "units" in names and len(names) == value.dim() else None
    else:
        narrowed = isinstance(site, Site) and site.selection and value.dim() > 2
        axis = None if narrowed else _CHANNELS.get(value.dim())
    if not axis:
        first, last = _examples(site, value.dim())
        raise AnalyzerError(
            f"{named(site)} has shape {tuple(as_held(value, site).shape)}, and of these dimensions the ops tell none that "
            f"alone counts channels. Expected a site whose layout calls one units: fmr.Site({str(id_of(site))!r}, "
            f"layout={first}) where it is the first beside the images, {last} where it is the last."
        )
    return value.movedim(axis, 1)


def _examples(site: Key, rank: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two layouts of so many dimensions, of which the first one counts channels and the last one."""
    places = {3: ("positions",), 4: ("rows", "columns")}.get(rank, tuple(f"places{n}" for n in range(1, rank - 1)))
    names = _names(site)
    at = names.index("examples") if "examples" in names and len(names) == rank else 0
    first, last = ["units", *places], [*places, "units"]
    for one in (first, last):
        one.insert(at, "examples")
    return tuple(first), tuple(last)


def channel_numbers(channels: Any) -> list[int]:
    """Numbers of channels as they are asked for."""
    several = list(channels) if isinstance(channels, Iterable) and not isinstance(channels, str) else []
    found = [number for number in map(whole_number, several) if number is not None]
    if not found or len(found) < len(several):
        raise AnalyzerError(f"channels={channels!r}: expected numbers of channels, as channels=[3], or None for all.")
    return found


def gram(value: Tensor) -> Tensor:
    """The Gram matrices of values (images, channels, ...): mean products of channels over places.

    >>> analyzers.images.gram(torch.tensor([2.0, 3.0])[None, :, None, None].expand(1, 2, 5, 5))
    tensor([[[4., 6.],
             [6., 9.]]])

    G_ij = sum over places of F_i F_j, divided by the number of places (Gatys et al. 2016, "Image style transfer using
    convolutional neural networks").
    """
    if not isinstance(value, Tensor) or value.dim() < 2:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise AnalyzerError(f"gram got {what}, expected values (images, channels, ...).")
    flat = spread(value)
    return flat @ flat.mT / flat.shape[2]


def spread(value: Tensor) -> Tensor:
    """A value (images, channels, ...) with its places in a row, (images, channels, places)."""
    return value[..., None].flatten(2)


def named(site: Key) -> str:
    """A site in words."""
    name = str(id_of(site))
    return repr(name) if name else "The output of the model"
