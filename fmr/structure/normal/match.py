"""Contractions and projections, weights and constants, and the walks up and down the ops of a graph."""

from collections.abc import Callable, Container, Iterator
from math import prod
from typing import NamedTuple

import torch

from fmr.graph.execute import draws
from fmr.graph.graph import Graph
from fmr.ids import RESULT, TensorId
from fmr.nests import exact
from fmr.nodes import Node
from fmr.structure.normal.vocabulary import CONVOLUTIONS, ELEMENTWISE, EMPTY, MOVES, REPEATS, SAME, STATISTICS, VIEWS
from fmr.structure.normal.walks import cached_per_graph, walk

_OF_WEIGHTS = MOVES | ELEMENTWISE | STATISTICS | frozenset("weight_norm batch_norm normalize sum softmax".split())
"""Ops that make weights of weights: standardised, quantised, masked, bent; nothing that multiplies one by another."""

_WITH_WEIGHTS = CONVOLUTIONS | {"linear"}
"""Contractions that have a place for their weight, the right one."""

_PRODUCTS = _WITH_WEIGHTS | frozenset("matmul bmm mm mv grouped_mm tensordot inner baddbmm addmm addbmm einsum".split())
"""Ops that multiply two tensors."""


class Contraction(NamedTuple):
    """A product that sums over one dimension of two operands."""

    node: Node
    left: TensorId
    right: TensorId


class Projection(NamedTuple):
    """A contraction of an activation with a weight."""

    node: Node
    data: TensorId
    weight: TensorId


def dims_told(node: Node, rank: int, position: int = 1) -> list[int]:
    """The dimensions that an op is told to go along, in what has so many."""
    dim = node.argument("dim", position, node.argument("dims", position))
    return [n % rank for n in (dim if isinstance(dim, (list, tuple)) else [dim]) if isinstance(n, int) and rank]


def contraction(node: Node) -> Contraction | None:
    """The product that a node computes, if it is one of two tensors."""
    if node.op not in _PRODUCTS:
        return None
    match node.op:
        case "matmul" | "bmm" | "mm" | "mv" | "grouped_mm" | "tensordot" | "inner":
            pair = node.parent("input", 0), node.parent("mat2", 1) or node.parent("other", 1)
        case "baddbmm" | "addmm" | "addbmm":
            pair = node.parent("batch1", 1) or node.parent("mat1", 1), node.parent("batch2", 2) or node.parent("mat2", 2)
        case "einsum":
            pair = node.parents if len(node.parents) == 2 else (None, None)
        case _:
            pair = node.parent("input", 0), node.parent("weight", 1)
    left, right = pair
    return Contraction(node, left.id, right.id) if left is not None and right is not None else None


def projection(graph: Graph, node: Node) -> Projection | None:
    """The contraction of a node, if one operand is a weight and the other is not; or is a parameter that is projected.

    What stands in the place of a weight and is made of parameters alone is one (a merged update, a normalised weight).
    """
    return _projections(graph).get(node.id)


@cached_per_graph
def _projections(graph: Graph) -> dict[str, Projection]:
    """The projections of a graph."""
    known: dict[str, Projection] = {}
    for found in filter(None, map(contraction, graph.nodes)):
        left, right = bool(weights(graph, found.left)), _is_weight(graph, found)
        if left != right or (right and found.node.op in _WITH_WEIGHTS):
            known[found.node.id] = Projection(*found) if right else Projection(found.node, found.right, found.left)
    return known


def product(graph: Graph, node: Node) -> Contraction | None:
    """The contraction of a node, if it is one of two activations."""
    found = contraction(node)
    weighed = found is None or node.op in CONVOLUTIONS or weights(graph, found.left) or _is_weight(graph, found)
    return None if weighed else found


def _is_weight(graph: Graph, found: Contraction) -> bool:
    """Whether the right operand of a product is a weight: also one that is computed, where a layer takes its weight."""
    return bool(weights(graph, found.right)) or (found.node.op in _WITH_WEIGHTS and is_constant(graph, found.right))


def weighed_sum(graph: Graph, node: Node) -> Contraction | None:
    """The contraction that a node computes as the sum of a multiplication of two activations."""
    factors = graph[node.parents[0].id] if node.op == "sum" and node.parents else None
    if factors is None or factors.op != "mul" or len(factors.parents) != 2 or node.argument("dim", 1) is None:
        return None
    left, right = (squeezed(graph, parent.id) for parent in factors.parents)
    if left == right or weights(graph, left) or weights(graph, right):
        return None
    return Contraction(node, left, right)


def squeezed(graph: Graph, name: TensorId) -> TensorId:
    """The value that was given dimensions of size one to be repeated along."""
    node = graph[name]
    while node.op in ("unsqueeze", "getitem", "view", "reshape") and len(read := data_inputs(graph, node)) == 1:
        higher = graph[read[0]]
        if len(higher.shape) >= len(node.shape) or [n for n in higher.shape if n != 1] != [n for n in node.shape if n != 1]:
            break
        node = higher
    return node.id


def weights(graph: Graph, name: TensorId) -> tuple[TensorId, ...]:
    """The parameters and buffers that a value consists of; empty where anything else flows in.

    A weight may be reshaped, standardised, quantised, bent, brought to length one or scaled by one number that is made of
    weights (a spectral norm) on its way, and chosen among several matrices; a parameter that was projected or normalised
    by a layer norm (a learned query), or a row of one (an embedding), is an activation.
    """
    return _weights(graph).get(name, ())


@cached_per_graph
def _weights(graph: Graph) -> dict[str, tuple[TensorId, ...]]:
    """For each value that is a weight what it consists of."""
    found: dict[str, tuple[TensorId, ...]] = {}
    for node in graph.nodes:
        if node.op in ("param", "buffer"):
            found[node.id] = (node.id,)
        elif node.op in _OF_WEIGHTS:
            made = [found.get(name, ()) for name in reversed(_shaping(graph, node))]
            if made and all(made):
                found[node.id] = tuple(dict.fromkeys(name for names in made for name in names))
    return found


def _shaping(graph: Graph, node: Node) -> list[TensorId]:
    """The operands that make a weight: all but a scale, and not what chooses among matrices."""
    if len(node.parents) < 2:
        return [parent.id for parent in node.parents]
    if node.op == "narrow" or node.op in _LIKE or (node.op == "getitem" and len(graph[node.parents[0].id].shape) > 2):
        return [node.parents[0].id]
    names = (parent.id for parent in node.parents if parent.at.rpartition(".")[2] not in _BOUNDS)
    return [name for name in names if prod(graph[name].shape) > 1 or not is_constant(graph, name)]


_BOUNDS = frozenset("start stop step".split())
"""What a slice is given."""


def unbroadcast(graph: Graph, weight: TensorId) -> TensorId:
    """A weight before it was repeated along dimensions of size one, for each example of a batch; else itself."""
    node = graph[strip_views(graph, weight, SAME)]
    if node.op not in REPEATS:
        return weight
    higher = graph[node.parents[0].id]
    sizes = zip(higher.shape[::-1], node.shape[::-1], strict=False)
    return squeezed(graph, higher.id) if all(before in (1, between) for before, between in sizes) else weight


def looked_up(graph: Graph, node: Node) -> tuple[TensorId, TensorId] | None:
    """The table and the indices of a look-up of its rows: an embedding, a table that is indexed; None for another op."""
    if node.op == "embedding":
        table, index = node.parent("weight", 1), node.parent("input", 0)
        return (table.id, index.id) if table is not None and index is not None else None
    if node.op not in ("getitem", "index_select") or len(node.parents) != 2:
        return None
    rows, one = (graph[parent.id] for parent in node.parents)
    whole = len(rows.shape) == 2 and node.shape[-1:] == rows.shape[1:] and not is_constant(graph, one.id)
    return (rows.id, one.id) if whole and weights(graph, rows.id) and one.dtype in (torch.int64, torch.int32) else None


def is_constant(graph: Graph, name: TensorId) -> bool:
    """Whether no input flows into a value."""
    return name not in _sources(graph)


def sources_of(graph: Graph, name: TensorId) -> frozenset[TensorId]:
    """The inputs, and the values of code that is not seen, that flow into a value."""
    return _sources(graph).get(name, frozenset())


@cached_per_graph
def _sources(graph: Graph) -> dict[str, frozenset[TensorId]]:
    """For each value that anything flows into what that is."""
    found: dict[str, frozenset[TensorId]] = {}
    for node in graph.nodes:
        own = {frozenset([node.id])} if node.op in ("input", "opaque") else set()
        given = own | {found[name] for name in computed_from(node) if name in found}
        if given:
            found[node.id] = next(iter(given)) if len(given) == 1 else frozenset().union(*given)
    return found


def is_learned(graph: Graph, name: TensorId) -> bool:
    """Whether a parameter flows into a value."""
    return any(node.op == "param" for node in above(graph, name, lambda node: True, all_inputs))


def value_number(graph: Graph, name: TensorId) -> TensorId:
    """The first value that is computed in the same way of the same values: what several layers each compute is one."""
    return _value_numbers(graph)[name]


@cached_per_graph
def _value_numbers(graph: Graph) -> dict[str, TensorId]:
    """For each value the first that is computed in the same way."""
    known: dict[object, TensorId] = {}
    found: dict[str, TensorId] = {}
    for node in graph.nodes:
        read = tuple((found[parent], parent.at) for parent in node.parents)
        own = not read or node.op in ("opaque", "alias") or draws(node)
        key = node.id if own else (node.op, read, exact(node.args), node.id.parts.output)
        found[node.id] = known.setdefault(key, node.id)
    return found


def all_inputs(graph: Graph, node: Node) -> list[TensorId]:
    """Everything that a node reads."""
    return [parent.id for parent in node.parents]


def data_inputs(graph: Graph, node: Node) -> list[TensorId]:
    """The operands whose numbers a node reads: of an op that moves numbers not those that say which ones, where they go or
    what their shape is, as the bounds of a slice, an index and the tensor of `view_as` do."""
    if node.op not in MOVES or not _is_number(node):
        return all_inputs(graph, node)
    if node.op in _LIKE:
        return computed_from(node)
    moved = (parent for parent in node.parents if _is_number(graph[parent.id]) or parent.at.partition(".")[0] in _MOVED)
    return [parent.id for parent in moved]


def computed_from(node: Node) -> list[TensorId]:
    """Everything on whose numbers a node's own depend: not what it reads for a shape or a type alone."""
    number = 0 if node.op in EMPTY else 1 if node.op in _LIKE else None
    return [parent.id for parent in node.parents[:number]]


_LIKE = frozenset("view_as reshape_as expand_as to".split())
"""Ops that read their second operand for its shape or its type."""

_MOVED = frozenset("0 input self tensors".split())
"""The names of the argument whose numbers an op moves."""


def _is_number(node: Node) -> bool:
    """Whether a value has numbers that mean amounts, and no places, counts or truth values."""
    return node.dtype.is_floating_point or node.dtype.is_complex


Through = frozenset[str] | Callable[[Node], bool]
"""What a walk goes through: nodes of these ops, or those of which a function says so."""


def _asked(through: Through) -> Callable[[Node], bool]:
    return through if callable(through) else lambda node: node.op in through


def above(
    graph: Graph,
    start: TensorId,
    through: Through,
    inputs: Callable[[Graph, Node], list[TensorId]] = data_inputs,
) -> Iterator[Node]:
    """The ancestors of a value, nearest first, not going above a node that `through` refuses.

    What only says which part is taken is no ancestor; with other `inputs` of a node, those are.
    """
    goes_on, node_of = _asked(through), graph.__getitem__
    return walk([graph[start]], lambda node: map(node_of, inputs(graph, node)) if goes_on(node) else ())


def between(graph: Graph, start: TensorId, end: TensorId, through: Callable[[Node], bool] = lambda node: True) -> list[Node]:
    """What a value is made of and comes after another one, in execution order, not above a node that is refused."""
    begin, last = graph.place(start), graph.place(end)

    def onward(place: int) -> list[int]:
        higher = map(graph.place, graph.nodes[place].parents) if through(graph.nodes[place]) else ()
        return [one for one in higher if one > begin]

    return [graph.nodes[place] for place in sorted(walk([last] if last > begin else [], onward))]


def come_of(graph: Graph, start: TensorId, end: TensorId, given: Container[TensorId] = ()) -> Iterator[Node]:
    """The nodes on the ways from a value to another, past those that are given."""
    lower = {start}
    for node in between(graph, start, end, lambda node: node.id not in given):
        if node.id not in given and any(parent in lower for parent in node.parents):
            lower.add(node.id)
            yield node


Path = tuple[Node, ...]
"""Nodes that follow one another, each reading the one before."""


def below(graph: Graph, start: Node, through: Through) -> Iterator[tuple[Node, Path]]:
    """The descendants of a node, nearest first, each with the nodes on the way, not going below one that is refused."""
    goes_on = _asked(through)
    return paths(graph, start, lambda node, way: goes_on(node))


def paths(graph: Graph, start: Node, through: Callable[[Node, Path], bool]) -> Iterator[tuple[Node, Path]]:
    """The descendants of a node with the ways to them, where `through` is told the way on which it meets a node."""
    waiting: list[tuple[Node, Path]] = [(start, ())]
    seen = {start.id}
    for node, way in waiting:
        yield node, way
        if node is start or through(node, way):
            for reader in graph.readers(node.id):
                if reader.id not in seen:
                    seen.add(reader.id)
                    waiting.append((reader, (*way, node)))


def depends_on(graph: Graph, name: TensorId, origin: TensorId) -> bool:
    """Whether a value is computed from another."""
    begin = graph.place(origin)
    return origin in walk([name], lambda one: graph[one].parents if graph.place(one) > begin else ())


def strip_views(graph: Graph, name: TensorId, ops: frozenset[str] = SAME | {"view", "reshape", "flatten"}) -> TensorId:
    """The value that a view, a cast or a copy was made of."""
    node = graph[name]
    while node.op in ops and len(read := {*data_inputs(graph, node)}) == 1:
        (name,) = read
        node = graph[name]
    return node.id


def settled(graph: Graph, node: Node) -> Node:
    """The last of the views and bias adds that alone read a projection's result."""
    made = node
    while len(readers := graph.readers(node.id)) == 1:
        others = [parent.id for parent in readers[0].parents if parent != node.id]
        biased = readers[0].op == "add" and others and all(_is_bias(graph, name, made, readers[0]) for name in others)
        if not (readers[0].op in VIEWS or biased or readers[0].op == RESULT):
            break
        node = readers[0]
    return node


def _is_bias(graph: Graph, name: TensorId, made: Node, total: Node) -> bool:
    """Whether a weight is a bias of what was made; what differs by position is none of a layer that knows no positions."""
    by_position = made.op == "linear" and made.shape == total.shape and prod(graph[unbroadcast(graph, name)].shape[:-1]) > 1
    return bool(weights(graph, name)) and not by_position
