"""How alike two sets of vectors of the same things are, whatever their axes: each set as a form, and what two forms make."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Measure(NamedTuple):
    """A measure: what it needs of one set of vectors (rows, width), these in another order, and what two make."""

    form: Callable[[Tensor], Tensor]
    moved: Callable[[Tensor, Tensor], Tensor]
    alike: Callable[[Tensor, Tensor], float]


def _centred(values: Tensor) -> Tensor:
    """Vectors less their mean, in float64."""
    centred: Tensor = values.double() - values.double().mean(0)
    return centred


# ---- centred kernel alignment


def _gram(values: Tensor) -> Tensor:
    """The products of all pairs of rows without those with themselves, centred so that their sums by row are 0.

    It is the U-centred matrix, whose products are unbiased (Székely, Rizzo 2014).
    """
    values = _centred(values)
    gram = (values @ values.T).fill_diagonal_(0.0)
    n = len(gram)
    sums = gram.sum(0) / (n - 2)
    gram = gram - sums - sums[:, None] + sums.sum() / (n - 1)
    return gram.fill_diagonal_(0.0)


def _by_rows(form: Tensor, order: Tensor) -> Tensor:
    return form[order]


def _by_pairs(form: Tensor, order: Tensor) -> Tensor:
    return form[order][:, order]


def _cosine(first: Tensor, second: Tensor) -> float:
    both = first.norm() * second.norm()
    return float((first * second).sum() / both) if both > 0 else float("nan")


# ---- distances


DIGITS = 6
"""What is left of a distance: rows of the same token differ by rounding alone, and share a rank."""


def _ranks(values: Tensor) -> Tensor:
    """The ranks of one less the correlation of each pair of rows, less their mean, as a matrix with 0 on the diagonal."""
    from scipy.stats import rankdata

    values = values.double()
    values = values - values.mean(1, keepdim=True)
    values = values / values.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    far = (1 - values @ values.T).round(decimals=DIGITS)
    above = torch.triu_indices(len(far), len(far), 1)
    ranks = torch.from_numpy(rankdata(far[above[0], above[1]].numpy()))
    found = torch.zeros_like(far)
    found[above[0], above[1]] = ranks - ranks.mean()
    return found + found.T


# ---- turns


def _scaled(values: Tensor) -> Tensor:
    """Centred vectors with squares that sum to 1."""
    scaled: Tensor = (centred := _centred(values)) / centred.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return scaled


def _turned(first: Tensor, second: Tensor) -> float:
    """The sum of products once one set is turned onto the other."""
    return float(torch.linalg.svdvals(first.T @ second).sum()) if bool(first.any() and second.any()) else float("nan")


# ---- directions that correlate

KEPT = 0.99
"""The share of the variance that the directions hold which are correlated."""


def _directions(values: Tensor) -> Tensor:
    """The main directions of vectors, each of length 1 over the rows."""
    left, sizes, _ = torch.linalg.svd(_centred(values), full_matrices=False)
    shares = sizes.square().cumsum(0) / sizes.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    kept: Tensor = left[:, : int((shares < KEPT).sum()) + 1] if bool(sizes.any()) else left[:, :0]
    return kept


def _correlated(first: Tensor, second: Tensor) -> float:
    """The mean of the canonical correlations."""
    few = min(first.shape[1], second.shape[1])
    return float(torch.linalg.svdvals(first.T @ second)[:few].mean()) if few else float("nan")


MEASURES = {
    "cka": Measure(_gram, _by_pairs, _cosine),
    "rsa": Measure(_ranks, _by_pairs, _cosine),
    "procrustes": Measure(_scaled, _by_rows, _turned),
    "svcca": Measure(_directions, _by_rows, _correlated),
}
"""Each is 1 for vectors that are the same but for a turn and a scale."""


def similarity(first: Tensor, second: Tensor, measure: str = "cka") -> float:
    """How alike two sets of vectors of the same things are.

    >>> x = torch.randn(50, 6)
    >>> round(similarity(x, 3 * x.flip(1)), 6)
    1.0

    first, second: (rows, width) and (rows, other width), a row of each for the same thing; 4 rows or more.
    """
    form, _, alike = MEASURES[measure]
    return alike(form(first), form(second))
