"""The clock: variants of one computation in turns, in one process, each as a ratio to the first."""

import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Variant = Callable[[], object]


class Ratio(NamedTuple):
    """The median over rounds of variant / base of the same round, its quartiles, and the median seconds of one call."""

    median: float
    low: float
    high: float
    seconds: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median:.2f}"


def cpu_seconds(variant: Variant, calls: int = 1) -> float:
    """CPU seconds of one call of this process, freeing what it returned included."""
    start = time.process_time()
    for _ in range(calls):
        variant()
    return (time.process_time() - start) / calls


def gpu_seconds(variant: Variant, calls: int = 1) -> float:
    """Seconds of one call on the wall, until the GPU has done what was asked of it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        variant()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


class Clock(NamedTuple):
    """How long to measure: `rounds` turns, but no new one after `seconds` once `least` are done."""

    rounds: int = 15
    seconds: float = 20.0
    least: int = 5
    timer: Callable[[Variant, int], float] = cpu_seconds

    def ratios(self, variants: Mapping[str, Variant], calls: int = 1) -> dict[str, Ratio]:
        """Time every variant in turns; the first is the base. `calls` calls make one sample.

        Each round begins one variant later than the round before, so that none always follows the same other one.
        """
        names = list(variants)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            variants[name]()
        gc.collect()
        begun = time.perf_counter()
        for turn in range(self.rounds):
            if turn >= self.least and time.perf_counter() - begun > self.seconds:
                break
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(self.timer(variants[name], calls))
        return compare(samples)


def compare(samples: Mapping[str, Sequence[float]]) -> dict[str, Ratio]:
    """Samples taken in the same rounds as ratios to the first of them."""
    base = next(iter(samples.values()))
    return {name: _ratio([mine / its for mine, its in zip(own, base, strict=True)], own) for name, own in samples.items()}


def _ratio(ratios: Sequence[float], samples: Sequence[float]) -> Ratio:
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high, statistics.median(samples), len(ratios))


def child_cpu_seconds(command: Sequence[str]) -> float:
    """CPU seconds of a process of its own, from its start to its end."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}, expected 0. Run it alone to see why.")
    return used.ru_utime + used.ru_stime
