"""What is known of a tensor object while a graph is made: the value that it stands for, and what overwrote its bytes."""

from typing import NamedTuple

from fmr.ids import TensorId
from fmr.watching.swaps import Ref


class Owner(NamedTuple):
    """Which node a live tensor object stands for, and when it came to."""

    tensor: Ref
    node: int
    since: int
    name: TensorId
    version: int | None


class Overwrite(NamedTuple):
    """An op that overwrote bytes of a storage."""

    time: int
    node: int
    extent: tuple[int, int]
