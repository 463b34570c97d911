"""Causal tracing: the subject of a fact is made unreadable, and states of the clean run are put back, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.protocol import Analyzer, AnalyzerError, check_eval, check_other, device_of
from analyzers.tracing.cells import Cell, cells_of, checked_kinds, columns_of, window_of
from analyzers.tracing.corruption import Corrupted, noised, swapped
from analyzers.tracing.facts import Fact, asked, fact_of
from analyzers.tracing.traces import Trace, Traces, by_role, by_token
from fmr.edits import Interchange
from fmr.errors import number_of
from fmr.structure.parts import Structure
from fmr.sweeps import probability


class CausalTracing(Analyzer[Traces]):
    """Find where a model recalls a fact: which states bring the answer back to a run that cannot read the subject.

    >>> tracing = CausalTracing(model, tokenizer)
    >>> tracing.run("Junel Dunoth grew up in", "Junel Dunoth", progress=False).plot()
    >>> tracing.over(world.facts()[:3], progress=False).result().subject[-1]
    'last subject token'

    model: any module with a residual stream, in eval mode. tokenizer: for facts that are text. kinds: what is restored, of
    `KINDS` in `analyzers.tracing.cells`: "state" after a layer, what "attention" or "mlp" write in a window of layers, and
    the severed "state without mlp" and "state without attention". noise: the standard deviation of the noise that is added
    to the embedding of the subject's tokens; None takes 3 times that of the embedding there. swaps: other subjects to put in
    its place instead of noise, those of as many tokens. samples: how many draws of the noise (the paper takes 10), or how
    many swaps. window: how many layers go into a cell of attention or mlp; None takes a sixth of them. seed: of noise and
    choices.

    The indirect effect of a cell is p(answer) with it restored less p(answer) corrupted, the mean over samples, which are
    the same for all cells; the total effect is p(answer) clean less p(answer) corrupted. An answer of several tokens has
    the product of their probabilities. All cells of a fact go through one `fmr.sweep`.

    Source: K. Meng, D. Bau, A. Andonian, Y. Belinkov, "Locating and editing factual associations in GPT", 2022, section 2.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        kinds: Sequence[str] = ("state", "attention", "mlp"),
        noise: float | None = None,
        swaps: Sequence[str] = (),
        samples: int = 3,
        window: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("samples", samples, 1), ("window", window, 1), ("noise", noise, 0)):
            if value is not None and not (isinstance(value, int | float) and value >= least):
                raise AnalyzerError(f"{name}={value!r}: expected a number, {least} or more.")
        if isinstance(swaps, str) or (swaps and noise is not None):
            raise AnalyzerError(f"swaps={swaps!r}, noise={noise!r}: expected a list of other subjects, or noise, not both.")
        self.model, self.tokenizer, self.kinds = model, tokenizer, checked_kinds(kinds)
        self.noise, self.swaps, self.samples, self.window, self.seed = noise, tuple(swaps), samples, window, seed
        self.structure: Structure | None = None
        self.traces: list[Trace] = []
        self.skipped, self.said = 0, ""

    def run(
        self, prompt: Any, subject: Any, answer: Any = None, seed: int | None = None, *, progress: bool | None = None
    ) -> Traces:
        """Trace one fact: a map with a column for each token, and one for all of the subject.

        >>> traces = tracing.run("Junel Dunoth grew up in", "Junel Dunoth", progress=False)
        >>> traces.columns[1:4], traces.effects["state"].shape
        (('Junel*', 'Dunoth*', 'grew'), (4, 7))

        prompt: a text, or token ids. subject: a part of the text, or positions. answer: what follows, of any number of
        tokens; None for the model's first choice. seed: of the noise, the analyzer's own if None. progress: show a bar;
        None shows it on a terminal only.
        """
        seed = self.seed if seed is None else seed
        return by_token(self._trace(fact_of(prompt, subject, answer, self.tokenizer), prompt, subject, seed, progress), seed)

    def update(self, batch: Any) -> CausalTracing:
        """Trace one fact and count it; one whose answer is not the model's first choice is skipped, since it is not known.

        >>> CausalTracing(model, tokenizer).update(("Junel Dunoth grew up in", "Junel Dunoth", "Brigost"))

        batch: prompt, subject and answer, as a tuple or under these names; without an answer, the model's first choice.
        """
        prompt, subject, answer = asked(batch)
        fact = fact_of(prompt, subject, answer, self.tokenizer)
        if fact.answer and (choice := self._choice(fact)) != fact.answer[0]:
            self.skipped += 1
            self.said = self.said or f"{self._text([choice])!r} after {self._prompt(fact, prompt)!r}"
            return self
        self.traces.append(self._trace(fact, prompt, subject, self.seed, False))
        return self

    @property
    def counted(self) -> str:
        """How many facts were counted."""
        return number_of(len(self.traces), "fact") if self.traces else ""

    def merge(self, other: CausalTracing) -> CausalTracing:
        """Add the facts that another analyzer of the same settings traced, and return this one.

        >>> CausalTracing(model, tokenizer).merge(CausalTracing(model, tokenizer).update(world.facts()[0])).result()
        """
        check_other(self, other)
        if self._settings != other._settings:
            raise AnalyzerError(
                f"merge of {self._settings} with {other._settings}: expected another CausalTracing of these settings."
            )
        self.traces, self.skipped = [*self.traces, *other.traces], self.skipped + other.skipped
        self.said = self.said or other.said
        return self

    def result(self, *, seed: int = 0) -> Traces:
        """The means over all facts, by the role of each token; seed: of the confidence intervals.

        >>> CausalTracing(model, tokenizer).over(world.facts()[:2], progress=False).result().columns[0]
        'before the subject'
        """
        if not self.traces:
            if self.skipped:
                raise AnalyzerError(
                    f"No fact has been traced: {number_of(self.skipped, 'fact')} had another answer than the model's first "
                    f"choice, which is {self.said}. Expected facts that the model knows, or no answer, for its first "
                    "choice; run(prompt, subject, answer) traces any answer."
                )
            raise AnalyzerError("No fact has been traced yet. Call update(fact) or over(facts) before result().")
        return by_role(self.traces, self.skipped, seed)

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("kinds", "noise", "swaps", "samples", "window", "seed")
        return {name: getattr(self, name) for name in names}

    def _choice(self, fact: Fact) -> int:
        """What the model says first after the prompt."""
        with torch.no_grad():
            run = fmr.run(self.model, **self._placed({"input_ids": fact.ids[None]}), keep="none")
        return int(fmr.sweeps.metrics.logits_of(run.output)[0, -1].argmax())

    def _text(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else str(self.tokenizer.decode(list(ids)))

    def _prompt(self, fact: Fact, prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else " ".join(fact.tokens)

    def _placed(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Inputs on the device of the model."""
        device = device_of(self.model)
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _located(self, run: fmr.Run) -> Structure:
        """The structure of the model, from the first fact on."""
        if self.structure is None:
            self.structure = fmr.locate(run)
        return self.structure

    def _corrupted(self, fact: Fact, prompt: Any, subject: Any, clean: fmr.Run, seed: int) -> Corrupted:
        """Runs that read another subject, or noise in its place."""
        draw = torch.Generator().manual_seed(seed)
        if self.swaps:
            rows = swapped(fact, prompt, subject, self.swaps, self.tokenizer, draw)
            chosen = [torch.cat([rows[n % len(rows)] for n in range(start, start + self.samples)]) for start in (0, 1)]
            first, second = (self._placed({"input_ids": ids[: len(rows)]}) for ids in chosen)
            return Corrupted(self.model, first, {}, second, {}, {}, float("nan"))
        structure = self._located(clean)
        if structure.embedding is None:
            raise AnalyzerError(
                f"fmr.locate found no embedding in {structure.model} to add noise to. Expected a model of tokens, or other "
                "subjects in place of the noise: swaps=[...]."
            )
        inputs = self._placed(fact.inputs(self.samples))
        return noised(self.model, inputs, fact, structure.embedding, clean, self.noise, self.samples, draw)

    @torch.no_grad()
    def _trace(self, fact: Fact, prompt: Any, subject: Any, seed: int, progress: bool | None) -> Trace:
        """One fact: its clean and its corrupted runs, all cells in one sweep, and the controls."""
        check_eval(self.model)
        if not fact.answer:
            fact = Fact(fact.ids, fact.tokens, fact.subject, (self._choice(fact),))
        clean = fmr.run(self.model, **self._placed(fact.inputs()))
        structure = self._located(clean)
        columns = columns_of(fact.tokens, fact.subject)
        window = window_of(len(structure.layers), self.window)
        cells = list(cells_of(structure, columns, self.kinds, window))
        metric = probability(torch.tensor([fact.answer]))
        made = self._corrupted(fact, prompt, subject, clean, seed)
        held = [str(site.id) for site in dict.fromkeys(site for cell in cells for site in cell.held)]
        corrupted = Interchange(fmr.run(self.model, **made.inputs, edits=made.edits, keep=held)) if held else None
        rows = [cell.row(Interchange(clean), corrupted) for cell in cells]
        grid = fmr.sweep(self.model, made.inputs, rows, None, metric, base=made.edits, seed=seed, progress=progress)
        values = (grid.values - grid.base).double().cpu()
        order = [cells[place] for place in np.argsort(values.mean(1).numpy())]
        strongest = {(cell.kind, cell.column in fact.subject): cell for cell in order}
        controls = made.controls(metric, list(strongest.values()), corrupted)
        effects = [(kind, value) for (kind, _), value in zip(strongest, controls, strict=True)]
        choice = int(fmr.sweeps.metrics.logits_of(clean.output)[0, len(fact.ids) - 1].argmax())
        return Trace(
            prompt=self._prompt(fact, prompt),
            answer=self._text(fact.answer),
            columns=tuple(columns),
            subject=fact.subject,
            clean=float(metric(clean.output)),
            corrupted=grid.base.double().cpu().expand(values.shape[1]),
            effects=_as_maps(cells, values, len(structure.layers), len(columns)),
            control={kind: max(p for other, p in effects if other == kind) - float(grid.base.mean()) for kind, _ in effects},
            elsewhere=made.elsewhere(metric),
            noise=made.noise,
            window=window,
            how=grid.how,
            forwards=grid.forwards + bool(held) + len(strongest) + 4,
            error=grid.error,
            other="" if choice == fact.answer[0] else self._text([choice]),
        )


def _as_maps(cells: Sequence[Cell], values: Tensor, layers: int, columns: int) -> dict[str, Tensor]:
    """The values of cells, (cells, samples), as one map a kind: (layers, columns, samples), NaN where there is no cell."""
    maps: dict[str, Tensor] = {}
    for cell, value in zip(cells, values, strict=True):
        if cell.kind not in maps:
            maps[cell.kind] = torch.full((layers, columns, len(value)), float("nan"), dtype=torch.double)
        maps[cell.kind][cell.layer, cell.column] = value
    return maps
