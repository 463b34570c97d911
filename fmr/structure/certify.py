"""Certificates: a finding is recomputed from its parts, in double precision, and compared with what the model computed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.structure.attention import Attention
from fmr.structure.carry import carried, numbers
from fmr.structure.evaluate import Values, evaluate
from fmr.structure.match import NONLINEAR, NORMS, STATISTICS, after
from fmr.structure.memory import Memory
from fmr.structure.output import output_of, own_parts
from fmr.structure.residual import Stream

TOLERANCE = 1e-4
"""The largest error, relative to the largest value, in float32."""

_COARSE = {torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""The same in half precision: what ten or twenty roundings come to."""


@dataclass(frozen=True)
class Certificate:
    """How far each recomputed value lies from the recorded one: the maximum error relative to the largest value."""

    errors: Mapping[str, float]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance."""
        return all(error <= self.tolerance for error in self.errors.values())

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        parts = ", ".join(f"{what} {error:.0e}" for what, error in self.errors.items())
        return f"{'certified' if self.ok else 'NOT certified'}: {parts} (tolerance {self.tolerance:.0e})"


def certify_attention(graph: Graph, found: Attention, value: Values) -> Certificate:
    """Recompute the pattern from q, k, mask and scale, z from pattern and v, and the output from the single heads.

    The pattern must also be a distribution: nothing negative, no row above one. Where a norm or a nonlinearity lies between
    the heads and their projection, what one head writes is not defined; then the output is recomputed from all at once.

    In half precision large scores are rounded so coarsely that their softmax shows it. Then the scores are compared, and the
    pattern is recomputed from them; z also from q, k and v, since a kernel does not round the scores that it keeps inside.
    """
    q, k, v, pattern, z = (value(name) for name in (found.q, found.k, found.v, found.pattern, found.z))
    tolerance = _tolerance(q, k, pattern, z, value(found.out or found.z))
    coarse = tolerance > TOLERANCE
    keys, weighed = {found.q: q, found.k: k}, {found.pattern: pattern, found.v: v}
    ways = (weighed, {**keys, found.v: v}) if coarse else (weighed,)
    errors = {
        "pattern": _rounded(graph, found, keys, value) if coarse else _again(graph, found.pattern, keys, value),
        "rows": min(_excess(pattern, dim) for dim in {-1, found.dim} if _is_of_places(found, dim)),
        "z": min(_again(graph, found.z, given, value) for given in ways),
    }
    if found.out is not None and found.kind in ("self", "cross"):
        bent = _bent(graph, found.z, found.out)
        whole = evaluate(graph, found.out, {found.z: z}, value) if bent else _sum_of_heads(graph, found, found.out, value)
        errors["out"] = error(whole, value(found.out))
    return Certificate(errors, tolerance)


def _again(graph: Graph, name: TensorId, given: Mapping[TensorId, Tensor], value: Values) -> float:
    """How far a value lies from what comes of given ones."""
    return error(evaluate(graph, name, given, value), value(name))


def _rounded(graph: Graph, found: Attention, keys: Mapping[TensorId, Tensor], value: Values) -> float:
    """How far scores lie from what comes of queries and keys, each as far as it counts, or the pattern from what comes of
    the scores."""
    recorded, weights = (value(name).detach().double() for name in (found.scores, found.softmax))
    off = (evaluate(graph, found.scores, keys, value) - recorded).abs() / recorded.abs().clamp(min=1.0)
    return max(float((off * weights).nan_to_num(0.0).max()), _again(graph, found.pattern, {found.scores: recorded}, value))


def _bent(graph: Graph, start: TensorId, end: TensorId) -> bool:
    """Whether a normalisation or a nonlinearity lies between two values."""
    bends = NORMS | NONLINEAR | STATISTICS - {"mean"}
    return any(node.op in bends for node in after(graph, start, end))


def _is_of_places(found: Attention, dim: int) -> bool:
    """Whether a dimension of a pattern counts queries or keys: over heads or examples it need not add up to one."""
    layout = found.layouts[4]
    return dim == -1 or layout is None or layout[dim] not in ("heads", "examples")


def _excess(pattern: Tensor, dim: int) -> float:
    """How far a pattern goes below zero or its rows, along a dimension, go above one."""
    known = pattern.detach().double().nan_to_num(0.0)
    return max(float((known.sum(dim) - 1).clamp(min=0).max()), float((-known).clamp(min=0).max()))


def _sum_of_heads(graph: Graph, found: Attention, out: TensorId, value: Values) -> Tensor:
    """The output as the sum of what each head writes alone, plus the bias once."""
    read, whose = _told_apart(graph, found)
    z = value(read)
    bias = evaluate(graph, out, {read: torch.zeros_like(z)}, value)
    total = bias.clone()
    for head in range(found.n_heads):
        alone = z * (whose % found.n_heads == head).to(z.device)
        total += evaluate(graph, out, {read: alone}, value) - bias
    return total


def _told_apart(graph: Graph, found: Attention) -> tuple[TensorId, Tensor]:
    """A value in which the heads are told apart, and the head of each of its numbers, counted on where there are more.

    It is what the projection reads, as a norm may stand between it and z; z itself where that is put together from several.
    """
    shape, layout = graph[found.z].shape, found.layouts[5] or ()
    lead = [size if name == "heads" else 1 for size, name in zip(shape, layout, strict=False)]
    number = numbers(*(lead if "heads" in layout else (*shape[:-1], 1)))
    output = output_of(graph, graph[found.z], own_parts(graph, found.q, found.v, found.softmax))
    assert output is not None
    whose = carried(graph, number.expand(shape), output.way)
    return (found.z, number) if whose is None or bool((whose < 0).any()) else (output.projection.data, whose)


def certify_memory(graph: Graph, found: Memory, value: Values) -> Certificate:
    """Recompute the coefficients from what the keys read, and the output as the sum of the values that they weigh."""
    post, out = value(found.post), value(found.out)
    errors = {"post": error(evaluate(graph, found.post, {found.source: value(found.source)}, value), post)}
    values = found.own(value(found.values).detach().double(), post.shape[-1])
    if values.dim() == 2 and found.axis == -1 and post.shape[-1] in values.shape:
        bias = evaluate(graph, found.out, {found.post: torch.zeros_like(post)}, value)
        total = post.double() @ (values.mT if found.value_dim else values)
        errors["out"] = error(total.reshape(out.shape) + bias, out)
    else:
        errors["out"] = error(evaluate(graph, found.out, {found.post: post}, value), out)
    return Certificate(errors, _tolerance(value(found.source), post, out))


def certify_stream(stream: Stream, value: Values) -> Certificate:
    """Compare each write with the difference that it makes."""
    worst, tolerance = 0.0, TOLERANCE
    for write in stream.writes:
        before, added, after = (value(name) for name in (write.before, write.added, write.after))
        worst = max(worst, error(before.double() + write.times * added.double(), after))
        tolerance = max(tolerance, _tolerance(before, added, after))
    return Certificate({"writes": worst}, tolerance)


def _tolerance(*values: Tensor) -> float:
    """What the least precise of these allows: under autocast a pattern is float32 and what it mixes is not."""
    return max(_COARSE.get(value.dtype, TOLERANCE) for value in values)


def error(recomputed: Tensor, recorded: Tensor) -> float:
    """The maximum absolute difference relative to the largest recorded value; infinite where the shapes differ.

    A model may compute NaN (rows that are masked as a whole); then the recomputation must say so too.
    """
    recorded = recorded.detach()
    if recomputed.shape != recorded.shape or not torch.equal(recomputed.isnan(), recorded.isnan()):
        return float("inf")
    finite = torch.isfinite(recorded)
    if not finite.all():  # elsewhere nothing is picked out, which is slow
        recomputed, recorded = recomputed[finite], recorded[finite]
    if not recorded.numel():
        return 0.0
    difference = (recomputed.double() - recorded.double()).abs()
    worst = float(difference.max() / recorded.abs().max().double().clamp(min=1e-12))
    return worst if worst == worst else float("inf")
