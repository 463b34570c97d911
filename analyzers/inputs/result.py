"""What an answer rests on: a number for each token, pixel or value, as a table, in colours, and on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of, whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

PROMISE = {"ig": 0.01, "deeplift": 1e-3, "kernel-shap": 0.01}
"""Methods whose sum is the difference between input and baseline, and up to which share off it is called complete."""


@dataclass(frozen=True, eq=False)
class Attribution(Stored):
    """What a target rests on: `values` has a number for each number at the place, (examples, ...).

    >>> answered.strongest(2)
    ['in', 'Dunoth']
    >>> answered.plot(); answered.table()

    kind: "tokens", "image" or "values"; `scores` is a number for each token, pixel or value. output and base: the target at
    the input and at the baseline (the mean over several), by example. `gap` is how far their difference is from the sum of
    the attributions, as a share of it: completeness, which "ig", "deeplift" and "kernel-shap" promise. tokens: by example;
    real: which positions they stand at. images: what pictures show, (examples, height, width, 3) from 0 to 1. notes: what
    is not as promised.
    """

    method: str
    target: tuple[str, ...]
    place: str
    kind: str
    baseline: str
    values: Tensor = field(repr=False)
    output: Tensor
    base: Tensor
    tokens: tuple[tuple[str, ...], ...] = field(repr=False)
    real: Tensor = field(repr=False)
    images: Tensor | None = field(repr=False)
    how: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scores(self) -> Tensor:
        """One number for each token (examples, positions), pixel (examples, height, width), or number at the place."""
        if self.kind == "image":
            return self.values.sum(1) if self.values.dim() == 4 else self.values
        return self.values.flatten(2).sum(2) if self.kind == "tokens" and self.values.dim() > 2 else self.values

    @property
    def gap(self) -> Floats:
        """How far attributions are from being complete: |sum - (output - base)| / |output - base|, by example."""
        difference = self.output - self.base
        found: Floats = ((self.values.double().flatten(1).sum(1) - difference).abs() / difference.abs()).numpy()
        return found

    @property
    def complete(self) -> bool | None:
        """Whether the sum is the whole difference, for a method that promises it; else None."""
        return bool((self.gap <= PROMISE[self.method]).all()) if self.method in PROMISE else None

    def of_tokens(self, example: int = 0) -> tuple[tuple[str, ...], Floats]:
        """The tokens of an example with their scores."""
        self._check(example)
        found: Floats = self.scores[example][self.real[example]].double().numpy()
        return self.tokens[example], found

    def strongest(self, many: int = 5, example: int = 0) -> list[str]:
        """The tokens, pixels or values with the largest scores of an example, whatever their sign."""
        names, scores = self._named(example)
        order = scores.abs().argsort(descending=True, stable=True)[:many]
        return [names[int(place)] for place in order]

    def table(self) -> DataFrame:
        """One row a token, pixel or value: its example, name and score.

        >>> answered.table().sort_values("score").tail(3)
        """
        import pandas as pd

        frames = []
        for example in range(len(self)):
            names, scores = self._named(example)
            frames.append(pd.DataFrame({"example": example, self._one: names, "score": scores.double().numpy()}))
        return pd.concat(frames, ignore_index=True)

    def plot(self, ax: Axes | None = None, example: int | None = None) -> Figure:
        """Draw tokens in colours, pixels over their picture, or values as bars; returns the figure.

        >>> answered.plot(example=0).savefig("why.png")

        ax: where to draw one example; None makes a figure of all, or of the one that is asked for. Red speaks for the
        target, blue against it, on one scale for each example.
        """
        from analyzers.inputs.pictures import draw
        from fmr.pictures.heatmap import returned

        if example is not None:
            self._check(example)
        return returned(draw(self, ax, example)) if ax is None else draw(self, ax, example)

    def _repr_html_(self) -> str:
        from analyzers.inputs.pictures import as_html

        return as_html(self)

    @property
    def _one(self) -> str:
        return {"tokens": "token", "image": "pixel"}.get(self.kind, "value")

    def _named(self, example: int) -> tuple[list[str], Tensor]:
        self._check(example)
        if self.kind == "tokens":
            names, scores = self.of_tokens(example)
            return list(names), torch.from_numpy(scores)
        scores_of = self.scores[example]
        places = torch.cartesian_prod(*map(torch.arange, scores_of.shape)).reshape(scores_of.numel(), -1)
        return [", ".join(map(str, place)) for place in places.tolist()], scores_of.flatten()

    def _check(self, example: int) -> None:
        number = whole_number(example)
        if number is None or not 0 <= number < len(self):
            raise AnalyzerError(f"example={example!r}: expected one of 0 to {len(self) - 1}.")

    def __repr__(self) -> str:
        head = f"Attribution of {', '.join(dict.fromkeys(self.target))} to {self.place} by {self.method}: "
        sums = self.values.double().flatten(1).sum(1)
        lines = [head + f"{number_of(len(self), 'example')}, baseline {self.baseline}, {self.how}"]
        for example in range(min(len(self), 4)):
            out, base = float(self.output[example]), float(self.base[example])
            if self.method == "rollout":
                continue
            gap = f"{float(self.gap[example]):.2%}" if out != base else "undefined"
            lines.append(
                f"  [{example}] {out:.3f} at the input, {base:.3f} at the baseline; attributions sum to "
                f"{float(sums[example]):.3f} of {out - base:.3f}, gap {gap}"
            )
        if self.complete is False:
            lines.append("  NOT complete: the sum is not the difference; see the notes, or take more steps or samples")
        if self.complete is None and self.method != "rollout":
            lines.append("  this method promises no complete sum")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
