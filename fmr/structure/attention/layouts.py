"""What the dimensions of an attention's values count: examples, heads, positions, units."""

import math
from typing import NamedTuple

import torch

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.structure.attention.attention import Attention
from fmr.structure.attention.definition import MULTIPLY
from fmr.structure.attention.heads import Heads
from fmr.structure.attention.maps import JOIN, counts_heads, told_apart
from fmr.structure.attention.scores import Scores
from fmr.structure.attention.values import Output, ValueProduct
from fmr.structure.normal.einsum import Subscripts
from fmr.structure.normal.indices import dim_map, iota, trace
from fmr.structure.normal.match import Path
from fmr.structure.normal.value import Value

Layout = tuple[str, ...]
"""What each dimension of a value counts."""


class Layouts(NamedTuple):
    """What the dimensions of q, k, v, of scores and pattern, and of z count."""

    q: Layout
    k: Layout
    v: Layout
    scores: Layout
    z: Layout


def laid_out(graph: Graph, name: TensorId, layout: Layout | None = None) -> Site:
    """The site of a value with what its dimensions count; heads are not told apart where that is not known."""
    shape, named = graph[name].shape, layout or _usual(len(graph[name].shape))
    return Site(name, layout=named, n_heads=shape[named.index("heads")] if "heads" in named else None)


def described(
    graph: Graph,
    softmax: Value,
    read: tuple[Site, Site, Site],
    made: tuple[Site, Site],
    output: Output | None,
    sizes: tuple[int, int, int],
    kind: str,
) -> Attention:
    """The attention around a softmax: q, k and v, pattern and z, who writes them, and heads, key heads and units."""
    return Attention(
        graph,
        softmax.node.id,
        *read,
        laid_out(graph, softmax.operands[0], made[0].layout),
        *made,
        Site(output.id) if output is not None else None,
        *sizes,
        kind,
        softmax.node.module,
        softmax.dim,
        path=tuple(node.id for node in output.way) if output is not None and kind in MULTIPLY else (),
    )


def _usual(rank: int) -> Layout:
    return ("examples", *(f"axis {n}" for n in range(1, rank - 2)), "positions", "units")[-rank:]


def layouts(graph: Graph, scores: Scores, use: ValueProduct, heads: Heads) -> Layouts:
    """What the dimensions of an attention's values count."""
    v, pattern, z = mixing(graph, use, heads)
    q, k = _of_product(scores.subscripts, _moved(graph, pattern, scores.way))
    return Layouts(_of_rows(graph[scores.q].shape, q, dict(zip(pattern, use.way[0].shape, strict=True))), k, v, pattern, z)


def _of_rows(shape: tuple[int, ...], layout: Layout, sizes: dict[str, int]) -> Layout:
    """The layout of queries, of whose rows each head has as many as a pattern of these sizes: heads are folded into them."""
    rows = [name for name in sizes if name in ("heads", "positions")]
    if len(rows) < 2 or "positions" not in layout or any(counts_heads(name) for name in layout):
        return layout
    at = layout.index("positions")
    folded = shape[at] == math.prod(sizes[name] for name in rows) > sizes["positions"]
    return tuple(JOIN.join(rows) if folded and n == at else name for n, name in enumerate(layout))


def over_others(name: str, beside: bool) -> str:
    """Why a softmax along a dimension of this name weighs no values, as where that lies `beside` queries and keys; empty
    where it may count either."""
    over = "heads" if counts_heads(name) else name if name == "examples" else "neither keys nor queries" if beside else ""
    return f"its softmax is over {over}: what weighs the values adds up to one over those, and not over keys" if over else ""


def mixing(graph: Graph, use: ValueProduct, heads: Heads) -> tuple[Layout, Layout, Layout]:
    """What the dimensions of v, of the pattern and of z count."""
    head = use.subscripts.result[heads.dims[0]] if len(heads.dims) == 1 and not heads.folded else ""
    v, weights, z = _of_mixing(use.subscripts, head)
    if heads.number > 1 and "heads" not in z and heads.places is not None:
        z = told_apart(z, use.node.shape, heads.places)
        shared = {letter: name for letter, name in zip(use.subscripts.result, z, strict=True) if counts_heads(name)}
        v, weights = _renamed(use.subscripts.right, v, shared), _renamed(use.subscripts.left, weights, shared)
    pattern = _moved(graph, weights, use.way)
    told = heads.folded or heads.places is not None
    if heads.number > 1 and told and not any(counts_heads(name) for name in pattern):
        pattern = _followed(graph, pattern, use, heads)
    return v, pattern, z


def _renamed(word: str, layout: Layout, names: dict[str, str]) -> Layout:
    """A layout in which the dimensions of some subscripts are called otherwise."""
    return tuple(names.get(letter, name) for letter, name in zip(word, layout, strict=True))


def _followed(graph: Graph, layout: Layout, use: ValueProduct, heads: Heads) -> Layout:
    """The layout of a pattern whose heads are told apart by following its numbers to the vectors of z that they weigh; where
    it is not known which these are, those of an example lie beside one another."""
    shape, subscripts = use.way[0].shape, use.subscripts
    value = trace(graph, iota(*shape), use.way) if math.prod(shape) else None
    if value is None or value.shape != use.way[-1].shape:
        return layout
    beside = [torch.arange(heads.number) * (n in heads.dims[:1]) for n in range(len(subscripts.result))]
    of_z = dict(zip(subscripts.result, heads.places or beside, strict=True))
    own = [n for n, letter in enumerate(subscripts.left) if letter in of_z]
    rows = value.permute(*own, *(n for n in range(value.dim()) if n not in own))
    rows = rows[tuple(of_z[subscripts.left[n]].clamp(max=size - 1) for n, size in zip(own, rows.shape, strict=False))]
    seen = (rows.flatten(1) >= 0).all(0).nonzero()  # what is padded has no places
    if not len(seen):
        return layout
    found = told_apart(layout, shape, torch.unravel_index(rows.flatten(1)[:, seen[0, 0]].long(), shape))
    return _of_heads(layout, found.index("heads")) if "heads" in found else found


def _of_mixing(subscripts: Subscripts, head: str) -> tuple[Layout, Layout, Layout]:
    """What the dimensions of v, of the weights that its product reads and of z count.

    Where each query has keys of its own, its place is that of a batch of products.
    """
    queries = subscripts.free(subscripts.left).replace(head, "") or subscripts.batch.replace(head, "")[1:]
    query, key, unit = queries[-1:], subscripts.contracted[-1:], subscripts.free(subscripts.right)[-1:]
    shared = dict.fromkeys([letter for letter in subscripts.batch if letter not in head + query][:1], "examples")
    v = _named(subscripts.right, shared | {unit: "units", key: "positions", head: "heads"})
    weights = _named(subscripts.left, shared | {query: "positions", key: "units", head: "heads"})
    return v, weights, _named(subscripts.result, shared | {unit: "units", query: "positions", head: "heads"})


def _of_product(subscripts: Subscripts, result: Layout) -> tuple[Layout, Layout]:
    """What the dimensions of q and k count, known what those of their product do."""
    named = {letter: name for letter, name in zip(subscripts.result, result, strict=True) if name != "units"}
    unit, key = subscripts.contracted[-1:], subscripts.free(subscripts.right)[-1:]
    shared = {letter: name for letter, name in named.items() if name != "positions"}
    k = shared if named.get(key) == "heads" else shared | {key: "positions"}
    return _named(subscripts.left, named | {unit: "units"}), _named(subscripts.right, k | {unit: "units"})


def _named(word: str, names: dict[str, str]) -> Layout:
    """The name of each letter; of those that have none the first counts examples, where no other does."""
    first = next((n for n, letter in enumerate(word) if letter not in names and "examples" not in names.values()), None)
    return tuple(names.get(letter, "examples" if n == first else f"axis {n}") for n, letter in enumerate(word))


def _moved(graph: Graph, layout: Layout, way: Path) -> Layout:
    """What the dimensions at the beginning of a way count, known what they count at its end."""
    rank = len(way[0].shape)
    places = {place: name for place, name in zip(dim_map(graph, way), layout, strict=True) if place is not None}
    axis = next((n for n, name in places.items() if name == "heads"), None)
    places = {n: name for n, name in places.items() if n != axis}
    usual = _usual(rank)
    found = tuple(places.get(n, "" if usual[n] in places.values() else usual[n]) or f"axis {n}" for n in range(rank))
    if axis is None and "heads" in layout:
        return _laid_together(graph, found, layout.index("heads"), way)
    return found if axis is None else _of_heads(found, axis)


def _laid_together(graph: Graph, layout: Layout, axis: int, way: Path) -> Layout:
    """The layout at the beginning of a way at whose end this dimension counts heads, which lie there with something else."""
    shape = way[0].shape
    value = trace(graph, iota(*shape), way) if math.prod(shape) else None
    first = value.movedim(axis, 0).flatten(1)[:, 0].long() if value is not None else torch.tensor([-1])
    return told_apart(layout, shape, torch.unravel_index(first, shape)) if bool((first >= 0).all()) else layout


def _of_heads(layout: Layout, axis: int) -> Layout:
    """A layout with one dimension for heads; what that was thought to count is counted by one that is still free."""
    named = dict(enumerate(layout)) | {axis: "heads"}
    free = [n for n, name in named.items() if name == f"axis {n}"] if layout[axis] != f"axis {axis}" else []
    return tuple((named | dict.fromkeys(free[-1:], layout[axis])).values())
