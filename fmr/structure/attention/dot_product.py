"""Attention by dataflow: two contractions around a softmax, the first of queries with keys, the second with the values."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.attention.attention import Attention
from fmr.structure.attention.heads import Queries, heads_in_rows, key_heads
from fmr.structure.attention.kind import kind_of, units_beside
from fmr.structure.attention.layouts import described, laid_out, layouts, over_others
from fmr.structure.attention.maps import counts_heads
from fmr.structure.attention.scores import BEFORE, Scores, find_scores, scores_go_on
from fmr.structure.attention.values import (
    Parts,
    ValueProduct,
    handed_on,
    is_beside,
    orient,
    output_of,
    own_parts,
    products_with_values,
    split_keys,
    unused,
    value_product,
    why_not_summed,
)
from fmr.structure.normal.form import form_of
from fmr.structure.normal.indices import iota, trace
from fmr.structure.normal.match import (
    Path,
    above,
    below,
    contraction,
    depends_on,
    is_constant,
    is_learned,
    projection,
    strip_views,
)
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import MOVES
from fmr.structure.proof.certificate import Rejected

_LAID_OUT = frozenset("pad as_strided unfold chunk split cat stack diagonal new_zeros setitem".split())
"""Ops that lay a pattern out for a banded product; the pattern is what they are given."""

_WINDOWS = frozenset({"as_strided", "unfold"})

_SUMMED_UP = MOVES | {"add", "mul", "div"}
"""What may lie between mixed values and the projection of a sum of these and of others."""


def dot_product(graph: Graph, softmax: Value) -> Attention | str:
    """The attention around a softmax of products of queries with keys, or the reason why it is none."""
    reason = ""
    for scores in find_scores(graph, softmax):
        use = value_product(graph, softmax, scores)
        answer = weighed(graph, softmax, scores, use) if use is not None else unused(graph, softmax)
        if isinstance(answer, Attention):
            return answer
        reason = reason or answer
    return reason or _why_no_scores(graph, softmax)


def weighed(graph: Graph, softmax: Value, scores: Scores, use: ValueProduct) -> Attention | str:
    """The attention of these scores whose pattern is multiplied with values so, or the reason why there is none."""
    parts = split_keys(graph, softmax, use)
    use = parts.first(graph, scores)
    scores = orient(graph, scores, use, softmax.dim)
    return _why_no_values(graph, softmax, scores, use) or _attention(graph, softmax, scores, parts, use)


def _why_no_scores(graph: Graph, softmax: Value) -> str:
    higher = above(graph, softmax.operands[0], BEFORE)
    hidden = next((node for node in higher if node.op == "opaque"), None)
    if hidden is not None:
        return f"its scores come from code that is hidden from torch: {hidden.id}"
    form = form_of(graph)
    way = list(form[softmax.operands[0]].above(lambda one: one.kind not in ("projection", "product")))
    scores = next((one for one in way if one.kind == "product"), None)
    if scores is None:
        pair = next((one for one in way if one.kind == "op" and len(one.inputs) > 1), None)
        if pair is not None:
            return f"what {pair.id} makes of several activations is no product that is known"
        ends = next((one for one in way if one.kind in ("projection", "input")), None)
        return f"no product of two activations lies above the softmax{f', up to {ends.id}' if ends else ''}"
    between = (one for one in way if one is not scores and scores in one.above(lambda higher: higher.kind != "projection"))
    stop = next((one for one in between if not scores_go_on(one)), None)
    what = f"{stop.id} lies" if stop is not None else "not all of it goes on"
    return f"{what} between it and {scores.id}, the nearest product of two activations: it has no scores"


def _why_no_values(graph: Graph, softmax: Value, scores: Scores, use: ValueProduct) -> str:
    """Why what a softmax weighs are no values; empty where they are."""
    if is_constant(graph, scores.k) and not is_constant(graph, use.v):
        return "its keys are weights and its values are not, as where it chooses among experts"
    if is_constant(graph, use.v) and not is_learned(graph, use.v) and not is_constant(graph, scores.k):
        return "what it weighs are constants, as in an expectation over a grid: they are no data"
    if _is_of_patterns(graph, use.v):
        return "its values are themselves made of patterns"
    return why_not_summed(graph, use, softmax.dim)


def _attention(graph: Graph, softmax: Value, scores: Scores, parts: Parts, use: ValueProduct) -> Attention | str:
    """The attention of these scores and values, if its heads can be told."""
    z = handed_on(graph, parts.total)
    output = output_of(graph, z, own_parts(graph, scores.q, use.v, softmax.node.id))
    queries = Queries(graph, scores)
    if queries.compare_units:
        return "its scores sum over positions: it weighs units by units, not positions"
    if queries.are_of_units and Queries(graph, scores.swapped).are_of_units:
        return "its queries and its keys are units of one position: it weighs heads by heads, not positions"
    heads = heads_in_rows(graph, use, z, output) if output is not None else None
    heads = heads or queries.heads(use)
    if heads is None:
        return "how many heads it has can be read neither off the way of its values into a projection nor off its queries"
    kind = kind_of(graph, scores, parts)
    if not isinstance(kind, str):
        return f"its queries or keys are made by code that is hidden from torch ({kind.id}), and of what cannot be told"
    named, more = layouts(graph, scores, use, heads), units_beside(graph, softmax.operands[0], scores.q, scores.k)
    if reason := over_others(named.scores[softmax.dim], is_beside(graph, use, softmax.dim)):
        return reason
    axis = next((n for n, name in enumerate(named.k) if counts_heads(name)), None)
    return described(
        graph,
        softmax,
        (laid_out(graph, scores.q, named.q), laid_out(graph, scores.k, named.k), laid_out(graph, use.v, named.v)),
        (laid_out(graph, acting(graph, parts.whole(use)), named.scores), laid_out(graph, z.id, named.z)),
        output,
        (heads.number, key_heads(graph, use, heads, _repeated(graph, scores.k, axis)), queries.size + more),
        kind,
    )


def _is_of_patterns(graph: Graph, name: TensorId) -> bool:
    """Whether a value is made of the results of softmaxes alone: a step of an approximation, and no values yet."""
    higher = list(above(graph, name, lambda node: node.op != "softmax" and projection(graph, node) is None))
    made = any(node.op in ("input", "opaque") or projection(graph, node) is not None for node in higher)
    return not made and any(node.op == "softmax" for node in higher)


def acting(graph: Graph, way: Path) -> TensorId:
    """The last node on the way to the product that changes the numbers; dropout and the layout of a band do not count."""
    last = way[0]
    for before, node in pairwise(way):
        if node.op in _LAID_OUT or contraction(node) is not None:
            break
        cut = node.op == "getitem" and len(node.shape) == len(before.shape) and node.shape[:-1] == before.shape[:-1]
        if cut or node.op in ("to", "scatter", "nan_to_num") or node.op not in MOVES:
            last = node
    return last.id


def _repeated(graph: Graph, k: TensorId, axis: int | None) -> float:
    """How many query heads share one key head: how often what keys were moved from stands along the dimension that counts
    their heads, or in all of them where none does; windows, which overlap, do not count."""
    moves = MOVES - _WINDOWS
    sources = [node for node in above(graph, k, moves) if node.op not in moves and not is_constant(graph, node.id)]
    source = sources[0] if len(sources) == 1 else graph[strip_views(graph, k, moves)]
    value = trace(graph, iota(*source.shape), (source, graph[k]))
    if value is None or not value.numel():
        return 1.0
    rows = value.flatten() if axis is None else value.movedim(axis, 0).flatten(1)
    return len(rows) / len(rows.unique(dim=0))


def undivided(graph: Graph) -> Iterator[Rejected]:
    """Each product with values whose weights are divided by their sum only afterwards: a softmax that is nowhere."""
    for value in form_of(graph).of_kind("gate"):
        mixed, total = (one.unmoved for one in value.inputs)
        bent = total.inputs[0].unmoved if total.kind == "statistic" and total.op == "sum" else None
        weighed = mixed.kind == "product" and any(one.unmoved is bent for one in mixed.inputs)
        if bent is not None and weighed and bent.op == "exp" and any(find_scores(graph, replace(bent, dim=-1))):
            yield Rejected(bent.id, "attention", "its pattern is never computed: the division comes after the values")


def used_again(graph: Graph, found: Sequence[Attention]) -> Iterator[Rejected]:
    """Each further product that weighs values by the pattern of an attention, as where layers share one."""
    for one in found:
        end = (one.out or one.z).id
        for use in products_with_values(graph, form_of(graph)[one.softmax]) if one.minus is None else ():
            if not depends_on(graph, end, use.node.id) and not _is_of_patterns(graph, use.v):
                reason = (
                    f"it weighs other values by the pattern of {one.softmax}, which is told with what {one.z.id} mixes alone"
                )
                yield Rejected(use.node.id, "attention", reason)


def with_others(graph: Graph, found: Sequence[Attention]) -> Iterator[Rejected]:
    """Each projection that reads the sum of what heads mix and of what is no stream: it is no output of the heads alone."""
    for one in found:
        for node, way in below(graph, graph[one.z.id], _SUMMED_UP) if one.out is None else ():
            added = [name for step in way[1:] if step.op == "add" for name in step.parents if graph[name] not in way]
            if any(depends_on(graph, one.q.id, name) for name in added):
                break
            if added and projection(graph, node) is not None:
                yield Rejected(
                    node.id, "output", f"{added[0]} is added to {one.z.id}, what heads mix, before both are projected"
                )
                break
