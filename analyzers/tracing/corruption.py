"""Runs that cannot read a subject: noise on its embedding, or another subject in its place; and their controls."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.protocol import AnalyzerError
from analyzers.tracing.cells import Cell
from analyzers.tracing.facts import Fact
from fmr.edits import Context, Edit, Interchange
from fmr.errors import number_of
from fmr.ids import Site
from fmr.nodes import Key
from fmr.sweeps.metrics import Metric

Edits = dict[Key, Edit]


@dataclass(frozen=True, eq=False)
class Noised:
    """The edit that adds noise, (samples, positions, units), to as many examples, or to more of them over and over."""

    noise: Tensor

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        order = [("examples", "positions", "units").index(axis) for axis in context.site.axes(value)]
        again = torch.arange(value.shape[order.index(0)]) % len(self.noise)
        return value + self.noise[again].permute(order).to(value)


@dataclass(frozen=True, eq=False)
class Corrupted:
    """Corrupted runs, an example for each sample; `other` ones that are corrupted in another way; noise `elsewhere`."""

    model: nn.Module
    inputs: dict[str, Any]
    edits: Edits
    other_inputs: dict[str, Any]
    other_edits: Edits
    elsewhere_edits: Edits
    noise: float

    def controls(self, metric: Metric, cells: Sequence[Cell], held: Edit | None) -> Iterator[float]:
        """The metric with each of some cells restored from a run that is corrupted too, in another way."""
        ids = [str(site.id) for cell in cells for site in cell.restored]
        other = fmr.run(self.model, **self.other_inputs, edits=self.other_edits, keep=list(dict.fromkeys(ids)))
        for cell in cells:
            row = cell.row(Interchange(other), held)
            both = {site: [one[site] for one in (self.edits, row) if site in one] for site in (*self.edits, *row)}
            yield self._measured(metric, both)

    def elsewhere(self, metric: Metric) -> float:
        """The metric with the same noise at as many other tokens; NaN where there is none."""
        return self._measured(metric, self.elsewhere_edits) if self.elsewhere_edits else float("nan")

    def _measured(self, metric: Metric, edits: Mapping[Key, Any]) -> float:
        run = fmr.run(self.model, **self.inputs, edits=edits, keep=())
        return float(metric(run.output).double().mean())


def noised(
    model: nn.Module,
    inputs: dict[str, Any],
    fact: Fact,
    embedding: Site,
    clean: fmr.Run,
    noise: float | None,
    samples: int,
    draw: torch.Generator,
) -> Corrupted:
    """Runs with noise on the embedding of the subject's tokens, by default 3 times as wide as its values there."""
    at = embedding.at(positions=list(fact.subject))
    value = clean[at]
    noise = 3 * float(value.float().std()) if noise is None else float(noise)
    units = value.shape[at.axes(value).index("units")]
    first, second = noise * torch.randn(2, samples, len(fact.subject), units, generator=draw)
    others = [place for place in range(len(fact.tokens)) if place not in fact.subject]
    chosen = sorted(others[n] for n in torch.randperm(len(others), generator=draw).tolist()[: len(fact.subject)])
    elsewhere: Edits = {embedding.at(positions=chosen): Noised(first[:, : len(chosen)])} if chosen else {}
    return Corrupted(model, inputs, {at: Noised(first)}, inputs, {at: Noised(second)}, elsewhere, noise)


def swapped(
    fact: Fact, prompt: Any, subject: Any, swaps: Sequence[str], tokenizer: Any, draw: torch.Generator
) -> list[Tensor]:
    """The token ids of the prompt with another subject in its place, of each that has as many tokens, in random order."""
    if not isinstance(prompt, str) or not isinstance(subject, str):
        raise AnalyzerError("swaps are put into a text: expected prompt and subject as text, and a tokenizer.")
    fitting = []
    for other in dict.fromkeys(swaps):
        ids = torch.tensor(tokenizer(prompt.replace(subject, other))["input_ids"])
        if other != subject and len(ids) == len(fact.ids):
            fitting.append(Fact(ids, fact.tokens, fact.subject, fact.answer).inputs()["input_ids"])
    if not fitting:
        raise AnalyzerError(
            f"No swap of {len(swaps)} has {number_of(len(fact.subject), 'token')} like "
            f"{subject!r}, so that positions would "
            "correspond. Expected other subjects of that length, or noise: swaps=()."
        )
    return [fitting[n] for n in torch.randperm(len(fitting), generator=draw).tolist()]
