"""The processes of one torchrun: which batches are whose, and what all of them have counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from itertools import islice
from typing import Any, TypeVar

import torch.distributed as dist

from fmr.errors import FmrError, StoreError, number_of

T = TypeVar("T")


def check_ranks(error: type[FmrError] = StoreError) -> tuple[int, int]:
    """The number of this process and how many there are; an error where there is no group of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        raise error(
            "ranks=True asks for several processes, and there is no group of them. Expected `torchrun --nproc-per-node=2 "
            'script.py` and torch.distributed.init_process_group("gloo") in it.'
        )
    return dist.get_rank(), dist.get_world_size()


def share(batches: Iterable[T], error: type[FmrError] = StoreError) -> Iterable[T]:
    """The batches of this process: as many one behind the other as of the others, or one more. Of ten, rank 1 of 3 has those
    from 3 to 5."""
    rank, world = check_ranks(error)
    if not isinstance(batches, Sized):
        raise error(
            f"batches is a {type(batches).__name__} without a length, so that it cannot be divided. Expected a list or a "
            "loader that has one."
        )
    if (many := len(batches)) < world:
        raise error(f"{number_of(many, 'batch', 'batches')} for {world} processes. Expected one for each, or more.")
    return islice(batches, many * rank // world, many * (rank + 1) // world)


def together(work: Callable[[], T], error: type[FmrError] = StoreError) -> list[T]:
    """What each process makes of its part, in the order of their ranks, the same list in each; where one fails, all do."""
    _, world = check_ranks(error)
    made: T | None = None
    raised: BaseException | None = None
    try:
        made = work()
    except Exception as problem:
        raised = problem
    told: list[Any] = [None] * world
    dist.all_gather_object(told, (made, None if raised is None else f"{type(raised).__name__}: {raised}"))
    if raised is not None:
        raise raised
    if failed := next(((rank, why) for rank, (_, why) in enumerate(told) if why is not None), None):
        raise error(f"Process {failed[0]} of {world} failed, so that nothing is counted: {failed[1]}")
    return [one for one, _ in told]
