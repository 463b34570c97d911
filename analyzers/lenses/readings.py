"""What a lens read: per layer and position the top tokens, the entropy, how far an answer is from the top."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from analyzers.lenses.opening import labelled
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

LENS, TRANSLATED, NULL = "lens", "translated", "null"
"""The ways of reading: as it is, through a translator, and through one that was fitted to other tokens."""

ROUNDING = 0.005
"""How far weights lie from the same in half precision, or less."""

MEASURES = {"probability": "probability of the answer", "rank": "rank of the answer", "entropy": "entropy (nats)",
            "kl": "KL to what the model says (nats)"}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Lens(Stored):
    """Readings by way ("lens", "translated", "null"), each (layers, examples, positions), NaN where nothing was read.

    >>> lens.probability["lens"].shape
    torch.Size([4, 1, 6])
    >>> lens.summary()

    entropy and kl (of the model's own distribution to the reading) in nats; rank: how many tokens lie above the answer, with
    its probability; other_rank: the same for the answer of another prompt or position (`control`). top: the tokens with the
    largest logits, (layers, examples, positions, k), and what their text is (`words`). error: how far the last row lies from
    what the model says. apart: how far the weights lie from those that the translator was fitted to, as a share of them.
    """

    points: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    entropy: dict[str, Tensor] = field(repr=False)
    kl: dict[str, Tensor] = field(repr=False)
    rank: dict[str, Tensor] = field(repr=False)
    probability: dict[str, Tensor] = field(repr=False)
    other_rank: dict[str, Tensor] = field(repr=False)
    top: dict[str, Tensor] = field(repr=False)
    top_probability: dict[str, Tensor] = field(repr=False)
    answers: Tensor
    words: dict[str, str] = field(repr=False)
    mask: Tensor = field(repr=False)
    control: str
    error: float
    seed: int
    apart: float = 0.0

    @property
    def views(self) -> tuple[str, ...]:
        """The ways in which the stream was read."""
        return tuple(self.rank)

    @property
    def read(self) -> Tensor:
        """Where something was read, (examples, positions)."""
        return self.answers >= 0

    def first(self, below: int = 1) -> dict[str, float]:
        """By way, the first layer at which the answer has fewer than so many tokens above it: the median over what was read.

        >>> lens.first(below=10)
        {'lens': ...}

        Where it never has, that counts as the number of layers, one more than the last.
        """
        found = {}
        for view, ranks in self.rank.items():
            hit = ranks[:, self.read] < below
            place = torch.where(hit.any(0), hit.int().argmax(0), len(self.points))
            found[view] = float(place.double().quantile(0.5, interpolation="lower"))
        return found

    def summary(self) -> DataFrame:
        """One row a layer and a way: medians of the ranks, the share in the top ten, means of the rest.

        >>> lens.summary().query("view == 'lens'")
        """
        import pandas as pd

        rows = []
        for place, point in enumerate(self.points):
            for view in self.views:
                rank, other, *rest = (
                    held[view][place][self.read]
                    for held in (self.rank, self.other_rank, self.probability, self.entropy, self.kl)
                )
                means = [float(values.mean()) for values in rest]
                ten = float((rank < 10).double().mean()) if not bool(rank.isnan().any()) else float("nan")
                rows.append((point, view, float(rank.median()), ten, *means, float(other.median())))
        names = ["layer", "view", "median rank", "top ten", "probability", "entropy", "kl", "rank of others"]
        return pd.DataFrame(rows, columns=names)

    def table(self) -> DataFrame:
        """One row for each way, layer, example and position that was read, with the top token.

        >>> lens.table().query("layer == '3' and view == 'lens'")
        """
        import pandas as pd

        frames = []
        examples, columns = self.read.nonzero(as_tuple=True)
        labels = self.labels
        for view in self.views:
            for place, point in enumerate(self.points):
                values: dict[str, Any] = {"view": view, "layer": point, "example": examples, "position": columns}
                values["token"] = [labels[b][p] for b, p in zip(examples.tolist(), columns.tolist(), strict=True)]
                values["top"] = [self.words[str(one)] for one in self.top[view][place, examples, columns, 0].tolist()]
                for name in MEASURES:
                    values[name] = getattr(self, name)[view][place, examples, columns]
                values["rank of others"] = self.other_rank[view][place, examples, columns]
                values["answer"] = [self.words[str(one)] for one in self.answers[examples, columns].tolist()]
                frames.append(pd.DataFrame(values))
        return pd.concat(frames, ignore_index=True)

    @property
    def labels(self) -> list[list[str]]:
        """The token at each column of each example; nothing on padding."""
        return labelled(self.tokens, self.mask)

    def plot(
        self, ax: Axes | None = None, *, what: str = "probability", view: str | None = None, example: int = 0
    ) -> Figure:
        """Draw a measure as heat maps, layers up, tokens across, with the top token in each cell; returns the figure.

        >>> lens.plot().savefig("lens.png")

        what: "probability" or "rank" of the answer, "entropy", "kl". view: one way of reading; None draws all of them, the
        null among them. ax: where to draw one of them.
        """
        from analyzers.lenses.pictures import draw_lens
        from fmr.pictures.heatmap import returned

        if what not in MEASURES:
            raise AnalyzerError(f"what={what!r}: expected one of {', '.join(map(repr, MEASURES))}.")
        if view is not None and view not in self.views:
            raise AnalyzerError(f"view={view!r} was not read. Expected one of {', '.join(map(repr, self.views))}.")
        if not 0 <= example < len(self.tokens):
            raise AnalyzerError(f"example={example!r}: expected 0 to {len(self.tokens) - 1}.")
        figure = draw_lens(self, ax, what, view, example)
        return returned(figure) if ax is None else figure

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        several = f"{number_of(len(self.tokens), 'prompt')}, {number_of(int(self.read.sum()), 'position')}"
        exact = f"lies {self.error:.0e} from" if self.error else "is"
        yield f"Lens of {several}, {number_of(len(self.points), 'layer')}; the last row {exact} what the model says"
        told = [f"{view} {self._layer(place)}" for view, place in self.first().items()]
        yield f"  the answer is first on top at layer (median): {', '.join(told)}"
        if not self.apart < ROUNDING:
            yield f"  translated by maps that were fitted to {self._others()}"
        last = len(self.points) - 1
        for place in sorted({(last + 1) // 2, 5 * (last + 1) // 6} - {last}):
            ranks = [f"{view} {self.rank[view][place][self.read].median():.0f}" for view in self.views]
            other = float(self.other_rank[LENS][place][self.read].median())
            yield (
                f"  layer {self.points[place]}: tokens above the answer (median) {', '.join(ranks)}; "
                f"above {self.control}, lens {other:.0f}"
            )

    def _others(self) -> str:
        return f"weights {self.apart:.1%} away from these" if self.apart == self.apart else "weights that are not known"

    def _layer(self, place: float) -> str:
        return self.points[int(place)] if place < len(self.points) else "none"
