"""Values that are mixed by scores without a softmax: sigmoid and relu attention, linear attention and states summed so far;
and those that two attentions mix and of which one is subtracted from the other.

They are no attentions, each is said with what stands where a softmax would.
"""

from collections.abc import Iterator, Sequence

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.attention.attention import Attention
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
        softmaxes = (one for one in (*(higher for way in ways for higher in way), *_below(value)) if one.kind == "softmax")
        if reasons and next(softmaxes, None) is None:
            yield Rejected(value.id, "attention", reasons[0])


def subtracted(graph: Graph, found: Sequence[Attention]) -> Iterator[Rejected]:
    """Each difference of what two attentions mix of the same values, which are claimed by themselves."""
    form = form_of(graph)
    mixed = {form[one.z.id]: one for one in found}
    for value in form.of_kind("sum") if len(found) > 1 else ():
        ways = [one.above(lambda higher: higher.kind in ("move", "affine") and higher not in mixed) for one in value.inputs]
        pair = [one for way in ways for higher in way if (one := mixed.get(higher)) is not None]
        if len(pair) == 2 and pair[0] is not pair[1] and len({_unmoved(form[one.v.id]) for one in pair}) == 1:
            names = " and ".join(one.softmax for one in pair)
            reason = (
                f"it adds up what {names} weigh of the same values, each claimed by itself, as in differential attention"
            )
            yield Rejected(value.id, "attention", reason)


def _unmoved(value: Value) -> Value:
    return _unmoved(value.inputs[0]) if value.kind == "move" else value


def _goes_on(value: Value) -> bool:
    return value.kind in _BETWEEN or value.op in ("cumsum", "sort", "topk", "alias")


def _below(value: Value) -> Iterator[Value]:
    """What is made of a value as of scores."""
    waiting, seen = [value], {value}
    for here in waiting:
        for user in here.users:
            if user not in seen:
                seen.add(user)
                yield user
                waiting += [user] if _goes_on(user) else []


def _reason(value: Value, way: list[Value]) -> str:
    """What stands where a softmax would, of the values above an operand of a product; empty where no scores do."""
    if any(one.op in ("sort", "topk") for one in way) and any(one.kind == "product" for one in way if one is not value):
        return "its scores are held against the largest of them where a softmax would be, as in sparse attention"
    if any(one.op == "cumsum" for one in way) and any(one.kind in ("gate", "product") for one in way):
        return "it reads a state that is summed so far, as linear attention does"
    scores = next((one for one in way if one.kind == "product" and one is not value), None)
    if scores is None:
        return ""
    bend = next((one for one in way if one.kind == "bend" and one.op != "exp"), None)
    if bend is not None:
        return f"{bend.op} stands where a softmax would, at {bend.id}, as in {bend.op} attention"
    return f"no softmax lies between it and {scores.id}, as in linear attention and state-space layers"
