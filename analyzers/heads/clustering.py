"""Which attention heads do the same: their distances over a data set, by where they look or by what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.heads.clusters import HeadClusters
from analyzers.heads.divergence import ATTENTION, CKA, DISTANCES, LOOKS, OUTPUT, Sums, count
from analyzers.heads.outputs import Writing, count_outputs, from_likeness, writings
from analyzers.numbers.embed import group, plane, separation
from analyzers.protocol import Analyzer, AnalyzerError, Batch, check_counts, check_other, checked, real_tokens
from analyzers.sites import read_parts
from fmr.errors import number_of
from fmr.ids import Site
from fmr.nodes import Key
from fmr.runs.run import Run
from fmr.structure.parts import Attention

if TYPE_CHECKING:
    from fmr.structure.parts import Structure

Reading = tuple[Attention, Writing | None]
"""An attention, and how its heads write where that is asked for."""

Read = tuple[Tensor, Tensor | None]
"""The pattern of an attention, (examples, heads, queries, keys), and what its heads wrote, (examples, heads, positions,
width)."""


class HeadClustering(Analyzer["HeadClusters"]):
    """Measure how differently attention heads look at, or write from, the same tokens, over a data set.

    >>> heads = HeadClustering(model)
    >>> heads.over(tokenizer(text, return_tensors="pt", padding=True) for text in texts)
    >>> heads.result().plot()

    model: any module with self-attention, in eval mode; several by name, {"before": one, "after": other}, are put on one map
    (they must split texts alike); None where only `update_patterns` is used.
    distances: which are counted, one or several of:

        attention       the Jensen-Shannon divergence of two heads' rows in bits, the mean over all real query tokens: 0 for
                        heads that look alike, 1 for heads that never look at the same token
        beyond first    the same over all keys but the first, each row with the sum 1 again: heads that rest on the first
                        token (a sink) are alike by that alone
        output          1 - cosine of what two heads add to the stream, after a norm that stands between, the mean over
                        tokens; without a stream, to the output of their attention
        cka             1 - linear CKA (unbiased) of these: whether they tell tokens apart alike, in whatever direction

    smoothing: the share of uniform attention over the real keys mixed into each row before comparing, from 0 (none, as
    in the paper) to below 1; a little of it makes less of weights that differ only in how close to 0 they are.
    scope: a glob over the module calls that hold the attentions, for a model with several stacks ("encoder.*").
    mask: the name of the argument that is 0 on padding, (examples, positions); without it every token is real.

    Padding counts neither as query nor as key. The first batch is tracked in full to find the patterns; later ones read only
    these.

    Source: K. Clark, U. Khandelwal, O. Levy, C. Manning, "What Does BERT Look At?", 2019, section 6; S. Kornblith et al.,
    "Similarity of Neural Network Representations Revisited", 2019 (CKA).
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module] | None = None,
        *,
        distances: str | Sequence[str] = ATTENTION,
        smoothing: float = 0.0,
        scope: str = "*",
        mask: str = "attention_mask",
    ) -> None:
        if not 0 <= smoothing < 1:
            raise AnalyzerError(f"smoothing={smoothing}: expected a share from 0 (none) to below 1, such as 0.001.")
        named = (distances,) if isinstance(distances, str) else tuple(distances)
        if not named or not set(named) <= DISTANCES.keys():
            raise AnalyzerError(f"distances={distances!r}: expected some of {', '.join(map(repr, DISTANCES))}.")
        self.models = dict(model) if isinstance(model, Mapping) else {"": model} if model is not None else {}
        self.distances, self.smoothing, self.scope, self.mask = named, smoothing, scope, mask
        self.found: dict[str, tuple[Reading, ...]] = {}
        self.layers: dict[str, tuple[int, ...]] = {}
        self.sums: Sums | None = None

    @property
    def blocks(self) -> tuple[Attention, ...]:
        """The attentions, by layer, model after model; none before the first batch."""
        return tuple(block for several in self.found.values() for block, _ in several)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the patterns lie, by layer; none before the first batch."""
        return tuple(block.pattern for block in self.blocks)

    def update(self, batch: Batch) -> HeadClustering:
        """Run the model on one batch and count its attention.

        >>> heads.update(tokenizer(["It rains."], return_tensors="pt"))

        batch: the model's arguments by name, with the mask where there is padding. `AnalyzerError` if the batch holds
        no tensor, or the model no attention that `fmr.locate` certifies.
        """
        if not self.models:
            raise AnalyzerError(
                "This HeadClustering has no model to run. Make it with HeadClustering(model), or call update_patterns."
            )
        inputs = checked(batch)
        read = {name: self._read(name, inputs) for name in self.models}
        patterns = {name: [pattern for pattern, _ in values] for name, values in read.items()}
        outputs = [written for values in read.values() for _, written in values if written is not None]
        return self._update(patterns, inputs.get(self.mask), outputs)

    def update_patterns(self, patterns: Sequence[Any] | Mapping[str, Sequence[Any]], mask: Any = None) -> HeadClustering:
        """Count attention patterns from any source.

        >>> HeadClustering().update_patterns([torch.eye(5).expand(2, 12, 5, 5)])

        patterns: one tensor or array per layer, (examples, heads, queries, keys), all over the same tokens; those of several
        models by name. mask: (examples, positions), 0 on padding; None: no padding.
        """
        if self._writes:
            raise AnalyzerError(f"Patterns alone do not tell what is written: expected distances of {_OF_PATTERNS}.")
        return self._update(dict(patterns) if isinstance(patterns, Mapping) else {"": patterns}, mask, [])

    @property
    def counted(self) -> str:
        """How many tokens were counted."""
        return number_of(self.sums.tokens, "token") if self.sums is not None and self.sums.tokens else ""

    def merge(self, other: HeadClustering) -> HeadClustering:
        """Add what another analyzer counted on other data, and return this one; the result is that of one pass over all.

        >>> HeadClustering(model).over(batches[:2]).merge(HeadClustering(model).over(batches[2:])).result()

        `AnalyzerError` if the two differ in heads, in where the patterns lie, in distances or in smoothing.
        """
        check_other(self, other, asked=("scope",) if self.sums is None else ())
        for what in ("smoothing", "distances"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours != theirs:
                raise AnalyzerError(f"merge of {what}={ours} with {theirs}: expected one value. {_ONE}")
        if other.sums is None:
            return self
        if self.sums is not None and self.layers != other.layers:
            raise AnalyzerError(f"merge of {_told(self.layers)} heads by layer with {_told(other.layers)}. {_ONE}")
        ours, theirs = ([str(site.id) for site in one.sites] for one in (self, other))
        if ours and theirs and ours != theirs:
            first = next(n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
            raise AnalyzerError(f"merge of patterns at {ours[first]!r} with {theirs[first]!r} (layer {first}). {_ONE}")
        self.found = self.found or other.found
        self._add(other.layers, other.sums)
        return self

    def result(
        self, *, distance: str | None = None, clusters: int | None = None, seed: int = 0, permutations: int = 2000
    ) -> HeadClusters:
        """Distances, a map in the plane, clusters, and whether heads of one layer are alike beyond chance.

        >>> heads.result(seed=0).distances.shape
        (16, 16)

        distance: which of those that were counted; None takes the first. clusters: how many; None takes the number of
        highest silhouette. seed: of the map's random starts and of the permutations of layer labels, of which
        `permutations` are drawn (0: no test, p_value is nan).
        """
        if self.sums is None or not self.sums.tokens:
            raise AnalyzerError("No token has been counted yet. Call update(batch) or over(batches) before result().")
        check_counts(0, permutations=permutations)
        kind, sums = self.distances[0] if distance is None else distance, self.sums
        if kind not in self.distances:
            raise AnalyzerError(
                f"distance={distance!r} was not counted. Expected one of {', '.join(map(repr, self.distances))}."
            )
        if not sums.counted[kind]:
            raise AnalyzerError(
                f"No example was long enough for the distance {kind!r}: expected texts of four tokens or more."
            )
        heads = [
            (name, layer, head) for name, sizes in self.layers.items() for layer, n in enumerate(sizes) for head in range(n)
        ]
        apart = from_likeness(sums.apart[kind]) if kind == CKA else sums.apart[kind] / sums.counted[kind]
        distances = apart.numpy()
        points, stress = plane(distances, seed)
        labels, silhouette = group(distances, clusters)
        looks = {look: (sums.looks[look] / (sums.asked[look] or float("nan"))).numpy() for look in LOOKS}
        by_layer = np.unique([f"{name} {layer:06d}" for name, layer, _ in heads], return_inverse=True)[1]
        return HeadClusters(
            distances=distances,
            distance=kind,
            models=tuple(name for name, _, _ in heads),
            heads=tuple((layer, head) for _, layer, head in heads),
            scopes=tuple(block.scope for block in self.blocks),
            looks=looks | {"entropy": (sums.entropy / sums.tokens).numpy()},
            points=points,
            stress=stress,
            clusters=labels,
            silhouette=silhouette,
            by_layer=separation(distances, by_layer, permutations, seed),
            tokens=sums.tokens,
            examples=sums.examples,
            skipped=sums.skipped,
            smoothing=self.smoothing,
            seed=seed,
        )

    @property
    def _writes(self) -> bool:
        return bool({OUTPUT, CKA} & set(self.distances))

    def _read(self, name: str, inputs: dict[str, Any]) -> list[Read]:
        """The patterns of one model, and what its heads wrote, in a batch."""
        with torch.no_grad():
            self.found[name], values = read_parts(
                self.models[name], inputs, self.found.get(name, ()), self._readings, _keys, _read
            )
        return values

    def _readings(self, structure: Structure, run: Run) -> tuple[Reading, ...]:
        blocks = self._blocks(structure)
        written = writings(structure, run, blocks) if self._writes else [None] * len(blocks)
        return tuple(zip(blocks, written, strict=True))

    def _update(self, patterns: Mapping[str, Sequence[Any]], mask: Any, outputs: list[Tensor]) -> HeadClustering:
        by_name = {name: [torch.as_tensor(pattern) for pattern in several] for name, several in patterns.items()}
        values = [value for several in by_name.values() for value in several]
        _check_shapes(values)
        layers = {name: tuple(value.shape[1] for value in several) for name, several in by_name.items()}
        if self.sums is not None and layers != self.layers:
            raise AnalyzerError(
                f"This batch has {_told(layers)} heads by layer, earlier ones had {_told(self.layers)}. {_ONE}"
            )
        real = real_tokens(mask, values[0].shape[0], values[0].shape[-1])
        with torch.no_grad():
            sums = count(
                [value.to(values[0].device) for value in values], real.to(values[0].device), self.smoothing, self.distances
            )
            if outputs:
                count_outputs(sums, [one.to(outputs[0].device) for one in outputs], real)
            self._add(layers, sums)
        return self

    def _add(self, layers: dict[str, tuple[int, ...]], sums: Sums) -> None:
        if self.sums is None:
            self.layers, self.sums = layers, Sums.zeros(len(sums), self.distances)
        self.sums.add(sums)

    def _blocks(self, structure: Structure) -> tuple[Attention, ...]:
        """The self-attentions that the scope selects, whose maps are distributions; an error says what there was instead."""
        found = [block for block in structure.attention if block.kind == "self" and block.minus is None]
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


def _keys(reading: Reading) -> list[Key]:
    block, written = reading
    return [*block.map_sites, *([] if written is None else written.keys)]


def _read(reading: Reading, run: Run) -> Read:
    block, written = reading
    return block.maps(run), None if written is None else written.read(run)


_OF_PATTERNS = "'attention' or 'beyond first'"
_ONE = "Use one analyzer per model and setting, and merge only those that agree."


def _told(layers: Mapping[str, tuple[int, ...]]) -> str:
    several = {name: list(sizes) for name, sizes in layers.items()}
    return str(several if set(several) != {""} else several[""])


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
