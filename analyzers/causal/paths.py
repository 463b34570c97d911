"""Path patching: what a head tells another part directly, with all other heads as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

import fmr
from analyzers.causal.cells import Cell, given_cells
from analyzers.causal.effects import Effects, effects_of
from analyzers.causal.metrics import numbers
from analyzers.causal.opening import Direction, Patching, ids_of
from analyzers.protocol import AnalyzerError, Given
from fmr.edits import Edit, Interchange, Replace
from fmr.ids import Site
from fmr.nodes import Key
from fmr.structure.parts import Structure
from fmr.sweeps.bars import bar
from fmr.sweeps.metrics import Metric

Row = dict[Key, Edit]


class PathPatching(Patching):
    """Patch the paths from single heads to the logits or to other sites, and measure what the answer does.

    >>> paths = PathPatching(model, tokenizer)
    >>> paths.run(clean, corrupted, logit_diff(right, wrong), progress=False).strongest(3, "z")

    model, tokenizer: as for `ActivationPatching`. direction: that of the paper by default, "noising": the sender's corrupted
    value goes into the clean run, and effects are shares of the way to the corrupted answer; or "denoising". through_mlps:
    whether memories between sender and receiver are computed again (the default, as in the paper), or keep the values of
    the base run like all heads do: then the path is direct.

    A sender takes its value of the source run, every later head keeps that of the base run, and what the receivers get of
    this is put into a run in which nothing else is changed; where the logits receive, that is the answer already.

    Source: K. Wang, A. Variengien, A. Conmy, B. Shlegeris, J. Steinhardt, "Interpretability in the wild: a circuit for
    indirect object identification in GPT-2 small", 2023, section 3.1; N. Goldowsky-Dill et al., "Localizing model behavior
    with path patching", 2023.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, direction: Direction = "noising", through_mlps: bool = True
    ) -> None:
        super().__init__(model, tokenizer, direction=direction)
        self.through_mlps = through_mlps

    def run(
        self,
        clean: Given,
        corrupted: Given,
        metric: Metric,
        senders: Sequence[Key] | None = None,
        receivers: Sequence[Key] | None = None,
        *,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Effects:
        """Patch the path from each sender to the receivers.

        >>> paths, receivers = PathPatching(model, tokenizer), [structure.attention[3].v.at(heads=1)]
        >>> paths.run(clean, corrupted, logit_diff(right, wrong), receivers=receivers, progress=False).maps["z"].shape
        (4, 4)

        clean, corrupted, metric, seed: as for `ActivationPatching`. senders: sites of which each is patched by itself; None
        takes z of every head. receivers: sites that hear of a sender, all at once; None takes the logits.
        """
        base, source, labels, metric = self._opened(clean, corrupted, metric)
        held = fmr.run(self.model, **base.inputs)
        structure, _ = self._located(base)
        cells = _heads(structure) if senders is None else given_cells(senders)
        taken, reached = self._source(source, ids_of(cells), metric)
        rows: list[Row] = [{cell.site: Interchange(taken)} for cell in cells]
        frozen = [block.z for block in structure.attention]
        frozen += [] if self.through_mlps else [memory.out for memory in structure.mlps]
        if receivers is not None:
            heard = [cell.site for cell in given_cells(receivers)]
            rows, frozen = list(self._heard(rows, frozen, heard, held, progress)), []
        grid = fmr.sweep(self.model, dict(base.inputs), rows, None, metric, freeze=frozen, seed=seed, progress=progress)
        before = numbers(grid.base, -1)
        kind = "memories computed again" if self.through_mlps else "memories held"
        return effects_of(
            f"Path patching ({self.direction}, {kind})",
            cells,
            numbers(grid.values, -1, len(base)) - before,
            before,
            reached,
            labels,
            seed,
            how=grid.how,
            forwards=grid.forwards + 2,
            error=grid.error,
        )

    def _heard(
        self, rows: list[Row], frozen: list[Site], receivers: list[Site], held: fmr.Run, progress: bool | None
    ) -> Iterator[Row]:
        """What the receivers get of each sender, to be put into a run in which nothing else is changed."""
        for row in bar(rows, "senders", progress):
            first = min(held.graph.place(sender) for sender in row)
            later = [site for site in frozen if held.graph.place(site) > first]
            hears = [site for site in receivers if held.graph.place(site) > first]
            heard = fmr.replay(held, row, freeze=later, want=[Site(site.id) for site in hears]) if hears else held
            yield {site: Replace(heard[site]) for site in receivers}  # what comes before a sender hears nothing of it


def _heads(structure: Structure) -> list[Cell]:
    """Every head of every layer as a sender."""
    blocks = [(number, layer.attention) for number, layer in enumerate(structure.layers) if layer.attention is not None]
    if not blocks:
        raise AnalyzerError(f"fmr.locate found no attention in {structure.model}. Pass senders=[...], such as block.z.")
    return [Cell("z", number, head, block.z.at(heads=head)) for number, block in blocks for head in range(block.n_heads)]
