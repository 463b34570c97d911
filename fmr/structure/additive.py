"""Additive attention (Bahdanau, Cho, Bengio 2015): the scores are a weighted sum over a nonlinearity of query plus key."""

import math

from fmr.graph import Graph
from fmr.nodes import Node
from fmr.structure.attention import Attention, acting, handed_on, output_projection
from fmr.structure.match import NONLINEAR, SAME, SHAPE, climb, contraction, projection, weights
from fmr.structure.operands import BEFORE, mix
from fmr.structure.softmax import Softmax


def additive(graph: Graph, softmax: Softmax) -> Attention | str:
    """The attention around a softmax of scores that a weight vector reads off a nonlinearity of two summed activations."""
    scored = next(
        (
            found
            for node in climb(graph, softmax.scores, lambda node: node.op in BEFORE and contraction(node) is None)
            if (found := projection(graph, node)) is not None and node.shape[-1] == 1
        ),
        None,
    )
    summed = _sum(graph, scored.data) if scored is not None else None
    mixed = mix(graph, softmax)
    if summed is None or mixed is None:
        return "its scores are neither products of queries with keys nor read off a sum of the two"
    a, b = sorted((parent.id for parent in summed.parents), key=lambda name: math.prod(graph[name].shape))
    z = handed_on(graph, mixed.node)
    return Attention(
        softmax=softmax.node.id,
        q=a,
        k=b,
        v=mixed.v,
        scores=softmax.scores,
        pattern=acting(graph, mixed.way),
        z=z.id,
        out=output_projection(graph, z),
        n_heads=1,
        n_kv_heads=1,
        head_dim=summed.shape[-1],
        kind="additive",
        scope=softmax.node.scope.partition("/")[0],
        dim=softmax.dim,
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
