"""What direct logit attribution found: the share of each part in a logit, as tables and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from analyzers.numbers.confidence import means
from analyzers.numbers.embed import Floats, Ints
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

KINDS = {
    "embedding": "embedding",
    "head": "heads",
    "cross head": "cross heads",
    "attention": "attention",
    "mlp": "memories",
    "block": "whole blocks",
    "write": "other writes",
    "bias": "biases",
}
"""What is written, one and several."""


@dataclass(frozen=True, eq=False)
class LogitParts(Stored):
    """A logit, or the difference of two, as the sum of what parts of the model wrote, (parts, examples) in logits.

    >>> attribution.by_kind()
    {'embedding': ..., 'heads': ..., 'memories': ..., 'biases': ...}
    >>> attribution.table().sort_values("share").tail(3)

    total: what the model says itself, by example; error: how far the sum of all parts lies from it. others: the shares of
    the same parts in the logits of other answers (`control` says which). memories: by layer, (memories, examples), where
    they were asked for. whole: the parts that could not be taken apart into heads or memories, with the reason. capped: a
    soft cap follows these logits.
    """

    kinds: tuple[str, ...]
    layers: Ints
    places: Ints
    values: Tensor = field(repr=False)
    others: Tensor = field(repr=False)
    total: Tensor
    memories: dict[str, Tensor] = field(repr=False)
    whole: dict[str, str]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    control: str
    capped: bool
    error: float
    position: int | None
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each part: "embedding", "head 3.1", "mlp 3", "bias 3"."""
        return tuple(
            f"{kind} {layer}.{place}" if place >= 0 else f"{kind} {layer}" if layer >= 0 else kind
            for kind, layer, place in zip(self.kinds, self.layers.tolist(), self.places.tolist(), strict=True)
        )

    @property
    def shares(self) -> Floats:
        """The mean of each part over examples."""
        return np.asarray(self.values.mean(1))

    def by_kind(self) -> dict[str, float]:
        """The mean over examples of what all parts of a kind wrote."""
        found = {}
        for kind, name in KINDS.items():
            own = [n for n, one in enumerate(self.kinds) if one == kind]
            if own:
                found[name] = float(self.shares[own].sum())
        return found

    def strongest(self, n: int = 5, kind: str | None = None) -> list[tuple[str, float]]:
        """The parts with the largest shares for or against the answer, with those shares.

        >>> attribution.strongest(2, "head")
        [('head ...', ...), ('head ...', ...)]
        """
        own = [place for place, one in enumerate(self.kinds) if kind in (None, one)]
        if not own:
            raise AnalyzerError(f"kind={kind!r}: expected one of {', '.join(map(repr, dict.fromkeys(self.kinds)))}.")
        order = sorted(own, key=lambda place: -abs(self.shares[place]))
        return [(self.names[place], float(self.shares[place])) for place in order[:n]]

    @property
    def heads(self) -> Floats:
        """The mean share of each head, (layers, heads); NaN where there is none."""
        return self._map(self.shares)

    def _map(self, shares: Floats) -> Floats:
        own = [n for n, kind in enumerate(self.kinds) if kind == "head"]
        if not own:
            raise AnalyzerError(f"No heads were told apart: {'; '.join(self.whole.values()) or 'there is no attention'}.")
        found = np.full((self.layers[own].max() + 1, self.places[own].max() + 1), np.nan)
        found[self.layers[own], self.places[own]] = shares[own]
        return found

    def table(self) -> DataFrame:
        """One row a part: its mean share, the 95 % interval of that over examples, and its share in other answers.

        >>> attribution.table().query("kind == 'head'")
        """
        import pandas as pd

        share, low, high = means(np.asarray(self.values), self.seed)
        columns = {"share": share, "low": low, "high": high, "others": np.asarray(self.others.mean(1))}
        return pd.DataFrame({"part": self.names, "kind": self.kinds, "layer": self.layers, "place": self.places, **columns})

    def memory_table(self, n: int = 20) -> DataFrame:
        """The single memories with the largest shares, of a run with memories=True."""
        import pandas as pd

        if not self.memories:
            raise AnalyzerError("No single memories were told apart. Expected run(..., memories=True).")
        rows = [
            (int(layer), memory, float(share))
            for layer, values in self.memories.items()
            for memory, share in enumerate(values.mean(1).tolist())
        ]
        rows.sort(key=lambda row: -abs(row[2]))
        return pd.DataFrame(rows[:n], columns=["layer", "memory", "share"])

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the heads as a map and, beside it, what each layer wrote; returns the figure.

        >>> attribution.plot().savefig("attribution.png")

        ax: where to draw the map alone; None makes a figure of both.
        """
        from analyzers.lenses.pictures import draw_parts
        from fmr.pictures.heatmap import returned

        return returned(draw_parts(self, ax)) if ax is None else draw_parts(self, ax)

    @property
    def title(self) -> str:
        """What was taken apart, in words."""
        several = len(set(self.right)) > 1
        right = "the answer" if several else repr(self.right[0])
        wrong = "" if not self.wrong else " - the wrong one" if len(set(self.wrong)) > 1 else f" - {self.wrong[0]!r}"
        return f"logit of {right}{wrong}"

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        capped = ", before the soft cap" if self.capped else ""
        kinds = " + ".join(f"{name} {share:.3f}" for name, share in self.by_kind().items())
        prompts = number_of(len(self.total), "prompt")
        yield f"LogitParts of {prompts}: {self.title}{capped} {float(self.total.mean()):.4f} (mean)"
        yield f"  = {kinds} (error {self.error:.0e}; scales of norms held)"
        if "head" in self.kinds:
            heads = np.array([kind == "head" for kind in self.kinds])
            order = np.argsort(self.shares[heads])
            names = np.array(self.names)[heads]
            told = [f"{names[n].removeprefix('head ')} {self.shares[heads][n]:+.3f}" for n in (*order[::-1][:3], *order[:2])]
            other = float(np.abs(np.asarray(self.others.mean(1))[heads]).max())
            yield f"  heads for it {', '.join(told[:3])}; against it {', '.join(told[3:])}"
            yield f"  the largest share of a head in {self.control} {other:.3f}"
        for name, why in self.whole.items():
            yield f"  {name} as a whole: {why}"
