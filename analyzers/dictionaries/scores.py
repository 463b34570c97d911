"""What a dictionary reaches on a model, as tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from analyzers.numbers.confidence import ratios
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored, told_skip
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

OWN, CLEAN, ABLATED = "dictionary", "clean", ("zero", "mean")
"""Names of what the loss is measured with: the dictionary, nothing, and the two ablations."""


@dataclass(frozen=True, eq=False)
class DictionaryScored(Stored):
    """What a dictionary explains at its site, and what of the loss it recovers there, beside its controls.

    >>> scored = analyzers.DictionaryScores(model, tokenizer, dictionary, site).update(texts[:2]).result()
    >>> scored.table()

    l0, explained: by name, latents on at once and the share of the variance. density: how often each latent fires.
    losses: by name, the summed cross-entropy of each example, in nats: clean, with the dictionary and with each control in
    the place of the value, with zero and with the mean there. targets: how many tokens each is of. rows: how many values.
    skip: how many tokens at the start of each example were left out.
    """

    site: str
    settings: dict[str, Any]
    l0: dict[str, float]
    explained: dict[str, float]
    density: Floats = field(repr=False)
    losses: dict[str, Floats] = field(repr=False)
    targets: Floats = field(repr=False)
    rows: int
    skip: int = 0

    def loss(self, name: str = OWN) -> float:
        """The mean loss of a token with this in the place of the value, in nats."""
        if name not in self.losses:
            raise AnalyzerError(f"{name!r} was not measured. Expected one of {', '.join(map(repr, self.losses))}.")
        return float(self.losses[name].sum() / self.targets.sum())

    def recovered(self, name: str = OWN, ablated: str = "zero") -> tuple[float, float, float]:
        """What of the loss this recovers of an ablation, with the ends of its 95 % interval.

        >>> scored = analyzers.DictionaryScores(model, tokenizer, dictionary, site).update(texts[:2]).result()
        >>> scored.recovered(ablated="mean")
        (...)
        """
        if ablated not in ABLATED:
            raise AnalyzerError(f"ablated={ablated!r}: expected {' or '.join(map(repr, ABLATED))}.")
        self.loss(name)
        above, below = self.losses[ablated] - self.losses[name], self.losses[ablated] - self.losses[CLEAN]
        share, low, high = ratios(above[None], below)
        return float(share[0]), float(low[0]), float(high[0])

    @property
    def dead(self) -> int:
        """How many latents fired on no value."""
        return int((self.density == 0).sum())

    def table(self) -> DataFrame:
        """One row for the dictionary and for each control, with what each recovers of both ablations.

        >>> analyzers.DictionaryScores(model, tokenizer, dictionary, site).update(texts[:2]).result().table()
        """
        import pandas as pd

        rows = []
        for name in self.l0:
            row: dict[str, Any] = {"l0": self.l0[name], "explained": self.explained[name], "loss": self.loss(name)}
            for ablated in ABLATED:
                names = (f"recovered_{ablated}", f"low_{ablated}", f"high_{ablated}")
                row |= dict(zip(names, self.recovered(name, ablated), strict=True))
            rows.append(row)
        return pd.DataFrame(rows, pd.Index(list(self.l0), name="what"))

    def plot(self, ax: Axes | None = None) -> Figure:
        """What each recovers of both ablations, with intervals; and how often latents fire, where no axes are given.

        >>> analyzers.DictionaryScores(model, tokenizer, dictionary, site).update(texts[:2]).result().plot()
        """
        from analyzers.dictionaries.pictures import draw_scored

        return draw_scored(self, ax)

    def __repr__(self) -> str:
        def told(name: str) -> str:
            both = [self.recovered(name, ablated) for ablated in ABLATED]
            ends = "; of the mean's ".join(f"{share:.3f} [{low:.3f}, {high:.3f}]" for share, low, high in both)
            on = f"{self.explained[name]:.3f} of the variance, {self.l0[name]:.1f} on"
            return f"  {name}: {on}, loss {self.loss(name):.3f}; of zero's {ends}"

        examples, tokens = len(self.targets), int(self.targets.sum())
        alive = self.density[self.density > 0]
        often = f", the others on {np.median(alive):.2%} of values (median)" if len(alive) else ""
        return (
            f"DictionaryScored at {self.site}: {number_of(examples, 'example')}, {number_of(tokens, 'token')}"
            f"{told_skip(self.skip)}; loss "
            f"{self.loss(CLEAN):.3f} clean, {self.loss('zero'):.3f} with zero there, {self.loss('mean'):.3f} with the mean\n"
            + "\n".join(map(told, self.l0))
            + f"\n  dead: {self.dead} of {len(self.density)}{often}"
        )
