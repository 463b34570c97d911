"""k-means with many starts at once."""

import numpy as np

from analyzers.numbers.embed import Floats, Ints


def k_means(points: Floats, k: int, seed: int, starts: int = 10, turns: int = 100) -> Ints:
    """The labels of k clusters whose points lie closest to their means: the best of several starts.

    >>> k_means(np.array([[0.0], [0.1], [5.0], [5.1]]), 2, seed=0)
    array([0, 0, 1, 1])

    points: (points, dimensions). Starts are drawn far apart (k-means++) and moved until no label changes, all at once. Labels
    are in the order in which they come; where fewer points differ there are fewer of them.

    Source: D. Arthur, S. Vassilvitskii, "k-means++: the advantages of careful seeding", 2007; S. Lloyd, 1982.
    """
    squares = (points**2).sum(1)
    means = _seeded(points, squares, k, np.random.default_rng([seed, k]), starts)
    labels = np.full((starts, len(points)), -1)
    for _ in range(turns):
        distances = _squared(points, squares, means)
        new = distances.argmin(2)
        if np.array_equal(new, labels):
            break
        labels = new
        means = _moved(points, labels, means)
    spread = np.take_along_axis(_squared(points, squares, means), labels[..., None], 2).sum((1, 2))
    best: Ints = labels[spread.argmin()]
    _, first, where = np.unique(best, return_index=True, return_inverse=True)
    named: Ints = np.argsort(np.argsort(first))[where]
    return named


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
        drawn = (reach < random.random((starts, 1)) * reach[:, -1:]).sum(1).clip(max=len(points) - 1)
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
