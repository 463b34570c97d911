"""How many heads an attention has, read off the way of its mixed values into the output projection.

A row of what the projection reads is the mixed values of all heads, one beside the other. So every vector of z is given a
number, the numbers are sent along that way, and those that meet in one row are the heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.graph import Graph
from fmr.nodes import Node
from fmr.structure.letters import carried, letters_of, numbers, sources
from fmr.structure.match import MASKING, NORMS, SAME, SHAPE, Projection, climb, contraction, projection, unshaped, weights
from fmr.structure.operands import Scores, Use, read_dims

Layout = tuple[str, ...]
"""What each dimension of a value counts."""

_SPLITS = SHAPE | SAME | MASKING | NORMS | frozenset("neg rsqrt pow mean sum sigmoid".split())
"""What may lie between a projection and the queries that it is split into: norms, gates and rotations too."""


class Heads(NamedTuple):
    """The number of heads, the dimensions of z that count them and how many each does, and whether one counts more too."""

    number: int
    dims: tuple[int, ...]
    counts: tuple[int, ...]
    folded: bool


def heads_in_rows(graph: Graph, use: Use, z: Node, way: tuple[Node, ...], end: Projection) -> Heads | None:
    """The heads whose values meet in a row that the projection `end` reads; None where its rows are not made of z.

    A pattern may weigh values of several places at once; then only the last dimension of a value counts its units.
    """
    found = (_meeting(graph, units, z, way, end) for units in dict.fromkeys((use.units, use.units[-1:])))
    return next((heads for heads in found if heads is not None), None)


def _meeting(graph: Graph, units: tuple[int, ...], z: Node, way: tuple[Node, ...], end: Projection) -> Heads | None:
    shape = z.shape
    lead = tuple(1 if n in units else size for n, size in enumerate(shape))
    if not math.prod(shape):
        return None
    value = carried(graph, numbers(*lead).expand(shape), way)
    if value is None:
        return None
    dims = read_dims(graph, end)
    row = value.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).flatten(0, -2)[0]
    met = row.unique().long()
    if met[0] < 0 or len(met) * math.prod(shape[n] for n in units) != len(row):
        return None
    places = [place.unique() for place in torch.unravel_index(met, lead)]
    several = tuple(n for n, place in enumerate(places) if len(place) > 1)
    counts = tuple(len(places[n]) for n in several)
    if len(shape) > 3 and any(count != shape[n] for count, n in zip(counts, several, strict=True)):
        return None
    return Heads(len(met), several, counts, math.prod(counts) != math.prod(shape[n] for n in several))


def key_heads(graph: Graph, use: Use, heads: Heads, repeated: float) -> int:
    """Key-value heads: fewer where values are repeated, or broadcast, over several query heads."""
    sizes = dict(zip(use.values, graph[use.v].shape, strict=True))
    least = 0 if heads.folded else 1
    own = [n for place, n in zip(heads.dims, heads.counts, strict=True) if sizes.get(use.letters.result[place], 0) > least]
    return max(1, round(math.prod(own) / repeated))


def head_size(graph: Graph, scores: Scores) -> int:
    """The units of a query or key that a score sums over; it may sum over places too."""
    sizes = graph[scores.q].shape
    summed = [n for n, letter in enumerate(scores.in_q) if letter in scores.letters.summed]
    value = _told_apart(graph, scores) if len(summed) > 1 else None
    units = [n for n in summed if value is not None and _varies(value, n)]
    return math.prod(sizes[n] for n in units or summed)


def compares_units(graph: Graph, scores: Scores) -> bool:
    """Whether a score sums over positions: then the map is one of units by units."""
    value = _told_apart(graph, scores)
    if value is None:
        return False
    alone = [n for n, letter in enumerate(scores.in_q) if letter in scores.letters.alone(scores.in_q)]
    summed = [n for n, letter in enumerate(scores.in_q) if letter in scores.letters.summed]
    return any(_varies(value, n) for n in alone) and not any(_varies(value, n) for n in summed)


def _told_apart(graph: Graph, scores: Scores) -> Tensor | None:
    """The queries, in which each unit of what they were split from has its own number."""
    made = _projected(graph, scores)
    value = carried(graph, _units(graph, made), (made, graph[scores.q])) if made is not None else None
    return value if value is not None and value.numel() and value.min() >= 0 else None


def _projected(graph: Graph, scores: Scores) -> Node | None:
    """What the queries were split from: the projection, else a whole that is no weight."""
    above = list(climb(graph, scores.q, lambda node: node.op in _SPLITS and contraction(node) is None))
    projected = (node for node in above if projection(graph, node) is not None)
    whole = (node for node in above if node.op not in _SPLITS and len(node.shape) < 4 and not weights(graph, node.id))
    return next(projected, next(whole, None))


def heads_in_queries(graph: Graph, scores: Scores, use: Use) -> Heads | None:
    """The heads that the units of a projection were split into on their way to the queries."""
    made = _projected(graph, scores)
    if made is None:
        return _in_view(graph, scores, use) or (Heads(1, (), (), False) if len(use.node.shape) == 3 else None)
    value = _told_apart(graph, scores)
    if _is_split(graph, made):
        return None  # what its units are is not all that is beside them
    if value is None:
        return _in_view(graph, scores, use)
    summed = [n for n, letter in enumerate(scores.in_q) if letter in scores.letters.summed]
    if not any(_varies(value, n) for n in summed):
        return None  # it compares units over positions
    number, rest = divmod(len(value.unique()), head_size(graph, scores))
    if rest or not number:
        return _in_view(graph, scores, use)
    several = [n for n, letter in enumerate(scores.in_q) if letter not in scores.letters.summed and _varies(value, n)]
    dims = [_in_result(graph, scores, use, scores.in_q[n]) for n in several]
    counts = tuple(value.shape[n] for n in several)
    if math.prod(counts) == number and None not in dims:
        return Heads(number, tuple(n for n in dims if n is not None), counts, False)
    return Heads(number, (0,), (number,), True)


def _in_view(graph: Graph, scores: Scores, use: Use) -> Heads | None:
    """The heads of the view that split the units of the queries, where the units themselves cannot be followed."""
    size, z = head_size(graph, scores), use.node.shape
    for node in climb(graph, scores.q, lambda node: node.op in _SPLITS and contraction(node) is None):
        if node.op in ("view", "reshape", "unflatten") and len(node.shape) > 2 and node.parents:
            above = graph[node.parents[0].id].shape
            wide = size * node.shape[-2]
            if node.shape[-1] == size != above[-1] and wide in (above[-1], math.prod(above[-2:])):
                number = node.shape[-2]
                dims = [n for n in range(1, len(z) - 1) if z[n] == number]
                alone = len(dims) == 1
                return Heads(number, (dims[0] if alone else 0,), (number,), not alone)
    return None


def _is_split(graph: Graph, made: Node) -> bool:
    """Whether heads were split before a projection, which makes something of each alone."""
    found = projection(graph, made)
    first = graph[unshaped(graph, found.data, SAME | SHAPE)] if found is not None else made
    if found is None or projection(graph, first) is None:
        return False
    value = carried(graph, _units(graph, first), (first, graph[found.data]))
    dims = read_dims(graph, found)
    return value is not None and any(_varies(value, n) for n in range(value.dim()) if n not in dims)


def _units(graph: Graph, made: Node) -> Tensor:
    """The units of a value by number: what a weight makes of one position, or the last dimension."""
    found, data = contraction(made), projection(graph, made)
    shape = [1] * (len(made.shape) - 1) + [made.shape[-1]]
    if found is not None and data is not None:
        letters = letters_of(graph, found)
        _, weight = letters.of(found.left == data.data)
        sizes = dict(zip(weight, graph[data.weight].shape, strict=True))
        shape = [size if sizes.get(letter, 1) > 1 else 1 for letter, size in zip(letters.result, made.shape, strict=True)]
    return numbers(*shape).expand(made.shape)


def _varies(value: Tensor, dim: int) -> bool:
    return bool((value != value.narrow(dim, 0, 1)).any())


def _in_result(graph: Graph, scores: Scores, use: Use, letter: str) -> int | None:
    """The dimension of the mixed values that a letter of the queries is."""
    place: int | None = scores.letters.result.index(letter)
    for way in (scores.way, use.way):
        below = sources(graph, way)
        place = below.index(place) if place in below else None
    named = use.weighs[place] if place is not None else None
    return use.letters.result.index(named) if named is not None and named in use.letters.result else None


def layouts(graph: Graph, scores: Scores, use: Use, heads: Heads) -> tuple[Layout, ...]:
    """What the dimensions of q, k, v, scores, pattern and z count."""
    one = len(heads.dims) == 1 and not heads.folded
    head = use.letters.result[heads.dims[0]] if one else ""
    z = dict.fromkeys(use.letters.alone(use.values)[-1:], "units")
    own = {head: "heads"} if head else {}
    v = z | dict.fromkeys(use.letters.summed[-1:], "positions") | own
    queries = use.letters.alone(use.weighs).replace(head, "") or use.letters.shared.replace(head, "")[1:]
    z |= dict.fromkeys(queries[-1:], "positions")  # where each query has keys of its own, its place is that of a batch
    weighs = z | dict.fromkeys(use.letters.summed[-1:], "units") | own
    pattern = _moved(graph, _named(use.weighs, weighs), use.way)
    above = _moved(graph, pattern, scores.way)
    named = {letter: name for letter, name in zip(scores.letters.result, above, strict=True) if name != "units"}
    q = named | dict.fromkeys(scores.letters.summed[-1:], "units")
    keys = {letter: "positions" for letter in scores.letters.alone(scores.in_k)[-1:] if named.get(letter) != "heads"}
    k = {letter: name for letter, name in q.items() if name != "positions"} | keys
    return (
        _named(scores.in_q, q),
        _named(scores.in_k, k),
        _named(use.values, v),
        pattern,
        pattern,
        _named(use.letters.result, z | own),
    )


def _named(word: str, names: dict[str, str]) -> Layout:
    """The name of each letter; of those that have none the first counts examples."""
    first = next((n for n, letter in enumerate(word) if letter not in names), None)
    return tuple(names.get(letter, "examples" if n == first else f"axis {n}") for n, letter in enumerate(word))


def _moved(graph: Graph, layout: Layout, way: tuple[Node, ...]) -> Layout:
    """What the dimensions at the beginning of a way count, known what they count at its end."""
    rank = len(way[0].shape)
    places = {place: name for place, name in zip(sources(graph, way), layout, strict=True) if place is not None}
    usual = ("examples", *(f"axis {n}" for n in range(1, rank - 2)), "positions", "units")[-rank:]
    return tuple(places.get(n, "" if usual[n] in places.values() else usual[n]) or f"axis {n}" for n in range(rank))
