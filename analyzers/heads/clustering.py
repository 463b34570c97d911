"""Which attention heads do the same: their Jensen-Shannon divergences, as a map of all heads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.heads.divergence import LOOKS, Sums, count
from analyzers.numbers.embed import Floats, Ints, Separation, group, plane, separation
from analyzers.protocol import Analyzer, AnalyzerError, Batch, checked, real_tokens
from analyzers.sites import read_maps
from fmr.ids import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from fmr.structure.parts import Attention, Structure


class HeadClustering(Analyzer["HeadClusters"]):
    """Measure how differently attention heads look at the same tokens, over a data set.

    >>> heads = HeadClustering(model)
    >>> heads.over(tokenizer(text, return_tensors="pt", padding=True) for text in texts)
    >>> heads.result().plot()

    model: any module with self-attention, in eval mode; None where only `update_patterns` is used.
    smoothing: the share of uniform attention over the real keys mixed into each row before comparing, from 0 (none, as
    in the paper) to below 1; a little of it makes less of weights that differ only in how close to 0 they are.
    scope: a glob over the module calls that hold the attentions, for a model with several stacks ("encoder.*").
    mask: the name of the argument that is 0 on padding, (examples, positions); without it every token is real.

    The distance of two heads is the divergence of their rows in bits, the mean over all real query tokens: 0 for heads
    that look alike, 1 for heads that never look at the same token. Padding counts neither as query nor as key. The first
    batch is tracked in full to find the patterns; later ones read only these.

    Source: K. Clark, U. Khandelwal, O. Levy, C. Manning, "What Does BERT Look At?", 2019, section 6.
    """

    def __init__(
        self, model: nn.Module | None = None, *, smoothing: float = 0.0, scope: str = "*", mask: str = "attention_mask"
    ) -> None:
        if not 0 <= smoothing < 1:
            raise AnalyzerError(f"smoothing={smoothing}: expected a share from 0 (none) to below 1, such as 0.001.")
        self.model, self.smoothing, self.scope, self.mask = model, smoothing, scope, mask
        self.blocks: tuple[Attention, ...] = ()
        self.layers: tuple[int, ...] = ()
        self.sums: Sums | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the patterns lie, by layer; none before the first batch."""
        return tuple(block.pattern for block in self.blocks)

    def update(self, batch: Batch) -> "HeadClustering":
        """Run the model on one batch and count its attention.

        >>> heads.update(tokenizer(["It rains."], return_tensors="pt"))

        batch: the model's arguments by name, with the mask where there is padding. `AnalyzerError` if the batch holds
        no tensor, or the model no attention that `fmr.locate` certifies.
        """
        if self.model is None:
            raise AnalyzerError(
                "This HeadClustering has no model to run. Make it with HeadClustering(model), or call update_patterns."
            )
        inputs = checked(batch)
        self.blocks, patterns = read_maps(self.model, inputs, self.blocks, self._blocks)
        return self.update_patterns(patterns, inputs.get(self.mask))

    def update_patterns(self, patterns: Sequence[Any], mask: Any = None) -> "HeadClustering":
        """Count attention patterns from any source.

        >>> HeadClustering().update_patterns([torch.eye(5).expand(2, 12, 5, 5)])

        patterns: one tensor or array per layer, (examples, heads, queries, keys), all over the same tokens.
        mask: (examples, positions), 0 on padding; None: no padding.
        """
        values = [torch.as_tensor(pattern) for pattern in patterns]
        _check_shapes(values)
        layers = tuple(value.shape[1] for value in values)
        if self.sums is not None and layers != self.layers:
            raise AnalyzerError(
                f"This batch has {list(layers)} heads by layer, earlier ones had {list(self.layers)}. {_ONE}"
            )
        real = real_tokens(mask, values[0].shape[0], values[0].shape[-1])
        with torch.no_grad():
            self._add(layers, count(values, real.to(values[0].device), self.smoothing))
        return self

    def merge(self, other: "HeadClustering") -> "HeadClustering":
        """Add what another analyzer counted on other data, and return this one; the result is that of one pass over all.

        >>> HeadClustering(model).over(batches[:2]).merge(HeadClustering(model).over(batches[2:])).result()

        `AnalyzerError` if the two differ in heads, in where the patterns lie, or in smoothing.
        """
        if not isinstance(other, HeadClustering):
            raise AnalyzerError(f"merge got {type(other).__name__}, expected another HeadClustering.")
        if self.smoothing != other.smoothing:
            raise AnalyzerError(f"merge of smoothing={self.smoothing} with {other.smoothing}: expected one value. {_ONE}")
        if other.sums is None:
            return self
        if self.sums is not None and self.layers != other.layers:
            raise AnalyzerError(f"merge of {list(self.layers)} heads by layer with {list(other.layers)}. {_ONE}")
        ours, theirs = ([str(site.id) for site in one.sites] for one in (self, other))
        if ours and theirs and ours != theirs:
            first = next(n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
            raise AnalyzerError(f"merge of patterns at {ours[first]!r} with {theirs[first]!r} (layer {first}). {_ONE}")
        self.blocks = self.blocks or other.blocks
        self._add(other.layers, other.sums)
        return self

    def result(self, *, clusters: int | None = None, seed: int = 0, permutations: int = 2000) -> "HeadClusters":
        """Distances, a map in the plane, clusters, and whether heads of one layer are alike beyond chance.

        >>> heads.result(seed=0).distances.shape
        (16, 16)

        clusters: how many; None takes the number of highest silhouette. seed: of the map's random starts and of the
        permutations of layer labels, of which `permutations` are drawn (0: no test, p_value is nan).
        """
        if self.sums is None or not self.sums.tokens:
            raise AnalyzerError("No token has been counted yet. Call update(batch) or over(batches) before result().")
        sums, heads = self.sums, [(layer, head) for layer, n in enumerate(self.layers) for head in range(n)]
        distances = (sums.divergence / sums.tokens).numpy()
        points, stress = plane(distances, seed)
        labels, silhouette = group(distances, clusters)
        looks = {look: (sums.looks[look] / (sums.asked[look] or float("nan"))).numpy() for look in LOOKS}
        return HeadClusters(
            distances=distances,
            heads=tuple(heads),
            scopes=tuple(block.scope for block in self.blocks),
            looks=looks | {"entropy": (sums.entropy / sums.tokens).numpy()},
            points=points,
            stress=stress,
            clusters=labels,
            silhouette=silhouette,
            by_layer=separation(distances, np.array([layer for layer, _ in heads]), permutations, seed),
            tokens=sums.tokens,
            examples=sums.examples,
            skipped=sums.skipped,
            smoothing=self.smoothing,
            seed=seed,
        )

    def _add(self, layers: tuple[int, ...], sums: Sums) -> None:
        if self.sums is None:
            self.layers, self.sums = layers, Sums.zeros(len(sums))
        self.sums.add(sums)

    def _blocks(self, structure: "Structure") -> "tuple[Attention, ...]":
        """The self-attentions that the scope selects; an error says what there was instead."""
        found = [block for block in structure.attention if block.kind == "self"]
        chosen = tuple(block for block in found if fnmatchcase(block.scope, self.scope))
        if chosen:
            return chosen
        if found:
            scopes = ", ".join(repr(block.scope) for block in found[:4])
            raise AnalyzerError(
                f"scope={self.scope!r} matches no self-attention of {structure.model}. Expected a glob over {scopes}."
            )
        reasons = "".join(f"\n  {one!r}" for one in structure.rejected) or " There was no softmax to consider."
        raise AnalyzerError(
            f"{structure.model} has no self-attention that could be certified, so there are no heads to compare. "
            f"Run it in eval mode and check fmr.locate(run). Rejected:{reasons}"
        )


_ONE = "Use one analyzer per model and setting, and merge only those that agree."


def _check_shapes(patterns: list[Tensor]) -> None:
    if not patterns:
        raise AnalyzerError("patterns is empty. Expected one (examples, heads, queries, keys) tensor per layer.")
    for layer, pattern in enumerate(patterns):
        shape = tuple(pattern.shape)
        alike = (
            len(shape) == 4
            and shape[2] == shape[3]
            and (shape[0], shape[2]) == (patterns[0].shape[0], patterns[0].shape[-1])
        )
        if not alike:
            raise AnalyzerError(
                f"The pattern of layer {layer} has shape {shape}, that of layer 0 {tuple(patterns[0].shape)}. Expected "
                f"(examples, heads, queries, keys) with as many queries as keys and the same tokens in every layer. Of a "
                f"model with several stacks, choose one: HeadClustering(model, scope='encoder.*')."
            )


@dataclass(frozen=True, eq=False)
class HeadClusters:
    """The heads of a model by how differently they look at the same tokens.

    >>> result.heads[:2], result.distances[:2, :2].round(1)
    (((0, 0), (0, 1)), array([[0. , 0.5],
           [0.5, 0. ]]))
    >>> result.table().sort_values("previous").tail()

    distances: (heads, heads), mean Jensen-Shannon divergence in bits. heads: (layer, head) of each row; scopes: the module
    call of each layer. looks: by name, the mean weight that each head gives to the previous, next, first, last token and to
    the token itself, where there is one, and its entropy in bits. points: (heads, 2), a map of the distances, with its
    stress. clusters: a label per head, with the mean silhouette. by_layer: mean distance within and between layers, and the
    share of random layer labels that do as well. skipped: queries left out, as some head gave no weight to real keys.
    """

    distances: Floats
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

    @property
    def names(self) -> list[str]:
        """Each head as "layer.head"."""
        return [f"{layer}.{head}" for layer, head in self.heads]

    def table(self) -> "DataFrame":
        """One row per head: where it is, its cluster and nearest head, and where it looks.

        >>> result.table().query("cluster == 0")
        """
        import pandas as pd

        others = self.distances + np.diag(np.full(len(self.heads), np.inf))
        return pd.DataFrame(
            {
                "layer": [layer for layer, _ in self.heads],
                "head": [head for _, head in self.heads],
                "cluster": self.clusters,
                "nearest": [self.names[i] for i in others.argmin(1)],
                "nearest_bits": others.min(1),
                **self.looks,
                "x": self.points[:, 0],
                "y": self.points[:, 1],
            },
            index=pd.Index(self.names, name="layer.head"),
        )

    def plot(self, ax: "Axes | None" = None) -> "Figure":
        """Draw the map: a labelled point per head, coloured by layer, outlined by cluster; returns the figure.

        >>> result.plot().savefig("heads.png")

        ax: where to draw; None makes a figure. Both axes are in bits of divergence.
        """
        from analyzers.heads.scatter import draw
        from fmr.pictures.heatmap import returned

        return returned(draw(self, ax)) if ax is None else draw(self, ax)

    def __repr__(self) -> str:
        within, between, p_value = self.by_layer
        quality = f"silhouette {self.silhouette:.2f}; map: stress {self.stress:.3f}, seed {self.seed}"
        return (
            f"HeadClusters: {len(self.heads)} heads of {self.heads[-1][0] + 1} layers over {self.tokens} tokens in "
            f"{self.examples} examples\n"
            f"  distance in bits: within a layer {within:.3f}, between layers {between:.3f}, permutation p {p_value:.2g}\n"
            f"  {self.clusters.max() + 1} clusters, {quality}"
        )
