"""What every method that patches begins with: pairs of prompts, which of them is the base, and the model's structure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

import fmr
from analyzers.causal.cells import Cell, cells_of, given_cells
from analyzers.causal.metrics import by_pair, in_tokens, numbers
from analyzers.prompts import Prompts, pairs
from analyzers.protocol import AnalyzerError, Given, Method, check_eval
from fmr.graph.graph import Graph
from fmr.nodes import Key
from fmr.structure.parts import Structure
from fmr.sweeps.metrics import Metric

Direction = Literal["denoising", "noising"]


class Opened(NamedTuple):
    """Pairs as a method takes them: the runs that are patched, those that values come from, and what is measured."""

    base: Prompts
    source: Prompts
    labels: Prompts
    metric: Metric


class Paired(Method):
    """A method that is given pairs of prompts; the model is located once for each of their lengths."""

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._known: tuple[Structure, Graph] | None = None
        self._sizes: dict[str, tuple[int, ...]] = {}

    def _pairs(self, clean: Given, corrupted: Given, metric: Metric) -> tuple[Prompts, Prompts, Metric]:
        check_eval(self.model)
        both = pairs(clean, corrupted, self.model, self.tokenizer)
        return *both, in_tokens(metric, self.tokenizer, both[0])

    def _located(self, given: Prompts) -> tuple[Structure, Graph]:
        """The structure of the model in a run of the first two examples, with its graph: the IDs hold for any number."""
        sizes = {name: tuple(value.shape[1:]) for name, value in given.inputs.items() if isinstance(value, Tensor)}
        if self._known is None or sizes != self._sizes:
            run = first_run(self.model, given)
            self._known, self._sizes = (fmr.locate(run), run.graph), sizes
        return self._known


class Patching(Paired):
    """A method that puts values of one run into another."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, direction: Direction = "denoising") -> None:
        if direction not in ("denoising", "noising"):
            raise AnalyzerError(f"direction={direction!r}: expected 'denoising' or 'noising'.")
        super().__init__(model, tokenizer)
        self.direction = direction

    def _opened(self, clean: Given, corrupted: Given, metric: Metric) -> Opened:
        first, second, metric = self._pairs(clean, corrupted, metric)
        base, source = (first, second) if self.direction == "noising" else (second, first)
        return Opened(base, source, first, metric)

    def _cells(self, base: Prompts, sites: Sequence[Key] | None) -> list[Cell]:
        """What is patched: the sites that are given, or those of all layers."""
        if sites is not None:
            return given_cells(sites)
        structure, graph = self._located(base)
        return cells_of(structure, base, graph)

    def _source(self, source: Prompts, keep: Sequence[str], metric: Metric) -> tuple[fmr.Run, Tensor]:
        """The run that values come from, and its metric by pair."""
        run = fmr.run(self.model, **source.inputs, keep=keep)
        return run, numbers(by_pair(metric, run, len(source)), -1)


def first_run(model: nn.Module, given: Prompts) -> fmr.Run:
    """The first two examples, recorded as a whole: enough to locate in, whatever the number of examples."""
    examples = len(given)

    def few(value: Any) -> Any:
        counts = isinstance(value, Tensor) and value.dim() and len(value) == examples
        return value[:2] if counts else value

    return fmr.run(model, **{name: few(value) for name, value in given.inputs.items()})


def ids_of(cells: Iterable[Cell]) -> list[str]:
    """The IDs at which cells lie, each once."""
    return list(dict.fromkeys(str(cell.site.id) for cell in cells))
