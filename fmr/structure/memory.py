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
from fmr.structure.evaluate import evaluate
from fmr.structure.match import (
    ELEMENTWISE,
    LINEAR,
    NONLINEAR,
    NORMS,
    SAME,
    SHAPE,
    Projection,
    contraction,
    is_constant,
    projection,
    settled,
    unshaped,
    weights,
)

_THROUGH = SAME | SHAPE | ELEMENTWISE | NORMS | {"mean", "std", "var"}
"""What may lie between the two projections: number by number, and a norm or a threshold of the coefficients."""


class Memory(NamedTuple):
    """The IDs of one feed-forward memory: what enters its nonlinearity, its coefficients, its output, its weights.

    `keys` and `values` are `w_in` and `w_out` as the projections read them: `in_rows` if a key is a row of the one,
    `out_columns` if a value is a column of the other. `up` and `down` are the projections' results; with `fused_gate` one
    projection makes the gate and what it gates.
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


def find_memories(graph: Graph, stream: frozenset[TensorId]) -> Iterator[Memory]:
    """Each second projection of an unfused graph whose input is an elementwise nonlinear function of a first one.

    `stream` are the sums of the residual stream, beyond which no memory reaches.
    """
    for node in graph.nodes:
        down = projection(graph, node)
        if down is not None and (found := _memory(graph, down, stream)) is not None:
            yield found


class _Way(NamedTuple):
    """A first projection, and whether the path from it to the second one bends (goes through a nonlinearity)."""

    up: Projection
    bent: bool
    pre: TensorId


def _memory(graph: Graph, down: Projection, stream: frozenset[TensorId]) -> Memory | None:
    ways = _ups(graph, down.data, stream)
    if not ways or not any(way.bent for way in ways):
        return None
    sources = {unshaped(graph, way.up.data) for way in ways}
    ups = {way.up.node.id for way in ways}
    if len(ups) > 2 or len(sources) > 1:
        return None
    gate = min((way for way in ways if way.bent), key=lambda way: graph.place(way.pre))
    value = next((way for way in ways if way.up.node.id != gate.up.node.id), gate)
    post = unshaped(graph, down.data, frozenset({"view", "reshape"}))
    return Memory(
        pre=gate.pre,
        post=post,
        out=settled(graph, down.node).id,
        w_in=weights(graph, value.up.weight)[0],
        w_gate=weights(graph, gate.up.weight)[0] if value is not gate else None,
        w_out=weights(graph, down.weight)[0],
        source=sources.pop(),
        up=settled(graph, value.up.node).id,
        down=down.node.id,
        keys=value.up.weight,
        values=down.weight,
        in_rows=rows_are_outputs(value.up),
        out_columns=rows_are_outputs(down),
        fused_gate=len(ups) == 1 and graph[gate.up.node.id].shape[-1] == 2 * graph[post].shape[-1],
        scope=_scope(gate.up.node, down.node),
    )


def rows_are_outputs(found: Projection) -> bool:
    """Whether row i of the weight, as the projection reads it, makes output i: the layout (out, in)."""
    node, product = found.node, contraction(found.node)
    first = product is not None and product.left == found.weight
    if node.op == "einsum":
        operands, _, result = str(node.argument("equation", 0)).replace(" ", "").partition("->")
        return operands.split(",")[0 if first else 1][-2] in result
    return first or node.op == "linear" or (node.op in LINEAR and "transpose" not in node.op)


def count(graph: Graph, found: Memory) -> int:
    """How many memories there are: the units of the coefficients, which are channels where a window reads them."""
    windows = len(graph[found.values].shape) - 2 if graph[found.down].op in LINEAR else 0
    return graph[found.post].shape[-1 - windows]


def vectors(
    graph: Graph, found: Memory, weights: Mapping[TensorId, Tensor], index: int, expert: int | None
) -> tuple[Tensor, Tensor]:
    """The key and the value of one memory: slices of the weights as the projections read them."""
    keys, values = weights[found.keys], weights[found.values]
    if keys.dim() == values.dim() == 3 and graph[found.down].op not in LINEAR:
        if expert is None:
            raise StructureError(f"{found.scope!r} has {len(keys)} experts. Name one: block.memory({index}, expert=0).")
        if not 0 <= expert < len(keys):
            raise StructureError(f"Expert {expert} of {found.scope!r}: expected 0 to {len(keys) - 1}.")
        keys, values = keys[expert], values[expert]
    elif expert is not None:
        raise StructureError(f"{found.scope!r} has one matrix for all: expected block.memory({index}) without expert=.")
    known = count(graph, found) * (2 if found.fused_gate else 1), count(graph, found)
    rows, columns = (0 if found.in_rows else 1), (1 if found.out_columns else 0)
    if (keys.shape[rows : rows + 1], values.shape[columns : columns + 1]) != tuple((size,) for size in known):
        shapes = f"{tuple(keys.shape)} and {tuple(values.shape)}"
        raise StructureError(f"{found.scope!r} holds its weights as {shapes}: no row or column is that of one memory.")
    row = _gated(graph, found, keys.shape[rows], index) if found.fused_gate else index
    return _vector(keys.select(rows, row)), _vector(values.select(columns, index))


def _vector(weight: Tensor) -> Tensor:
    """The weights of one unit without the sizes of a window of one place."""
    return weight.flatten() if weight.numel() == len(weight) else weight


def _gated(graph: Graph, found: Memory, size: int, index: int) -> int:
    """Which unit of a projection that makes gates and what they gate is the key of a memory: the one that is gated."""
    up, pre = graph[found.up].shape, graph[found.pre].shape
    split = next(n for n in range(len(up) + 1) if math.prod(up[n:]) <= size)
    units = torch.arange(size, dtype=torch.float64).reshape(up[split:]).expand(up)
    gates = evaluate(graph, found.pre, {found.up: units}, lambda name: units).reshape(-1, pre[-1])[0].long().tolist()
    gated = sorted(set(range(size)) - set(gates))
    if len(gated) != count(graph, found):
        raise StructureError(f"{found.scope!r}: the units of {found.w_in} that are gated cannot be told from the gates.")
    return gated[index]


def _ups(graph: Graph, start: TensorId, stream: frozenset[TensorId]) -> list[_Way]:
    """The first projections above a value, through elementwise ops alone; empty where anything else flows in."""
    found: list[_Way] = []
    waiting: list[tuple[TensorId, bool, TensorId]] = [(start, False, start)]
    seen = {(start, False)}
    while waiting:
        name, bent, pre = waiting.pop()
        node = graph[name]
        if contraction(node) is not None:
            up = projection(graph, node)
            if up is None:
                return []
            found.append(_Way(up, bent, pre if bent else name))
        elif weights(graph, name) or (not node.parents and node.op not in ("input", "opaque")):
            continue
        elif node.op in _THROUGH and name not in stream:
            bends = node.op in NONLINEAR
            for parent in node.parents:
                step = (parent.id, bent or bends)
                if step not in seen:
                    seen.add(step)
                    waiting.append((*step, parent.id if bends else pre))
        elif not is_constant(graph, name):
            return []
    return found


def _scope(first: Node, last: Node) -> str:
    """The innermost module call that holds both projections."""
    a, b = first.scope.partition("/")[0].split("."), last.scope.partition("/")[0].split(".")
    common = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        common.append(x)
    return ".".join(common)
