"""One op of a graph run again: its arguments as they were given, the function that torch has for it."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmr.errors import IdError, StructureError
from fmr.ids import RESULT, TensorId
from fmr.nodes import Node
from fmr.ops.names import EDGES


def call_arguments(node: Node, tensors: Mapping[Any, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of an op's call, from its parents' tensors and its other arguments."""
    given: dict[str, Any] = {**node.args, **{parent.at: tensors[parent] for parent in node.parents}}
    if any("." in at for at in given):
        raise IdError(
            f"{node.id} was called with tensors inside a list; fmr cannot look inside such a call. "
            "Expected tensors one by one."
        )
    positions = sorted((at for at in given if at.isdigit()), key=int)
    return tuple(given[at] for at in positions), {at: value for at, value in given.items() if not at.isdigit()}


_BINARY: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "pow": operator.pow,
    "remainder": operator.mod,
    "floor_divide": operator.floordiv,
}


_VIEWS = frozenset(
    """T as_strided chunk diagonal expand expand_as flatten getitem mT movedim narrow permute reshape select split
    split_with_sizes squeeze t tensor_split transpose unbind unflatten unfold unsqueeze view view_as""".split()
)
"""What may show the numbers of a value anew without a copy."""


_HOMES = (Tensor, F, torch, torch.linalg, torch.special)
"""Where torch keeps its functions, in the order in which they are looked up."""


def execute(node: Node, tensors: Mapping[TensorId, Tensor]) -> Tensor:
    """Run the op of a node again."""
    if node.op in ("dropout", RESULT):
        return tensors[node.parents[0].id]
    args, kwargs = call_of(node, tensors)
    kwargs = {name: item for name, item in kwargs.items() if name not in ("dtype", "out", "inplace", "_stacklevel")}
    out: Tensor = function_of(node, args, kwargs)(*args, **kwargs)
    index = node.id.parts.output
    return out if index is None else out[index]


def overwritten(lookup: Callable[[str], Node], node: Node, tensors: Mapping[TensorId, Tensor]) -> Tensor:
    """A value of which views were overwritten: the same views of a copy, overwritten one after the other."""
    old, *writes = (parent.id for parent in node.parents)
    whole = tensors[old].clone()
    for written in writes:
        way = [lookup(written)]
        while way[-1].id != old and way[-1].parents:
            way.append(lookup(way[-1].parents[0].id))
        part = whole
        for one in reversed(way[:-1]):  # what is no view was done in place
            if one.op in _VIEWS and len(one.parents) == 1:
                part = execute(one, {one.parents[0].id: part})
        same = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if way[-1].id != old or not same or part.shape != tensors[written].shape:
            raise StructureError(f"{node.id} was overwritten in place on the way, which is not recomputed.")
        part.copy_(tensors[written])
    return whole


def function_of(node: Node, args: Any, kwargs: Any) -> Callable[..., Any]:
    """The function that torch has for a node's op, as it is called with these arguments."""
    if node.op in _BINARY and len(args) == 2 and not kwargs:
        return _BINARY[node.op]
    match node.op:
        case "to":
            return lambda x, *rest, **more: x.to(torch.float64 if node.dtype.is_floating_point else node.dtype)
        case "getitem":
            return lambda x, index: x[_index(index)]
        case "setitem":
            return _written
        case "where" if isinstance(args[0], Tensor) and args[0].dtype == torch.bool:
            return torch.where
        case "softmax":
            safe = "/" in node.scope  # inside a kernel, where a row that is masked as a whole is zero and not NaN
            return lambda x, dim=-1, *rest, **more: torch._safe_softmax(x, dim) if safe else torch.softmax(x, dim)
        case "grouped_mm":
            return _grouped
        case "copy":
            return lambda x, y, *rest: y.expand_as(x)
        case op if op in EDGES:
            return lambda x: getattr(x, op)
    for home in _HOMES:
        if hasattr(home, node.op):
            found: Callable[..., Any] = getattr(home, node.op)
            return found
    raise StructureError(f"{node.id} cannot be recomputed: torch has no function {node.op!r}.")


def _index(index: Any) -> Any:
    several = isinstance(index, list) and any(isinstance(i, (slice, Tensor, type(None))) for i in index)
    return tuple(index) if several else index


def _written(base: Tensor, index: Any, item: Any) -> Tensor:
    base = base.clone()
    base[_index(index)] = item
    return base


def _grouped(rows: Tensor, matrices: Tensor, offs: Tensor, *rest: Any, **more: Any) -> Tensor:
    """The product of each group of rows with its own matrix; `offs` are the ends of the groups."""
    ends = offs.tolist()
    parts = [rows[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, matrices, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], matrices.shape[-1])])


def call_of(node: Node, tensors: Mapping[TensorId, Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the named arguments of an op, nests restored, with these tensors for its parents."""
    tree: dict[str, Any] = {}
    for at, item in [*node.args.items(), *((parent.at, tensors[parent.id]) for parent in node.parents)]:
        *path, last = at.split(".")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[last] = item
    restored = {key: _restore(item) for key, item in tree.items()}
    positions = sorted((key for key in restored if key.isdigit()), key=int)
    return [restored[key] for key in positions], {key: item for key, item in restored.items() if not key.isdigit()}


def _restore(item: Any) -> Any:
    if isinstance(item, dict) and item and all(isinstance(key, str) and key.isdigit() for key in item):
        return [_restore(item[key]) for key in sorted(item, key=int)]
    return item
