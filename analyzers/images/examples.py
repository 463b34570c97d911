"""Which dimension of a site counts images: the one that grows with their number, and holds of each what it makes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import fmr
from analyzers.images.seen import named, one_tensor
from analyzers.protocol import AnalyzerError
from fmr.ids import Site
from fmr.nodes import Key

Pass = Callable[[Tensor, Sequence[Key], int], fmr.Run]
"""A pass over images that reads sites, with a seed for what is drawn in it."""

_CLOSE = {torch.float16: 0.25, torch.bfloat16: 0.25}
"""How far what is made of an image among others may lie from what is made of it alone, by how far two images lie apart."""


def axes_of(run: Pass, pair: Tensor, sites: Sequence[Key], dtype: torch.dtype) -> dict[Key, int]:
    """The dimension of each site that counts images, proven on two of them, in a model of this type.

    Each is run alone, and both together. Where no two images pass at once it is the first one, of a single image.
    """
    whole = {site: _whole(site) for site in sites}
    keys = list(dict.fromkeys(whole.values()))
    alone = [_tensors(run(image[None], keys, 0), keys) for image in pair]
    try:
        both = _tensors(run(pair, keys, 0), keys)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError):  # of a model that takes one image alone
        both = {}
    found = {key: _axis(key, alone[0][key], both.get(key)) for key in keys}
    for key in both:
        if not _same(key, found[key], alone, both, dtype):
            _check_drawn(run, pair, key, found[key], alone, both, dtype)
    return {site: found[whole[site]] for site in sites}


def _whole(site: Key) -> Key:
    """A site that is not narrowed."""
    if not isinstance(site, Site):
        return site
    if site.examples is not None:
        raise AnalyzerError(f"{site!r} is narrowed to some examples, and each image has a score. Leave examples= out.")
    return replace(site, positions=None, heads=None, units=None, n_heads=None)


def _tensors(values: fmr.Run, keys: Sequence[Key]) -> dict[Key, Tensor]:
    return {key: one_tensor(key, values[key]).detach() for key in keys}


def _axis(site: Key, one: Tensor, both: Tensor | None) -> int:
    """The dimension of which there is one of one image, and two of two."""
    if both is None:
        grown = [0] if one.shape[:1] == (1,) else []
    else:
        sizes = list(zip(one.shape, both.shape, strict=True)) if one.dim() == both.dim() else []
        grown = [n for n, (alone, together) in enumerate(sizes) if alone != together]
    if len(grown) != 1 or one.shape[grown[0]] != 1 or (both is not None and both.shape[grown[0]] != 2):
        of_two = f" and {tuple(both.shape)} for two" if both is not None else ""
        raise AnalyzerError(
            f"{named(site)} has shape {tuple(one.shape)} for one image{of_two}, expected a row for each image: a site of "
            "which one dimension counts images."
        )
    return grown[0]


def _same(key: Key, axis: int, alone: list[dict[Key, Tensor]], both: dict[Key, Tensor], dtype: torch.dtype) -> bool:
    """Whether each image makes the same alone and beside another one."""
    single = torch.cat([one[key] for one in alone], axis)
    return _far(both[key], single) <= _slack(single, axis, dtype)


def _slack(single: Tensor, axis: int, dtype: torch.dtype) -> float:
    """How far numbers of one image may lie apart that are the same but for rounding."""
    size = _far(single, torch.zeros_like(single))
    return _CLOSE.get(dtype, 0.05) * _far(*single.split(1, axis)) + 16 * torch.finfo(dtype).eps * size


def _far(one: Tensor, other: Tensor) -> float:
    """The largest difference of two values."""
    return float((one.double() - other.double()).nan_to_num().abs().max()) if one.numel() else 0.0


def _check_drawn(
    run: Pass, pair: Tensor, key: Key, axis: int, alone: list[dict[Key, Tensor]], both: dict[Key, Tensor], dtype: torch.dtype
) -> None:
    """Raise where an image makes something else beside another one, and that is not because the model draws numbers."""
    slack = _slack(torch.cat([one[key] for one in alone], axis), axis, dtype)
    again, drawn = (_tensors(run(pair, [key], seed), [key])[key] for seed in (0, 1))
    if _far(again, both[key]) > slack:
        raise AnalyzerError(
            f"{named(key)} differs from pass to pass over the same images, by what the model keeps of those before. "
            "Expected a model that makes the same of an image each time."
        )
    if _far(drawn, both[key]) <= slack:
        raise AnalyzerError(
            f"{named(key)} holds something else of an image beside another one than of it alone: the images stand in "
            "another order there, or depend on each other. Expected a site at which each image has a row of its own."
        )


def check_layout(site: Key, axis: int) -> None:
    """Raise for a site that says, or leaves to be understood, that another dimension counts images."""
    layout = site.layout if isinstance(site, Site) else None
    said = layout.index("examples") if layout is not None and "examples" in layout else 0
    if said != axis:
        how = "its layout says" if layout is not None else "without a layout it would be"
        raise AnalyzerError(
            f"{named(site)} counts images by dimension {axis}, and {how} dimension {said}. Expected a fmr.Site whose layout "
            f"has 'examples' at {axis}."
        )
