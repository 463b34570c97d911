"""What an analyzer has counted, without what it was made with: to be sent to another process, and merged there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeVar

from torch import nn

A = TypeVar("A")

_GIVEN = "what an analyzer was made with"


class _Given:
    """Stands for a model, a tokenizer or a function that an analyzer was made with: each process has its own."""

    def __init__(self, name: str, key: Any) -> None:
        self.name, self.key = name, key

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        return memo[_GIVEN][self.name, self.key]


def _given(made_with: Mapping[str, Any]) -> Iterator[tuple[tuple[str, Any], Any]]:
    """What an analyzer was made with and every process makes for itself."""
    for name, value in made_with.items():
        several = value.items() if isinstance(value, Mapping) and not isinstance(value, nn.Module) else [(None, value)]
        for key, one in several:
            if isinstance(one, nn.Module) or callable(one) or hasattr(one, "decode"):
                yield (name, key), one


def empty(analyzer: A) -> A:
    """An analyzer that was made with the same, and has counted nothing.

    >>> empty(analyzers.HeadClustering(model))
    HeadClustering(GPT2LMHeadModel): nothing counted yet
    """
    return type(analyzer)(**analyzer._made_with)  # type: ignore[attr-defined]


def counts_of(analyzer: Any) -> dict[str, Any]:
    """What an analyzer has counted, as what can be sent.

    >>> sorted(counts_of(analyzers.HeadClustering(model)))[:2]
    [...]
    """
    memo: dict[Any, Any] = {id(one): _Given(*at) for at, one in _given(analyzer._made_with)}
    held = {name: value for name, value in vars(analyzer).items() if name != "_made_with"}
    return deepcopy(held, memo)


def with_counts(analyzer: A, counts: Mapping[str, Any]) -> A:
    """An analyzer that was made with the same as this one, and has counted that."""
    made: A = empty(analyzer)
    vars(made).update(deepcopy(dict(counts), {_GIVEN: dict(_given(made._made_with))}))  # type: ignore[attr-defined, dict-item]
    return made
