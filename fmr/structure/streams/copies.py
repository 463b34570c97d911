"""Copies of a stream in one value, which small matrices mix before each layer reads of them and writes to them."""

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import subscripts_of
from fmr.structure.normal.match import above, contraction, product, strip_views
from fmr.structure.normal.vocabulary import CONVOLUTIONS, LAID_OUT
from fmr.structure.streams.dominators import flow_of

_COPIES = 16
"""Of more copies than these a stream does not consist: a matrix that is larger mixes positions."""


def hyper_connection(graph: Graph, node: Node) -> TensorId | None:
    """The copies of a stream that a small matrix mixes (hyper-connections, Zhu et al. 2024); None for another op.

    The matrix is square, or has one more row or column for what a layer reads. It is a weight, or made for each position by
    a projection; a pattern of attention, the product of two activations, is none.
    """
    found = contraction(node)
    if found is None or node.op in CONVOLUTIONS or len(node.shape) < 4:
        return None
    words = subscripts_of(graph, found)
    for streams, matrix, word, other in (
        (found.right, found.left, words.right, words.left),
        (found.left, found.right, words.left, words.right),
    ):
        mixed, made = words.contracted, words.free(other)
        if len(mixed) == len(made) == 1 and word.replace(mixed, made) == words.result and word[-1:] != mixed:
            count, number = graph[streams].shape[word.index(mixed)], node.shape[words.result.index(made)]
            small = number - count in (0, 1) and 1 < count <= min(_COPIES, node.shape[-1]) and len(word) > 3
            if small and word[-1] not in other and streams in flow_of(graph) and _is_mixing(graph, matrix, streams):
                return streams
    return None


def _is_mixing(graph: Graph, matrix: TensorId, streams: TensorId) -> bool:
    """Whether a matrix is a weight, or made by projections alone, and not as a product of two activations."""
    known = {streams, strip_views(graph, streams, LAID_OUT)}
    higher = above(graph, matrix, lambda one: one.id not in known and contraction(one) is None)
    return not any(product(graph, one) is not None for one in higher if one.id not in known)
