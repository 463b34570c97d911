"""What a sweep measured, and how it came to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fmr.errors import DrawError, number_of
from fmr.ids import Site

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Grid:
    """What a sweep measured: one value for each site (and example), and how it came to them.

    >>> grid = fmr.sweep(model, inputs, [site, block.z.at(heads=1)], edits.Zero(), logit_diff(3, 7), progress=False)
    >>> grid.how
    'rows, cut'

    `values` has a row for each site: one number, or one for each example. `base` is the metric without edits. `how` is
    "rows, cut" (of a replay, with the positions that matter alone), "rows", "batched" (the model's own forward with the
    inputs repeated) or "loop"; `why` says why others were left. `rows` is how many runs went at once, `forwards` counts
    calls of the model; `error` is the largest difference of the cells that were run one by one besides, relative to the
    largest value.
    """

    sites: tuple[tuple[Site, ...], ...]
    values: Tensor
    base: Tensor
    how: str
    why: str
    rows: int
    forwards: int
    error: float

    def table(self) -> "pandas.DataFrame":
        """One line for each site: what was edited, the metric, and how far it is from that without edits."""
        import pandas

        values, base = self.values.reshape(len(self.sites), -1).mean(1), float(self.base.mean())
        lines = [
            {"site": " + ".join(map(repr, sites)), "value": float(value), "change": float(value) - base}
            for sites, value in zip(self.sites, values, strict=True)
        ]
        return pandas.DataFrame(lines)

    def plot(self, ax: "Axes | None" = None, tokens: Sequence[str] | None = None) -> "Figure":
        """Draw what each edit changes the metric by, the mean over examples; returns the figure.

        >>> places = [site.at(positions=t) for t in range(6)]
        >>> grid = fmr.sweep(model, inputs, places, edits.Zero(), logit_diff(3, 7), progress=False)
        >>> figure = grid.plot(tokens=["<bos>", "who", "gave", "what", "to", "whom"])

        Sites of one position each, or of one head, make a map: a row for each value, a column for each position or head;
        those of one head at one position have a row for each head. Where IDs of values differ in one number
        alone, it names their rows. Any others stand side by side, in the order of the sweep. ax: where to draw. tokens: one
        for each position.
        """
        from fmr.pictures.changes import draw, numbered

        changes = self.values.reshape(len(self.sites), -1).double().mean(1).cpu() - float(self.base.mean())
        axis, cells = _laid_out(self.sites)
        rows = list(dict.fromkeys(row for row, _ in cells))
        columns = 1 + max(column for _, column in cells)
        found = torch.full((len(rows), columns), float("nan"), dtype=torch.double)
        for (row, column), change in zip(cells, changes, strict=True):
            found[rows.index(row), column] = change
        if tokens is not None and (axis != "positions" or len(tokens) < columns):
            raise DrawError(
                f"tokens holds {len(tokens)} labels, and the map has {columns} {axis}. Expected one for each position, "
                "of sites that have one position each."
            )
        labels = list(map(str, range(columns))) if tokens is None else list(tokens[:columns])
        across = "" if tokens is not None else axis.removesuffix("s")
        names, title = [name for name, _ in rows], number_of(len(self.sites), "edited run")
        by_head = rows[0][1] is not None
        if short := numbered(names):
            names, title = list(map(str, short[0])), f"{title}\nrows: *{'.head' * by_head} of {short[1]}"
        if by_head:
            names = [f"{name}.{head}" for name, (_, head) in zip(names, rows, strict=True)]
        return draw(found, names, labels, across, title, ax)

    def __repr__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        low, high = float(self.values.min()), float(self.values.max())
        return (
            f"Grid of {number_of(len(self.sites), 'edited run')} by {self.how}{why}, {self.rows} at once: values {low:.4g} "
            f"to {high:.4g}, without edits {float(self.base.mean()):.4g}; {number_of(self.forwards, 'forward')}, spot "
            f"checks within {self.error:.1e}"
        )


Row = tuple[str, int | None]
"""What a row of a map holds: an ID, and one head of it where rows are heads."""


def _laid_out(sites: Sequence[tuple[Site, ...]]) -> tuple[str, list[tuple[Row, int]]]:
    """What the columns of a map count, and the row and column of each run; one row of runs where they make no map."""
    every = [of[0] for of in sites if len(of) == 1]
    for axis, by_head in (("positions", False), ("heads", False), ("positions", True)):
        places = [getattr(site, axis) for site in every]
        single = [*places, *(site.heads for site in every if by_head)]
        if len(every) == len(sites) and all(type(place) is int and place >= 0 for place in single):
            rows = [(str(site.id), cast("int", site.heads) if by_head else None) for site in every]
            cells = list(zip(rows, places, strict=True))
            if len(set(cells)) == len(cells):
                return axis, cells
    return "runs", [(("", None), number) for number in range(len(sites))]
