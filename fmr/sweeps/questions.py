"""What a model's Python asks of values: a path chosen by a number or a size stays the recorded one under any edit."""

from collections.abc import Collection
from weakref import WeakKeyDictionary

import torch

from fmr.errors import ReplayError
from fmr.graph.graph import Graph
from fmr.ids import OPAQUE, Parent, TensorId, outer_op
from fmr.nodes import Node
from fmr.sweeps.steps import steps_of

_COUNTING = {
    **dict.fromkeys(
        "argwhere bincount nonzero unique unique2 unique_consecutive unique_dim".split(), ("0", "input", "self")
    ),
    **dict.fromkeys(("masked_select",), ("1", "mask")),
    **dict.fromkeys(("repeat_interleave",), ("1", "repeats")),
    **dict.fromkeys(("pack_padded_sequence", "pad_packed_sequence"), ("1", "lengths", "batch_sizes")),
}
"""The argument whose numbers decide how many elements the result has."""

_SIZED = frozenset(
    """arange chunk diagonal empty expand eye full hsplit interpolate linspace logspace narrow new_empty new_full new_ones
    new_zeros ones pad range repeat reshape split split_with_sizes tensor_split tile topk tril_indices triu_indices
    unflatten unfold view vsplit zeros""".split()
)
"""Ops that take sizes, each of which may be a tensor with a whole number."""

_MAKING = frozenset("arange empty eye full linspace logspace ones range tril_indices triu_indices zeros".split())
"""Those of them that take nothing else first."""


def deciding(node: Node, graph: Graph) -> list[Parent]:
    """The values whose numbers decide how many elements the result of an op has."""
    parents = node.parents
    if node.op in ("getitem", "index"):
        masks = (torch.bool, torch.uint8)
        return [one for one in parents if one.at not in ("0", "self") and (_is_bound(one) or graph[one.id].dtype in masks)]
    if node.op == "where":
        return list(parents) if len(parents) == 1 and not node.args else []
    if node.op == "one_hot":
        return list(parents) if node.argument("num_classes", 1, -1) == -1 else []
    if node.op == "repeat_interleave" and len(parents) == 1 and not {"1", "repeats"} & node.args.keys():
        return list(parents)
    if node.op in _SIZED:
        tensors = [one for one in parents if node.op in _MAKING or one.at not in ("0", "input", "self")]
        return [one for one in tensors if node.op in ("arange", "range") or not _is_fraction(graph[one.id].dtype)]
    return [one for one in parents if one.at in _COUNTING.get(node.op, ())]


def _is_bound(parent: Parent) -> bool:
    """Whether a tensor stands for a number in a slice."""
    return parent.at.endswith((".start", ".stop", ".step"))


def _is_fraction(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


Sized = tuple[tuple[Node, frozenset[TensorId]], ...]
"""Ops whose results have as many elements as values say, each with these values."""

_sized: "WeakKeyDictionary[Graph, Sized]" = WeakKeyDictionary()


def sized_by_values(graph: Graph) -> Sized:
    """The ops of a graph whose size depends on values; they are remembered while the graph lives."""
    if graph not in _sized:
        found = [(step.first, frozenset(one.id for one in deciding(step.first, graph))) for step in steps_of(graph)]
        _sized[graph] = tuple((node, by) for node, by in found if by)
    return _sized[graph]


def reached_by(graph: Graph, edited: Collection[TensorId], frozen: Collection[TensorId] = ()) -> set[TensorId]:
    """What is edited, and all that depends on it but for what is frozen."""
    reached = {outer_op(name) for name in edited}
    for step in steps_of(graph):
        if any(name in reached for name in step.reads):
            reached.update(node.id for node in step.nodes if node.id not in frozen)
    return reached


def refuse_chosen_paths(graph: Graph, edited: set[TensorId]) -> None:
    """Raise where a number that Python was told depends on what is edited: another run may take another path."""
    reached = reached_by(graph, edited)
    for node, by in sized_by_values(graph):
        if not by.isdisjoint(reached):
            raise ReplayError(f"how many elements {node.id} has depends on values, and Python may go by it")
    for name in graph.asked:
        if name in reached or (graph[name].op == OPAQUE and not graph[name].parents):
            raise ReplayError(f"the model's Python asks for the number in {name}, which may choose its path")
