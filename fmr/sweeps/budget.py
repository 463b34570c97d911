"""How many rows fit into memory."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.sweeps.steps import steps_of

SHARE, MOST = 0.25, 2**27
"""Of the free memory, and bytes at most."""

SENTINELS = 5


def rows_that_fit(
    graph: Graph,
    edited: set[TensorId],
    recorded: int,
    many: int,
    device: torch.device,
    part: Callable[[TensorId], float] = lambda name: 1.0,
) -> int:
    """The number of edited rows whose values fit into a quarter of the free memory, and into 128 MB.

    The graph is that of a recording of so many rows; `part` tells how much of the value that begins a step is made.
    """
    peak = peak_of(graph, edited, part) / recorded
    return max(1, min(many, int(min(SHARE * free_on(device), MOST) / max(peak, 1)) - SENTINELS))


def free_on(device: torch.device) -> float:
    """The bytes that are free on a device; of the machine those that can be had, as far as its limits tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = [_available()]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # a machine of which only a part may be used
        found.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    return max(0.0, min(found))


def _available() -> float:
    with suppress(OSError, StopIteration):
        line = next(one for one in Path("/proc/meminfo").read_text().splitlines() if one.startswith("MemAvailable:"))
        return float(line.split()[1]) * 1024
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float(4 * MOST)


def peak_of(graph: Graph, edited: set[TensorId], part: Callable[[TensorId], float] = lambda name: 1.0) -> float:
    """The most bytes at one time of all that follows the first edit, each value freed after its last reader."""
    steps = steps_of(graph)
    last = {name: place for place, step in enumerate(steps) for name in step.reads}
    live: dict[TensorId, float] = {}
    now = most = 0.0
    for place, step in enumerate(steps):
        share = part(step.first.id)
        for node in step.nodes:
            if node.id in edited or any(name in live for name in step.reads):
                size = node.dtype.itemsize
                for length in node.shape:
                    size *= length
                live[node.id] = size * share
                now += live[node.id]
        most = max(most, now)
        for name in step.reads:
            if last[name] == place and name in live:
                now -= live.pop(name)
    return most
