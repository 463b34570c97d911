"""Feed-forward memories by dataflow: a contraction with keys, a nonlinearity, a contraction with values."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.letters import carried, letters_of, numbers
from fmr.structure.match import (
    ELEMENTWISE,
    LINEAR,
    NONLINEAR,
    NORMS,
    SAME,
    SHAPE,
    STATISTICS,
    Projection,
    climb,
    contraction,
    first,
    is_constant,
    once,
    product,
    projection,
    settled,
    unshaped,
    weights,
)
from fmr.structure.operands import read_dims

_THROUGH = SAME | SHAPE | ELEMENTWISE | NORMS | STATISTICS | frozenset("topk sort kthvalue median".split())
"""What may lie between the two projections: number by number, and a norm or a threshold of the coefficients."""

_MOST = 128
"""How many ops may lie between the two projections; recurrent models have endless ones."""


class Memory(NamedTuple):
    """The IDs of one feed-forward memory: what enters its nonlinearity, its coefficients, its output, its weights.

    `keys` and `values` are `w_in` and `w_out` as the projections read them: `in_rows` if a key is a row of the one,
    `out_columns` if a value is a column of the other. `up` and `down` are the projections' results; with `fused_gate` one
    projection makes the gate and what it gates. `axis` is the dimension of the coefficients that counts the memories.
    """

    pre: TensorId
    post: TensorId
    out: TensorId
    w_in: TensorId
    w_gate: TensorId | None
    w_out: TensorId
    source: TensorId
    up: TensorId
    down: TensorId
    keys: TensorId
    values: TensorId
    in_rows: bool
    out_columns: bool
    fused_gate: bool
    scope: str
    axis: int = -1
    first: int | None = None

    def own(self, values: Tensor, n: int) -> Tensor:
        """What the second projection holds for its `n` memories; it may read other units beside them."""
        columns = 1 if self.out_columns else 0
        return values if self.first is None else values.narrow(columns, self.first, n)


def find_memories(graph: Graph, stream: frozenset[TensorId]) -> Iterator[Memory]:
    """Each second projection of an unfused graph whose input is an elementwise nonlinear function of a first one.

    `stream` are the sums of the residual stream, beyond which no memory reaches.
    """
    for node in graph.nodes:
        down = projection(graph, node)
        if down is None:
            continue
        found = _memory(graph, down, stream) or _beside_heads(graph, down, stream)
        if found is not None:
            yield found


def _beside_heads(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> Memory | None:
    """The memory whose coefficients a projection reads side by side with the mixed values of an attention."""
    joined = graph[unshaped(graph, down.data)]
    matrix = len(graph[down.weight].shape) == 2 and joined.shape == graph[down.data].shape
    if joined.op != "cat" or len(joined.parents) != 2 or not matrix:
        return None
    parts = [graph[parent.id] for parent in joined.parents]
    for part, other, start in zip(parts, parts[::-1], (0, parts[0].shape[-1]), strict=True):
        mixed = climb(graph, other.id, lambda node: node.op in SAME | SHAPE and node.id not in stream)
        if joined.shape == (*part.shape[:-1], part.shape[-1] + other.shape[-1]) and any(
            product(graph, node) is not None for node in mixed
        ):
            found = _memory(graph, down._replace(data=part.id), stream)
            if found is not None:
                return found._replace(first=start)
    return None


STRAIGHT, GATED, BENT = range(3)


class _Way(NamedTuple):
    """A first projection, and what it meets on its path to the second one: nothing, another one, a nonlinearity."""

    up: Projection
    bent: int
    pre: TensorId


def _memory(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> Memory | None:
    """The memory whose values a projection weighs; None where what it reads is no function of one or two others."""
    ways = _without_updates(graph, _ups(graph, down, stream))
    most = max((way.bent for way in ways), default=STRAIGHT)
    if most == STRAIGHT:
        return None
    if any(_is_filter(graph, one) for one in (down, *(way.up for way in ways))):
        return None
    sources = {first(graph, unshaped(graph, way.up.data)) for way in ways}
    ups = {(first(graph, unshaped(graph, way.up.data)), way.up.weight) for way in ways}
    if len(ups) > 2 or len(sources) > 1 or _are_summed(graph, down, {way.up.node.id: way.up.weight for way in ways}):
        return None
    gate = min((way for way in ways if way.bent == most), key=lambda way: graph.place(way.pre))
    value = next((way for way in ways if way.up.weight != gate.up.weight), gate)
    post = unshaped(graph, down.data, frozenset({"view", "reshape"}))
    axis = _axis(graph, down)
    return Memory(
        pre=gate.pre,
        post=post,
        out=settled(graph, down.node).id,
        w_in=_held(graph, value.up.weight),
        w_gate=_held(graph, gate.up.weight) if value is not gate else None,
        w_out=_held(graph, down.weight),
        source=unshaped(graph, value.up.data),
        up=settled(graph, value.up.node).id,
        down=down.node.id,
        keys=_matrices(graph, value.up.weight),
        values=_matrices(graph, down.weight),
        in_rows=rows_are_outputs(value.up),
        out_columns=rows_are_outputs(down),
        fused_gate=len(ups) == 1 and graph[gate.up.node.id].shape[axis] == 2 * graph[post].shape[axis],
        axis=axis,
        scope=_scope(gate.up.node, down.node),
    )


def _matrices(graph: Graph, weight: TensorId) -> TensorId:
    """A weight before it was repeated for each example, or the matrices among which one was chosen for each position."""
    node = graph[unshaped(graph, weight, SAME)]
    return node.parents[0].id if node.op == "getitem" and len(node.parents) > 1 else once(graph, weight)


def _held(graph: Graph, weight: TensorId) -> TensorId:
    """The parameter that a weight was made of; the weight itself where it is made of several."""
    made = [node.id for node in climb(graph, weight, lambda _: True) if node.op in ("param", "buffer")]
    return (weights(graph, weight) or (made if len(made) == 1 else [weight]))[0]


def _are_summed(graph: Graph, down: Projection, ups: Mapping[TensorId, TensorId]) -> bool:
    """Whether results of different first projections are added up: then neither is gated by the other."""

    def met(name: TensorId) -> set[TensorId]:
        above = climb(graph, name, lambda node: node.op in _THROUGH and node.id not in ups)
        return {ups[node.id] for node in above if node.id in ups}

    between = climb(graph, down.data, lambda node: node.op in _THROUGH and node.id not in ups)
    sums = (node for node in between if node.op in ("add", "sub") and len(node.parents) == 2 and node.id not in ups)
    return len(set(ups.values())) > 1 and any(
        one and other and not one & other for one, other in (tuple(met(p.id) for p in node.parents) for node in sums)
    )


def _axis(graph: Graph, down: Projection) -> int:
    """The dimension that a projection sums over in what it reads, counted from the right."""
    found = contraction(down.node)
    if down.node.op in LINEAR or found is None:
        return 1 - len(graph[down.weight].shape)
    letters = letters_of(graph, found)
    data, _ = letters.of(found.left == down.data)
    summed = [n for n, letter in enumerate(data) if letter in letters.summed]
    return summed[-1] - len(data) if summed else -1


def only_weighs(graph: Graph, found: Memory, sums: frozenset[TensorId]) -> bool:
    """Whether what a memory makes reaches the sums of a stream only repeated, to weigh what another part writes."""
    waiting, seen = [(graph[found.down], False)], set()
    for node, weighs in waiting:
        for reader in graph.readers(node.id):
            here = reader.id, weighs or _is_share(graph, node, reader)
            if here not in seen:
                seen.add(here)
                if reader.id not in sums and (reader.op in _THROUGH | {"sum"} or product(graph, reader) is not None):
                    waiting.append((reader, here[1]))
    return {weighs for name, weighs in seen if name in sums} == {True}


def _is_share(graph: Graph, node: Node, reader: Node) -> bool:
    """Whether a node multiplies a value with one that has more dimensions, which the first alone is repeated along."""
    found = product(graph, reader)
    if found is None:
        whole = any(graph[parent.id].shape == reader.shape for parent in reader.parents)
        return reader.op == "mul" and whole and math.prod(node.shape) < math.prod(reader.shape)
    letters = letters_of(graph, found)
    own, other = letters.of(found.left == node.id)
    return bool(letters.alone(other)) and not letters.alone(own)


def rows_are_outputs(found: Projection) -> bool:
    """Whether row i of the weight, as the projection reads it, makes output i: the layout (out, in)."""
    node, product = found.node, contraction(found.node)
    first = product is not None and product.left == found.weight
    if node.op == "einsum":
        operands, _, result = str(node.argument("equation", 0)).replace(" ", "").partition("->")
        return operands.split(",")[0 if first else 1][-2] in result
    if node.op == "tensordot" and not isinstance(dims := node.argument("dims", 2), int):
        return dims[0 if first else 1][0] in (1, -1)
    return first or node.op in ("linear", "inner") or (node.op in LINEAR and "transpose" not in node.op)


def count(graph: Graph, found: Memory) -> int:
    """How many memories there are: the units of the coefficients, which are channels where a window reads them."""
    return graph[found.post].shape[found.axis]


def vectors(
    graph: Graph, found: Memory, weights: Mapping[TensorId, Tensor], index: int, expert: int | None
) -> tuple[Tensor, Tensor]:
    """The key and the value of one memory: slices of the weights as the projections read them."""
    keys, values = weights[found.keys], found.own(weights[found.values], count(graph, found))
    if keys.dim() == values.dim() == 3 and graph[found.down].op not in LINEAR:
        if expert is None:
            raise StructureError(f"{found.scope!r} has {len(keys)} experts. Name one: block.memory({index}, expert=0).")
        if not 0 <= expert < len(keys):
            raise StructureError(f"Expert {expert} of {found.scope!r}: expected 0 to {len(keys) - 1}.")
        keys, values = keys[expert], values[expert]
    elif expert is not None:
        raise StructureError(f"{found.scope!r} has one matrix for all: expected block.memory({index}) without expert=.")
    rows, columns = (0 if found.in_rows else 1), (1 if found.out_columns else 0)
    among = _key_rows(graph, found, keys.shape[rows]) if keys.dim() == 2 and not found.fused_gate else None
    known = count(graph, found) * (2 if found.fused_gate else 1), count(graph, found)
    known = (keys.shape[rows] if among else known[0]), known[1]
    if (keys.shape[rows : rows + 1], values.shape[columns : columns + 1]) != tuple((size,) for size in known):
        shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
        raise StructureError(f"{found.scope!r} holds its weights as {shapes}: no row or column is that of one memory.")
    row = _gated_row(graph, found, keys.shape[rows], index) if found.fused_gate else among[index] if among else index
    return _vector(keys.select(rows, row)), _vector(values.select(columns, index))


def _vector(weight: Tensor) -> Tensor:
    """The weights of one unit without the sizes of a window of one place."""
    return weight.flatten() if weight.numel() == len(weight) else weight


def _key_rows(graph: Graph, found: Memory, size: int) -> list[int] | None:
    """Which units of a projection that makes more than a memory are its keys: what is gated, where there is a gate."""
    up, n = graph[found.up], count(graph, found)
    if size == n or up.shape[-1:] != (size,):
        return None
    cuts = []
    for node in climb(graph, found.post, lambda node: node.op in _THROUGH and node.id != up.id):
        if node.shape[-1:] == (n,) and unshaped(graph, node.id, SAME | SHAPE) == up.id:
            units = carried(graph, numbers(size).expand(up.shape), (up, node))
            cuts.append((node.id == found.pre, units.reshape(-1, n).long() if units is not None else torch.zeros(0, n)))
    whole = [(gates, units[0].tolist()) for gates, units in cuts if len(units) and bool((units == units[0]).all())]
    gates = next((units for gate, units in whole if gate), None)
    return next((units for _, units in whole if units != gates), gates)


def _gated_row(graph: Graph, found: Memory, size: int, index: int) -> int:
    """Which unit of a projection that makes gates and what they gate is the key of a memory: the one that is gated."""
    if graph[unshaped(graph, found.post, SAME)].op == "glu":
        return index  # the second half gates the first
    up, pre = graph[found.up].shape, graph[found.pre].shape
    split = next(n for n in range(len(up) + 1) if math.prod(up[n:]) <= size)
    units = numbers(size).reshape(up[split:]).expand(up)
    gates = carried(graph, units, (graph[found.up], graph[found.pre]))
    gated = sorted(set(range(size)) - set(gates.reshape(-1, pre[-1])[0].long().tolist())) if gates is not None else []
    if len(gated) != count(graph, found):
        raise StructureError(f"{found.scope!r}: the units of {found.w_in} that are gated cannot be told from the gates.")
    return gated[index]


def _without_updates(graph: Graph, ways: list[_Way]) -> list[_Way]:
    """The ways without small updates of another: projections of what is itself projected from the same value."""
    sources = {first(graph, unshaped(graph, way.up.data)) for way in ways}
    kept = []
    for way in ways:
        below = projection(graph, graph[unshaped(graph, way.up.data, SAME | {"view", "reshape", "mul"})])
        own = first(graph, unshaped(graph, way.up.data))
        if below is None or first(graph, unshaped(graph, below.data)) not in sources - {own}:
            kept.append(way)
    return kept


def _ups(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> list[_Way]:
    """The first projections above a second one, through elementwise ops alone; empty where anything else flows in.

    A convolution of each unit alone may lie below the projection, but nothing may bend between the two.
    """
    found: list[_Way] = []
    waiting = [_Step(down.data, STRAIGHT, down.data, False)]
    seen = {waiting[0][:2]}
    while waiting and len(seen) < _MOST:
        name, bent, pre, windowed = waiting.pop()
        node = graph[name]
        alone = _is_depthwise(graph, node)
        if contraction(node) is not None and not alone:
            up = projection(graph, node)
            if up is None:
                return []
            found.append(_Way(up, bent, pre if bent else name))
        elif weights(graph, name) or (not node.parents and node.op not in ("input", "opaque")):
            continue
        elif (alone or node.op in _THROUGH or _is_choice(graph, node, down)) and name not in stream:
            here = _bends(graph, node, bent == STRAIGHT or windowed)
            if windowed and here > STRAIGHT:
                return []
            for parent in [node.parents[0].id] if alone else _coefficients(graph, node, down):
                over = here > STRAIGHT and here >= bent
                step = _Step(parent, max(bent, here), parent if over else pre, windowed or alone)
                if step[:2] not in seen:
                    seen.add(step[:2])
                    waiting.append(step)
        elif not is_constant(graph, name):
            return []
    return [] if waiting else found


def _is_filter(graph: Graph, found: Projection) -> bool:
    """Whether a projection is a filter over an image: its weight is no vector for each unit."""
    shape = graph[found.weight].shape
    return found.node.op in LINEAR and len(shape) > 3 and max(shape[2:]) > 1


class _Step(NamedTuple):
    """A value on the way up, what was met below it, what entered that, and whether a convolution lies below."""

    name: TensorId
    bent: int
    pre: TensorId
    windowed: bool


def _is_depthwise(graph: Graph, node: Node) -> bool:
    """Whether a node is a convolution of each unit alone."""
    shape = graph[node.parents[1].id].shape if node.op in LINEAR and len(node.parents) > 1 else ()
    return len(shape) > 2 and shape[1] == 1 < shape[0] and max(shape[2:]) > 1


def _bends(graph: Graph, node: Node, gates: bool) -> int:
    """What a node adds to a way up; whether it `gates` is asked of products of two activations."""
    if node.op in NONLINEAR | {"softmax"}:
        return BENT
    if not gates or node.op != "mul" or len(node.parents) < 2 or any(weights(graph, parent.id) for parent in node.parents):
        return STRAIGHT
    return GATED


def _is_choice(graph: Graph, node: Node, down: Projection) -> bool:
    """Whether a node is a softmax over the units that a projection reads: a memory that is read by attention."""
    last = node.argument("dim", 1) in (-1, len(node.shape) - 1)
    return node.op == "softmax" and last and read_dims(graph, down) == (len(graph[down.data].shape) - 1,)


def _coefficients(graph: Graph, node: Node, down: Projection) -> list[TensorId]:
    """The operands of a node that have a number for each memory; one for all of them is only a share."""
    wide = [p.id for p in node.parents if down.node.op in LINEAR or not node.shape or graph[p.id].shape[-1:] != (1,)]
    return wide if node.op in ("mul", "div") and wide else [parent.id for parent in node.parents]


def _scope(first: Node, last: Node) -> str:
    """The innermost module call that holds both projections."""
    a, b = first.module.split("."), last.module.split(".")
    common = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        common.append(x)
    return ".".join(common)
