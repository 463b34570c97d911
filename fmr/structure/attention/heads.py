"""How many heads an attention has, read off the way of its mixed values into the output projection, or off its queries.

A row of what the projection reads is the mixed values of all heads, one beside the other. So every vector of z is given a
number, the numbers are sent along that way, and those that meet in one row are the heads. Where that does not tell, the
units that a projection was split into queries do; the size of a head is always read there.
"""

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.attention.scores import Scores
from fmr.structure.attention.values import Output, ValueProduct
from fmr.structure.normal.dims import dims_of
from fmr.structure.normal.einsum import of_projection, read_dims, summed_dim
from fmr.structure.normal.indices import dim_map, iota, rows_of, trace, varies
from fmr.structure.normal.match import above, contraction, projection, strip_views, weights
from fmr.structure.normal.vocabulary import ELEMENTWISE, MEANS, MOVES, NORMS, VIEWS


class Heads(NamedTuple):
    """The number of heads, the dimensions of z that count them and how many each does, and whether one counts more too.

    `places` are where in z the vectors of one row lie, one for each head in order; None where that is not known.
    """

    number: int
    dims: tuple[int, ...]
    counts: tuple[int, ...]
    folded: bool
    places: tuple[Tensor, ...] | None = None


def heads_in_rows(graph: Graph, use: ValueProduct, z: Node, output: Output) -> Heads | None:
    """The heads whose values meet in a row that the output projection reads; None where its rows are not made of z.

    A pattern may weigh values of several places at once; then only the last dimension of a value counts its units.
    """
    query = use.subscripts.free(use.subscripts.left)[-1:]
    row = use.subscripts.result.index(query) if query else None
    summed = summed_dim(graph, output.projection) % len(output.way[-1].shape)
    asked = [n for n, place in enumerate(dim_map(graph, output.way)) if place is not None and place == row and n != summed]
    found = (_meeting(graph, units, z.shape, output, asked, row) for units in dict.fromkeys((use.units, use.units[-1:])))
    return next((heads for heads in found if heads is not None), None)


def _meeting(
    graph: Graph, units: tuple[int, ...], shape: tuple[int, ...], output: Output, asked: list[int], query: int | None
) -> Heads | None:
    """The heads, where these dimensions of z count the units of a value, and those `asked` of what is projected queries.

    Where z has a dimension for heads, the rest may only be folded into that of the queries.
    """
    lead = tuple(1 if n in units else size for n, size in enumerate(shape))
    value = trace(graph, iota(*lead).expand(shape), output.way) if math.prod(shape) else None
    if value is None:
        return None
    rows = rows_of(graph, output.projection, value, asked)
    if query is not None and not _reaches(rows, lead, (*units, query)):
        return None
    row = rows[0]
    if any(node.op == "cat" for node in output.way):
        row = row[row >= 0]  # the coefficients of a memory may lie beside them
    met = row.unique().long()
    if not len(met) or met[0] < 0 or len(met) * math.prod(shape[n] for n in units) != len(row):
        return None
    places = [place.unique() for place in torch.unravel_index(met, lead)]
    several = tuple(n for n, place in enumerate(places) if len(place) > 1)
    in_order = torch.tensor(list(dict.fromkeys(row.long().tolist())))
    counts = tuple(len(places[n]) for n in several)
    if len(shape) > 3 and any(n != query and count != shape[n] for count, n in zip(counts, several, strict=True)):
        return None
    folded = math.prod(counts) != math.prod(shape[n] for n in several)
    return Heads(len(met), several, counts, folded, torch.unravel_index(in_order, lead))


def _reaches(rows: Tensor, lead: tuple[int, ...], but: tuple[int, ...]) -> bool:
    """Whether rows are made of all places of each dimension but some; where others are projected elsewhere, or added to
    these, a row does not hold all heads."""
    places = torch.unravel_index(rows[rows >= 0].unique().long(), lead)
    return all(n in but or len(place.unique()) == lead[n] for n, place in enumerate(places))


def key_heads(graph: Graph, use: ValueProduct, heads: Heads, repeated: float) -> int:
    """Key-value heads: fewer where values are repeated, or broadcast, over several query heads."""
    sizes = dict(zip(use.subscripts.right, graph[use.v].shape, strict=True))
    least = 0 if heads.folded else 1
    own = [
        n for place, n in zip(heads.dims, heads.counts, strict=True) if sizes.get(use.subscripts.result[place], 0) > least
    ]
    return max(1, round(math.prod(own) / repeated))


_SPLITS = MOVES | ELEMENTWISE | NORMS | MEANS | frozenset("mean sum".split())
"""What may lie between a projection and the queries that it is split into: norms, gates, rotations and bends too."""


class Queries:
    """The queries of scores: which of their dimensions tell apart the units of what they were split from."""

    def __init__(self, graph: Graph, scores: Scores) -> None:
        self.graph, self.scores = graph, scores
        self.shape = graph[scores.q].shape
        subscripts = scores.subscripts
        self.contracted = [n for n, letter in enumerate(subscripts.left) if letter in subscripts.contracted]
        self.free = [n for n, letter in enumerate(subscripts.left) if letter in subscripts.free(subscripts.left)]

    @cached_property
    def made(self) -> Node | None:
        """What the queries were split from: the projection, else a whole that is no weight."""
        higher = list(above(self.graph, self.scores.q, _SPLITS))
        projected = (node for node in higher if projection(self.graph, node) is not None)
        wholes = [node for node in higher if node.op not in _SPLITS and (len(node.shape) < 4 or contraction(node))]
        learned = [node for node in wholes if weights(self.graph, node.id)]
        return next(projected, next((node for node in wholes if node not in learned), learned[0] if learned else None))

    @cached_property
    def units(self) -> Tensor | None:
        """The queries, in which each unit of what they were split from has its own number."""
        if self.made is None:
            return None
        value = trace(self.graph, _units(self.graph, self.made), (self.made, self.graph[self.scores.q]))
        return value if value is not None and value.numel() and value.min() >= 0 else None

    @cached_property
    def varying(self) -> frozenset[int]:
        """The dimensions along which the units differ."""
        value = self.units
        return frozenset(n for n in range(value.dim()) if varies(value, n)) if value is not None else frozenset()

    @property
    def size(self) -> int:
        """The units of a query or key that a score sums over; it may sum over places too."""
        units = [n for n in self.contracted if n in self.varying] if len(self.contracted) > 1 else []
        return math.prod(self.shape[n] for n in units or self.contracted)

    @property
    def compare_units(self) -> bool:
        """Whether a score sums over positions: then the map is one of units by units."""
        if not self.varying.intersection(self.free) or self.varying.intersection(self.contracted):
            return False
        if self.size > 1 or self.made is None:
            return self.size > 1
        dims = dims_of(self.graph)
        of_queries, of_made = (dims.of(one.id, len(one.shape)) for one in (self.graph[self.scores.q], self.made))
        return any(of_queries[n] in of_made[:-1] for n in self.contracted)  # beside its units, of which there is one

    @property
    def are_of_units(self) -> bool:
        """Whether units of one position tell them apart, as heads, and no positions do, as those of a window; weights that
        each position has alone do not."""
        apart = bool(self.varying.intersection(self.contracted)) or self.size == 1
        if self.made is None or not apart or not self.varying.intersection(self.free):
            return False
        found = projection(self.graph, self.made)
        if found is not None and of_projection(self.graph, found).batch:
            return False
        places = iota(*self.made.shape[:-1], 1).expand(self.made.shape)
        value = trace(self.graph, places, (self.made, self.graph[self.scores.q]))
        return value is not None and not any(varies(value, n) for n in self.free)

    def heads(self, use: ValueProduct) -> Heads | None:
        """The heads that the units of a projection were split into on their way to the queries."""
        if self.made is None:
            alone = len(use.node.shape) > 2 and math.prod(use.node.shape[1:-2]) == 1
            return Heads(1, (), (), False) if alone else None
        if _is_split(self.graph, self.made):
            return None  # what its units are is not all that is beside them
        if self.units is None:
            return self._heads_of_view(use)
        if not self.varying.intersection(self.contracted):
            return None  # it compares units over positions
        query = self.units[tuple(slice(None) if n in self.contracted else 0 for n in range(self.units.dim()))]
        number, rest = divmod(len(self.units.unique()), len(query.unique()))  # a rotation makes one number of two units
        if rest or not number:
            return None
        return self._heads_of_keys(use) if number == 1 < self._beside else self._heads_of_units(number, use)

    @property
    def _beside(self) -> int:
        """How many rows for each position stand beside one another in what the queries were made of and is no projection:
        heads, if anything; its units do not tell."""
        if self.made is None or projection(self.graph, self.made) is not None:
            return 1
        return math.prod(self.made.shape[0 if weights(self.graph, self.made.id) else 1 : -2])

    def _heads_of_keys(self, use: ValueProduct) -> Heads | None:
        """The heads that the keys were split into, where queries that are no projection have as many."""
        keys = Queries(self.graph, self.scores.swapped)
        heads = keys.heads(use) if keys._beside == 1 else None
        return heads if heads is not None and heads.number == self._beside else None

    def _heads_of_view(self, use: ValueProduct) -> Heads | None:
        """The heads that a view splits the units of the queries into, where several projections made these, as experts."""
        view = next(filter(self._splits_units, above(self.graph, self.scores.q, _SPLITS)), None)
        if view is None:
            return None
        number = view.shape[-2]
        numbers = iota(*(1 for _ in view.shape[:-2]), number, 1).expand(view.shape)
        value = trace(self.graph, numbers, (view, self.graph[self.scores.q]))
        several = [n for n in range(value.dim()) if varies(value, n)] if value is not None else []
        place = self._in_result(use, self.scores.subscripts.left[several[0]]) if len(several) == 1 else None
        return Heads(number, (place,), (number,), False) if place is not None else None

    def _splits_units(self, node: Node) -> bool:
        """Whether a view lays units out as heads of the size of a query."""
        if node.op not in VIEWS or len(node.shape) < 3:
            return False
        units, (number, size) = self.graph[node.parents[0].id].shape, node.shape[-2:]
        return size == self.size != units[-1] and number * size in (units[-1], math.prod(units[-2:]))

    def _heads_of_units(self, number: int, use: ValueProduct) -> Heads:
        """This many heads, with the dimensions of the mixed values that count them where those can be told."""
        several = sorted(self.varying.difference(self.contracted))
        dims = [self._in_result(use, self.scores.subscripts.left[n]) for n in several]
        counts = tuple(self.shape[n] for n in several)
        if math.prod(counts) == number and None not in dims:
            told = tuple(n for n in dims if n is not None)
            return Heads(number, told, counts, False, self._in_groups(told, several, use) if len(told) > 1 else None)
        return Heads(number, (0,), (number,), True, self._places(number, use, several))

    def _in_groups(self, dims: tuple[int, ...], several: list[int], use: ValueProduct) -> tuple[Tensor, ...] | None:
        """Where in z the heads lie that several dimensions of the queries count, in the order of their units."""
        if self.units is None:
            return None
        first = self.units[tuple(slice(None) if n in several else 0 for n in range(self.units.dim()))]
        order = torch.unravel_index(first.flatten().argsort(), first.shape)
        nothing = torch.zeros_like(order[0])
        return tuple(order[dims.index(n)] if n in dims else nothing for n in range(len(use.node.shape)))

    def _places(self, number: int, use: ValueProduct, several: list[int]) -> tuple[Tensor, ...] | None:
        """Where in z the first vector of each head lies, if its units are told apart along one dimension of the queries."""
        place = self._in_result(use, self.scores.subscripts.left[several[0]]) if len(several) == 1 else None
        if self.units is None or place is None:
            return None
        line = self.units[tuple(slice(None) if n in several else 0 for n in range(self.units.dim()))]
        firsts = torch.tensor([int((line == unit).nonzero()[0, 0]) for unit in line.unique()])
        nothing = torch.zeros_like(firsts)
        return (
            tuple(firsts if n == place else nothing for n in range(len(use.node.shape))) if len(firsts) == number else None
        )

    def _in_result(self, use: ValueProduct, letter: str) -> int | None:
        """The dimension of the mixed values that a letter of the queries is."""
        place: int | None = self.scores.subscripts.result.index(letter)
        for way in (self.scores.way, use.way):
            lower = dim_map(self.graph, way)
            place = lower.index(place) if place in lower else None
        named = use.subscripts.left[place] if place is not None else None
        return use.subscripts.result.index(named) if named is not None and named in use.subscripts.result else None


def told_by_units(graph: Graph, name: TensorId) -> list[int]:
    """The dimensions of a value along which it has other units of the projection that it was moved from."""
    made = graph[strip_views(graph, name, MOVES)]
    value = trace(graph, _units(graph, made), (made, graph[name])) if projection(graph, made) is not None else None
    if value is None or not value.numel():
        return []
    least = value.where(value >= 0, torch.inf)  # what is filled up, or comes from elsewhere, has no number
    return [n for n in range(value.dim()) if bool((least.amin(n) < value.amax(n)).any())]


def _is_split(graph: Graph, made: Node) -> bool:
    """Whether heads were split before a projection, which makes something of each alone."""
    found = projection(graph, made)
    first = graph[strip_views(graph, found.data, MOVES)] if found is not None else made
    if found is None or projection(graph, first) is None:
        return False
    value = trace(graph, _units(graph, first), (first, graph[found.data]))
    read = read_dims(graph, found)
    return value is not None and any(varies(value, n) for n in range(value.dim()) if n not in read)


def _units(graph: Graph, made: Node) -> Tensor:
    """The units of a value by number: what a weight makes of one position, or the last dimension."""
    shape = [1] * (len(made.shape) - 1) + [made.shape[-1]]
    found = projection(graph, made)
    if found is not None:
        subscripts = of_projection(graph, found)
        sizes = dict(zip(subscripts.right, graph[found.weight].shape, strict=True))
        shape = [size if sizes.get(letter, 1) > 1 else 1 for letter, size in zip(subscripts.result, made.shape, strict=True)]
    return iota(*shape).expand(made.shape)
