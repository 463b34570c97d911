"""Code that torch does not show: values whose producer was not seen, and ops of other libraries or of kernels alone."""

from collections.abc import Iterator
from functools import cache
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from fmr.graph.graph import Graph
from fmr.ids import OPAQUE, TensorId, within
from fmr.nests import ids_in
from fmr.nodes import Node
from fmr.ops.names import canonical
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import above, below, is_constant, product, projection, weights
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import ELEMENTWISE, MOVES, NORMS
from fmr.structure.normal.walks import cached_per_graph

_HOMES = (Tensor, F, torch, torch.linalg, torch.special, torch.fft, torch.nn.utils.rnn)
"""Where torch keeps the functions that it documents."""

_OF_FMR = frozenset("alias buffer copy getitem input is_all_true param result setitem".split())
"""Ops that stand for no function of torch's of this name."""

_OF_PYTHON = frozenset("apply map map2".split())
"""Methods of a tensor that run any Python function on each number."""


@cache
def _documented() -> frozenset[str]:
    """The ops that torch documents, by the names that they go by here: in place too, and where C calls them otherwise."""
    names = [(name, getattr(home, name, None)) for home in _HOMES for name in dir(home) if not name.startswith("_")]
    return frozenset(canonical(one) for name, func in names for one in (name, getattr(func, "__name__", name)))


_BETWEEN = frozenset("move join affine bend gate sum".split())
"""What may lie between the two projections of a memory of which one is hidden."""

_MOST = 64
"""How many values may lie between two projections."""


def is_hidden(node: Node) -> bool:
    """Whether torch does not show what a node computes: its producer was not seen, or torch documents no such op."""
    if node.op == OPAQUE:
        return True
    known = node.op in _OF_FMR or (node.op in _documented() and node.op not in _OF_PYTHON)
    return not known


def reads(graph: Graph, node: Node) -> list[TensorId]:
    """What a node reads; of code that is not seen what it was handed: the values of its module call that nothing else reads,
    or what went into that call."""
    return [parent.id for parent in node.parents] or _handed_out(graph).get(node.id, [])


@cached_per_graph
def _handed_out(graph: Graph) -> dict[TensorId, list[TensorId]]:
    """For each value of which no producer was seen what was handed to the code that made it, where that can be told."""
    inputs = {scope.path: ids_in(scope.inputs) for scope in graph.scopes[1:]}
    returned = {name for scope in graph.scopes for name in ids_in(scope.output)}
    left: dict[str, list[TensorId]] = {}
    found: dict[TensorId, list[TensorId]] = {}
    for node in graph.nodes:
        unread = not graph.readers(node.id) and node.id not in returned
        if node.op == OPAQUE and not node.parents:
            found[node.id] = left.pop(node.module, []) or list(inputs.get(node.module, []))
        elif unread and node.dtype.is_floating_point and not is_constant(graph, node.id):
            left.setdefault(node.module, []).append(node.id)
    return found


def read_alone(graph: Graph, node: Node) -> TensorId | None:
    """The one activation that a node reads; None where it reads several or none."""
    read = {name for name in reads(graph, node) if not weights(graph, name) and not is_constant(graph, name)}
    return read.pop() if len(read) == 1 else None


def hidden_memories(graph: Graph, stream: frozenset[TensorId]) -> Iterator[tuple[Node, Node]]:
    """Each second projection below a nonlinearity of which one of the two is hidden, and the hidden one."""
    for node in graph.nodes:
        found = projection(graph, node)
        data = found.data if found is not None else read_alone(graph, node) if is_hidden(node) else None
        if data is None:
            continue
        bent, firsts = _firsts(graph, data, stream)
        bent = bent or any(bends_alone(graph, one) for one in firsts)
        hidden = [one for one in (node, *firsts) if is_hidden(one) and read_alone(graph, one) is not None]
        if bent and firsts and hidden:
            yield node, hidden[0]


def bends_alone(graph: Graph, node: Node) -> bool:
    """Whether hidden code makes a value of what a projection makes, of the same size: as a function of each number does."""
    read = read_alone(graph, node) if is_hidden(node) else None
    if read is None or graph[read].shape != node.shape:
        return False
    return any(projection(graph, one) is not None for one in above(graph, read, MOVES))


def hidden_attentions(graph: Graph) -> Iterator[Node]:
    """Each hidden value that a projection reads as it is, made of several values, or of a product of two, in a call that
    projects them: as the mixed values of an attention are, and its pattern, which weighs others."""
    for node in graph.nodes:
        if not (is_hidden(node) and node.dtype.is_floating_point and len(node.shape) > 2):
            continue
        alone = read_alone(graph, node)
        higher = above(graph, alone, MOVES | ELEMENTWISE) if alone is not None else ()
        scores = any(product(graph, one) is not None for one in higher)
        told = _projects(graph, node) if alone is None or not node.parents else scores
        if (alone is None or scores) and told and _is_projected(graph, node):
            yield node


def _is_projected(graph: Graph, node: Node) -> bool:
    """Whether what a node makes goes into a projection, or weighs other values, moved at most."""
    lower = (one for one, way in below(graph, node, MOVES) if way)
    return any(projection(graph, one) is not None or product(graph, one) is not None for one in lower)


def _projects(graph: Graph, node: Node) -> bool:
    """Whether a node reads several values that were projected; of what it reads nothing is known, whether its module call
    projects any before."""
    if not node.parents:
        before = graph.nodes[: graph.place(node.id)]
        return any(within(one.scope, node.module) and projection(graph, one) is not None for one in before)
    higher = (above(graph, parent.id, MOVES | ELEMENTWISE | NORMS) for parent in node.parents)
    return sum(any(projection(graph, one) is not None for one in values) for values in higher) > 1


def _firsts(graph: Graph, data: TensorId, stream: frozenset[TensorId]) -> tuple[bool, list[Node]]:
    """Whether a nonlinearity lies between a value and the projections above it, and these, hidden ones included."""

    def goes_on(value: Value) -> bool:
        return value.kind in _BETWEEN and value.id not in stream and not is_hidden(value.node)

    higher = list(islice(form_of(graph)[data].above(goes_on), _MOST))
    firsts = [one.node for one in higher if one.kind == "projection" or is_hidden(one.node)]
    return any(one.kind == "bend" and goes_on(one) for one in higher), firsts
