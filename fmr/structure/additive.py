"""Additive attention (Bahdanau, Cho, Bengio 2015): the scores are a weighted sum over a nonlinearity of query plus key."""

import math

from fmr.graph import Graph
from fmr.nodes import Node
from fmr.structure.attention import BEFORE, Attention, handed_on, mix, output_projection
from fmr.structure.match import NONLINEAR, SAME, SHAPE, climb, contraction, projection, weights


def additive(graph: Graph, softmax: Node) -> Attention | str:
    """The attention around a softmax of scores that a weight vector reads off a nonlinearity of two summed activations."""
    scored = next(
        (
            found
            for node in climb(graph, softmax.parents[0].id, lambda node: node.op in BEFORE and contraction(node) is None)
            if (found := projection(graph, node)) is not None and node.shape[-1] == 1
        ),
        None,
    )
    summed = _sum(graph, scored.data) if scored is not None else None
    mixed = mix(graph, softmax)
    if summed is None or mixed is None:
        return "its scores are neither products of queries with keys nor read off a sum of the two"
    a, b = sorted((parent.id for parent in summed.parents), key=lambda name: math.prod(graph[name].shape))
    use, pattern, v = mixed
    z = handed_on(graph, use.node)
    return Attention(
        softmax=softmax.id,
        q=a,
        k=b,
        v=v,
        scores=softmax.parents[0].id,
        pattern=pattern,
        z=z.id,
        out=output_projection(graph, z),
        n_heads=1,
        n_kv_heads=1,
        head_dim=summed.shape[-1],
        kind="additive",
        scope=softmax.scope.partition("/")[0],
        axes=(None,) * 6,
    )


def _sum(graph: Graph, name: str) -> Node | None:
    """The sum of two activations under a nonlinearity."""
    bent = False
    for node in climb(graph, graph[name].id, lambda node: node.op in SAME | SHAPE | NONLINEAR):
        bent = bent or node.op in NONLINEAR
        if node.op == "add" and bent and len(node.parents) == 2:
            both = not any(weights(graph, parent.id) for parent in node.parents)
            return node if both else None
    return None
