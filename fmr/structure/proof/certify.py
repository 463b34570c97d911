"""Certificates: a finding is recomputed from its parts, in double precision, and compared with what the model computed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.attention.dot_product import Attention
from fmr.structure.attention.output import output_of, own_parts
from fmr.structure.memories.memory import Memory
from fmr.structure.normal.indices import carried, numbers
from fmr.structure.normal.match import NONLINEAR, NORMS, STATISTICS, after, projection
from fmr.structure.proof.evaluate import Values, evaluate
from fmr.structure.streams.residual import Stream

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

    That heads are such is shown by taking one head's pattern away: the mixed values of the others stay.

    The pattern must also be a distribution: nothing negative, no row above one. Where a norm or a nonlinearity lies between
    the heads and their projection, what one head writes is not defined; then the output is recomputed from all at once.

    In half precision large scores are rounded so coarsely that their softmax shows it. Then the scores are compared, and the
    pattern is recomputed from them; z also from q, k and v, since a kernel does not round the scores that it keeps inside.
    """
    q, k, v, pattern, z = (value(name) for name in (found.q, found.k, found.v, found.pattern, found.z))
    tolerance = _tolerance(q, k, pattern, z, value(found.out or found.z))
    coarse = tolerance > TOLERANCE
    keys = {found.q: q, found.k: k}
    mixed = evaluate(graph, found.z, {found.pattern: pattern, found.v: v}, value)
    errors = {
        "pattern": _rounded(graph, found, keys, value) if coarse else _again(graph, found.pattern, keys, value),
        "rows": min(_excess(pattern, dim) for dim in {-1, found.dim} if _is_of_places(found, dim)),
        "z": error(mixed, z),
        **_heads(graph, found, pattern, mixed, value),
    }
    if coarse:
        errors["z"] = min(errors["z"], _again(graph, found.z, {**keys, found.v: v}, value))
    if found.out is not None and found.kind in ("self", "cross"):
        bent = _bent(graph, found.z, found.out)
        whole = evaluate(graph, found.out, {found.z: z}, value) if bent else _sum_of_heads(graph, found, found.out, value)
        errors["out"] = error(whole, value(found.out))
    return Certificate(errors, tolerance)


def _heads(graph: Graph, found: Attention, pattern: Tensor, mixed: Tensor, value: Values) -> dict[str, float]:
    """How far the mixed values of other heads move when one head's pattern is taken away; nothing where heads are folded
    into the batch, or weighed by one another."""
    maps, values = (found.layouts[n] or () for n in (4, 5))
    weighed = (projection(graph, node) for node in after(graph, found.pattern, found.z))
    if "heads" not in maps or "heads" not in values or any(one is not None for one in weighed):
        return {}
    row, axis = maps.index("heads"), values.index("heads")
    if not pattern.shape[row] == mixed.shape[axis] == found.n_heads:
        return {"heads": float("inf")}
    without = pattern.detach().clone()
    without.select(row, -1).zero_()
    moved = evaluate(graph, found.z, {found.pattern: without, found.v: value(found.v)}, value)
    moved.select(axis, -1).copy_(mixed.select(axis, -1))
    return {"heads": error(moved, mixed)}


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
    """Recompute the coefficients from what the keys read, what the keys make of that as matrices, and the output as the sum
    of the values that the coefficients weigh."""
    source, post, out = value(found.source), value(found.post), value(found.out)
    errors = {"post": error(evaluate(graph, found.post, {found.source: source}, value), post)}
    keys, values = value(found.keys), found.own(value(found.values), post.shape[-1])
    of_keys = of_values = None
    if found.axis == -1:
        of_keys = _product(graph, found.source, found.up, keys, found.key_dim == 0, value)
        of_values = _product(graph, found.post, found.out, values, found.value_dim == 1, value)
    if of_keys is not None:
        errors["keys"] = error(of_keys, value(found.up))
    errors["out"] = error(evaluate(graph, found.out, {found.post: post}, value) if of_values is None else of_values, out)
    return Certificate(errors, _tolerance(source, post, out))


def _product(graph: Graph, name: TensorId, result: TensorId, weight: Tensor, turned: bool, value: Values) -> Tensor | None:
    """What a weight makes of a value as a matrix, turned or not, plus the bias; None where it is none that fits both.

    One that would fit the other way round is not the matrix that was claimed, and makes nothing that is finite.
    """
    given, made = value(name).detach().double(), value(result)
    if weight.dim() != 2:
        return None
    matrix = (weight.mT if turned else weight).detach().double()
    positions = given.shape[:-1].numel()
    if (given.shape[-1], positions * matrix.shape[1]) != (len(matrix), made.numel()):
        other = (given.shape[-1], positions * len(matrix)) == (matrix.shape[1], made.numel())
        return torch.full(made.shape, torch.inf) if other else None
    bias = evaluate(graph, result, {name: torch.zeros_like(given)}, value)
    return (given @ matrix).reshape(made.shape) + bias


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
