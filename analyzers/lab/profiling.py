"""Profiles as they are made: work done twice, once for torch's count of FLOPs and once under its profiler."""

from __future__ import annotations

import bisect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from analyzers.lab.errors import LabError
from analyzers.lab.flops import FORMULAS
from analyzers.lab.measure import seeded
from analyzers.lab.profile import BETWEEN, ROOT, Profile
from fmr.watching.calls import Noted, Proceed, Watcher, watching

MARK = "module: "
_LEVEL = "KINETO_LOG_LEVEL"
Stack = tuple[str, ...]


class _Calls:
    """A watcher that lets something happen around each module call, by the path of the module."""

    def __init__(self, model: nn.Module | None, around: Callable[[str], Any]) -> None:
        self.foreign, self.ended, self.around = Noted(), False, around
        self.paths = {id(module): path or ROOT for path, module in model.named_modules()} if model is not None else {}

    def call(self, proceed: Proceed, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """One call, inside its mark."""
        with self.around(self.paths.get(id(module)) or type(module).__name__):
            return proceed(*args, **kwargs)

    def swap(self, first: Tensor, second: Tensor) -> None:
        """Nothing that is kept here depends on it."""

    def hand_out(self, tensor: Tensor) -> None:
        """Nothing that is kept here depends on it."""

    def end_before(self, others: tuple[Watcher, ...]) -> None:
        """Blocks may end in any order."""


def profiled(model: nn.Module | None, work: Callable[[], Any], seed: int, called: Any = None) -> Profile:
    """What some work takes, by module and op: done twice, from the same seed and the same buffers of what is called."""
    with seeded(seed), _same_buffers(called):
        flops = _flops(model, work)
    with seeded(seed), _same_buffers(called):
        events, memory = _events(model, work)
    return _profile(events, memory, flops)


@contextmanager
def _same_buffers(called: Any) -> Iterator[None]:
    """A block after which the buffers of a module, such as running statistics, are those of before, with their numbers."""
    modules = [*called.modules()] if isinstance(called, nn.Module) else []
    before = [(module._buffers, dict(module._buffers)) for module in modules]
    held = [one for _, named in before for one in named.values() if one is not None and not one.is_inference()]
    copies = [(one, one.detach().clone()) for one in held if not one.is_meta]
    try:
        yield
    finally:
        for buffers, named in before:
            buffers.clear()
            buffers.update(named)
        with torch.no_grad():
            for buffer, copy in copies:
                if buffer.layout != torch.strided or not torch.equal(buffer, copy):  # kernels count no versions of these
                    buffer.copy_(copy)


def _flops(model: nn.Module | None, work: Callable[[], Any]) -> dict[tuple[Stack, str], int]:
    """FLOPs by the stack of module calls and the op, as torch counts them."""
    found: dict[tuple[Stack, str], int] = defaultdict(int)
    counter, stack, before = FlopCounterMode(display=False, custom_mapping=FORMULAS), list[str](), dict[Any, int]()

    def note() -> None:
        now = dict(counter.flop_counts["Global"])
        for op, count in now.items():
            found[tuple(stack), str(op).replace(".", "::", 1)] += count - before.get(op, 0)
        before.update(now)

    @contextmanager
    def around(path: str) -> Iterator[None]:
        note()
        stack.append(path)
        try:
            yield
        finally:
            note()
            stack.pop()

    with watching(_Calls(model, around)), counter:
        work()
        note()
    return {key: count for key, count in found.items() if count}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that the profiler's library writes to stderr about itself; it asks for a level at its first use."""
    if _LEVEL in os.environ:
        yield
        return
    os.environ[_LEVEL] = "6"
    try:
        yield
    finally:
        os.environ.pop(_LEVEL, None)


class _Span(NamedTuple):
    """An op or a mark: when it began and ended in microseconds, what it is, its own time, and what it took on a GPU."""

    start: float
    end: float
    name: str
    own: float
    device: float


def _events(model: nn.Module | None, work: Callable[[], Any]) -> tuple[list[_Span], list[tuple[float, int]]]:
    """Spans of the calling thread, and those of others without their time; memory taken and given back, by moment."""
    if torch.autograd._profiler_enabled():
        raise LabError("A profiler of torch is on already, and it knows one at a time. Leave its block first.")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with _quiet(), profile(activities=activities, profile_memory=True) as made:
        with watching(_Calls(model, lambda path: record_function(MARK + path))), record_function(MARK):
            work()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
    cpu = torch.autograd.DeviceType.CPU
    events = [one for one in made.events() or () if one.device_type == cpu and one.name != "[memory]"]
    root = next(one for one in events if one.name == MARK)
    begin, end = root.time_range.start, root.time_range.end
    spans = [
        _Span(e.time_range.start, e.time_range.end, e.name, e.self_cpu_time_total, e.self_device_time_total)
        if e.thread == root.thread
        else _Span(begin, begin - 1, e.name, 0.0, e.self_device_time_total)
        for e in events
        if begin <= e.time_range.start and e.time_range.end <= end
    ]
    raw = made.profiler.kineto_results
    began = raw.trace_start_ns()
    memory = [((e.start_ns() - began) / 1000, e.nbytes()) for e in raw.events() if e.name() == "[memory]"]
    return spans, [(at, many) for at, many in memory if begin <= at <= end]


class _Row:
    """What one op took below one stack of module calls."""

    def __init__(self) -> None:
        self.calls, self.own, self.device, self.taken, self.flops = 0, 0.0, 0.0, 0, 0


def _profile(spans: list[_Span], memory: list[tuple[float, int]], flops: Mapping[tuple[Stack, str], int]) -> Profile:
    rows: dict[tuple[Stack, str], _Row] = defaultdict(_Row)
    begins, keys = list[float](), list[tuple[Stack, str]]()
    open_: list[tuple[float, tuple[Stack, str]]] = []
    for span in sorted(spans, key=lambda one: (one.start, -one.end)):
        while open_ and span.start >= open_[-1][0]:
            _note(begins, keys, open_.pop()[0], open_[-1][1] if open_ else ((), BETWEEN))
        stack = open_[-1][1][0] if open_ else ()
        path = span.name.removeprefix(MARK)
        key = (stack, span.name) if path == span.name else ((*stack, path) if path else stack, BETWEEN)
        rows[key].calls += 1
        rows[key].own += span.own
        rows[key].device += span.device
        if span.end >= span.start:
            open_.append((span.end, key))
            _note(begins, keys, span.start, key)
    while open_:
        _note(begins, keys, open_.pop()[0], open_[-1][1] if open_ else ((), BETWEEN))
    now = peak = 0
    for at, many in sorted(memory):
        now += many
        peak = max(peak, now)
        if many > 0:
            rows[keys[max(0, bisect.bisect_right(begins, at) - 1)]].taken += many
    for key, count in flops.items():
        rows[key].flops += count
    return Profile(
        stacks=tuple(";".join(stack) for stack, _ in rows),
        ops=tuple(op for _, op in rows),
        calls=np.array([row.calls for row in rows.values()]),
        seconds=np.array([row.own for row in rows.values()]) / 1e6,
        device_seconds=np.array([row.device for row in rows.values()]) / 1e6,
        memory=np.array([row.taken for row in rows.values()]),
        flops=np.array([row.flops for row in rows.values()]),
        whole=next(span.end - span.start for span in spans if span.name == MARK) / 1e6,
        peak=peak,
    )


def _note(begins: list[float], keys: list[tuple[Stack, str]], at: float, key: tuple[Stack, str]) -> None:
    begins.append(at)
    keys.append(key)
