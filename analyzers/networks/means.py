"""k-means with many starts at once."""

import numpy as np

from analyzers.numbers.embed import Floats, Ints

STARTS, TURNS, KEPT = 10, (6, 60), 2
"""How many starts there are, for how many turns all of them and then the best are moved, and how many these are."""


def k_means(points: Floats, k: int, seed: int) -> Ints:
    """The labels of k clusters whose points lie closest to their means: the best of ten starts.

    >>> k_means(np.array([[0.0], [0.1], [5.0], [5.1]]), 2, seed=0)
    array([0, 0, 1, 1])

    points: (points, dimensions). Starts are drawn far apart (k-means++) and moved all at once, a few turns each, and the
    best of them until no label changes. Labels come in the order of their first points; where fewer points differ, there
    are fewer of them.

    Source: D. Arthur, S. Vassilvitskii, "k-means++: the advantages of careful seeding", 2007; S. Lloyd, 1982.
    """
    squares = (points**2).sum(1)
    means = _seeded(points, squares, k, np.random.default_rng([seed, k]), STARTS)
    for turns, kept in zip(TURNS, (KEPT, 1), strict=True):
        labels, means = _settled(points, squares, means, turns)
        spread = np.take_along_axis(_squared(points, squares, means), labels[..., None], 2).sum((1, 2))
        best = spread.argsort(kind="stable")[:kept]
        labels, means = labels[best], means[best]
    _, first, where = np.unique(labels[0], return_index=True, return_inverse=True)
    named: Ints = np.argsort(np.argsort(first))[where]
    return named


def _settled(points: Floats, squares: Floats, means: Floats, turns: int) -> tuple[Ints, Floats]:
    """Labels and means after so many turns, or when no label changes any more."""
    labels = np.full((len(means), len(points)), -1)
    for _ in range(turns):
        new = _squared(points, squares, means).argmin(2)
        if np.array_equal(new, labels):
            break
        labels, means = new, _moved(points, new, means)
    return labels, means


def _squared(points: Floats, squares: Floats, means: Floats) -> Floats:
    """Squared distances, (starts, points, means)."""
    found: Floats = squares[None, :, None] - 2 * points @ means.transpose(0, 2, 1) + (means**2).sum(2)[:, None]
    return found


def _seeded(points: Floats, squares: Floats, k: int, random: np.random.Generator, starts: int) -> Floats:
    """For each start k of the points, each drawn by its squared distance to those before."""
    means = points[random.integers(len(points), size=(starts, 1))]
    nearest = np.maximum(_squared(points, squares, means)[..., 0], 0)
    for _ in range(k - 1):
        reach = nearest.cumsum(1)
        drawn = np.minimum((reach < random.random((starts, 1)) * reach[:, -1:]).sum(1), len(points) - 1)
        means = np.concatenate([means, points[drawn][:, None]], 1)
        nearest = np.minimum(nearest, np.maximum(_squared(points, squares, means[:, -1:])[..., 0], 0))
    return means


def _moved(points: Floats, labels: Ints, means: Floats) -> Floats:
    """The mean of each cluster; an empty one stays where it is."""
    starts, k, wide = means.shape
    at = (labels + k * np.arange(starts)[:, None]).ravel()
    counts = np.bincount(at, minlength=starts * k).reshape(starts, k)
    sums = np.stack([np.bincount(at, np.tile(points[:, n], starts), starts * k) for n in range(wide)], 1)
    moved: Floats = np.where(counts[..., None] > 0, sums.reshape(starts, k, wide) / np.maximum(counts, 1)[..., None], means)
    return moved
