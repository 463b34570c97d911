"""What each layer, memory and head is worth: the loss without it, all of them in one sweep, beside changes as large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.numbers.confidence import means
from analyzers.prompts import prompts
from analyzers.protocol import AnalyzerError, Given, Method, check_eval
from analyzers.sparsity.pruning import loss_of
from analyzers.surgery.costs import LayerCosts
from analyzers.surgery.places import stream_of, writes_of
from fmr.ids import Site
from fmr.nodes import Key
from fmr.structure.parts import Structure
from fmr.sweeps.metrics import Metric

LAYER, MEMORY, HEAD = "layer", "memory", "head"


class _Part(NamedTuple):
    """What is left out: its kind, its layer, which one of the layer it is, and the sites of what it writes."""

    kind: str
    layer: int
    place: int
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Turned:
    """A change as long as leaving a value out, in a random direction: its null.

    At each position a random vector as long as the value is added, the same for every example.
    """

    seed: int

    def __call__(self, value: Tensor, context: fmr.edits.Context) -> Tensor:
        """The value with its change."""
        draw = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(value.shape[1:], generator=draw).to(value)
        changed: Tensor = value + noise * (value.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        return changed


class Ablation(Method):
    """The cost in loss of each layer, memory and head of a model: how much the loss grows when it is left out.

    >>> costs = analyzers.Ablation(model, tokenizer).run(texts, progress=False)
    >>> costs.table().sort_values("cost").tail(3)

    model: any module whose layers `fmr.locate` finds, in eval mode. tokenizer: for texts. A layer is left out by zeros at
    all that it writes to the stream (norms on the stream itself stay), a memory by zeros at its output, a head by a zero z.
    All go through one `fmr.sweep`, and so does the control: to each a random vector is added that is as long as what is left
    out, at every position. A part whose cost is no more than that of the control matters by its size alone.

    Source: P. Michel, O. Levy, G. Neubig, "Are sixteen heads really better than one?", 2019 (heads); D. Fan, E. Grave,
    A. Joulin, "Reducing transformer depth on demand with structured dropout", 2020 (layers).
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer

    def run(self, texts: Given, metric: Metric | None = None, *, seed: int = 0, progress: bool | None = None) -> LayerCosts:
        """Leave out each layer, memory and head on these texts.

        >>> analyzers.Ablation(model, tokenizer).run(texts, progress=False).maps["head"].shape
        (4, 4)

        texts: what the loss is of. metric: of the model's output, one number for each example, larger for worse; None takes
        the mean cross-entropy of the next tokens in nats. seed: of the control and the intervals. progress: show a bar; None
        shows it on a terminal only.
        """
        check_eval(self.model)
        given = prompts(texts, self.model, self.tokenizer)
        structure = fmr.locate(fmr.run(self.model, **given.inputs))
        parts = _parts(structure)
        if not parts:
            raise AnalyzerError(f"{structure.model} has no layers that were found. Expected a model with a residual stream.")
        asked: list[Mapping[Key, Any]] = [dict.fromkeys(part.sites, fmr.edits.Zero()) for part in parts]
        asked += [{site: Turned(seed + n) for n, site in enumerate(part.sites)} for part in parts]
        metric = loss_of(given) if metric is None else metric
        grid = fmr.sweep(self.model, dict(given.inputs), asked, None, metric, seed=seed, progress=progress)
        base = grid.base.double().reshape(-1).cpu()
        changes = (grid.values.double().cpu().reshape(len(asked), -1) - base).numpy()
        cost, low, high = means(changes[: len(parts)], seed)
        return LayerCosts(
            model=type(self.model).__name__,
            kinds=tuple(part.kind for part in parts),
            layers=np.array([part.layer for part in parts]),
            places=np.array([part.place for part in parts]),
            cost=cost,
            low=low,
            high=high,
            control=changes[len(parts) :].mean(1),
            base=float(base.mean()),
            examples=len(given),
            how=grid.how,
            forwards=grid.forwards,
            seed=seed,
        )


def _parts(structure: Structure) -> list[_Part]:
    """All that may be left out."""
    found = []
    for number, layer in enumerate(structure.layers):
        _, stream = stream_of(structure, layer)
        written = tuple(Site(write.added) for write in writes_of(stream, layer))
        found.append(_Part(LAYER, number, 0, written))
        found += [_Part(MEMORY, number, n, (memory.out,)) for n, memory in enumerate(layer.mlps)]
        first = 0
        for block in layer.attentions:
            if "heads" in (block.z.layout or ()):
                found += [_Part(HEAD, number, first + n, (block.z.at(heads=n),)) for n in range(block.n_heads)]
            first += block.n_heads
    return found
