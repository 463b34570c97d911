"""Ops over positions: what is put together of several of them, and which units it belongs to."""

from analyzers.networks.known import Known
from analyzers.networks.tags import level, parallel
from analyzers.networks.units import Units
from fmr.nodes import Node
from fmr.structure.normal.vocabulary import STATISTICS


def reduced(units: Units, node: Node, known: Known) -> Known | None:
    """Positions that are put together leave the units alone; a statistic of units belongs to none."""
    rank = known.units.dim()
    dim = node.argument("dim", 2 if node.op in ("norm", "vector_norm") else 1)
    dims = tuple(range(rank)) if dim is None else tuple(dim) if isinstance(dim, (tuple, list)) else (int(dim),)
    dims = tuple(n % rank for n in dims)
    found = level(units, known.units, dims) if node.op not in STATISTICS - {"mean"} else None
    if found is None and node.op == "sum":
        found = parallel(units, known.units, dims)
    if found is None:
        return None
    gain = None if known.gain is None else known.gain.mean(dims, keepdim=True)
    kept = tuple(1 if n in dims else size for n, size in enumerate(known.units.shape))
    found, gain = found.expand(kept), None if gain is None else gain.expand(kept)
    return Known(found.reshape(node.shape), None if gain is None else gain.reshape(node.shape))


def pooled(units: Units, node: Node, known: Known) -> Known | None:
    """A window over positions leaves the units alone."""
    lead = len(node.shape) - next((int(c) for c in node.op if c.isdigit()), known.units.dim() - 2)
    dims = tuple(range(lead, len(node.shape)))
    whole = all(node.shape[n] == 1 for n in dims)
    found = level(units, known.units, dims, unite=whole)
    if found is None:
        return None
    gain = None if known.gain is None else known.gain.mean(dims, keepdim=True).expand(node.shape)
    return Known(found.expand(node.shape), gain)


def summed_along(units: Units, node: Node, known: Known) -> Known | None:
    """What each position sums up of those before it is of the same unit."""
    found = level(units, known.units, (int(node.argument("dim", 1)),))
    return None if found is None else Known(found.expand(node.shape), known.gain)
