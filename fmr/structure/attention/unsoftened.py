"""Values that are mixed by scores without a softmax: sigmoid and relu attention, linear attention and states summed so far.

They are no attentions, each is said with what stands where a softmax would.
"""

from collections.abc import Iterator

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.normal.form import form_of
from fmr.structure.normal.value import Value
from fmr.structure.proof.certificate import Rejected

_BETWEEN = frozenset("move join affine norm bend gate sum".split())
"""What may lie between two products, of queries with keys and of that with values."""


def unsoftened(graph: Graph, stream: frozenset[TensorId]) -> Iterator[Rejected]:
    """Each product that weighs values by a product of queries and keys without a softmax, with what it is.

    `stream` are the sums of the residual stream, beyond which no scores lie.
    """
    for value in form_of(graph).of_kind("product"):
        ways = [list(one.above(lambda higher: _goes_on(higher) and higher.id not in stream)) for one in value.inputs]
        reasons = [reason for way in ways if (reason := _reason(value, way))]
        met = (*(higher for way in ways for higher in way), *value.below(_goes_on))
        if reasons and not any(one.kind == "softmax" for one in met):
            yield Rejected(value.id, "attention", reasons[0])


def _goes_on(value: Value) -> bool:
    return value.kind in _BETWEEN or value.op in ("cumsum", "sort", "topk", "alias")


def _reason(value: Value, way: list[Value]) -> str:
    """What stands where a softmax would, of the values above an operand of a product; empty where no scores do."""
    if any(one.op in ("sort", "topk") for one in way) and any(one.kind == "product" for one in way if one is not value):
        return "its scores are held against the largest of them where a softmax would be, as in sparse attention"
    if any(one.op == "cumsum" for one in way) and any(one.kind in ("gate", "product") for one in way):
        return "it reads a state that is summed so far, as linear attention does"
    scores = next((one for one in way if one.kind == "product" and one is not value), None)
    if scores is None:
        return ""
    bends = (one for one in way if one.kind == "bend")
    bend = next((one for one in bends if any(higher.kind == "product" for higher in one.above(_goes_on))), None)
    if bend is not None:
        return f"{bend.op} stands where a softmax would, at {bend.id}, as in {bend.op} attention"
    return f"no softmax lies between it and {scores.id}, as in linear attention and state-space layers"
