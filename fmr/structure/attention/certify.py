"""The proof of an attention: pattern, z and output are recomputed from their parts, and compared with a run's values."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.attention.claim import Claim
from fmr.structure.attention.definition import MULTIPLY, miscounted, misread, mistaken, mixes, own_rows
from fmr.structure.attention.factors import Heads, in_order
from fmr.structure.attention.halves import map_of, picked
from fmr.structure.attention.maps import counts_heads
from fmr.structure.normal.match import between, projection
from fmr.structure.normal.vocabulary import NONLINEAR, NORMS, STATISTICS
from fmr.structure.proof.certificate import TOLERANCE, Certificate, error, tolerance_of
from fmr.structure.proof.evaluate import Values, at_zero, evaluate, evaluate_each, why_unproving


def certify(graph: Graph, found: Claim, value: Values) -> Certificate:
    """Recompute the pattern from q, k, mask and scale, z from pattern and v, and the output from the single heads.

    That heads are such is shown by taking one head's pattern away: the mixed values of the others stay.

    The pattern must also be a distribution: nothing negative, no row above one. Where a norm or a nonlinearity lies between
    the heads and their projection, what one head writes is not defined; then the output is recomputed from all at once.

    Where layouts name the dimensions of its values, z is also the pattern times the values as they are named, and one query
    moves its own row of the scores, one key those of its head. Parts that do not follow one another as they are named, heads
    that are as many as is not said, and values that are constants are a `StructureError`.

    In half precision large scores are rounded so coarsely that their softmax shows it. Then the scores are compared, and the
    pattern is recomputed from them, as it is where a mask is so large that scores beside it are rounded; z also from q, k
    and v, since a kernel does not round the scores that it keeps inside.
    """
    sites = (found.pattern, found.q, found.k, found.v, found.z, *([found.out] if found.out is not None else []))
    if nothing := why_unproving((site.id for site in sites), value):
        raise StructureError(nothing)
    if found.minus is not None:
        return _certify_difference(graph, found, value)
    if wrong := misread(graph, found) or miscounted(graph, found, value) or mistaken(graph, found, value):
        raise StructureError(wrong)
    q, k, v, pattern, z = (value(site.id) for site in (found.q, found.k, found.v, found.pattern, found.z))
    tolerance = tolerance_of(q, k, pattern, z, value((found.out or found.z).id))
    coarse = tolerance > TOLERANCE
    keys = {found.q.id: q, found.k.id: k}
    mixed = evaluate(graph, found.z.id, {found.pattern.id: pattern, found.v.id: v}, value)
    errors = {
        **_softened(graph, found, value, coarse),
        "z": error(mixed, z),
        **_heads(graph, found, pattern, mixed, value),
    }
    if found.kind in MULTIPLY:
        told = [mixes(graph, found, pattern, v, mixed, value), own_rows(graph, found, value)]
        errors |= {"layout": max(known)} if (known := [one for one in told if one is not None]) else {}
    if coarse:
        errors["z"] = min(errors["z"], _again(graph, found.z.id, {**keys, found.v.id: v}, value))
    return Certificate(errors | _written(graph, found, value, tolerance), tolerance)


def _certify_difference(graph: Graph, found: Claim, value: Values) -> Certificate:
    """Recompute both patterns from their queries and keys, z from both and v, and the output from the single heads.

    z is also the difference of both maps, of which a share of the second is taken, times the values as they are named.
    """
    halves, minus = found.halves, found.minus
    assert minus is not None
    for half in halves:
        if wrong := misread(graph, half) or miscounted(graph, half, value) or mistaken(graph, half, value):
            raise StructureError(wrong)
    for one in (found, minus):
        if len({str(site.heads) for site in (one.q, one.k, one.scores, one.pattern)}) > 1:
            raise StructureError(f"the sites around {one.softmax} pick other heads each")
    if halves[0].kind not in MULTIPLY or any(not one.pattern.layout for one in halves):
        raise StructureError(f"{found.z.id} is no difference of two attentions in which queries and keys are multiplied")
    tolerance = max(tolerance_of(*(value(one.id) for one in (h.q, h.k, h.pattern, h.z))) for h in halves)
    softened = [_softened(graph, half, value, tolerance > TOLERANCE) for half in halves]
    given = {half.pattern.id: value(half.pattern.id) for half in halves} | {found.v.id: value(found.v.id)}
    counts = Heads(found.n_heads, found.n_kv_heads)
    maps = map_of(lambda site: picked(value(site.id), site).double(), found.pattern, found.minus, *counts)
    v, z = (in_order(value(site.id).double(), site, counts, site is found.v) for site in (found.v, found.z))
    rows = [off for half in halves if (off := own_rows(graph, half, value)) is not None]
    errors = {
        "pattern": max(one["pattern"] for one in softened),
        "rows": max(one["rows"] for one in softened),
        "z": _again(graph, found.z.id, given, value),
        "difference": error(maps @ v, z),
        **({"layout": max(rows)} if rows else {}),
    }
    return Certificate(errors | _written(graph, found, value, tolerance), tolerance)


def _softened(graph: Graph, found: Claim, value: Values, coarse: bool) -> dict[str, float]:
    """How far the pattern is from what its queries and keys make, and its rows from a distribution."""
    keys = {site.id: value(site.id) for site in (found.q, found.k)}
    pattern = value(found.pattern.id)
    off = _rounded(graph, found, keys, value) if coarse else _again(graph, found.pattern.id, keys, value)
    if off > TOLERANCE and not coarse and graph[found.scores.id].shape == graph[found.softmax].shape:
        off = min(off, _rounded(graph, found, keys, value, _ROUNDINGS))
    return {
        "pattern": off,
        "rows": max(
            _excess(value(found.softmax), found.dim, graph[found.softmax].op == "softmax"),
            min(_excess(pattern, dim) for dim in {-1, found.dim} if _is_of_places(found, dim)),
        ),
    }


def _written(graph: Graph, found: Claim, value: Values, tolerance: float) -> dict[str, float]:
    """How far the output is from what the single heads write; nothing where there is none."""
    if found.out is None or found.kind not in MULTIPLY:
        return {}
    out = found.out.id
    if found.n_heads == 1 or _bent(graph, found.z.id, out):
        return {"out": error(evaluate(graph, out, {found.z.id: value(found.z.id)}, value), value(out))}
    off = max(error(one, value(out)) for one in _sums_of_heads(graph, found, out, value))
    if off > tolerance and any(map(counts_heads, found.z.layout or ())):  # what a head writes may be no sum over its places
        off = max(error(one, value(out)) for one in _sums_of_heads(graph, found, out, value, whole=True))
    return {"out": off}


def _heads(graph: Graph, found: Claim, pattern: Tensor, mixed: Tensor, value: Values) -> dict[str, float]:
    """How far the mixed values of other heads move when one head's pattern is taken away; nothing where heads are folded
    into the batch, or weighed by one another."""
    maps, values = found.pattern.layout or (), found.z.layout or ()
    weighed = (projection(graph, node) for node in between(graph, found.pattern.id, found.z.id))
    if "heads" not in maps or "heads" not in values or any(one is not None for one in weighed):
        return {}
    row, axis = maps.index("heads"), values.index("heads")
    if not pattern.shape[row] == mixed.shape[axis] == found.n_heads:
        return {"heads": float("inf")}
    without = pattern.detach().clone()
    without.select(row, -1).zero_()
    moved = evaluate(graph, found.z.id, {found.pattern.id: without, found.v.id: value(found.v.id)}, value)
    moved.select(axis, -1).copy_(mixed.select(axis, -1))
    return {"heads": error(moved, mixed)}


def _again(graph: Graph, name: TensorId, given: Mapping[TensorId, Tensor], value: Values) -> float:
    """How far a value lies from what comes of given ones."""
    return error(evaluate(graph, name, given, value), value(name))


_ROUNDINGS = 4
"""Of how many roundings, each of half a unit in the last place or less, scores may be off beside a mask."""


def _rounded(
    graph: Graph, found: Claim, keys: Mapping[TensorId, Tensor], value: Values, roundings: int | None = None
) -> float:
    """How far scores lie from what comes of queries and keys, each as far as it counts, or the pattern from what comes of
    the scores; relative to the scores, or by how much more than so many of their roundings."""
    scores, weights = value(found.scores.id).detach(), value(found.softmax).detach().double()
    recorded = scores.double()
    off = (evaluate(graph, found.scores.id, keys, value) - recorded).abs()
    if roundings is None:
        off = off / recorded.abs().clamp(min=1.0)
    else:
        off = (off - roundings * torch.finfo(scores.dtype).eps * recorded.abs()).clamp(min=0.0)
    again = _again(graph, found.pattern.id, {found.scores.id: recorded}, value)
    counted = torch.where(weights > 0, off * weights, 0.0)
    return max(float(counted.nan_to_num(torch.inf, torch.inf).max()), again)


def _bent(graph: Graph, start: TensorId, end: TensorId) -> bool:
    """Whether a normalisation or a nonlinearity lies between two values."""
    bends = NORMS | NONLINEAR | STATISTICS - {"mean"}
    return any(node.op in bends for node in between(graph, start, end))


def _is_of_places(found: Claim, dim: int) -> bool:
    """Whether a dimension of a pattern counts queries or keys: over heads or examples it need not add up to one."""
    layout = found.pattern.layout
    return dim == -1 or layout is None or layout[dim] not in ("heads", "examples")


def _excess(pattern: Tensor, dim: int, whole: bool = False) -> float:
    """How far a pattern goes below zero, or its rows along a dimension above one; or, where they are `whole`, from one.

    Rows that are masked as a whole are zero, or no numbers.
    """
    known = pattern.detach().nan_to_num(0.0)
    sums = known.sum(dim, dtype=torch.float64)
    over = torch.minimum((sums - 1).abs(), sums.abs()) if whole else (sums - 1).clamp(min=0)
    return max(float(over.max()), -float(known.min()))


def _sums_of_heads(graph: Graph, found: Claim, out: TensorId, value: Values, whole: bool = False) -> Iterator[Tensor]:
    """The output as the sum of what two halves of the heads write, plus the bias once.

    Which heads are in which half is drawn for each place, and often enough where places are few; or, of `whole` heads, for
    all places at once: two heads that write something together are in one half throughout in one of 250 draws.
    """
    z, layout = value(found.z.id), found.z.layout or ()
    kept = counts_heads if whole else "units".__ne__
    own = [size if kept(name) else 1 for size, name in zip(z.shape, layout, strict=False)]
    shape = own if whole or "heads" in layout else [*z.shape[:-1], 1]
    bias = at_zero(graph, out, found.z.id, value)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_PLACES if whole else max(1, _PLACES * found.n_heads // math.prod(shape))):
        half = (torch.rand(shape, generator=generator) < 0.5).to(z.device)
        one, other = evaluate_each(graph, out, found.z.id, torch.stack([z * half, z * ~half]), value)
        yield one + other - bias


_PLACES = 8
"""At so many places halves are drawn at least."""
