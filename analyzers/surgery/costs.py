"""What layers, memories and heads are worth, as numbers: the loss without each of them, beside a change as large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analyzers.numbers.embed import Floats, Ints
from analyzers.protocol import AnalyzerError, check_counts
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class LayerCosts(Stored):
    """How much the loss grows without each layer, memory and head.

    >>> costs = analyzers.Ablation(model, tokenizer).run(texts, progress=False)
    >>> costs.cost.shape == costs.control.shape, costs.maps["layer"].shape
    (True, (4, 1))

    By part: cost, the loss without it less the loss with it, in nats (or of the metric that was given), with the ends of its
    95 % interval over examples; control, the same for a random change as large. base: the loss of the model as it is. how,
    forwards: how the sweep went.
    """

    model: str
    kinds: tuple[str, ...]
    layers: Ints
    places: Ints
    cost: Floats
    low: Floats
    high: Floats
    control: Floats
    base: float
    examples: int
    how: str
    forwards: int
    seed: int

    @property
    def names(self) -> list[str]:
        """Each part as its kind with its layer, and a head with its number: "head 2.1"."""
        rows = zip(self.kinds, self.layers, self.places, strict=True)
        return [f"{kind} {layer}" + (f".{place}" if kind == "head" else "") for kind, layer, place in rows]

    @property
    def maps(self) -> dict[str, Floats]:
        """The costs as one map a kind, (layers, heads) or (layers, 1); NaN where there is none."""
        found = {}
        for kind in dict.fromkeys(self.kinds):
            own = np.array([one == kind for one in self.kinds])
            made = np.full((int(self.layers.max()) + 1, int(self.places[own].max()) + 1), np.nan)
            made[self.layers[own], self.places[own]] = self.cost[own]
            found[kind] = made
        return found

    def cheapest(self, many: int = 3, kind: str = "layer") -> list[str]:
        """The names of the parts of a kind that cost least, which may be left out first.

        >>> costs = analyzers.Ablation(model, tokenizer).run(texts[:2], progress=False)
        >>> analyzers.Surgery(model, structure).delete(*costs.cheapest(2), *costs.cheapest(1, "head"))
        Surgery of GPT2LMHeadModel: without layers ...

        kind: "layer", "head" or "memory".
        """
        check_counts(1, many=many)
        if kind not in self.kinds:
            raise AnalyzerError(f"kind={kind!r}: expected {' or '.join(map(repr, dict.fromkeys(self.kinds)))}.")
        own = [n for n in np.argsort(self.cost, kind="stable") if self.kinds[n] == kind]
        return [self.names[n] for n in own[:many]]

    def table(self) -> DataFrame:
        """One row a part, in order of layers.

        >>> costs = analyzers.Ablation(model, tokenizer).run(texts[:2], progress=False)
        >>> costs.table().query("kind == 'layer'")[["layer", "cost", "control"]]
        """
        import pandas as pd

        columns = {name: getattr(self, name) for name in ("cost", "low", "high", "control")}
        return pd.DataFrame({"kind": self.kinds, "layer": self.layers, "place": self.places, **columns})

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the costs of layers and memories beside their control, and those of heads as a map; returns the figure.

        >>> analyzers.Ablation(model, tokenizer).run(texts[:2], progress=False).plot().savefig("costs.png")

        ax: where to draw layers and memories alone.
        """
        from analyzers.surgery.pictures import draw
        from fmr.pictures.heatmap import returned

        return returned(draw(self, ax)) if ax is None else draw(self, ax)

    def __repr__(self) -> str:
        lines = [
            f"LayerCosts of {self.model}: loss {self.base:.3f} over {number_of(self.examples, 'example')}, "
            f"{number_of(len(self.kinds), 'part')} left out one at a time ({self.how}), seed {self.seed}"
        ]
        for kind in dict.fromkeys(self.kinds):
            own = [n for n, one in enumerate(self.kinds) if one == kind]
            most, least = max(own, key=lambda n: self.cost[n]), min(own, key=lambda n: self.cost[n])
            more = sum(self.cost[n] > self.control[n] for n in own)
            lines.append(
                f"  {kind}: {self.names[least].removeprefix(kind + ' ')} costs {self.cost[least]:.3f}, "
                f"{self.names[most].removeprefix(kind + ' ')} costs {self.cost[most]:.3f}; "
                f"{more} of {len(own)} cost more than a random change as large"
            )
        return "\n".join(lines)
