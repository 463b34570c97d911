"""What the zoo hands out: a trained model with its tokenizer, its card and, for a classifier of photographs, its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fmr.errors import ZooError

REMEDY = "pip install 'fmr[demo]'"


@dataclass(frozen=True, repr=False)
class Trained:
    """A trained model, its tokenizer (None where it has none) and its card; a pair `model, tokenizer`, too.

    >>> fmr.zoo.load("gru").card["metrics"]
    {'accuracy': 1.0}
    >>> model, tokenizer = found = fmr.zoo.load("facts")
    >>> found[0] is found.model is model
    True

    The card is a dict: name, knows, architecture, parameters; of the models trained here also script, seed, steps,
    metrics (the accuracies reached, which `fmr.zoo.measure` finds again), and the torch they were trained with; of the
    models that others trained, source and license. labels: what the classes of a photograph are called, class by class.
    preprocess: makes the model's input of a photograph; None where the model takes none.
    """

    model: nn.Module
    tokenizer: Any
    card: dict[str, Any]
    labels: tuple[str, ...] = ()
    preprocess: Callable[[Any], Tensor] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    def __getitem__(self, place: int) -> Any:
        return (self.model, self.tokenizer)[place]

    def __repr__(self) -> str:
        card = self.card
        lines = [f"{card['name']}: {card['architecture']}, {card['parameters']:,} parameters"]
        lines.append(f"  knows      {card['knows']}")
        if "metrics" in card:
            lines.append("  reached    " + ", ".join(f"{name} {value:.4f}" for name, value in card["metrics"].items()))
        if "script" in card:
            lines.append(f"  made by    {card['script']}, seed {card['seed']}")
        if "source" in card:
            lines += [f"  source     {card['source']}", f"  license    {card['license']}"]
        if self.tokenizer is not None:
            lines.append(f"  tokenizer  {len(self.tokenizer):,} tokens")
        if self.labels:
            lines.append(f"  labels     {len(self.labels):,} classes")
        return "\n".join(lines)


def need(package: str, name: str, remedy: str = REMEDY) -> Path:
    """The folder of an installed package, without importing it; one that is missing is a `ZooError` with its remedy."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ZooError(f"The zoo's {name} needs the package {package.replace('_', '-')}, which is not installed: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)))
