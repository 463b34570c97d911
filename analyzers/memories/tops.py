"""The strongest triggers of many memories at once, exact in whatever order they come, and the moments of coefficients."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 1 << 17
"""Of how many memories lists are merged at once."""


class Prefixes(NamedTuple):
    """Prefixes in a row: a number for the text of each, and the place of its last token."""

    texts: Tensor
    places: Tensor


@dataclass
class Tops:
    """The k largest positive values of each memory, the largest first, with the prefixes that they were seen at.

    values, texts, places: (memories, k); where fewer were seen, values are 0 at the end. Of equal values the text of the
    smaller number comes first, and in it the earlier place; one prefix is counted once, with the larger of its values.
    """

    values: Tensor
    texts: Tensor
    places: Tensor

    @classmethod
    def empty(cls, memories: int, k: int) -> "Tops":
        """Lists in which nothing was entered.

        >>> Tops.empty(3, 2).values.shape
        torch.Size([3, 2])
        """
        places = torch.zeros(memories, k, dtype=torch.int32)
        return cls(torch.zeros(memories, k), torch.zeros(memories, k, dtype=torch.int64), places)

    def add(self, values: Tensor, at: Prefixes) -> Tensor:
        """Enter the values of a batch, (prefixes, memories); returns the numbers of the memories whose lists changed.

        Every prefix of a batch is another one. What is below the least of a full list is not looked at again, nor what is
        below the k largest of the batch.
        """
        k = self.values.shape[1]
        least = self.values[:, -1].to(values.device)
        hits = (values >= least) & (values > 0)
        if len(values) > k and int(hits.sum()) > 2 * k * values.shape[1]:
            hits &= values >= values.topk(k, 0).values[-1]
        memories, prefixes = (one.cpu() for one in hits.mT.nonzero(as_tuple=True))
        if not len(memories):
            return memories
        found = values.mT[hits.mT].cpu().float()
        rows, which, counts = memories.unique_consecutive(return_inverse=True, return_counts=True)
        slots = torch.arange(len(memories)) - (counts.cumsum(0) - counts)[which]
        wide = Tops.empty(len(rows), int(counts.max()))
        wide.values[which, slots] = found
        wide.texts[which, slots] = at.texts[prefixes]
        wide.places[which, slots] = at.places[prefixes].to(torch.int32)
        return self._enter(rows, wide)

    def merge(self, other: "Tops") -> Tensor:
        """Enter the lists of the same memories from other data; returns the numbers of the memories whose lists changed."""
        rows = torch.arange(len(self.values))
        return torch.cat([self._enter(part, other.of(part)) for part in rows.split(_ROWS)])

    def of(self, rows: Tensor) -> "Tops":
        """The lists of some memories."""
        return Tops(self.values[rows], self.texts[rows], self.places[rows])

    def _enter(self, rows: Tensor, others: "Tops") -> Tensor:
        before = self.of(rows)
        after = _best(before, others)
        changed = ((before.values != after.values) | (before.texts != after.texts) | (before.places != after.places)).any(1)
        for held, new in zip((self.values, self.texts, self.places), (after.values, after.texts, after.places), strict=True):
            held[rows] = new
        return rows[changed]


def _best(one: Tops, other: Tops) -> Tops:
    """The k best of two lists for each memory: sorted by value, then text, then place, each prefix once."""
    k = one.values.shape[1]
    values, texts, places = (
        torch.cat(pair, 1) for pair in ((one.values, other.values), (one.texts, other.texts), (one.places, other.places))
    )

    def by(keys: Tensor, descending: bool = False) -> None:
        nonlocal values, texts, places
        order = keys.sort(dim=1, descending=descending, stable=True).indices
        values, texts, places = values.gather(1, order), texts.gather(1, order), places.gather(1, order)

    by(values, descending=True)
    by(places)
    by(texts)
    again = (texts[:, 1:] == texts[:, :-1]) & (places[:, 1:] == places[:, :-1]) & (values[:, :-1] > 0)
    values[:, 1:][again] = 0
    by(values, descending=True)
    values, texts, places = values[:, :k], texts[:, :k].clone(), places[:, :k].clone()
    empty = values == 0
    texts[empty], places[empty] = 0, 0
    return Tops(values.clone(), texts, places)


@dataclass
class Moments:
    """How many values were seen of each memory, their mean, and the sum of their squared distances from it."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Those of a batch, (prefixes, memories), in double precision.

        >>> Moments.of(torch.tensor([[1.0], [3.0]])).squares
        tensor([2.], dtype=torch.float64)
        """
        double = values.double()
        mean = double.mean(0)
        return cls(len(values), mean.cpu(), (double - mean).square_().sum(0).cpu())

    @property
    def variance(self) -> Tensor:
        """The mean squared distance from the mean, with n - 1 in the denominator; NaN for a single value."""
        return self.squares / (self.count - 1 if self.count > 1 else float("nan"))

    def merge(self, other: "Moments") -> "Moments":
        """Those of both.

        Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
        """
        count = self.count + other.count
        if count == 0:
            return self
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), squares)
