"""Blocks of batches that Ray hands to actors, one a device: each is counted anew by whoever has it, and merged once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

import fmr
from analyzers.counts import counts_of, empty, with_counts
from analyzers.protocol import Analyzer, AnalyzerError, Given, check_counts, gathered, some
from fmr.corpora.corpus import Corpus
from fmr.corpora.shards import part_of
from fmr.disk.files import new_folder
from fmr.sweeps.bars import hidden

A = TypeVar("A", bound=Analyzer[Any])

BLOCK = 8
"""How many batches are counted between two states that are sent."""


def over(
    make: Callable[[], A],
    batches: Iterable[Given],
    *,
    workers: int = 2,
    gpus: float = 0.0,
    block: int = BLOCK,
    progress: bool | None = None,
) -> A:
    """Count every batch of a loader by several actors of Ray Data, and return one analyzer that has counted all.

        analyzers.scale.over(lambda: analyzers.HeadClustering(load()), batches, workers=8, gpus=1).result()

    make: makes an analyzer with its model, on the device of whoever calls it: an actor once, and this process. workers: how
    many actors. gpus: how many devices each has. block: how many batches are sent and counted at a time.

    A block is counted from nothing and its counts come back once; one whose actor dies is counted again by another. So the
    result is that of one process, whatever dies. Ray must be installed (`pip install 'fmr[ray]'`); a cluster that is up is
    used (`ray.init(address=...)` before), else this machine.
    """
    check_counts(1, workers=workers, block=block)
    ray = started(progress)
    if not callable(make):
        raise AnalyzerError(
            f"make is a {type(make).__name__}, expected a function that makes an analyzer and its model, "
            "since each actor has its own."
        )
    analyzer = make()
    if not isinstance(analyzer, Analyzer):
        raise AnalyzerError(f"make() gave a {type(analyzer).__name__}, expected an analyzer, as HeadClustering(model).")
    if isinstance(batches, (dict, str)):
        raise AnalyzerError(f"batches is one {type(batches).__name__}, expected several batches, as a loader gives them.")
    all_batches = list(some(gathered(batches)))
    blocks = [all_batches[start : start + block] for start in range(0, len(all_batches), block)]

    class Counter:
        """An actor: an analyzer that is made once, and counts for each block from nothing."""

        def __init__(self) -> None:
            self.analyzer = make()

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return _made(row, lambda: counts_of(empty(self.analyzer).over(row["batches"].held, progress=False)))

    rows = [{"number": number, "batches": _Held(one)} for number, one in enumerate(blocks)]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    told = data.map(
        Counter, compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))), num_gpus=gpus or None
    ).take_all()
    for counts in _all(told):
        analyzer.merge(with_counts(analyzer, counts))
    return analyzer


@dataclass
class _Held:
    """What goes through a table of Ray as one thing."""

    held: Any


def _made(row: Mapping[str, Any], work: Callable[[], Any]) -> dict[str, Any]:
    """What a worker made of a row, or why it could not, which Ray would put into a long text of its own."""
    try:
        return {"number": row["number"], "made": _Held(work()), "failed": ""}
    except Exception as problem:
        return {"number": row["number"], "made": _Held(None), "failed": f"{type(problem).__name__}: {problem}"}


def _all(rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    """What the workers made, in its order; one that failed is an error."""
    found = sorted(rows, key=lambda row: int(row["number"]))
    if bad := next((row for row in found if row["failed"]), None):
        raise AnalyzerError(f"A worker failed at part {bad['number']} of {len(found)}: {bad['failed']}")
    return [row["made"].held for row in found]


def collect(
    make: Callable[[], nn.Module],
    batches: Sequence[Any],
    keep: Any,
    to: str | os.PathLike[str],
    *,
    workers: int = 2,
    gpus: float = 0.0,
    progress: bool | None = None,
    **settings: Any,
) -> Corpus:
    """Write what sites hold over a whole corpus to a folder by several actors, and open it.

        analyzers.scale.collect(load, batches, keep=["transformer.h.2.mlp"], to="values", workers=8, gpus=1)

    make: makes the model, in eval mode and on the device of whoever calls it. workers: each collects as many batches, one
    behind the other, into a part of the folder; one that dies is begun again and goes on from its last shard. settings:
    those of `fmr.collect`, as dtype and shard. The folder must be one that every machine sees.
    """
    check_counts(1, workers=workers)
    if not isinstance(batches, Sequence):
        raise AnalyzerError(f"batches is a {type(batches).__name__}, expected a list of batches, which can be divided.")
    if (many := len(batches)) < workers:
        raise AnalyzerError(f"{many} batches for {workers} workers. Expected one for each, or more.")
    folder = new_folder(to).absolute()
    places = [part_of(folder, number, workers) for number in range(workers)]
    ray = started(progress)

    def part(row: dict[str, Any]) -> dict[str, Any]:
        place = places[row["number"]]
        return _made(row, lambda: len(fmr.collect(make(), row["batches"].held, keep, place, progress=False, **settings)))

    cuts = [many * n // workers for n in range(workers + 1)]
    rows = [{"number": n, "batches": _Held(list(batches[cuts[n] : cuts[n + 1]]))} for n in range(workers)]
    _all(ray.data.from_items(rows, override_num_blocks=workers).map(part, num_gpus=gpus or None).take_all())
    return Corpus(folder)


def started(progress: bool | None) -> Any:
    """Ray with its Data, connected to a cluster or to this machine; its bars as ours."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise AnalyzerError(f"Ray is not installed ({error}). Expected it: pip install 'fmr[ray]'.") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = not hidden(progress)
    return ray
