"""A table of the module calls of a pass: kind, output, parameters read, floating-point operations, size."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fmr.errors import FmrError, GraphError, IdError, nearest, whole_number
from fmr.graph.execute import execute
from fmr.graph.paths import Calls
from fmr.ids import OPAQUE, TensorId, relative
from fmr.nests import ids_in
from fmr.nodes import Key, Node, Scope, scope_of
from fmr.ops.fused import is_fused
from fmr.pictures.captions import size
from fmr.pictures.notebook import preformatted
from fmr.watching.calls import unwatched

if TYPE_CHECKING:
    from pandas import DataFrame

_MULTIPLY = frozenset(
    """addbmm addmm addmv addr baddbmm bilinear bmm cdist chain_matmul conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d conv_transpose3d convolution dot einsum gru gru_cell grouped_mm inner kron linear lstm lstm_cell matmul
    mm multi_dot mv outer rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell scaled_mm tensordot vdot""".split()
)
"""The ops that may run a kernel for which torch has a formula of its operations."""


class Opened(Calls, Protocol):
    """What is read of a graph here besides its calls: the values inside fused ops."""

    def inner(self, key: Key) -> tuple[Node, ...]:
        """The values inside a fused op."""


class Layer(NamedTuple):
    """One module call.

    `params` are the elements of the parameters that were read in the call, submodules included, each parameter counted
    once; `own` those that its own ops read. `flops` are the operations of the call as torch's counter counts them, two for
    a multiplication with its addition; `complete` is False where an op could not be counted. `nbytes` is the output's size.
    """

    path: str
    kind: str
    parent: str | None
    output: tuple[Node, ...]
    params: int
    own: int
    flops: int
    complete: bool
    nbytes: int


class Layers(tuple[Layer, ...]):
    """The module calls of a pass as a table, in the order in which they began; `table[path]` is one of them.

    >>> run.graph.table()["transformer.h.3.mlp"].params
    131712
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice) or whole_number(key) is not None:
            return super().__getitem__(key)
        key = "" if key == "(root)" else key
        found = next((layer for layer in self if layer.path == key), None)
        if found is None:
            raise IdError(f"The table has no module call {key!r}.{nearest(str(key), (layer.path for layer in self))}")
        return found

    def frame(self) -> DataFrame:
        """The table for pandas, one row a call by its path."""
        import pandas as pd

        rows = [{**layer._asdict(), "output": _shapes(layer)} for layer in self]
        columns = ["path", "kind", "output", "params", "own", "flops", "complete", "nbytes"]
        return pd.DataFrame(rows, columns=columns).set_index("path")

    def __repr__(self) -> str:
        depths: dict[str | None, int] = {None: -1}
        rows = [("module", "kind", "output", "params", "own", "flops", "size")]
        for layer in self:
            depths[layer.path] = depth = depths[layer.parent] + 1
            name = "  " * depth + (relative(layer.path, layer.parent or "") or "(root)")
            flops = _short(layer.flops).rstrip() + "+" * (not layer.complete)
            numbers = (f"{layer.params:,}", f"{layer.own:,}", flops, f"{_short(layer.nbytes)}B")
            rows.append((name, layer.kind, _shapes(layer), *numbers))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
        if not all(layer.complete for layer in self):
            lines.append("+ and what could not be counted, as in scripted code")
        return "\n".join(lines)

    _repr_html_ = preformatted


def table(graph: Opened, depth: int | None = None) -> Layers:
    """One row a module call: kind, output, parameters, operations.

    >>> run.graph.table(depth=2)

    depth: how far below the root modules are listed; None lists all. From the graph alone, so a model on the meta device
    has one, too. A parameter counts where it was read, one that the pass did not read nowhere; operations are those of
    torch.utils.flop_counter, with fused attention counted as the products that it stands for, on any device.
    """
    levels = whole_number(depth)
    if depth is not None and (levels is None or levels < 0):
        raise GraphError(f"depth={depth!r} is no depth. Expected 0 for the root alone, 1, 2, ... for levels, None for all.")
    flops = dict(_counted(graph))
    own: dict[str, set[TensorId]] = {scope.path: set() for scope in graph.scopes}
    work: dict[str, list[int | None]] = {scope.path: [] for scope in graph.scopes}
    for node in graph.nodes:
        if not node.id.is_source:
            path = node.scope if node.scope in own else node.module
            own[path] |= {parent.id for parent in node.parents if parent.startswith("param:")}
            work[path].append(flops.get(node.id, 0))
    params, total = {path: set(names) for path, names in own.items()}, {path: list(some) for path, some in work.items()}
    for scope in reversed(graph.scopes):  # each after the calls inside it
        if scope.parent is not None:
            params[scope.parent] |= params[scope.path]
            total[scope.parent] += total[scope.path]
    level: dict[str | None, int] = {None: -1}
    for scope in graph.scopes:
        level[scope.path] = level[scope.parent] + 1
    return Layers(
        _layer(graph, scope, own[scope.path], params[scope.path], total[scope.path])
        for scope in graph.scopes
        if depth is None or level[scope.path] <= depth
    )


def _layer(graph: Opened, scope: Scope, own: set[TensorId], params: set[TensorId], work: list[int | None]) -> Layer:
    output = tuple(graph[name] for name in ids_in(scope.output))
    return Layer(
        scope.path,
        scope.kind,
        scope.parent,
        output,
        sum(_elements(graph[name]) for name in params),
        sum(_elements(graph[name]) for name in own),
        sum(flops or 0 for flops in work),
        None not in work,
        sum(_elements(node) * node.dtype.itemsize for node in output),
    )


def _elements(node: Node) -> int:
    """The number of elements of a value; a ragged one has no number here."""
    return 0 if -1 in node.shape else prod(node.shape)


def _shapes(layer: Layer) -> str:
    shapes = [size(node) or "scalar" for node in layer.output]
    return ", ".join(shapes[:2]) + (f" and {len(shapes) - 2} more" if len(shapes) > 2 else "")


def _short(number: float) -> str:
    """A number with three digits or four and the prefix of its size."""
    for unit in (" ", " k", " M", " G", " T"):
        if number < 1000:
            return f"{number:.4g}{unit}"
        number /= 1000
    return f"{number:.4g} P"


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    left = [text.ljust(width) for text, width in zip(row[:3], widths[:3], strict=True)]
    return left + [text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)]


# ---- operations


def _counted(graph: Opened) -> Iterator[tuple[TensorId, int | None]]:
    """The operations of each op that has any, under the ID of its first output; None where they could not be counted."""
    from torch.utils.flop_counter import FlopCounterMode

    seen: set[str] = set()
    known: dict[Any, int | None] = {}
    with unwatched(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        for node in graph.nodes:
            if node.op == OPAQUE:
                yield node.id, None
            elif (is_fused(node) or node.op in _MULTIPLY) and scope_of(node) not in seen:
                seen.add(scope_of(node))
                yield node.id, _flops(graph, node, counter, known)


def _flops(graph: Opened, node: Node, counter: Any, known: dict[Any, int | None]) -> int | None:
    parents = {parent.id: graph[parent] for parent in node.parents}
    call = (node.op, tuple((parent.at, parents[parent.id].shape) for parent in node.parents), repr(node.args))
    if call not in known:
        known[call] = _inside(graph, node, counter, known) if is_fused(node) else _run(node, parents, counter)
    return known[call]


def _inside(graph: Opened, node: Node, counter: Any, known: dict[Any, int | None]) -> int | None:
    """The operations of a fused op: those of its plain form."""
    nodes = graph.inner(node.id)
    first = {scope_of(inner): inner for inner in reversed(nodes) if is_fused(inner) or inner.op in _MULTIPLY}
    work = [_flops(graph, inner, counter, known) for inner in first.values()]
    return None if not nodes or None in work else sum(flops or 0 for flops in work)


def _run(node: Node, parents: dict[TensorId, Node], counter: Any) -> int | None:
    """The operations of one op, run on tensors without elements while torch counts."""
    if any(-1 in parent.shape for parent in parents.values()):
        return None
    if node.op == "grouped_mm":  # each row meets one matrix of its group
        return 2 * _elements(node) * parents[node.parents[0].id].shape[-1]
    before = counter.get_total_flops()
    try:
        args = {at: arg for at, arg in node.args.items() if at not in ("out", "dtype")}
        reads = tuple(parent for parent in node.parents if parent.at.partition(".")[0] != "out")
        given = {name: _stand_in(parent) for name, parent in parents.items()}
        execute(node._replace(args=args, parents=reads), given)
    except (RuntimeError, TypeError, ValueError, IndexError, FmrError):
        return None
    return int(counter.get_total_flops() - before)


def _stand_in(node: Node) -> Tensor:
    """A tensor of a node's shape without elements; all floating-point ones of one type, as autocast would have them."""
    dtype = torch.float32 if node.dtype.is_floating_point else node.dtype
    return torch.empty(node.shape, dtype=dtype, device="meta")
