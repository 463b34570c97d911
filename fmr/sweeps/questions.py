"""What a model's Python asks of values: a path chosen by a number stays the recorded one under any edit."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmr.errors import ReplayError
from fmr.graph.graph import Graph
from fmr.ids import Parent, TensorId, outer_op
from fmr.nests import leaves
from fmr.nodes import Node
from fmr.runs.passes import Pass
from fmr.sweeps.steps import steps_of
from fmr.watching.calls import WatcherMode

_ANSWERS = frozenset(
    """__bool__ __int__ __float__ __index__ __complex__ __contains__ __array__ item tolist numpy is_nonzero equal allclose
    array_equal""".split()
)
"""Functions that tell Python numbers of tensors."""


class Questions(WatcherMode):
    """A mode that notes the tensors whose numbers are told to Python while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ANSWERS:
            self.tensors += [tensor for _, tensor in leaves((args, kwargs))]
        return func(*args, **(kwargs or {}))


_COUNTING = {"nonzero": "0", "argwhere": "0", "unique": "0", "unique_consecutive": "0", "bincount": "0"} | {
    "masked_select": "1",
    "repeat_interleave": "1",
}
"""The argument whose numbers decide how many elements the result has."""


def _deciding(node: Node, graph: Graph) -> list[Parent]:
    """The values whose numbers decide how many elements the result of an op has."""
    if node.op == "getitem":
        return [one for one in node.parents if one.at != "0" and graph[one.id].dtype == torch.bool]
    if node.op == "where" and len(node.parents) == 1:
        return list(node.parents)
    at = _COUNTING.get(node.op)
    return [one for one in node.parents if one.at == at or (at == "1" and one.at in ("mask", "repeats"))]


def refuse_chosen_paths(recorded: Pass, asked: Sequence[Tensor], edited: set[TensorId]) -> None:
    """Raise where a number that Python was told depends on what is edited: another run may take another path."""
    names: dict[int, list[TensorId]] = defaultdict(list)
    for name, value in recorded.values.items():
        names[id(value)].append(name)
    reached = {outer_op(name) for name in edited}
    for step in steps_of(recorded.graph):
        if any(name in reached for name in step.reads):
            reached.update(node.id for node in step.nodes)
            if any(parent.id in reached for parent in _deciding(step.first, recorded.graph)):
                raise ReplayError(f"how many elements {step.first.id} has depends on values, and Python may go by it")
    for tensor in asked:
        known = names.get(id(tensor), [])
        hit = next((name for name in known if name in reached), None)
        if hit is not None or not known:
            what = hit or f"a tensor of shape {tuple(tensor.shape)} that was not recorded"
            raise ReplayError(f"the model's Python asks for the number in {what}, which may choose its path")
