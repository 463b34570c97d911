"""Every softmax of a graph: one op, or exponentials over their sum."""

from collections.abc import Iterator
from typing import NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import CLAMPS, MOVES, SAME, above, strip_views

_EXP = frozenset({"exp", "exp2"})


class Softmax(NamedTuple):
    """A softmax: its result, what enters it, and the dimension along which it adds up to one."""

    node: Node
    scores: TensorId
    dim: int


def softmaxes(graph: Graph) -> Iterator[Softmax]:
    """Each softmax of a graph, in order."""
    for node in graph.nodes:
        found = _softmax(graph, node)
        if found is not None:
            yield found


def _softmax(graph: Graph, node: Node) -> Softmax | None:
    match node.op:
        case "softmax" | "softmin":
            return Softmax(node, node.parents[0].id, _dim(graph, node))
        case "normalize" if node.argument("p", 1, 2.0) == 1 and graph[node.parents[0].id].op in _EXP:
            bent = graph[node.parents[0].id]
            return Softmax(node, bent.parents[0].id, _dim(graph, node) if "dim" in node.args else 1 - len(node.shape))
        case "exp" if node.parents:
            return _of_logarithms(graph, node)
        case "div" if len(node.parents) == 2:
            return _over_sum(graph, node)
    return None


def _of_logarithms(graph: Graph, node: Node) -> Softmax | None:
    """exp(log_softmax(s)), or exp(s - logsumexp(s))."""
    higher = graph[strip_views(graph, node.parents[0].id, SAME)]
    if higher.op == "log_softmax":
        return Softmax(node, higher.parents[0].id, _dim(graph, higher))
    total = _statistic(graph, higher, frozenset({"logsumexp"}))
    return Softmax(node, higher.parents[0].id, _dim(graph, total)) if total is not None else None


def _over_sum(graph: Graph, node: Node) -> Softmax | None:
    """e / sum(e), where e = exp(s) or exp(s - max(s)), masked or not; something may be added to the sum."""
    higher, lower = (strip_views(graph, parent.id, SAME) for parent in node.parents)
    through = MOVES | CLAMPS | {"add", "maximum"}
    sums = (one for one in above(graph, lower, through) if one.op == "sum" and one.parents)
    total = next((one for one in sums if strip_views(graph, one.parents[0].id, SAME) == higher), None)
    bent = next(
        (one for one in above(graph, higher, SAME | {"mul", "masked_fill", "where"}) if one.op in _EXP),
        None,
    )
    if total is None or bent is None:
        return None
    scores = graph[strip_views(graph, bent.parents[0].id, SAME)]
    least = _statistic(graph, scores, frozenset({"max", "amax", "logsumexp"}))
    return Softmax(node, scores.parents[0].id if least is not None else scores.id, _dim(graph, total))


def _statistic(graph: Graph, node: Node, ops: frozenset[str]) -> Node | None:
    """The one of `ops` that is taken of a value and subtracted from it."""
    if node.op != "sub" or len(node.parents) != 2:
        return None
    value = strip_views(graph, node.parents[0].id, SAME)
    higher = above(graph, node.parents[1].id, MOVES)
    return next((one for one in higher if one.op in ops and strip_views(graph, one.parents[0].id, SAME) == value), None)


def _dim(graph: Graph, node: Node) -> int:
    """The dimension that an op works along, counted from the right."""
    dim = node.argument("dim", 1)
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    rank = len(graph[node.parents[0].id].shape)
    return -1 if not isinstance(dim, int) else dim if dim < 0 else dim - rank
