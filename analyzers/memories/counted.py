"""All that was counted of the memories of a model: lists, moments, the texts that lists name, and what went in."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyzers.memories.reading import Texts
from analyzers.memories.tops import Moments, Prefixes, Tops
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of

Ids = NDArray[np.int32]

SIGNS = (1, -1)
_SPARE = 4096
"""How many texts that no list names are kept before they are looked through."""


class Counted(NamedTuple):
    """One batch that went in: a digest of its texts, their number and that of their tokens."""

    digest: int
    texts: int
    tokens: int


@dataclass
class Layer:
    """The memories of a layer: the lists of each sign, the moments, and which memories changed since they were written."""

    number: int
    site: str
    tops: tuple[Tops, ...]
    moments: Moments
    changed: list[Tensor]

    @property
    def n(self) -> int:
        """How many memories there are."""
        return len(self.moments.mean)

    @classmethod
    def empty(cls, number: int, site: str, n: int, k: int, signs: int) -> "Layer":
        """One of which nothing was counted yet."""
        zeros = torch.zeros(n, dtype=torch.float64)
        tops = tuple(Tops.empty(n, k) for _ in range(signs))
        return cls(number, site, tops, Moments(0, zeros, zeros.clone()), [torch.zeros(n, dtype=torch.bool) for _ in tops])

    def add(self, values: Tensor, offered: Tensor | None, at: Prefixes) -> None:
        """Count the coefficients of a batch, (tokens, memories); `offered` are those that may enter lists, None for all."""
        if not len(values):
            return
        batch = Moments.of(values)
        if not bool(batch.mean.isfinite().all()):
            raise AnalyzerError(
                f"Layer {self.number} has coefficients that are no finite numbers. Expected a model that computes without "
                "overflow: load it in float32 or bfloat16."
            )
        self.moments = self.moments.merge(batch)
        chosen = values if offered is None else values[offered.to(values.device)]
        for sign, tops, changed in zip(SIGNS, self.tops, self.changed, strict=False):
            changed[tops.add(chosen if sign > 0 else -chosen, at)] = True

    def merge(self, other: "Layer") -> None:
        """Add what was counted of the same memories on other data."""
        self.moments = self.moments.merge(other.moments)
        for ours, theirs, changed in zip(self.tops, other.tops, self.changed, strict=True):
            changed[ours.merge(theirs)] = True


@dataclass(repr=False)
class Counts:
    """Layers, the tokens of the texts that their lists name, and the batches that were counted."""

    layers: list[Layer]
    texts: dict[int, Ids] = field(default_factory=dict)
    batches: list[Counted] = field(default_factory=list)

    @property
    def n_texts(self) -> int:
        """How many texts were counted."""
        return sum(batch.texts for batch in self.batches)

    @property
    def n_tokens(self) -> int:
        """How many tokens were counted."""
        return sum(batch.tokens for batch in self.batches)

    def __repr__(self) -> str:
        memories = (
            f"{number_of(sum(layer.n for layer in self.layers), 'memory', 'memories')} of "
            f"{number_of(len(self.layers), 'layer')}"
        )
        return (
            f"{number_of(self.n_tokens, 'token')} of {number_of(self.n_texts, 'text')} in "
            f"{number_of(len(self.batches), 'batch', 'batches')}; {memories}"
        )

    def add(self, values: Sequence[Tensor], texts: Texts, position: int | None) -> None:
        """Count a batch: coefficients (examples, positions, memories) of each layer, over the same texts."""
        kept = _kept(texts.real, position)
        places = (texts.real.long().cumsum(1) - 1)[kept]
        numbers = texts.numbers[:, None].expand_as(kept)[kept]
        seen: set[int] = set()
        first = torch.tensor([not (one in seen or seen.add(one)) for one in texts.numbers.tolist()])  # type: ignore[func-returns-value]
        offered = None if bool(first.all()) else first[:, None].expand_as(kept)[kept]
        at = Prefixes(numbers, places) if offered is None else Prefixes(numbers[offered], places[offered])
        every = bool(kept.all())
        for layer, value in zip(self.layers, values, strict=True):
            layer.add(value.flatten(0, 1) if every else value[kept.to(value.device)], offered, at)
        self.texts |= dict(zip(texts.numbers.tolist(), texts.tokens, strict=True))
        self.batches.append(Counted(digest_of(texts), len(kept), int(kept.sum())))
        if len(self.texts) > 2 * getattr(self, "_named", 0) + _SPARE:
            self.forget()

    def forget(self) -> None:
        """Let go of texts that no list names any longer."""
        named = {int(one) for layer in self.layers for tops in layer.tops for one in tops.texts.unique()}
        self.texts = {number: ids for number, ids in self.texts.items() if number in named}
        self._named = len(self.texts)

    def merge(self, other: "Counts") -> None:
        """Add what was counted of the same memories on other data."""
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            ours.merge(theirs)
        self.texts |= other.texts
        self.batches += other.batches
        self.forget()

    def repeats(self, other: "Counts") -> bool:
        """Whether all batches of another were counted here already."""
        ours, theirs = (Counter(batch.digest for batch in one.batches) for one in (self, other))
        return bool(theirs) and theirs <= ours


def _kept(real: Tensor, position: int | None) -> Tensor:
    """Which tokens are counted: all that are real, or of each text the one at a position."""
    if position is None:
        return real
    order = real.long().cumsum(1) - 1
    wanted = position if position >= 0 else order[:, -1:] + 1 + position
    return real & (order == wanted)


def digest_of(texts: Texts) -> int:
    """A number for the texts of a batch, whatever their order."""
    told = np.sort(texts.numbers.numpy()).tobytes()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1


ONE = "Expected one model, read in one way: make another KeyValueMemories for another."


def place(number: int, site: str, n: int) -> str:
    """A layer in words."""
    return f"layer {number} with {number_of(n, 'memory', 'memories')}{f' at {site!r}' if site else ''}"


def same(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """Raise where settings differ; a model that is not known differs from none."""
    for name, value in ours.items():
        if value != theirs[name] and not (name == "model" and "" in (value, theirs[name])):
            told = {"model": "other weights"}.get(name, f"{name}={theirs[name]!r} where {name}={value!r} was asked for")
            raise AnalyzerError(f"{what} {told}: expected counts of one model with one k, signs, position and tokens.")
