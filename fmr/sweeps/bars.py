"""Progress bars: on a terminal alone, unless they are asked for."""

from collections.abc import Sequence
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def hidden(progress: bool | None) -> bool | None:
    """What tqdm calls `disable`: None hides a bar where there is no terminal."""
    return None if progress is None else not progress


def bar(items: Sequence[T], name: str, progress: bool | None, least: int = 0) -> "tqdm[T]":
    """The items with a bar, which is shown from so many on."""
    return tqdm(items, name, disable=True if len(items) < least else hidden(progress))
