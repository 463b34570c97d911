"""States laid one on another, and what layers read of them: sums over depth."""

from collections.abc import Iterator, Sequence
from math import prod

from fmr.graph.graph import Graph
from fmr.ids import Parent, TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import subscripts_of
from fmr.structure.normal.indices import dim_map
from fmr.structure.normal.match import below, come_of, contraction, dims_told, weighed_sum
from fmr.structure.normal.vocabulary import MOVES, SAME
from fmr.structure.streams.dominators import flow_of
from fmr.structure.streams.identity import handed


def over_depth(graph: Graph) -> dict[TensorId, list[TensorId]]:
    """The values that are weighed out of states laid one on another, each with these states.

    All data of a later state comes from the first one: what lies one on another are no steps that read something new.
    """
    found, flow = {}, flow_of(graph)
    for node in graph.nodes:
        dim = _along(node)
        states = list(_laid(graph, node.id, dim)) if dim is not None else []
        if len(states) > 1 and all(flow.dominates(states[0], state) for state in states):
            for reader in _sums(graph, node, dim or 0):
                found[reader.id] = states
    return found


def _along(node: Node) -> int | None:
    """The dimension along which a node lays values one on another or side by side; None for another op."""
    dim = node.argument("dim", 1, 0)
    return dim % len(node.shape) if node.op in ("stack", "cat") and isinstance(dim, int) and node.shape else None


def _laid(graph: Graph, name: TensorId, dim: int) -> Iterator[TensorId]:
    """The values that lie one on another in a value, each of size one along a dimension that it was given for that."""
    node = graph[name]
    while node.op in SAME and node.parents:
        node = graph[node.parents[0].id]
    if node.op == "stack" or (node.op == "unsqueeze" and node.shape[dim] == 1):
        yield from (handed(graph, parent.id) for parent in node.parents)
    elif _along(node) == dim:
        for parent in node.parents:
            yield from _laid(graph, parent.id, dim)
    elif prod(node.shape):
        yield name


def _sums(graph: Graph, stack: Node, dim: int) -> Iterator[Node]:
    """The nodes that sum up what lies one on another, after norms, views and scaling; a plain sum is an add."""
    size = prod(stack.shape)
    lower = below(graph, stack, lambda one: contraction(one) is None and prod(one.shape) == size)
    summed = ((node, way) for node, way in lower if way and _over(graph, stack, dim, node))
    return (node for node, way in summed if node.op != "sum" or any(one.op not in MOVES for one in way))


def addends(graph: Graph, node: Node) -> tuple[TensorId, ...]:
    """The two values that a node adds up: an add, a difference, or the sum of two that were laid one on another; of more
    the last, and the sum of those before."""
    if node.op == "sum" and len(node.parents) == 1:
        stack = graph[node.parents[0].id]
        if not _is_total(graph, node, stack):
            return ()
        if len(stack.parents) > 2:
            before = _totals(graph, stack.parents[:-1])
            return (before[0].id, stack.parents[-1].id) if before else ()
        node = stack
    added = tuple(parent.id for parent in node.parents if parent.at != "out")
    return added if node.op in ("add", "sub", "stack") and len(added) == 2 else ()


def _is_total(graph: Graph, node: Node, stack: Node) -> bool:
    """Whether a node is the plain sum of what was laid one on another."""
    return node.op == "sum" and stack.op == "stack" and dims_told(node, len(stack.shape)) == [_along(stack)]


def _totals(graph: Graph, parts: Sequence[Parent]) -> list[Node]:
    """The sums of these values, which were laid one on another."""
    names = [one.id for one in parts]
    stacks = (one for one in graph.readers(names[0]) if [parent.id for parent in one.parents] == names)
    return [one for stack in stacks for one in graph.readers(stack.id) if _is_total(graph, one, stack)]


def _over(graph: Graph, stack: Node, dim: int, node: Node) -> bool:
    """Whether a node sums up its operand over a dimension of a stack, and over no other."""
    found = contraction(node) or weighed_sum(graph, node)
    if found is not None:
        words = subscripts_of(graph, found)
        return any(
            _is_at(graph, stack, dim, operand, [n for n, letter in enumerate(word) if letter in words.contracted])
            for operand, word in ((found.left, words.left), (found.right, words.right))
        )
    if node.op not in ("sum", "mean") or not node.parents:
        return False
    operand = node.parents[0].id
    return _is_at(graph, stack, dim, operand, dims_told(node, len(graph[operand].shape)))


def _is_at(graph: Graph, stack: Node, dim: int, operand: TensorId, dims: list[int]) -> bool:
    """Whether these dimensions of an operand are the one of a stack."""
    if len(dims) != 1 or prod(graph[operand].shape) != prod(stack.shape):
        return False
    return dim_map(graph, (stack, *come_of(graph, stack.id, operand)))[dims[0]] == dim
