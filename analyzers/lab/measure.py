"""The seed of an experiment, and what it took: seconds, memory, the versions of what it ran on."""

from __future__ import annotations

import os
import platform
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from analyzers.lab.errors import LabError
from fmr.errors import whole_number

_PERIOD = 0.005  # seconds between two looks at the memory
PACKAGES = ("torch", "fmr", "numpy", "transformers")
_ALONE = threading.RLock()  # held by the thread that draws, as random numbers are of the process


def checked_seed(seed: Any) -> int:
    """A seed that Python, NumPy and torch all take."""
    number = whole_number(seed)
    if number is None or not 0 <= number < 2**32:
        raise LabError(f"seed={seed!r}: expected a whole number from 0 to 2**32 - 1, as seed=0.")
    return number


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's random numbers from a seed; after the block they go on as if it had not been.

    One thread is in such a block at a time, and others wait for it.
    """
    with _ALONE:
        python, numpy = random.getstate(), np.random.get_state()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        try:
            with torch.random.fork_rng(devices=devices):
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Meter:
    """Seconds of a block, and how much more memory it had at its peak than at its begin.

    >>> with Meter() as meter:
    ...     kept = torch.zeros(1000)
    >>> meter.seconds > 0
    True

    The memory of this process is looked at every 5 ms, and that of CUDA is what its allocator counts, since the last reset
    of its peak; where a system does not tell, it is NaN.
    """

    seconds = memory = 0.0

    def __enter__(self) -> Meter:
        self._stop, self._peak = threading.Event(), _resident()
        self._start, self._cuda = self._peak, _cuda()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, _resident())
        self.memory = self._peak - self._start + max(0, _cuda() - self._cuda)

    def _look(self) -> None:
        while not self._stop.wait(_PERIOD):
            self._peak = max(self._peak, _resident())


def _resident() -> float:
    """Bytes of memory that this process has now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return float("nan")


def _cuda() -> int:
    return (
        sum(torch.cuda.max_memory_allocated(n) for n in range(torch.cuda.device_count()))
        if torch.cuda.is_initialized()
        else 0
    )


_version = cache(version)


def environment() -> dict[str, str]:
    """The versions of what experiments run on."""
    told = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            told[name] = torch.__version__ if name == "torch" else _version(name)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        told["device"] = torch.cuda.get_device_name()
    return told | {"threads": str(torch.get_num_threads())}
