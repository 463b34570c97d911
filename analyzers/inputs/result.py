"""What an answer rests on: a number for each token, pixel or value, as a table, in colours, and on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, check_counts
from analyzers.results import Stored
from fmr.errors import number_of, whole_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from analyzers.circuits.circuit import Circuit

PROMISE = {"ig": 0.01, "deeplift": 1e-3, "deeplift-reveal-cancel": 1e-3, "kernel-shap": 0.01}
"""Methods whose sum is the difference between input and baseline, and up to which share off it is called complete."""

ROUNDINGS = 4
"""So many units in the last place, of the numbers that a model computes in, its target may be off by rounding."""

SHOWN = 6
"""How many notes are printed."""

REMEDY = {
    "ig": ", or take more gradients, most=; where these change nothing, what lies between has no derivative (a rounding, a "
    "comparison, a detach): method='deeplift'",
    "kernel-shap": ", or take more samples=",
}
"""What else may help where a sum is not complete."""

UNSIGNED = ("rollout", "saliency")
"""Methods whose scores say how much and not which way, so that they sum to nothing."""


@dataclass(frozen=True, eq=False)
class Attribution(Stored):
    """What a target rests on: `values` has a number for each number at the place, (examples, ...).

    >>> answered.strongest(2)
    ['in', 'Dunoth']
    >>> answered.plot(); answered.table()

    kind: "tokens", "image", "values" or "nodes" of a circuit; `scores` is a number for each of these. output and base: the
    target at the input and at the baseline (the mean over several), by example. `gap` is how far their difference is from
    the sum of the attributions, as a share of it: completeness, which "ig", both rules of DeepLIFT and "kernel-shap"
    promise. tokens: by example; real: which positions they stand at. images: what pictures show, (examples, height, width,
    3) from 0 to 1. notes: what is not as promised. rounding: the last place of the numbers that the model computes in, as a
    share of them; a sum that is off by no more than four of these is complete.
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
    rounding: float = 0.0

    @classmethod
    def of_circuit(cls, circuit: Circuit) -> Attribution:
        """The nodes of a circuit: how much of the answer leaves each of them over the edges that were kept.

        >>> analyzers.Attribution.of_circuit(circuit).strongest(2)
        ['embedding', 'head 1.3']

        The score of a node is the sum of those of its edges, in units of the metric, the mean over pairs. With all edges,
        scored by "eap", it is what attribution patching says of the node. An answer goes through one node after the other,
        so that the scores do not add up to it.
        """
        if not hasattr(circuit, "nodes") or not hasattr(circuit, "faithfulness"):
            raise AnalyzerError(f"circuit is a {type(circuit).__name__}: expected a Circuit.")
        names = [name for name in circuit.nodes if name != "logits"]
        found = torch.zeros(1, len(names), dtype=torch.double)
        for edge in circuit.edges:
            found[0, names.index(edge.writer)] += edge.score
        clean, corrupted = (one.double().cpu().mean()[None] for one in (circuit.clean, circuit.corrupted))
        one_by_one = "scores of edges are those of removing one after the other, and do not add up to what a node does"
        return cls(
            method=circuit.method,
            target=("the metric",),
            place=f"{number_of(len(names), 'node')} of {circuit.model}",
            kind="nodes",
            baseline="corrupted",
            values=found * (clean - corrupted),
            output=clean,
            base=corrupted,
            tokens=(tuple(names),),
            real=torch.ones(1, len(names), dtype=torch.bool),
            images=None,
            how=f"sums over {number_of(len(circuit.edges), 'edge')}, which carry {circuit.faithfulness():.0%} of the answer",
            notes=(one_by_one,) if circuit.method == "acdc" else (),
        )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def scores(self) -> Tensor:
        """One number for each token (examples, positions), pixel (examples, height, width), or number at the place.

        It is the sum of those of its units or colours; of "saliency", of which a sum says nothing, their length.
        """
        over = {"image": 1, "tokens": 2}.get(self.kind)
        if over is None or self.values.dim() < (4 if self.kind == "image" else 3):
            return self.values
        return torch.linalg.vector_norm(self.values, dim=over) if self.method == "saliency" else self.values.sum(over)

    @property
    def gap(self) -> Floats:
        """How far attributions are from being complete: |sum - (output - base)| / |output - base|, by example.

        Where the target is the same at both ends, so that nothing is to be shared: the sum, as a share of all sizes.
        """
        difference, values = self.output - self.base, self.values.double().flatten(1)
        size = torch.where(difference == 0, values.abs().sum(1), difference.abs())
        found: Floats = (self._off / torch.where(size == 0, 1.0, size)).numpy()
        return found

    @property
    def _off(self) -> Tensor:
        return (self.values.double().flatten(1).sum(1) - (self.output - self.base)).abs()

    @property
    def complete(self) -> bool | None:
        """Whether the sum is the whole difference, up to rounding, for a method that promises it; else None."""
        if self.method not in PROMISE:
            return None
        rounded = ROUNDINGS * self.rounding * torch.maximum(self.output.abs(), self.base.abs())
        return bool(((torch.from_numpy(self.gap) <= PROMISE[self.method]) | (self._off <= rounded)).all())

    def of_tokens(self, example: int = 0) -> tuple[tuple[str, ...], Floats]:
        """The tokens of an example with their scores."""
        self._check(example)
        if self.kind not in ("tokens", "nodes"):
            raise AnalyzerError(
                f"An attribution to {self.kind} has no tokens: its numbers are scores[{example}], or table()."
            )
        found: Floats = self.scores[example][self.real[example]].double().numpy()
        return self.tokens[example], found

    def strongest(self, many: int = 5, example: int = 0) -> list[str]:
        """The tokens, pixels or values with the largest scores of an example, whatever their sign."""
        names, scores = self._named(example)
        check_counts(0, many=many)
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
        from analyzers.inputs.lines import check_axes
        from analyzers.inputs.pictures import draw
        from fmr.pictures.heatmap import returned

        check_axes(ax)
        if example is not None:
            self._check(example)
        return returned(draw(self, ax, example)) if ax is None else draw(self, ax, example)

    def _repr_html_(self) -> str:
        from analyzers.inputs.pictures import as_html

        return as_html(self)

    @property
    def _one(self) -> str:
        return {"tokens": "token", "image": "pixel", "nodes": "node"}.get(self.kind, "value")

    def _named(self, example: int) -> tuple[list[str], Tensor]:
        self._check(example)
        if self.kind in ("tokens", "nodes"):
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
            if self.method in UNSIGNED:
                continue
            lines.append(
                f"  [{example}] {out:.3f} at the input, {base:.3f} at the baseline; attributions sum to "
                f"{float(sums[example]):.3f} of {out - base:.3f}, gap {float(self.gap[example]):.2%}"
            )
        if self.complete is False:
            remedy = REMEDY.get(self.method, "")
            lines.append(f"  NOT complete: the sum is not the difference; see the notes{remedy}")
        elif self.complete and float(self.gap.max()) > PROMISE[self.method]:
            lines.append("  complete up to rounding: the model computes in numbers that are no finer than the gap")
        if self.complete is None and self.method not in UNSIGNED:
            lines.append("  this method promises no complete sum")
        lines += [f"  note: {note}" for note in self.notes[:SHOWN]]
        more = len(self.notes) - SHOWN
        return "\n".join([*lines, *([f"  and {number_of(more, 'note')} more in notes"] if more > 0 else [])])
