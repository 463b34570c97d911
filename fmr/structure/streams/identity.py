"""What a residual stream passes between two of its writes: views, scaling, norms, mixing, a projected shortcut; and the
way back from a value along the writes to its stream: where these ended, and where the stream began."""

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch

from fmr.graph.graph import Graph
from fmr.ids import RESULT, TensorId
from fmr.nodes import Node
from fmr.structure.normal.form import form_of
from fmr.structure.normal.indices import iota, trace
from fmr.structure.normal.match import above, come_of, depends_on, is_constant, projection, value_number, weights
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import CLAMPS, LAID_OUT, MEANS, NORMS, STATISTICS
from fmr.structure.normal.walks import cached_per_graph
from fmr.structure.streams.copies import hyper_connection
from fmr.structure.streams.dominators import flow_of
from fmr.structure.streams.stream import Write

CUTS = frozenset(
    "getitem select narrow unbind gather take_along_dim index_select chunk split tensor_split split_with_sizes".split()
)
"""What hands on a part of a value."""

HANDED = LAID_OUT | CUTS | {"roll", "pad"}
"""What may lie on the stream between two adds: no new numbers."""

OVERWRITES = frozenset("setitem index_put masked_scatter index_copy index_add scatter scatter_add slice_scatter".split())
"""What writes over a part of the stream from outside; the rest of it goes on."""

POOLS = MEANS | frozenset("max_pool1d max_pool2d max_pool3d adaptive_max_pool2d".split())
"""What makes one position of several."""

REDUCED = frozenset({"max", "amax", "mean"})
"""What pools over a dimension, of positions or of what they were grouped in."""


def unchanged(graph: Graph, name: TensorId) -> TensorId:
    """The value under casts to its own type and other ops that hand on the very same numbers."""
    node = graph[name]
    while node.op in ("to", "contiguous", "detach") and node.parents:
        higher = graph[node.parents[0].id]
        if (higher.shape, higher.dtype) != (node.shape, node.dtype):
            break
        node = higher
    return node.id


def handed(graph: Graph, name: TensorId) -> TensorId:
    """The value that a view, a cast, dropout or padding was made of; of a view that was written over, the one before."""
    node = graph[name]
    while node.op in HANDED and node.parents:
        node = graph[node.parents[0].id]
    return node.id


@cached_per_graph
def base(graph: Graph, name: TensorId) -> TensorId:
    """The value that a stream carries, seen through casts, dropout, views, mixing, constant scales and constant biases."""
    return identity_path(graph, name)[-1]


def identity_path(graph: Graph, name: TensorId) -> list[TensorId]:
    """A value, what it was made of without new numbers but scales and biases, and so on up to the base."""
    way = [graph[name].id]
    while (higher := identity_input(graph, graph[way[-1]])) is not None:
        way.append(higher)
    return way


@cached_per_graph
def identity_input(graph: Graph, node: Node) -> TensorId | None:
    """The value that goes on in a node: scaled, masked, mixed or cut; None where the node makes a new one."""
    read = [parent.id for parent in node.parents]
    if node.op in HANDED or node.op in OVERWRITES:
        part = _cut_out(graph, node) if node.op in CUTS else None
        return part if part is not None else read[0] if read and not is_constant(graph, read[0]) else None
    if node.op in ("mul", "div", "cat", "masked_fill") and not node.id.is_source:
        data = [name for name in read if name in flow_of(graph)]
        return data[0] if len(data) == 1 else _laid_again(graph, node, data)
    if node.op == "where":
        data = sorted((name for name in read if name in flow_of(graph)), key=graph.place)
        sums = above(graph, data[-1], lambda one: one.op == "add") if len(data) == 2 else ()
        kept = data[0] in {one.id for one in sums} if data else False
        return data[-1] if kept or len(data) == 1 else None
    if node.op == "add" and 0 < len(read) < 3:
        data = [name for name in read if not _is_bias(graph, node, name)]
        return data[0] if len(data) == 1 else reweighted(graph, node) or adaptive_norm(graph, node)
    return hyper_connection(graph, node)


def _cut_out(graph: Graph, node: Node) -> TensorId | None:
    """The one of the values whose units are laid side by side that a node cuts out again, whole."""
    laid = graph[handed(graph, node.id)]
    shapes = [graph[part.id].shape for part in laid.parents] if laid.op == "cat" else []
    rank, dim = len(laid.shape), laid.argument("dim", 1, 0)
    alike = {*map(len, shapes)} == {rank} and prod(node.shape) in map(prod, shapes)
    if not alike or dim % rank not in (rank - 1, rank - 3 if rank == 4 else -1):
        return None
    places = iota(*laid.shape)
    made = trace(graph, places, (laid, *come_of(graph, laid.id, node.id)))
    parts = zip(laid.parents, places.split([shape[dim] for shape in shapes], dim), strict=True)
    same = (part.id for part, own in parts if made is not None and torch.equal(made.flatten(), own.flatten()))
    return next(same, None)


def _laid_again(graph: Graph, node: Node, parts: list[TensorId]) -> TensorId | None:
    """The value whose parts, and all of them, a node lays side by side again."""
    wholes = {handed(graph, part) for part in parts} if node.op == "cat" else set()
    shapes = [graph[whole].shape for whole in wholes]
    alike = [len(shape) == len(node.shape) and prod(shape) == prod(node.shape) for shape in shapes]
    return wholes.pop() if alike == [True] else None


def _is_bias(graph: Graph, node: Node, name: TensorId) -> bool:
    """Whether an operand is a learned vector: one number for each unit. One of a sum's own shape is a learned token."""
    shape = graph[name].shape
    return prod(shape) == max(shape, default=1) and shape != node.shape and bool(weights(graph, name))


_OF_TERMS = LAID_OUT | {"add", "mul", "div"}
"""Ops after which a value has the terms of what it was made of."""


def reweighted(graph: Graph, node: Node) -> TensorId | None:
    """The later of two values that an add mixes, where the earlier is a part of it: the one has all terms of the other."""
    if node.op != "add" or len(node.parents) != 2:
        return None
    form, sides = form_of(graph), [parent.id for parent in node.parents]
    whose, waiting, alone = dict[Value, int](), list[tuple[int, TensorId]](), 0

    def meet(value: Value, side: int) -> None:
        if value not in whose:
            heappush(waiting, (-graph.place(value.id), value.id))
        whose[value] = whose.get(value, 0) | side

    for side, name in enumerate(sides, 1):
        meet(form[name], side)
    while alone < 3 and any(whose[form[name]] < 3 for _, name in waiting):
        value = form[heappop(waiting)[1]]
        ops = {one.op for one in value.folded or (value.node,)}
        terms = value.inputs if value.kind in ("sum", "affine", "move") and ops <= _OF_TERMS else ()
        alone |= 0 if terms else whose[value] % 3
        for term in terms:
            meet(term, whose[value])
    later = {0: max(sides, key=graph.place), 1: sides[0], 2: sides[1]}
    return later.get(alone)


def adaptive_norm(graph: Graph, node: Node) -> TensorId | None:
    """The value that an add goes on with where it is scaled and shifted by what was made of one condition."""
    for scaled, shift in both_orders(node, "add"):
        for scale, x in both_orders(graph[scaled], "mul"):
            condition = _condition(graph, scale)
            if condition == _condition(graph, shift) != handed(graph, x) and graph[x].shape == node.shape:
                return x if not is_constant(graph, condition) else None
    return None


def _condition(graph: Graph, name: TensorId) -> TensorId:
    """What a scale or a shift was projected from, or is a part of; one may be added to a scale."""
    node = graph[handed(graph, name)]
    if node.op == "add" and len(node.parents) == 1:
        node = graph[handed(graph, node.parents[0].id)]
    found = projection(graph, node)
    return value_number(graph, handed(graph, found.data) if found is not None else node.id)


class Highway(NamedTuple):
    """A sum of two products: `x` times a `gate` is what is kept, and `y` times another gate is added."""

    kept: TensorId
    added: TensorId
    gate: TensorId
    x: TensorId
    y: TensorId


def highway(graph: Graph, node: Node) -> Iterator[Highway]:
    """The readings of a node as `gate * x + other * y`: one gate is what the other leaves of one, or both are sigmoids."""
    for kept, added in both_orders(node, "add"):
        for gate, x in both_orders(graph[kept], "mul"):
            for other, y in both_orders(graph[added], "mul"):
                pair = graph[handed(graph, gate)], graph[handed(graph, other)]
                bounded = all(made.op == "sigmoid" for made in pair)
                rest = _rest(graph, *pair) or _rest(graph, *reversed(pair))
                if graph[x].shape == node.shape and (bounded or rest):
                    yield Highway(kept, added, gate, x, y)


def both_orders(node: Node, op: str) -> list[tuple[TensorId, TensorId]]:
    """The two operands of an op in both orders; none of another op."""
    pair = [parent.id for parent in node.parents]
    return [(pair[0], pair[1]), (pair[1], pair[0])] if node.op == op and len(pair) == 2 else []


def _rest(graph: Graph, gate: Node, other: Node) -> bool:
    """Whether a gate is one minus the other."""
    one = gate.argument("input", 0) if gate.op == "sub" else gate.argument("other", 1) if gate.op == "rsub" else None
    return one == 1 and handed(graph, gate.parents[0].id) == other.id


def shortcut(graph: Graph, name: TensorId, origin: TensorId) -> int | None:
    """How many projections, none or one, lead to a value through views, scales, norms and pools alone; else None."""
    node, projected = graph[name], 0
    while node.id != origin:
        found = projection(graph, node)
        higher = found.data if found is not None else _step_above(graph, node)
        if higher is None:
            return None
        projected += found is not None
        node = graph[higher]
    return projected if projected < 2 else None


def _step_above(graph: Graph, node: Node) -> TensorId | None:
    """The value that a shortcut goes on from: normed, pooled, scaled or whole."""
    if (node.op in NORMS or node.op in POOLS or node.op in REDUCED) and node.parents:
        return node.parents[0].id
    part = node.op in CUTS and prod(node.shape) < prod(graph[node.parents[0].id].shape)
    return None if part else identity_input(graph, node)  # another part may go through something else


def under_norm(graph: Graph, name: TensorId) -> TensorId | None:
    """The value that was normalised or bent to this one; None where it is no such value."""
    value = form_of(graph)[name]
    return base(graph, value.inputs[0].id) if value.kind in ("norm", "bend") or value.node.op in CLAMPS else None


def norms(graph: Graph, name: TensorId) -> list[TensorId]:
    """The values normalised from one, each norm one op or written out, then with its gain and its cast."""
    found = [user for user in form_of(graph)[name].users if user.kind == "norm" and user.op in STATISTICS | NORMS]
    whole = [one for one in found if one.node.op != "sub"] or found  # less its mean alone is a part of a norm
    return [_gained(graph, one).id for one in whole]


def _gained(graph: Graph, norm: Value) -> Node:
    """A norm with the gain and the bias that it is given, where it has none of its own."""
    if norm.node.op in NORMS and any(weights(graph, parent.id) for parent in norm.node.parents):
        return norm.node
    scaled = norm.users[-1].folded if norm.users and norm.users[-1].kind == "affine" else ()
    after = [*norm.views, *(scaled if all(user.node in scaled for user in norm.users) else ())]
    several = (one for one in reversed(after) if len(one.parents) > 1 or one.op in ("to", RESULT))
    return next((one for one in several if one.op in ("mul", "add", "to", RESULT)), norm.node)


PARALLEL = 3
"""Before how many writes what is added may have been computed."""


Writes = Mapping[TensorId, Write]
"""The writes of all streams in execution order, by their sums."""

Starts = Mapping[TensorId, TensorId]
"""Where the stream of each write began, by their sums."""


def ends(graph: Graph, name: TensorId, found: Writes) -> Iterator[TensorId]:
    """Where a stream that a write begins with may have ended: written back into a whole, or normalised to it."""
    yield from written_back(graph, name, found)
    yield from normed(graph, name)


def normed(graph: Graph, name: TensorId) -> Iterator[TensorId]:
    """The base of a value, the value that was normalised or bent to it, and so on."""
    higher: TensorId | None = base(graph, name)
    while higher is not None:
        yield higher
        higher = under_norm(graph, higher)


def written_back(graph: Graph, name: TensorId, found: Writes) -> list[TensorId]:
    """The sums that were written back into a value on the way to this one, or laid beside the rest of it: a part of it was
    a stream for some writes."""
    sums: list[TensorId] = []
    for node in (graph[one] for one in identity_path(graph, name)):
        sums += [last.after for _, last in reversed(split_branches(graph, node, found))]
        if node.op in OVERWRITES or node.op == "cat":
            parts = [parent.id for parent in node.parents]
            rest = parts[:1] if node.op in OVERWRITES else [part for part in parts if part not in found]
            wholes = {handed(graph, part) for part in rest}
            sums += [part for part in parts if part not in rest and _goes_back(graph, found, part, wholes)]
    return sums


def _goes_back(graph: Graph, found: Writes, part: TensorId, wholes: set[TensorId]) -> bool:
    """Whether a value is the sum of a write which, or one before it in its stream, was to a part of one of these."""
    write = found.get(part)
    while write is not None and handed(graph, write.before) not in wholes:
        write = found.get(base(graph, write.before))
    return write is not None


def split_branches(graph: Graph, node: Node, found: Writes) -> list[tuple[Write, Write]]:
    """The first and the last write to each part of a value, where each part has writes of its own, none with what was made
    of another, and all are laid side by side again, in the order in which they begin; none of another op."""
    lasts = [last_write(graph, parent.id, found) for parent in node.parents] if node.op == "cat" else []
    halves = [(_first_to_part(graph, end, found), end) for end in lasts if end is not None]
    if len(halves) < max(len(lasts), 2) or len({first and handed(graph, first.before) for first, _ in halves}) > 1:
        return []
    parts = sorted(((a, b) for a, b in halves if a is not None), key=lambda half: graph.place(half[0].after))
    alone = (a is not b and not depends_on(graph, b.added, a.after) for (a, _), (b, _) in pairwise(parts))
    return parts if all(alone) else []


def last_write(graph: Graph, name: TensorId, found: Writes) -> Write | None:
    """The write that a value comes from, normalised or not."""
    return next((found[one] for one in normed(graph, name) if one in found), None)


def _first_to_part(graph: Graph, write: Write, found: Writes) -> Write | None:
    """The first of the writes that go on to this one and are to a part of a value."""
    first: Write | None = write
    while first is not None and graph[first.before].op not in CUTS:
        first = last_write(graph, first.before, found)
    return first


def start_of(graph: Graph, name: TensorId, found: Writes, starts: Starts) -> TensorId | None:
    """Where the stream began that a value is on; None where it is on none."""
    return next((starts[one] for one in ends(graph, name, found) if one in starts), None)
