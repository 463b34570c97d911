"""Labelled vectors as they stream by: which are kept, and on which side of the split each lies, told by content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]

APART = ("attention_mask", "decoder_attention_mask", "position_ids")
"""Arguments that are no content: they follow from where the padding lies."""


def mixed(numbers: Hashes, salt: int) -> Hashes:
    """Numbers from 0 to 2^64 - 1 that look random and are the same for the same number and salt (splitmix64)."""
    found = numbers + np.full(1, salt * 0x9E3779B97F4A7C15 % 2**64, np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ (found >> np.uint64(shift))) * np.full(1, factor, np.uint64)
    return found ^ (found >> np.uint64(31))


def shares(numbers: Hashes, salt: int) -> NDArray[np.float64]:
    """The same as shares from 0 to below 1."""
    return (mixed(numbers, salt) >> np.uint64(11)) / 2.0**53


def digests(inputs: Mapping[str, Any], real: Tensor) -> Hashes:
    """A number for what each example holds, whatever pads it; real: (examples, positions)."""
    examples, positions = real.shape
    parts = {
        name: _plain(value)
        for name, value in sorted(inputs.items())
        if name not in APART and isinstance(value, Tensor) and value.dim() and len(value) == examples
    }
    found = []
    for n in range(examples):
        told = hashlib.blake2b(digest_size=8)
        for name, value in parts.items():
            row = value[n][real[n]] if value.dim() > 1 and value.shape[1] == positions else value[n]
            told.update(f"{name} {tuple(row.shape)} ".encode() + row.contiguous().numpy().tobytes())
        found.append(int.from_bytes(told.digest(), "little"))
    return np.array(found, np.uint64)


def by_position(value: Tensor) -> Hashes:
    """A number for what stands at each position of each example: token ids are their own."""
    plain = _plain(value)
    if plain.dim() == 2 and not plain.is_floating_point():
        return plain.numpy().astype(np.uint64)
    rows = plain.flatten(0, 1).contiguous().numpy()
    told = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows]
    return np.array(told, np.uint64).reshape(plain.shape[:2])


def _plain(value: Tensor) -> Tensor:
    """The same numbers in one type and on the CPU."""
    return value.detach().cpu().to(torch.float32 if value.is_floating_point() else torch.int64)


@dataclass(frozen=True, eq=False)
class Rows:
    """Labelled vectors: a number for the example of each and for its type, its position, its label, its vector by site."""

    examples: Hashes
    types: Hashes
    places: Ints
    labels: Ints
    vectors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> Hashes:
        """By which rows are ordered and chosen: random, and the same for the same position of the same example."""
        return mixed(mixed(self.examples, 1) ^ self.places.astype(np.uint64), 2)

    def take(self, index: NDArray[Any]) -> Rows:
        """Some of the rows."""
        at = torch.as_tensor(index)
        vectors = {name: value[at.to(value.device)].cpu() for name, value in self.vectors.items()}
        return Rows(self.examples[index], self.types[index], self.places[index], self.labels[index], vectors)

    def held_out(self, share: float, seed: int) -> NDArray[np.bool_]:
        """Which rows are for testing: all of an example, and of its equals, or none."""
        return shares(self.examples, 2 * seed + 3) < share


def smallest(parts: list[Rows], most: int) -> Rows:
    """Of several lists of rows those with the smallest keys, in the order of these: whatever the lists were."""
    whole = Rows(
        np.concatenate([one.examples for one in parts]),
        np.concatenate([one.types for one in parts]),
        np.concatenate([one.places for one in parts]),
        np.concatenate([one.labels for one in parts]),
        {name: torch.cat([one.vectors[name] for one in parts]) for name in parts[0].vectors},
    )
    return whole.take(np.lexsort((whole.labels, whole.keys))[:most])


class Sample:
    """At most so many rows of all that come by: those with the smallest keys, so that neither order nor shards count."""

    def __init__(self, most: int) -> None:
        self.most, self.parts, self.seen = most, list[Rows](), 0
        self._worst: np.uint64 | None = None

    def add(self, rows: Rows) -> None:
        """Count rows, and keep those that may be among the smallest."""
        self.seen += len(rows)
        if self._worst is not None:
            rows = rows.take(np.flatnonzero(rows.keys <= self._worst))
        self.parts.append(rows.take(np.arange(len(rows))))
        if sum(map(len, self.parts)) > 2 * self.most:
            self.rows()

    def merge(self, other: Sample) -> None:
        """Count what another one has seen."""
        self.seen += other.seen
        self.parts += other.parts
        self.rows()

    def rows(self) -> Rows:
        """Those that are kept, in the order of their keys."""
        whole = smallest(self.parts, self.most)
        self.parts = [whole]
        if len(whole) == self.most:
            self._worst = whole.keys.max()
        return whole
