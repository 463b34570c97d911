"""What a model's Python asks of values: a path chosen by a number stays the recorded one under any edit."""

import torch

from fmr.errors import ReplayError
from fmr.graph.graph import Graph
from fmr.ids import OPAQUE, Parent, TensorId, outer_op
from fmr.nodes import Node
from fmr.sweeps.steps import steps_of

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


def refuse_chosen_paths(graph: Graph, edited: set[TensorId]) -> None:
    """Raise where a number that Python was told depends on what is edited: another run may take another path."""
    reached = {outer_op(name) for name in edited}
    for step in steps_of(graph):
        if any(name in reached for name in step.reads):
            reached.update(node.id for node in step.nodes)
            if any(parent.id in reached for parent in _deciding(step.first, graph)):
                raise ReplayError(f"how many elements {step.first.id} has depends on values, and Python may go by it")
    for name in graph.asked:
        if name in reached or (graph[name].op == OPAQUE and not graph[name].parents):
            raise ReplayError(f"the model's Python asks for the number in {name}, which may choose its path")
