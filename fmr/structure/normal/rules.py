"""The rules of the normal form, bottom-up: what a node is, told by what it reads. The first that answers decides.

A new spelling of a product, a softmax, a norm or a function number by number is one rule here, or one word of a set. Each
answers with a new value, or with the one whose numbers the node hands on; what is of no kind is an `op`.
"""

from collections.abc import Callable
from dataclasses import replace
from math import prod

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import of_projection, subscripts_of, summed_alone
from fmr.structure.normal.match import Contraction, dims_told, is_constant, product, projection, weighed_sum, weights
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import CLAMPS, ELEMENTWISE, NONLINEAR, NORMS, SAME, SHAPE, STATISTICS

Rule = Callable[[Graph, Node, tuple[Value, ...]], Value | None]
"""What a node is, told by the values of which it reads the numbers; None where a rule does not know it."""

_TOLD = STATISTICS | frozenset("sum max amax min amin logsumexp".split())
"""What is told of many numbers."""

_OF_STATISTICS = (
    CLAMPS | SHAPE | frozenset("rsqrt sqrt pow reciprocal square add sub mul div log exp neg maximum max".split())
)
"""What is told of many numbers still, bounded, rooted or laid out to meet them."""

_BESIDE_STATISTICS = ("statistic", "weight", "constant")

_COMPARED = frozenset("gt ge lt le eq ne".split())
"""Ops that make truth values of amounts."""

_POWERS = frozenset("pow square abs".split())

_BENDS = NONLINEAR - CLAMPS

_EXPONENTIALS = frozenset({"exp", "exp2"})


_SOFTMAXES = frozenset("softmax softmin gumbel_softmax sparse_softmax".split())
"""Softmaxes that are one op."""


def source(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """What comes in, or from code that is not seen."""
    return Value(node, "input") if node.op in ("input", "opaque") else None


def weight(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """What consists of parameters."""
    return Value(node, "weight") if weights(graph, node.id) else None


def constant(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """What is made of nothing but numbers and weights."""
    plain = all(one.kind in ("weight", "constant") for one in read)
    return Value(node, "constant") if plain and is_constant(graph, node.id) else None


def same(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """A cast, a copy, dropout, the result of a kernel."""
    return read[0] if node.op in SAME and (len(read) == 1 or node.op == "to") else None


def move(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """Numbers laid out otherwise; what was moved before is moved once."""
    if node.op not in SHAPE or len(read) != 1:
        return None
    (before,) = read
    if before.kind == "statistic":
        return _statistic(node, before)
    if before.kind != "move" or before.views:
        return Value(node, "move", read, folded=(node,))
    return Value(node, "move", before.inputs, folded=(*before.folded, node))


def join(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """Several values laid side by side, one on another, or one over a part of another."""
    return Value(node, "join", _flowing(read), node.op) if node.op in SHAPE and len(read) > 1 else None


def projected(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """A product of data with a weight, which is on the right."""
    found = projection(graph, node)
    if found is None:
        return None
    operands = found.data, found.weight
    return Value(node, "projection", _flowing(read[:2]), operands=operands, subscripts=of_projection(graph, found))


def product_of(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """A product of two values that sums over a dimension: one op, a multiplication and a sum, or distances."""
    found = product(graph, node) or _distances(graph, node) or weighed_sum(graph, node)
    if found is None or (node.op == "sum" and (is_constant(graph, found.left) or is_constant(graph, found.right))):
        return None
    inputs = _flowing(read[0].inputs if node.op == "sum" else read)
    operands = found.left, found.right
    return Value(node, "product", inputs, operands=operands, subscripts=subscripts_of(graph, found))


def _distances(graph: Graph, node: Node) -> Contraction | None:
    """The distances of values from one another."""
    left, right = node.parent("x1", 0), node.parent("x2", 1)
    if node.op != "cdist" or left is None or right is None or weights(graph, left.id) or weights(graph, right.id):
        return None
    return Contraction(node, left.id, right.id)


def bias(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """What a projection or a norm makes, with its bias or its gain: weights scale or shift it, each unit alike."""
    data = _data(read)
    gains = ("mul", "add") if data and data[0].kind == "norm" else ("add",)
    if node.op not in gains or len(data) != 1 or data[0].kind not in ("projection", "norm") or len(read) != 2:
        return None
    gain = next((one.node.shape for one in read if one.kind == "weight"), None)
    alike = gain is not None and prod(gain) == max(gain, default=1) and gain != node.shape
    return data[0] if alike and data[0].node.shape == node.shape else None


def softmax(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """Exponentials over their sum: one op, or written out, with or without the largest subtracted or more in the sum."""
    if node.op in _SOFTMAXES:
        return _softmax(node, read[0], node.parents[0], dim_of(graph, node))
    if node.op == "exp" and read[0].kind == "norm" and read[0].op in ("log_softmax", "logsumexp"):
        made = read[0]
        return _softmax(node, made.inputs[0], made.node.parents[0], made.dim)
    if node.op == "normalize" and node.argument("p", 1, 2.0) == 1 and read[0].op in _EXPONENTIALS:
        dim = dim_of(graph, node) if "dim" in node.args else 1 - len(node.shape)
        return _softmax(node, read[0].inputs[0], read[0].operands[0], dim)
    return _over_sum(node, read)


def _softmax(node: Node, scores: Value, operand: TensorId, dim: int) -> Value:
    """The softmax that a node is of scores, which are read as this operand."""
    return Value(node, "softmax", (scores,), dim=dim, operands=(TensorId(operand),))


def _over_sum(node: Node, read: tuple[Value, ...]) -> Value | None:
    """e / sum(e), where e = exp(s), masked or not."""
    normed = _by_statistic(node, read)
    if normed is None or normed[1].op != "sum":
        return None
    e, total = normed
    masked = e
    while masked.kind == "affine":
        masked = masked.inputs[0]
    if masked.op not in _EXPONENTIALS or total.inputs[0] is not e:
        return None
    scores, operand = masked.inputs[0], masked.operands[0]
    while scores.kind == "norm" and scores.op in ("max", "amax", "logsumexp"):
        scores, operand = scores.inputs[0], scores.node.parents[0]
    return _softmax(node, scores, operand, total.dim)


def stacked(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """The sum of values that were laid one on another for that, each scaled or not."""
    found = summed_alone(graph, node)
    laid = read[0] if found is not None and read else None
    while laid is not None and laid.kind == "affine":
        laid = laid.inputs[0]
    if found is None or laid is None or laid.op != "stack":
        return None
    along = laid.node.argument("dim", 1, 0) % len(laid.node.shape)
    return Value(node, "sum", laid.inputs, "sum") if along == found[1] else None


def norm(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """A value divided by, or less, what is told of its own numbers; a norm of a norm is one."""
    if node.op in NORMS or node.op == "log_softmax":
        return Value(node, "norm", read[:1], node.op, dim=dim_of(graph, node))
    normed = _by_statistic(node, read)
    if normed is None:
        return None
    value, told = normed
    again = value.kind == "norm" and not value.views and value.op == "mean"
    inputs = value.inputs if again else (value,)
    return Value(node, "norm", inputs, told.op, dim=told.dim, folded=(*value.folded, *told.folded, node))


def _by_statistic(node: Node, read: tuple[Value, ...]) -> tuple[Value, Value] | None:
    """The value that a node divides by, multiplies with, or brings down by a statistic of it, and that statistic."""
    if node.op not in ("div", "mul", "sub") or len(read) != 2:
        return None
    for value, told in (read, read[::-1]) if node.op == "mul" else (read,):
        if told.kind == "statistic" and _root(told.inputs[0]) is _root(value) is not told:
            return (value, told) if value.node.shape == node.shape else None
    return None


def _root(value: Value) -> Value:
    """The value of which one is a power, a multiple, or what a mean was taken from."""
    while (
        value.kind == "affine"
        or (value.kind == "bend" and value.op in _POWERS)
        or (value.kind == "norm" and value.op in ("mean", "max", "amax"))
    ):
        value = value.inputs[0]
    return value


def statistic(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """What is told of many numbers: their mean, their largest, their sum."""
    if node.op in _TOLD and len(read) == 1 and prod(node.shape) <= prod(read[0].node.shape):
        return Value(node, "statistic", read, node.op, dim=dim_of(graph, node), folded=(node,))
    told = max((one for one in read if one.kind == "statistic"), key=lambda one: one.op == "sum", default=None)
    if told is None or node.op not in _OF_STATISTICS or any(one.kind not in _BESIDE_STATISTICS for one in read):
        return None
    return _statistic(node, told) if prod(node.shape) <= prod(told.node.shape) else None


def _statistic(node: Node, told: Value) -> Value:
    return Value(node, "statistic", told.inputs, told.op, dim=told.dim, folded=(*told.folded, node))


def number_by_number(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value | None:
    """A scale, a shift or a mask by what is no data; a function of one value; a product or a sum of two."""
    if node.op not in ELEMENTWISE:
        return None
    data = _data(read)
    if len(data) == 1:
        return _of_one(node, data[0])
    roots = set(map(_root_of, data))
    if len(roots) == 1:
        operands = next((one.operands for one in data if one.kind == "bend"), node.parents[:1])
        parts = tuple(dict.fromkeys(part for one in data for part in one.folded))
        made = _bent(node, tuple(roots), operands, parts)
        return replace(made, kind="bend", op="square") if made.kind == "affine" and node.op == "mul" else made
    if len(data) == 2 and node.op in ("mul", "div"):
        return Value(node, "gate", data, node.op)
    return Value(node, "sum", data, node.op) if node.op in ("add", "sub") and len(data) == 2 else None


def _of_one(node: Node, data: Value) -> Value:
    """A function of one value: what is scaled after it was bent is bent."""
    if data.kind in ("bend", "affine") and not data.views:
        made = _bent(node, data.inputs, data.operands, data.folded)
        return made if data.kind == made.kind else _bent(node, (data,), node.parents[:1], ())
    return _bent(node, (data,), node.parents[:1], ())


def _bent(node: Node, inputs: tuple[Value, ...], operands: tuple[TensorId, ...], parts: tuple[Node, ...]) -> Value:
    """What some ops, the last of which is a node, make of a value number by number: scaled and shifted, or bent."""
    folded = (*parts, node)
    bends = [one.op for one in folded if one.op in _BENDS]
    return Value(node, "bend" if bends else "affine", inputs, (bends or [node.op])[-1], operands=operands, folded=folded)


def _root_of(value: Value) -> Value:
    """The one value that a value is a function of, number by number."""
    while value.kind in ("bend", "affine") and not value.views:
        value = value.inputs[0]
    return value


def _data(read: tuple[Value, ...]) -> tuple[Value, ...]:
    """What of the values that a node reads is data, and numbers."""
    return tuple(one for one in _flowing(read) if one.node.dtype.is_floating_point or _compares(one))


def _compares(value: Value) -> bool:
    """Whether a value says which amounts are larger than others, or the same."""
    return value.node.op in _COMPARED and any(one.node.dtype.is_floating_point for one in value.inputs)


def _flowing(read: tuple[Value, ...]) -> tuple[Value, ...]:
    """What of the values that a node reads is neither a weight nor a constant."""
    return tuple(one for one in read if one.kind not in ("weight", "constant"))


def other(graph: Graph, node: Node, read: tuple[Value, ...]) -> Value:
    """Any other op."""
    return Value(node, "op", _flowing(read), node.op, operands=tuple(parent.id for parent in node.parents))


def dim_of(graph: Graph, node: Node) -> int:
    """The dimension that an op works along, counted from the right."""
    rank = len(graph[node.parents[0].id].shape) if node.parents else 0
    told = dims_told(node, rank)
    return told[0] - rank if len(told) == 1 else -1


RULES: tuple[Rule, ...] = (
    source,
    weight,
    softmax,
    stacked,
    projected,
    product_of,
    norm,
    constant,
    same,
    bias,
    statistic,
    move,
    join,
    number_by_number,
    other,
)
