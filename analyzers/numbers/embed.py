"""From distances to something to look at: points in the plane, clusters, and whether groups are closer than chance."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyzers.protocol import AnalyzerError
from fmr.errors import whole_number

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def plane(distances: Floats, seed: int = 0, starts: int = 8) -> tuple[Floats, float]:
    """Points in the plane whose distances come nearest to the given ones, and their stress.

    >>> points, stress = plane(distances, seed=0)
    >>> points.shape
    (16, 2)

    distances: (n, n), symmetric, 0 on the diagonal; the points have their unit. starts: random starts beside the
    classical solution, of which the best is taken, since the majorisation finds local minima. Stress is Kruskal's
    stress-1: 0 is exact, 0.05 good, 0.2 poor. The points are centred and turned to their principal axes, so that equal
    distances and seeds give equal pictures.

    Source: J. Kruskal, "Multidimensional scaling by optimizing goodness of fit to a nonmetric hypothesis", 1964;
    J. de Leeuw, "Applications of convex analysis to multidimensional scaling", 1977 (SMACOF, as in scikit-learn).
    """
    from sklearn.manifold import smacof

    unit = distances.mean()
    if len(distances) < 2 or not unit:
        return np.zeros((len(distances), 2)), 0.0
    fixed: dict[str, Any] = {"max_iter": 1000, "eps": 1e-9, "normalized_stress": False}
    found = [smacof(distances / unit, init=_classical(distances / unit), n_init=1, **fixed)]
    if starts:
        found.append(smacof(distances / unit, n_components=2, n_init=starts, random_state=seed, **fixed))
    points = _turned(min(found, key=lambda one: one[1])[0] * unit)
    return points, stress(distances, points)


def stress(distances: Floats, points: Floats) -> float:
    """Kruskal's stress-1 of points: the root mean square error of their distances, relative to those."""
    placed = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return float(np.sqrt(((placed - distances) ** 2).sum() / max((placed**2).sum(), np.finfo(float).tiny)))


def _classical(distances: Floats) -> Floats:
    """Torgerson's solution: the two leading eigenvectors of the centred squared distances."""
    centre = np.eye(len(distances)) - 1 / len(distances)
    values, vectors = np.linalg.eigh(-0.5 * centre @ distances**2 @ centre)
    points: Floats = vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 1e-12))
    return points


def _turned(points: Floats) -> Floats:
    """The points about their centre, along their principal axes, the farthest of each axis on the positive side."""
    centred = points - points.mean(0)
    turned = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    flipped: Floats = turned * np.sign(turned[np.abs(turned).argmax(0), [0, 1]] + np.finfo(float).tiny)
    return flipped


def group(distances: Floats, k: int | None = None, most: int = 40) -> tuple[Ints, float]:
    """Cluster labels by average linkage, largest cluster first, and their mean silhouette.

    >>> labels, silhouette = group(distances)
    >>> len(set(labels))
    3

    distances: (n, n). k: how many clusters; None takes the number from 2 to `most` with the highest silhouette among
    those that leave two clusters of several members, since to split off one outlier says nothing about the others.

    Source: P. Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of cluster analysis", 1987.
    """
    n = len(distances)
    if k is not None and (whole_number(k) is None or not 1 <= k <= n):
        raise AnalyzerError(f"clusters={k!r} for {n} heads: expected 1 to {n}, or None for that of highest silhouette.")
    if n < 3 and k is None:
        return np.zeros(n, dtype=np.int64), float("nan")
    cuts = [_cut(distances, number) for number in ([k] if k is not None else range(2, min(most, n - 1) + 1))]
    plural = [cut for cut in cuts if np.sum(np.bincount(cut[0]) > 1) > 1]
    labels, silhouette = max(plural or cuts, key=lambda cut: cut[1])
    return _by_size(labels), silhouette


def _cut(distances: Floats, k: int) -> tuple[Any, float]:
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    n = len(distances)
    if not 2 <= k <= n - 1:
        return np.arange(n) % k, float("nan")
    labels = AgglomerativeClustering(n_clusters=k, metric="precomputed", linkage="average").fit_predict(distances)
    return labels, float(silhouette_score(distances, labels, metric="precomputed"))


def _by_size(labels: Any) -> Ints:
    """The labels renamed 0, 1, ...: larger clusters first, equal ones by their first member."""
    names = sorted(set(labels.tolist()), key=lambda label: (-int((labels == label).sum()), int((labels == label).argmax())))
    return np.array([names.index(label) for label in labels.tolist()], dtype=np.int64)


class Separation(NamedTuple):
    """Mean distance within and between groups, and the share of random groupings that keep the first as small."""

    within: float
    between: float
    p_value: float


def separation(distances: Floats, labels: Ints, permutations: int = 2000, seed: int = 0) -> Separation:
    """Whether things of one label lie closer together than labels dealt at random would put them.

    >>> round(separation(distances, layers).p_value, 4)
    0.0005

    distances: (n, n). labels: (n,). The permutation test shuffles the labels; p = (1 + as small) / (1 + permutations).

    Source: N. Mantel, "The detection of disease clustering and a generalized regression approach", 1967.
    """
    same, other = labels[:, None] == labels[None], ~np.eye(len(labels), dtype=bool)
    within, between = _mean(distances[same & other]), _mean(distances[~same])
    if np.isnan([within, between]).any() or not permutations:
        return Separation(within, between, float("nan"))
    members = np.eye(labels.max() + 1)[labels]
    random = np.random.default_rng(seed)
    seen = np.vdot(members, distances @ members)
    drawn = [np.vdot(one, distances @ one) for one in (random.permutation(members) for _ in range(permutations))]
    return Separation(within, between, (1 + int(np.sum(drawn <= seen * (1 + 1e-12)))) / (1 + permutations))


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")
