"""What a sweep measured, and how it came to it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fmr.ids import Site

if TYPE_CHECKING:
    import pandas


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

    def __repr__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        low, high = float(self.values.min()), float(self.values.max())
        return (
            f"Grid of {len(self.sites)} edited runs by {self.how}{why}, {self.rows} at once: values {low:.4g} to "
            f"{high:.4g}, without edits {float(self.base.mean()):.4g}; {self.forwards} forwards, spot checks within "
            f"{self.error:.1e}"
        )
