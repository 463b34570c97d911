"""The heads of one model or of several by how far they lie from one another, as tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from analyzers.heads.divergence import ATTENTION, BEYOND, DISTANCES
from analyzers.numbers.embed import Floats, Ints, Separation
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class HeadClusters(Stored):
    """The heads of a model, or of several, by how differently they look at the same tokens, or what else was compared.

    >>> result.heads[:2], result.distances[:2, :2].round(1)
    (((0, 0), (0, 1)), array([[0. , 0.5],
           [0.5, 0. ]]))
    >>> result.table().sort_values("previous").tail()

    distances: (heads, heads), of the kind that `distance` names. heads: (layer, head) of each row; models: the name of its
    model, empty where there is one; scopes: the module call of each layer. looks: by name, the mean weight that each head
    gives to the previous, next, first, last token and to the token itself, where there is one, and its entropy in bits.
    points: (heads, 2), a map of the distances, with its stress. clusters: a label per head, with the mean silhouette.
    by_layer: mean distance within and between layers, and the share of random layer labels that do as well. skipped: queries
    left out, as some head gave no weight to real keys.
    """

    distances: Floats
    distance: str
    models: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    scopes: tuple[str, ...]
    looks: dict[str, Floats] = field(repr=False)
    points: Floats
    stress: float
    clusters: Ints
    silhouette: float
    by_layer: Separation
    tokens: int
    examples: int
    skipped: int
    smoothing: float
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_layer", Separation(*self.by_layer))

    @property
    def names(self) -> list[str]:
        """Each head as "layer.head", with the name of its model before it where there are several."""
        return [f"{model} {layer}.{head}".lstrip() for model, (layer, head) in zip(self.models, self.heads, strict=True)]

    @property
    def unit(self) -> str:
        """What a distance is, in words."""
        return DISTANCES[self.distance]

    def between(self, heads: list[str], others: list[str] | None = None) -> float:
        """The mean distance of some heads among themselves, or to others.

        >>> result.between(["0.0", "0.1"], ["3.0", "3.1"])
        0.4...
        """
        unknown = [name for name in (*heads, *(others or ())) if name not in self.names]
        if unknown or not heads:
            raise AnalyzerError(f"{unknown or heads} are no heads here. Expected some of {', '.join(self.names[:4])} ...")
        rows = [self.names.index(name) for name in heads]
        columns = rows if others is None else [self.names.index(name) for name in others]
        part = self.distances[np.ix_(rows, columns)]
        apart = np.not_equal.outer(rows, columns)
        return float(part[apart].mean()) if apart.any() else float("nan")

    def counterparts(self) -> list[tuple[str, str, float]]:
        """Each head of the first model with the same one of each other model, and their distance, farthest first.

        >>> result.counterparts()
        []
        """
        first, found = self.models[0], []
        places = {(model, head): n for n, (model, head) in enumerate(zip(self.models, self.heads, strict=True))}
        for (model, head), n in places.items():
            if model != first and (first, head) in places:
                other = places[first, head]
                found.append((self.names[other], self.names[n], float(self.distances[other, n])))
        return sorted(found, key=lambda one: -one[2])

    def table(self) -> DataFrame:
        """One row per head: where it is, its cluster and nearest head, and where it looks.

        >>> result.table().query("cluster == 0")
        """
        import pandas as pd

        others = self.distances + np.diag(np.full(len(self.heads), np.inf))
        nearest = "nearest_bits" if self.distance in (ATTENTION, BEYOND) else "nearest_distance"
        return pd.DataFrame(
            ({"model": self.models} if any(self.models) else {})
            | {
                "layer": [layer for layer, _ in self.heads],
                "head": [head for _, head in self.heads],
                "cluster": self.clusters,
                "nearest": [self.names[i] for i in others.argmin(1)],
                nearest: others.min(1),
                **self.looks,
                "x": self.points[:, 0],
                "y": self.points[:, 1],
            },
            index=pd.Index(self.names, name="layer.head"),
        )

    def plot(self, ax: Axes | None = None, kind: str = "map") -> Figure:
        """Draw the map: a labelled point per head, coloured by layer, outlined by cluster; returns the figure.

        >>> result.plot().savefig("heads.png")
        >>> result.plot(kind="tree").savefig("tree.png")

        ax: where to draw; None makes a figure. kind: "map", or "tree" for the dendrogram by average linkage, cut where the
        clusters are. All axes have the unit of the distance.
        """
        from analyzers.heads.scatter import draw
        from analyzers.heads.tree import draw as draw_tree
        from fmr.pictures.heatmap import returned

        kinds = {"map": draw, "tree": draw_tree}
        if kind not in kinds:
            raise AnalyzerError(f"kind={kind!r}: expected 'map' or 'tree'.")
        drawn = kinds[kind](self, ax)
        return returned(drawn) if ax is None else drawn

    def __repr__(self) -> str:
        within, between, p_value = self.by_layer
        apart = f"silhouette {self.silhouette:.2f}; " if self.silhouette == self.silhouette else ""
        quality = f"{apart}map: stress {self.stress:.3f}, seed {self.seed}"
        unit = "in bits" if self.distance == ATTENTION else f"({self.unit})"
        said = f"within a layer {within:.3f}", f"between layers {between:.3f}", f"permutation p {p_value:.2g}"
        told = ", ".join(text for text, known in zip(said, self.by_layer, strict=True) if known == known)
        layers = len(dict.fromkeys(zip(self.models, (layer for layer, _ in self.heads), strict=True)))
        lines = [
            f"HeadClusters: {number_of(len(self.heads), 'head')} of {number_of(layers, 'layer')} over "
            f"{number_of(self.tokens, 'token')} in {number_of(self.examples, 'example')}",
            f"  distance {unit}: {told or 'of one head to none'}",
            f"  {number_of(self.clusters.max() + 1, 'cluster')}, {quality}",
        ]
        if pairs := self.counterparts():
            mean = float(np.mean([apart for _, _, apart in pairs]))
            lines.append(f"  the same head of two models: {mean:.3f} apart, most {pairs[0][0]} ({pairs[0][2]:.3f})")
        return "\n".join(lines)
