"""What an objective reads: the images as they stand, and what the model made of them, by site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """Images (images, colours, height, width) from 0 to 1, before any transformation, and values by site.

    >>> seen = Seen(torch.rand(2, 1, 8, 8), lambda site: torch.ones(2, 16, 8, 8))
    >>> analyzers.images.Channel("conv1", 3)(seen)
    tensor([1., 1.])
    """

    images: Tensor
    read: Callable[[Key], Tensor]


def tensor_at(site: Key, value: object, images: int) -> Tensor:
    """The one tensor that a site holds, in single precision at least: a row for each image, narrowed as the site says."""
    found = dict(leaves(value))
    if len(found) > 1 and "logits" in found:
        found = {"": found["logits"]}
    if len(found) != 1:
        remedy = f"name one by its position, as {f'{id_of(site)}:{next(iter(found))}'!r}" if found else "another site"
        raise AnalyzerError(f"{_named(site)} holds {len(found)} tensors, expected one: {remedy}.")
    (tensor,) = found.values()
    if not tensor.dim() or len(tensor) != images:
        raise AnalyzerError(
            f"{_named(site)} has shape {tuple(tensor.shape)} for {images} images, expected a row for each image."
        )
    if not tensor.is_floating_point():
        raise AnalyzerError(
            f"{_named(site)} holds {str(tensor.dtype).removeprefix('torch.')}, which no gradient passes. "
            "Expected a site of floating-point values."
        )
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def by_channel(value: Tensor, site: Key, axis: int | None) -> Tensor:
    """A value as (images, channels, ...): the dimension that counts channels is the second one.

    Without an axis it is the one that the site's layout calls units; else the last of three, and the second of all others.
    """
    layout = site.layout if isinstance(site, Site) and not site.selection else None
    if axis is None and layout is not None and "units" in layout and len(layout) == value.dim():
        axis = layout.index("units")
    axis = _CHANNELS.get(value.dim()) if axis is None else axis
    if axis is None or not -value.dim() <= axis < value.dim() or axis % value.dim() == 0:
        raise AnalyzerError(
            f"{_named(site)} has shape {tuple(value.shape)}, of which "
            + (f"axis={axis} counts no channels" if axis is not None else "no dimension is known to count channels")
            + f". Expected axis=, one of 1 to {max(1, value.dim() - 1)}."
        )
    return value.movedim(axis, 1)


def channel_of(value: Tensor, site: Key, channel: int, axis: int | None) -> Tensor:
    """What one channel holds, (images, ...)."""
    values, number = by_channel(value, site, axis), whole_number(channel)
    if number is None or not -values.shape[1] <= number < values.shape[1]:
        raise AnalyzerError(
            f"{_named(site)} has shape {tuple(value.shape)}, which is {values.shape[1]} channels, and no channel "
            f"{channel!r}. Expected 0 to {values.shape[1] - 1}; axis= names the dimension that counts channels."
        )
    return values[:, number]


def gram(value: Tensor) -> Tensor:
    """The Gram matrices of values (images, channels, ...): mean products of channels over places.

    >>> analyzers.images.gram(torch.tensor([2.0, 3.0])[None, :, None, None].expand(1, 2, 5, 5))
    tensor([[[4., 6.],
             [6., 9.]]])

    G_ij = sum over places of F_i F_j, divided by the number of places (Gatys et al. 2016, "Image style transfer using
    convolutional neural networks").
    """
    flat = spread(value)
    return flat @ flat.mT / flat.shape[2]


def spread(value: Tensor) -> Tensor:
    """A value (images, channels, ...) with its places in a row, (images, channels, places)."""
    return value[..., None].flatten(2)


def _named(site: Key) -> str:
    name = str(id_of(site))
    return repr(name) if name else "The output of the model"
