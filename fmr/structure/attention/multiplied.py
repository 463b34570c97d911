"""Where the queries and keys of an attention are multiplied, above its scores."""

from itertools import permutations

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.attention.claim import Claim
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import between, come_of, is_constant, projection, strip_views
from fmr.structure.normal.vocabulary import LAID_OUT, SHAPE


def mixes_scores(graph: Graph, found: Claim) -> TensorId | None:
    """The projection that weighs heads by one another between the product of queries and keys and the softmax."""
    lower = (node for name in products(graph, found) for node in come_of(graph, name, found.scores.id))
    return next((node.id for node in lower if projection(graph, node) is not None), None)


def products(graph: Graph, found: Claim) -> list[TensorId]:
    """The products of what comes of queries and of keys above the scores, up to the nearest ones: where keys are those of
    an earlier layer, all that this one made of them lies higher up."""
    q, k = found.q.id, found.k.id
    nodes = between(graph, min(q, k, key=graph.place), found.scores.id, lambda node: not _is_of_two(graph, node))
    return [node.id for node in nodes if _meets(graph, node, q, k)]


def multiplied(graph: Graph, node: Node) -> tuple[TensorId, ...]:
    """The two values whose product, or whose distances, a node holds; none where it is none."""
    value = form_of(graph)[node.id]
    return value.operands if value.kind == "product" and value.node is node else ()


def _is_of_two(graph: Graph, node: Node) -> bool:
    """Whether a value is the product of two activations, none of them a constant."""
    found = multiplied(graph, node)
    return bool(found) and not any(is_constant(graph, name) for name in found)


def _meets(graph: Graph, node: Node, q: TensorId, k: TensorId) -> bool:
    """Whether a value is the product of queries and keys, as they are laid out there."""
    pair = [strip_views(graph, one, LAID_OUT) for one in multiplied(graph, node)]
    return pair in ([a, b] for a, b in permutations(strip_views(graph, one, LAID_OUT) for one in (q, k)))


_TURNED = SHAPE - {"cat", "scatter"}
"""Ops after which a dimension may count something else."""


def compared(graph: Graph, found: Claim) -> TensorId:
    """The product of queries and keys, where its dimensions are those of the scores; else the scores."""
    for name in products(graph, found):
        same = {name}
        for node in come_of(graph, name, found.scores.id):
            alike = len(node.shape) == len(graph[name].shape) and node.op not in _TURNED and not _is_of_two(graph, node)
            if alike and any(one.id in same for one in node.parents):
                same.add(node.id)
        if found.scores.id in same:
            return name
    return found.scores.id
