"""What every method that patches begins with: pairs of prompts, which of them is the base, and the model's structure."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

import fmr
from analyzers.causal.cells import Cell
from analyzers.causal.metrics import in_tokens
from analyzers.prompts import Given, Prompts, pairs
from analyzers.protocol import AnalyzerError
from fmr.structure.parts import Structure
from fmr.sweeps.metrics import Metric

Direction = Literal["denoising", "noising"]


class Opened(NamedTuple):
    """Pairs as a method takes them: the runs that are patched, those that values come from, and what is measured."""

    base: Prompts
    source: Prompts
    labels: Prompts
    metric: Metric


class Patching:
    """A method that puts values of one run into another; the model is located once."""

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, direction: Direction = "denoising") -> None:
        if direction not in ("denoising", "noising"):
            raise AnalyzerError(f"direction={direction!r}: expected 'denoising' or 'noising'.")
        self.model, self.tokenizer, self.direction = model, tokenizer, direction
        self._structure: Structure | None = None

    def _opened(self, clean: Given, corrupted: Given, metric: Metric) -> Opened:
        check_eval(self.model)
        both = pairs(clean, corrupted, self.model, self.tokenizer)
        base, source = both if self.direction == "noising" else both[::-1]
        return Opened(base, source, both[0], in_tokens(metric, self.tokenizer))

    def _located(self, given: Prompts) -> Structure:
        """The structure of the model in a run of the first two examples: its IDs hold for any number of them."""
        if self._structure is None:
            self._structure = fmr.locate(first_run(self.model, given))
        return self._structure


def check_eval(model: nn.Module) -> None:
    """Raise for a model of which a part is in train mode: dropout would differ between the runs that are compared."""
    name = next((name for name, module in model.named_modules() if module.training), None)
    if name is not None:
        part = f"{type(model).__name__}.{name}" if name else type(model).__name__
        raise AnalyzerError(
            f"{part} is in train mode, so that runs may differ without any patch. Expected eval mode: call model.eval()."
        )


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
