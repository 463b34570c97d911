"""How many heads an attention has, read off the way of its mixed values into the output projection.

A row of what the projection reads is the mixed values of all heads, one beside the other. So every vector of z is given a
number, the numbers are sent along that way, and those that meet in one row are the heads.
"""

import math
from typing import NamedTuple

import torch

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.letters import Letters, carried, letters_of, sources
from fmr.structure.match import LINEAR, Contraction, Projection, contraction


class Heads(NamedTuple):
    """The number of heads, the dimensions of z that count them and how many each does, and whether one counts more too."""

    number: int
    dims: tuple[int, ...]
    counts: tuple[int, ...]
    folded: bool


class Use(NamedTuple):
    """The product of a pattern with values, its letters, and the way of the pattern into it."""

    node: Node
    letters: Letters
    weighs: str
    values: str
    v: TensorId
    way: tuple[Node, ...]

    @property
    def units(self) -> tuple[int, ...]:
        """The dimensions of the result that count the units of a value."""
        return tuple(self.letters.result.index(letter) for letter in self.letters.alone(self.values))


def use_of(graph: Graph, found: Contraction, way: tuple[Node, ...]) -> Use:
    """A product with values, on a way that began at a softmax."""
    letters, names = letters_of(graph, found), [node.id for node in way]
    if found.left in names:
        return Use(found.node, letters, letters.left, letters.right, found.right, way[: names.index(found.left) + 1])
    return Use(found.node, letters, letters.right, letters.left, found.left, way[: names.index(found.right) + 1])


def heads_in_rows(graph: Graph, use: Use, z: Node, way: tuple[Node, ...], end: Projection) -> Heads | None:
    """The heads whose values meet in a row that the projection `end` reads; None where its rows are not made of z."""
    shape, units = z.shape, use.units
    lead = tuple(1 if n in units else size for n, size in enumerate(shape))
    if not math.prod(shape):
        return None
    value = carried(graph, torch.arange(math.prod(lead), dtype=torch.float64).reshape(lead).expand(shape), way)
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
    return Heads(len(met), several, counts, math.prod(counts) != math.prod(shape[n] for n in several))


def read_dims(graph: Graph, end: Projection) -> tuple[int, ...]:
    """The dimensions of what a projection reads in which its weight differs: those that it sums over, and its heads."""
    shape, found = graph[end.weight].shape, contraction(end.node)
    if end.node.op in LINEAR or found is None:
        return (len(graph[end.data].shape) - len(shape) + 1,)
    letters = letters_of(graph, found)
    data, weight = (letters.left, letters.right) if found.left == end.data else (letters.right, letters.left)
    sizes = dict(zip(weight, shape, strict=True))
    return tuple(n for n, letter in enumerate(data) if sizes.get(letter, 1) > 1)


def key_heads(graph: Graph, use: Use, heads: Heads, repeated: float) -> int:
    """Key-value heads: fewer where values are repeated, or broadcast, over several query heads."""
    sizes = dict(zip(use.values, graph[use.v].shape, strict=True))
    own = [n for place, n in zip(heads.dims, heads.counts, strict=True) if sizes.get(use.letters.result[place], 1) > 1]
    return max(1, round(math.prod(own) / repeated))


Layout = tuple[str, ...]
"""What each dimension of a value counts."""


def layouts(
    graph: Graph, scored: Contraction, use: Use, heads: Heads, above: tuple[Node, ...], turned: bool
) -> tuple[Layout, ...]:
    """What the dimensions of q, k, v, scores, pattern and z count; `above` is the way of the scores to the softmax.

    `turned` says that the keys are given as they were before a transposition.
    """
    one = len(heads.dims) == 1 and not heads.folded
    head = use.letters.result[heads.dims[0]] if one else ""
    z = dict.fromkeys(use.letters.alone(use.values)[-1:], "units")
    z |= dict.fromkeys(use.letters.alone(use.weighs).replace(head, "")[-1:], "positions")
    own = {head: "heads"} if head else {}
    v = z | dict.fromkeys(use.letters.summed[-1:], "positions") | own
    weighs = z | dict.fromkeys(use.letters.summed[-1:], "units") | own
    pattern = _moved(graph, _named(use.weighs, weighs), use.way)
    letters = letters_of(graph, scored)
    scores = _moved(graph, pattern, above)
    by_letter = {letter: name for letter, name in zip(letters.result, scores, strict=True) if name != "units"}
    q = by_letter | dict.fromkeys(letters.summed[-1:], "units")
    k = q | {letter: "positions" for letter in letters.alone(letters.right)[-1:] if by_letter.get(letter) != "heads"}
    right = letters.right[:-2] + letters.right[:-3:-1] if turned else letters.right
    return (
        _named(letters.left, q),
        _named(right, k),
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
