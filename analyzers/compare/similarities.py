"""How alike what sites hold is: a matrix a measure, beside that of rows that do not belong together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored, told_skip
from fmr.errors import nearest, number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Similarities(Stored):
    """How alike each pair of sites is.

    >>> alike = analyzers.Similarity(model).over(batches, progress=False).result()
    >>> alike.of("layers[0].resid_post", "layers[1].resid_post") > alike.of("layers[0].resid_post", "layers[3].resid_post")
    True

    names: of the sites, with that of the model in front where there are several. values, nulls: by measure, (sites, sites);
    a null has the rows of one site in another order. owners: the model of each site. widths: the numbers in a vector. rows:
    how many vectors were compared, of those seen, without those of the first `skip` tokens of each example. What a measure
    says of a site without variance is NaN.
    """

    names: tuple[str, ...]
    models: tuple[str, ...]
    owners: tuple[str, ...] = field(repr=False)
    values: dict[str, Floats] = field(repr=False)
    nulls: dict[str, Floats] = field(repr=False)
    widths: tuple[int, ...]
    rows: int
    seen: int
    seed: int
    skip: int = 0

    def of(self, first: str, second: str, measure: str | None = None) -> float:
        """How alike two sites are.

        >>> round(alike.of("layers[0].resid_post", "layers[0].resid_post", "procrustes"), 6)
        1.0
        """
        return float(self.values[self._measure(measure)][self._place(first), self._place(second)])

    def null(self, first: str, second: str, measure: str | None = None) -> float:
        """The same with the rows of the second in another order."""
        return float(self.nulls[self._measure(measure)][self._place(first), self._place(second)])

    def between(self, first: str, second: str, measure: str | None = None) -> Floats:
        """The sites of one model by those of another.

        >>> both = analyzers.Similarity({"one": model, "other": model}, measures="cka").over(batches, progress=False)
        >>> both.result().between("one", "other").shape
        (4, 4)
        """
        return self.values[self._measure(measure)][np.ix_(self._owned(first), self._owned(second))]

    def table(self, measure: str | None = None) -> DataFrame:
        """A row and a column a site.

        >>> alike.table("rsa").round(2)
        """
        import pandas as pd

        return pd.DataFrame(self.values[self._measure(measure)], index=list(self.names), columns=list(self.names))

    def plot(self, ax: Axes | None = None, measure: str | None = None) -> Figure:
        """Draw a map of the sites by the sites, of two models those of one by those of the other, and of a training lines.

        >>> alike.plot().savefig("alike.png")

        Of models whose names are numbers, in their order, each site has a line: how alike it is to itself in the last one.
        """
        from analyzers.compare.pictures import draw, lines

        return (lines if self.steps else draw)(self, self._measure(measure), ax)

    @property
    def steps(self) -> tuple[float, ...]:
        """The names of the models as numbers, where there are more than two and all of them rise; else nothing."""
        try:
            found = tuple(map(float, self.models))
        except ValueError:
            return ()
        return found if len(found) > 2 and list(found) == sorted(found) else ()

    def _measure(self, measure: str | None) -> str:
        if measure is not None and measure not in self.values:
            raise AnalyzerError(f"measure={measure!r}: expected one of {', '.join(map(repr, self.values))}.")
        return measure or next(iter(self.values))

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise AnalyzerError(f"{name!r} was not compared.{nearest(name, self.names)}")
        return self.names.index(name)

    def _owned(self, model: str) -> list[int]:
        if str(model) not in self.models:
            raise AnalyzerError(f"{model!r} is no model here: expected one of {', '.join(map(repr, self.models))}.")
        return [place for place, owner in enumerate(self.owners) if owner == str(model)]

    def __repr__(self) -> str:
        many = len(self.models)
        whose = f" of {many} models" if many > 1 else ""
        lines = [
            f"Similarities of {number_of(len(self.names), 'site')}{whose} over {number_of(self.rows, 'row')}"
            + (f" of {self.seen}" if self.seen > self.rows else "")
            + told_skip(self.skip)
        ]
        apart = ~np.eye(len(self.names), dtype=bool)
        for kind, values in self.values.items():
            pairs, null = values[apart], self.nulls[kind]
            told = _range(pairs) or ("of one site alone" if not len(pairs) else "no two sites with variance")
            lines.append(f"  {kind:<10}  {told}" + (f"; rows in another order {_range(null)}" if _range(null) else ""))
        for place, name in enumerate(self.names):
            kinds = [kind for kind, values in self.values.items() if np.isnan(values[place, place])]
            if kinds:
                lines.append(f"  NaN for {name} in {', '.join(kinds)}: there is no variance to compare")
        return "\n".join(lines)


def _range(values: Floats) -> str:
    """The least and the largest of some numbers; empty where there are none."""
    known = values[~np.isnan(values)]
    return f"{known.min():.2f} to {known.max():.2f}" if known.size else ""
