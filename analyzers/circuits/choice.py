"""Which edges make a circuit: the strongest, and of these those that lie on a way from the embedding to the logits.

Edges are matrices of truth values, (writers, readers); `feeds` (readers, writers) says which reader goes into which writer.
The first writer is the embedding, the last reader the logits.
"""

import numpy as np
from numpy.typing import NDArray

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError

Bools = NDArray[np.bool_]


def connected(kept: Bools, feeds: Bools) -> Bools:
    """The edges that lie on a way from the embedding to the logits; the others carry nothing, or tell nobody."""
    alive, told = np.arange(len(kept)) == 0, np.arange(kept.shape[1]) == kept.shape[1] - 1
    while not np.array_equal(alive, more := alive | feeds[kept[alive].any(0)].any(0)):
        alive = more
    while not np.array_equal(told, more := told | feeds[:, kept[:, told].any(1)].any(1)):
        told = more
    found: Bools = kept & alive[:, None] & told
    return found


def strongest(strengths: Floats, allowed: Bools, feeds: Bools, many: int) -> Bools:
    """The largest circuit of the strongest edges that has no more than so many once those that lead nowhere are left out."""
    places = np.argwhere(allowed)
    order = places[np.argsort(-strengths[tuple(places.T)], kind="stable")]
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _first(order, middle, feeds).sum() <= many else (low, middle - 1)
    return _first(order, low, feeds)


def _first(order: NDArray[np.int64], many: int, feeds: Bools) -> Bools:
    kept = np.zeros(feeds.T.shape, bool)
    kept[tuple(order[:many].T)] = True
    return connected(kept, feeds)


def counted(asked: int | float, total: int, what: str) -> int:
    """A number of edges, given as such or as a share of all."""
    if isinstance(asked, int) and not isinstance(asked, bool) and 1 <= asked <= total:
        return asked
    if isinstance(asked, float) and 0 < asked <= 1:
        return max(1, round(asked * total))
    raise AnalyzerError(f"{what}={asked!r}: expected a number of edges from 1 to {total}, or a share of them such as 0.05.")
