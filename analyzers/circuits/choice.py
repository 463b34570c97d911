"""Which edges make a circuit: the strongest, and of these those that lie on a way from the embedding to the logits."""

from typing import Any

import numpy as np

from analyzers.circuits.wiring import Bools, Wiring
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError


def connected(kept: Bools, wiring: Wiring) -> Bools:
    """The edges that lie on a way from the embedding to the logits; the others carry nothing, or tell nobody."""
    alive = np.zeros(len(wiring.writers), bool)
    alive[0] = True
    for component in wiring.components:
        reads, writes = _slices(component)
        alive[writes] = component.feeds[(kept[:, reads] & alive[:, None]).any(0)].any(0)
    found = kept & alive[:, None]
    for component in reversed(wiring.components):
        reads, writes = _slices(component)
        found[:, reads] &= component.feeds[:, found[writes].any(1)].any(1)
    return found


def _slices(component: Any) -> tuple[slice, slice]:
    reads, writes = component.readers, component.writers
    return slice(reads.start, reads.stop), slice(writes.start, writes.stop)


def strongest(strengths: Floats, wiring: Wiring, many: int) -> Bools:
    """The largest circuit of the strongest edges that has no more than so many once those that lead nowhere are left out."""
    places = np.argwhere(wiring.allowed)
    order = places[np.argsort(-strengths[tuple(places.T)], kind="stable")]
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _first(order, middle, wiring).sum() <= many else (low, middle - 1)
    return _first(order, low, wiring)


def _first(order: Any, many: int, wiring: Wiring) -> Bools:
    kept = np.zeros_like(wiring.allowed)
    kept[tuple(order[:many].T)] = True
    return connected(kept, wiring)


def random_circuit(wiring: Wiring, many: int, draw: np.random.Generator) -> Bools:
    """A circuit of edges drawn at random, chosen like the strongest."""
    return strongest(draw.random(wiring.allowed.shape), wiring, many)


def counted(asked: int | float, wiring: Wiring, what: str) -> int:
    """A number of edges, given as such or as a share of all."""
    total = int(wiring.allowed.sum())
    whole = isinstance(asked, int) and not isinstance(asked, bool)
    if whole and 1 <= asked <= total:
        return int(asked)
    if isinstance(asked, float) and 0 < asked <= 1:
        return max(1, round(asked * total))
    raise AnalyzerError(f"{what}={asked!r}: expected a number of edges from 1 to {total}, or a share of them such as 0.05.")
