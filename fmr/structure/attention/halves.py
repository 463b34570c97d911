"""Differential attention (Ye et al. 2025): the map of a head is a softmax less a share of another, over the same values."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.ids import Site, TensorId
from fmr.structure.attention.maps import maps_of


class Half(NamedTuple):
    """What is taken away in a differential attention: its queries, keys, scores and pattern, and how much of that.

    `share` is a number, or the site of what the pattern is multiplied by. Where one softmax makes both patterns, the sites
    say by `heads` which of its heads are these.
    """

    softmax: TensorId
    q: Site
    k: Site
    scores: Site
    pattern: Site
    dim: int
    share: Site | float

    @property
    def read(self) -> tuple[Site, ...]:
        """What a map is computed from."""
        return (self.pattern, self.share) if isinstance(self.share, Site) else (self.pattern,)

    @property
    def roles(self) -> dict[str, TensorId]:
        """Its values, as they are called."""
        names = {"queries": self.q, "keys": self.k, "scores": self.scores, "pattern": self.pattern}
        return {**{f"second {word}": site.id for word, site in names.items()}, "second softmax": self.softmax}


ORDER = ("examples", "heads", "positions", "units")


def map_of(read: Callable[[Site], Tensor], pattern: Site, minus: Half | None, n_heads: int, n_kv_heads: int) -> Tensor:
    """The maps of an attention as (examples, heads, queries, keys), less what is taken away, read by sites."""
    maps = maps_of(read(pattern).detach(), pattern, n_heads, n_kv_heads)
    if minus is None:
        return maps
    return maps - _share(read, minus.share) * maps_of(read(minus.pattern).detach(), minus.pattern, n_heads, n_kv_heads)


def _share(read: Callable[[Site], Tensor], share: Site | float) -> Tensor | float:
    """How much is taken away for each example, head and query."""
    if not isinstance(share, Site):
        return share
    layout, value = share.layout or (), read(share).detach()
    if value.dim() != len(layout) or (layout and layout[-1] == "units" and value.shape[-1] != 1):
        raise StructureError(f"{share.id}, {list(value.shape)}, is no share of a map for each head and query.")
    ordered: Tensor = value.permute([layout.index(name) for name in ORDER if name in layout])
    return ordered[tuple(slice(None) if name in layout else None for name in ORDER)]


def picked(value: Tensor, site: Site) -> Tensor:
    """The heads of a value that a site picks."""
    if site.heads is None or site.layout is None:
        return value
    axis, heads = site.layout.index("heads"), torch.as_tensor(site.heads, device=value.device)
    if int(heads.max()) >= value.shape[axis]:
        raise StructureError(f"{site!r} picks heads of which {list(value.shape)} has {value.shape[axis]}.")
    return value.index_select(axis, heads)
