"""How many rows fit into memory."""

import os
from collections.abc import Sequence

from fmr.ids import Site, TensorId
from fmr.sweeps.rows import FEW, Grown

SHARE, MOST = 0.25, 2**29
"""Of the free memory, and bytes at most."""


def rows_that_fit(grown: Grown, sites: Sequence[Sequence[Site]]) -> int:
    """The number of edited rows whose values fit into a quarter of the free memory, and into half a gigabyte."""
    peak = _peak(grown, {site.id for several in sites for site in several})
    return max(1, min(len(sites), int(min(SHARE * _free(), MOST) / max(peak, 1)) - 5))


def _free() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float(4 * MOST)


def _peak(grown: Grown, edited: set[TensorId]) -> int:
    """The bytes that a row has at most at one time: of all that follows the first edit, freed after its last reader."""
    last = {name: place for place, step in enumerate(grown.steps) for name in step.reads}
    live: dict[TensorId, int] = {}
    now = most = 0
    for place, step in enumerate(grown.steps):
        for node in step.nodes:
            if node.id in edited or any(name in live for name in step.reads):
                size = node.dtype.itemsize
                for length in node.shape:
                    size *= length
                live[node.id] = size // FEW
                now += live[node.id]
        most = max(most, now)
        for name in step.reads:
            if last[name] == place and name in live:
                now -= live.pop(name)
    return most
