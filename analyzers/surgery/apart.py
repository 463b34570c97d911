"""What tells the heads of an attention apart besides their weights: a bias of their scores by head, or a scale."""

from collections.abc import Iterator

from torch import Tensor

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import subscripts_of
from fmr.structure.normal.indices import iota, trace, varies
from fmr.structure.normal.match import Path, between, contraction
from fmr.structure.normal.vocabulary import MASKING, MOVES
from fmr.structure.parts import Attention


def told_apart(block: Attention) -> TensorId | None:
    """The first value that meets the scores of an attention and may be another for each head; None where none is.

    >>> told_apart(structure.attention[0])

    Such a value belongs to the place of a head among the others, not to its weights: linear and relative biases, scales that
    are learned for each head, further products with keys of their own.
    """
    graph, own = block.graph, {block.q.id, block.k.id}
    for node in between(graph, min(own, key=graph.place), block.pattern.id):
        if not any(parent.id in own for parent in node.parents):
            continue
        met = [parent.id for parent in node.parents if parent.id not in own]
        own.add(node.id)
        pair = contraction(node)
        for name in met:
            if pair is not None and name in (pair.left, pair.right):
                letters, shape = subscripts_of(graph, pair), graph[pair.left].shape
                shared = [shape[letters.left.index(letter)] for letter in letters.batch]
                if any(size % block.n_heads == 0 for size in shared):
                    return name
            elif _differs(graph, name, node, block):
                return name
    return None


def _differs(graph: Graph, name: TensorId, node: Node, block: Attention) -> bool:
    """Whether a value that flows into a node of the scores may be another for each head."""
    layout = block.scores.layout or ()
    told = "heads" in layout and len(node.shape) == len(layout)
    axis = layout.index("heads") - len(layout) if told else -3
    for way in _ways(graph, name):
        moved = trace(graph, iota(*way[0].shape), way)
        if moved is None or _varies(moved, axis, None if told else block.n_heads):
            return True
    return False


def _varies(moved: Tensor, axis: int, folded: int | None) -> bool:
    """Whether places along the heads hold different numbers; `folded`: so many heads lie in a dimension with examples."""
    if moved.dim() < -axis or moved.shape[axis] == 1:
        return False
    if folded is None:
        return varies(moved, axis)
    if moved.shape[axis] % folded:
        return True
    return varies(moved.unflatten(axis, (-1, folded)), axis)


def _ways(graph: Graph, name: TensorId) -> Iterator[Path]:
    """The ways by which a value is made of others by moves and number by number, each from where these begin."""
    waiting: list[Path] = [(graph[name],)]
    seen = {name}
    for way in waiting:
        parents = [parent.id for parent in way[0].parents] if way[0].op in MOVES | MASKING else []
        if not parents:
            yield way
        for parent in parents:
            if parent not in seen:
                seen.add(parent)
                waiting.append((graph[parent], *way))
