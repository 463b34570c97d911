"""Activation patching: values of one run are put into another, one place at a time, and the answer is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

import fmr
from analyzers.causal.cells import Cell
from analyzers.causal.effects import Effects, effects_of
from analyzers.causal.metrics import by_pair, numbers
from analyzers.causal.opening import Patching, ids_of
from analyzers.prompts import Prompts
from analyzers.protocol import Given
from fmr.nodes import Key
from fmr.sweeps.grid import Grid
from fmr.sweeps.metrics import Metric


class ActivationPatching(Patching):
    """Patch the activations of one run into another, one site at a time, and measure how far the answer goes over.

    >>> patching = ActivationPatching(model, tokenizer)
    >>> patching.run(clean, corrupted, logit_diff(right, wrong), progress=False).plot()

    model: any module whose layers `fmr.locate` finds, in eval mode. tokenizer: for prompts and answers that are text.
    direction: "denoising" puts clean values into the corrupted run: what is enough to restore the answer. "noising" puts
    corrupted values into the clean run: what is needed for it.

    The effect of a site is (patched - base) / (source - base) of the metric, means over pairs: 0 where the patched run
    answers as before, 1 where it answers as the run that the value came from. All sites go through one `fmr.sweep`.

    Source: J. Vig et al., "Investigating gender bias in language models using causal mediation analysis", 2020; F. Zhang,
    N. Nanda, "Towards best practices of activation patching in language models", 2024.
    """

    def run(
        self,
        clean: Given,
        corrupted: Given,
        metric: Metric,
        sites: Sequence[Key] | None = None,
        *,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Effects:
        """Patch every site in turn.

        >>> patching = ActivationPatching(model, tokenizer)
        >>> patching.run(clean, corrupted, logit_diff(right, wrong), progress=False).maps["resid_pre"].shape
        (4, 15)

        clean, corrupted: prompts that belong together one by one, with as many tokens each. metric: of the model's output,
        one number for each example, larger for the clean answer; `logit_diff` and `log_prob` of fmr.sweeps take answers as
        text. sites: what to patch; None takes the stream, attention and memory of every layer by position, and z by head.
        seed: of the confidence intervals, and of the cells that are run one by one to check the sweep. progress: show a bar;
        None shows it on a terminal only.
        """
        base, source, labels, metric = self._opened(clean, corrupted, metric)
        cells = self._cells(base, sites)
        taken, reached = self._source(source, ids_of(cells), metric)
        grid = self._sweep(cells, taken, base, metric, seed, progress)
        before, after = numbers(grid.base, -1), numbers(grid.values, -1, len(base))
        return effects_of(
            f"Activation patching ({self.direction})",
            cells,
            after - before,
            before,
            reached,
            labels,
            seed,
            control=self._control(metric, cells, after - before, base, source, before, reached - before),
            how=grid.how,
            forwards=grid.forwards + 1,
            error=grid.error,
        )

    def _sweep(
        self, cells: Iterable[Cell], taken: fmr.Run, base: Prompts, metric: Metric, seed: int, progress: bool | None
    ) -> Grid:
        sites, edit = [cell.site for cell in cells], fmr.edits.Interchange(taken)
        return fmr.sweep(self.model, dict(base.inputs), sites, edit, metric, seed=seed, progress=progress)

    def _control(
        self, metric: Metric, cells: list[Cell], changes: Tensor, base: Prompts, source: Prompts, before: Tensor, gap: Tensor
    ) -> dict[str, float]:
        """The effect of the strongest cell of each kind with values of another pair, a run each; none where there is one."""
        strongest = {cells[place].kind: cells[place] for place in np.argsort(changes.mean(1).abs().numpy())}
        if len(base) < 2:
            return {}
        other = fmr.run(self.model, **source.rolled().inputs, keep=ids_of(strongest.values()))
        found = {}
        for kind, cell in strongest.items():
            run = fmr.run(self.model, **base.inputs, keep=(), edits={cell.site: fmr.edits.Interchange(other)})
            found[kind] = float((numbers(by_pair(metric, run, len(base)), -1) - before).mean() / gap.mean())
        return found
