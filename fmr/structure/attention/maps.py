"""Attention patterns in one order, (examples, heads, queries, keys), whatever the model's own."""

import math
from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.ids import Site

KEY_HEADS, GROUPS = "key heads", "groups"
"""Two dimensions that count heads together: each key head, and the queries that share it."""


JOIN = "*"
"""Between the names of two things that one dimension counts; the first one changes last: "examples*heads"."""


def counts_heads(name: str) -> bool:
    """Whether a dimension of this name counts heads, alone or with something else."""
    return not {"heads", KEY_HEADS, GROUPS}.isdisjoint(name.split(JOIN))


def told_apart(layout: tuple[str, ...], shape: tuple[int, ...], places: Sequence[Tensor]) -> tuple[str, ...]:
    """A layout with the dimensions named that count heads, known the place of each head; as it was where none tell them.

    >>> told_apart(("examples", "positions", "units"), (8, 5, 5), [torch.arange(4), torch.zeros(4), torch.zeros(4)])
    ('examples*heads', 'positions', 'units')
    """
    counted = torch.arange(len(places[0]))
    along = {dim: place for dim, place in enumerate(places) if bool((place != place[0]).any())}
    if len(along) == 1:
        ((dim, place),) = along.items()
        other = layout[dim] if layout[dim] in ("examples", "positions") else "examples"
        name = _joined(place - place[0], counted, shape[dim], other)
    elif len(along) == 2:
        name = _crossed(along, shape, counted, layout)
    else:
        name = {}
    return tuple((dict(enumerate(layout)) | ({dim: name} if isinstance(name, str) else name)).values())


def _joined(place: Tensor, counted: Tensor, size: int, other: str, name: str = "heads") -> dict[int, str] | str:
    """What a dimension counts along which heads, or so many key heads or groups of them, lie in these places."""
    apart, rest = divmod(size, int(counted.max()) + 1)
    if rest:
        return {}
    if torch.equal(place, counted):
        return name if apart == 1 else f"{other}{JOIN}{name}"
    return f"{name}{JOIN}{other}" if torch.equal(place, counted * apart) else {}


def _crossed(along: dict[int, Tensor], shape: tuple[int, ...], counted: Tensor, layout: tuple[str, ...]) -> dict[int, str]:
    """What two dimensions count that tell heads apart together: key heads, and groups alone or beside something else."""
    for outer, inner in permutations(along):
        shared = len(along[inner].unique())
        own, inside = (
            _joined(along[dim] - along[dim][0], place, shape[dim], layout[dim], name)
            for dim, place, name in ((outer, counted // shared, KEY_HEADS), (inner, counted % shared, GROUPS))
        )
        if isinstance(own, str) and isinstance(inside, str):
            return {outer: own, inner: inside}
    return {}


def maps_of(value: Tensor, site: Site, n_heads: int, n_kv_heads: int) -> Tensor:
    """A pattern as (examples, heads, queries, keys). Dimensions that are none of these count as examples."""
    value, layout = named(value, site, n_heads, n_kv_heads)
    if _is_packed(layout, tuple(value.shape), n_heads, n_kv_heads):
        layout = tuple({"heads": KEY_HEADS, "positions": GROUPS}.get(name, name) for name in layout)
    heads = [dim for name in ("heads", KEY_HEADS, GROUPS) for dim, own in enumerate(layout) if own == name]
    _check_heads([(layout[dim], value.shape[dim]) for dim in heads], value, site, n_heads, n_kv_heads)
    queries, keys = ([dim for dim, name in enumerate(layout) if name == one] for one in ("positions", "units"))
    rest = [dim for dim in range(len(layout)) if dim not in (*heads, *queries, *keys)]
    sizes = (math.prod(value.shape[dim] for dim in dims) for dims in (rest, heads, queries, keys))
    return value.permute(*rest, *heads, *queries, *keys).reshape(*sizes)


def _is_packed(layout: tuple[str, ...], shape: tuple[int, ...], n_heads: int, n_kv_heads: int) -> bool:
    """Whether the heads that share keys stand where queries do: at a step of one query, for kernels that repeat no keys."""
    sizes = dict(zip(layout, shape, strict=True))
    shared = len(sizes) == len(layout) and n_kv_heads < n_heads and "positions" in sizes
    return shared and sizes.get("heads") == n_kv_heads and sizes["positions"] * n_kv_heads == n_heads


_ELSEWHERE = "Locate it in that run: fmr.locate(run), or of one pass fmr.locate(run.passes[i])."


def _found(value: Tensor, site: Site) -> str:
    return f"{str(site.id)!r} has shape {list(value.shape)} in this run"


def named(value: Tensor, site: Site, n_heads: int, n_kv_heads: int) -> tuple[Tensor, tuple[str, ...]]:
    """A value with a name for each of its dimensions, those that count heads and something else made two."""
    layout = site.layout or ()
    if len(layout) != value.dim():
        raise StructureError(f"{_found(value, site)}: expected {len(layout)} dimensions, {list(layout)}. {_ELSEWHERE}")
    names: tuple[str, ...] = ()
    counts = {"heads": n_heads, KEY_HEADS: n_kv_heads, GROUPS: n_heads // n_kv_heads}
    for dim in reversed(range(len(layout))):
        parts = tuple(layout[dim].split(JOIN))
        many = next((number for part, number in counts.items() if part in parts), n_heads)
        if len(parts) > 1 and value.shape[dim] % many:
            raise StructureError(
                f"{_found(value, site)}: dimension {dim} counts {' and '.join(parts)}, expected a multiple of {many} heads. "
                f"{_ELSEWHERE}"
            )
        if len(parts) > 1:
            apart = value.shape[dim] // many
            value = value.unflatten(dim, [counts.get(part, apart) for part in parts])
        names = parts + names
    return value, names


def _check_heads(counts: list[tuple[str, int]], value: Tensor, site: Site, n_heads: int, n_kv_heads: int) -> None:
    """Whether these dimensions are those of the heads; none are where there is one head alone."""
    if not counts and n_heads > 1:
        raise StructureError(
            f"Which places of {str(site.id)!r}, {list(value.shape)}, belong to which of its {n_heads} heads cannot be told. "
            f"Expected a dimension that counts heads; run[block.pattern] has the value as it is."
        )
    wrong = math.prod(size for _, size in counts) != n_heads
    if wrong or any(name == KEY_HEADS and size != n_kv_heads for name, size in counts):
        told = " times ".join(f"{size} {name}" for name, size in counts)
        raise StructureError(f"{_found(value, site)}: {told}, expected {n_heads} heads as where it was found. {_ELSEWHERE}")
