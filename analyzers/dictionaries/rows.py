"""Values to train on, wherever they lie: rows that are read as they are needed, and which of them are held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analyzers.probes.rows import shares
from analyzers.protocol import AnalyzerError
from fmr.corpora.corpus import Corpus, Rows
from fmr.ids import Site

BLOCK = 1 << 13
"""How many rows are held at once."""


@dataclass(frozen=True, eq=False)
class Values:
    """Rows of values, and the numbers of those that are trained on and of those that are held out.

    name: what they are called; place: the site that they are the values of, as it prints, empty where nothing tells it.
    """

    rows: Tensor | Rows
    name: str
    train: Tensor
    test: Tensor
    place: str = ""

    def __getitem__(self, at: Tensor) -> Tensor:
        """Some rows, (rows, width), in float32 and in main memory."""
        found: Tensor = self.rows[at]
        return found.detach().float().flatten(1).cpu()

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return int(np.prod(self.rows.shape[1:]))

    def blocks(self, at: Tensor) -> Iterator[Tensor]:
        """Some rows, so many at once."""
        for part in at.split(BLOCK):
            yield self[part]

    @property
    def digest(self) -> str:
        """A checksum of how many rows there are, which are trained on, and what some of them hold."""
        told = hashlib.blake2b(f"{tuple(self.rows.shape)}".encode(), digest_size=8)
        told.update(self.train.numpy().tobytes())
        told.update(self[self.train[:: max(1, len(self.train) // 256)]].cpu().contiguous().numpy().tobytes())
        return told.hexdigest()


def values_of(given: Any, site: Any, held_out: float, seed: int, skip: int = 0) -> Values:
    """Values as they are given: rows (rows, width), or a corpus with a site of it, less the first tokens of documents."""
    if skip and not isinstance(given, Corpus):
        raise AnalyzerError(f"skip={skip} of a {type(given).__name__}: expected a corpus, which knows positions.")
    if isinstance(given, Corpus):
        if site is None and len(given.sites) != 1:
            raise AnalyzerError(
                f"The corpus holds {', '.join(given.sites)}: expected one of them, as site={given.sites[0]!r}."
            )
        name = given.sites[0] if site is None else site
        rows: Any = given[name]
        apart = _by_document(given, held_out, seed)
    else:
        rows, name = given, "" if site is None else site
        order = torch.randperm(
            len(rows) if isinstance(rows, Tensor | Rows) else 0, generator=torch.Generator().manual_seed(seed)
        )
        apart = order < math.ceil(held_out * len(order))
    deep = 2 if isinstance(rows, Tensor) else math.inf  # of several dimensions in a row, which only a corpus tells
    floats = isinstance(rows, Tensor | Rows) and rows.dtype.is_floating_point and 1 < len(rows.shape) <= deep
    if not floats:
        told = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor | Rows) else type(rows).__name__
        raise AnalyzerError(
            f"The values are {told}, expected rows of numbers with fractions, (rows, width): what fmr.collect wrote, a site "
            "of it, or run[site].flatten(0, 1)."
        )
    counted = given.index[:][:, 1] >= skip if skip else torch.ones_like(apart)
    train, test = (~apart & counted).nonzero()[:, 0], (apart & counted).nonzero()[:, 0]
    if len(train) < 2 or len(test) < 2:
        raise AnalyzerError(
            f"Of {len(train) + len(test)} rows {len(test)} are held out: expected two or more on each side. "
            f"Give more rows or documents, or another share than held_out={held_out}."
        )
    place = rows.site if isinstance(rows, Rows) else repr(site) if isinstance(site, Site) else ""
    return Values(rows, name if isinstance(name, str) else repr(name), train, test, place)


def _by_document(corpus: Corpus, share: float, seed: int) -> Tensor:
    """Which rows of a corpus are held out: all of a document, and of its equals, or none."""
    index = np.asarray(corpus.index)
    starts = np.flatnonzero(np.r_[True, np.diff(index[:, 0]) != 0])
    keys = np.empty(len(starts), np.uint64)
    for n, part in enumerate(np.split(index, starts[1:])):
        tokens = part[:, 2] if (part[:, 2] >= 0).any() else part[:, 0]
        told = hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=8)
        keys[n] = int.from_bytes(told.digest(), "little")
    drawn = shares(keys, 2 * seed + 5)
    several = np.unique(drawn)
    held = drawn < np.append(several, 2.0)[math.ceil(share * len(several))]
    return torch.from_numpy(np.repeat(held, np.diff(np.r_[starts, len(index)])))
