"""What putting values of one run into another did: one number a site, as tables and maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from analyzers.causal.cells import BY_POSITION, Cell, as_maps
from analyzers.numbers.confidence import ratios
from analyzers.numbers.embed import Floats, Ints
from analyzers.prompts import Prompts
from analyzers.protocol import AnalyzerError
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Effects(Stored):
    """What patching each site did to the answer.

    >>> effects.maps["z"].shape, len(effects.strongest(3))
    ((4, 4), 3)
    >>> effects.table().sort_values("effect").tail()

    effects: by site, the share of the way from the base run's answer to the source run's, 0 for none and 1 for all of it,
    with the ends of their 95 % intervals over pairs. changes: (sites, pairs), what the metric changed by. base and source:
    the metric of both runs by pair. control: by kind, the effect of the strongest site with values of another pair.
    correlation: with the effects of exact patching, where those were given. forwards: how many there were, but for the one
    in which the model was located.
    """

    method: str
    kinds: tuple[str, ...] = field(repr=False)
    layers: Ints = field(repr=False)
    places: Ints = field(repr=False)
    sites: tuple[str, ...] = field(repr=False)
    effects: Floats
    low: Floats
    high: Floats
    changes: Tensor
    base: Tensor
    source: Tensor
    control: dict[str, float]
    correlation: float
    labels: tuple[str, ...]
    how: str
    forwards: int
    error: float
    seed: int

    @property
    def names(self) -> list[str]:
        """Each site as its kind with layer and place: "z 18.6"."""
        return [f"{kind} {layer}.{place}" for kind, layer, place in zip(self.kinds, self.layers, self.places, strict=True)]

    @property
    def maps(self) -> dict[str, Floats]:
        """The effects as one map a kind, (layers, positions) or for `z` (layers, heads)."""
        return as_maps(self.kinds, self.layers, self.places, self.effects)

    def strongest(self, many: int = 5, kind: str | None = None) -> list[str]:
        """The names of the sites with the largest effects, whatever their sign."""
        if kind is not None and kind not in self.kinds:
            raise AnalyzerError(f"kind={kind!r} was not patched. Expected one of {', '.join(dict.fromkeys(self.kinds))}.")
        order = [n for n in np.argsort(-np.abs(self.effects), kind="stable") if kind in (None, self.kinds[n])]
        return [self.names[n] for n in order[:many]]

    def table(self) -> DataFrame:
        """One row a site: its kind, layer and place, its effect with the interval, and the mean change of the metric.

        >>> effects.table().query("kind == 'z'")
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "kind": self.kinds,
                "layer": self.layers,
                "place": self.places,
                "effect": self.effects,
                "low": self.low,
                "high": self.high,
                "change": self.changes.mean(1).numpy(),
                "site": self.sites,
            }
        )

    def plot(self, ax: Axes | None = None, kind: str | None = None) -> Figure:
        """Draw the effects as heat maps, one a kind; returns the figure.

        >>> effects.plot(kind="resid_pre").savefig("patching.png")

        ax: where to draw one kind; None makes a figure of all of them.
        """
        from analyzers.causal.maps import draw
        from fmr.pictures.heatmap import returned

        return returned(draw(self, ax, kind)) if ax is None else draw(self, ax, kind)

    def __repr__(self) -> str:
        effects = dict(zip(self.names, self.effects, strict=True))
        lines = []
        for kind in dict.fromkeys(self.kinds):
            name = self.strongest(1, kind)[0]
            other = self.control.get(kind, float("nan"))
            beside = f"; with values of another pair {other:.2f}" if other == other else ""
            lines.append(f"  {kind}: strongest {name.removeprefix(kind + ' ')} with {effects[name]:.2f}{beside}")
        lines += [f"  {kind}: {why}" for kind, why in self._without()]
        exact = f"; correlation with exact patching {self.correlation:.3f}" if self.correlation == self.correlation else ""
        head = (
            f"{self.method}: {number_of(len(self.kinds), 'site')} over {number_of(len(self.base), 'pair')}, metric "
            f"{float(self.base.mean()):.3g} in "
            f"the base run, {float(self.source.mean()):.3g} in the source run; "
            f"{number_of(self.forwards, 'forward')} ({self.how}){exact}"
        )
        return "\n".join([head, *lines])

    def _without(self) -> Iterator[tuple[str, str]]:
        """The kinds of a patching of whole layers that were not located in some of them, in words."""
        layers = dict.fromkeys(n for n, kind in zip(self.layers.tolist(), self.kinds, strict=True) if kind == BY_POSITION[0])
        expected = [kind for kind in (*BY_POSITION, "z") if kind != "mixer" or kind in self.kinds]  # few models have any
        for kind in expected if layers else ():
            own = {n for n, one in zip(self.layers.tolist(), self.kinds, strict=True) if one == kind}
            missing = [str(n) for n in layers if n not in own]
            if missing:
                where = f"layer{'s' * (len(missing) > 1)} {', '.join(missing)}" if own else "any layer"
                yield kind, f"not patched, as fmr.locate found none in {where}"


def effects_of(
    method: str,
    cells: Sequence[Cell],
    changes: Tensor,
    base: Tensor,
    source: Tensor,
    given: Prompts,
    seed: int,
    *,
    control: dict[str, float] | None = None,
    exact: Effects | None = None,
    how: str,
    forwards: int,
    error: float = float("nan"),
) -> Effects:
    """The result of what patching each cell changed the metric by, (cells, pairs)."""
    gap = (source - base).numpy()
    if abs(gap.mean()) < 1e-6 * max(1.0, float(base.abs().mean())):
        raise AnalyzerError(
            f"The metric is {float(base.mean()):.4g} on the clean prompts and on the corrupted ones, so that nothing can go "
            "over. Expected prompts with other answers, or another metric."
        )
    effects, low, high = ratios(changes.numpy(), gap, seed)
    kinds, sites = tuple(cell.kind for cell in cells), tuple(repr(cell.site) for cell in cells)
    correlation = float("nan")
    if exact is not None:
        if exact.sites != sites:
            raise AnalyzerError("exact holds other sites than those asked for here. Expected a result for the same sites.")
        correlation = float(np.corrcoef(effects, exact.effects)[0, 1])
    return Effects(
        method=method,
        kinds=kinds,
        layers=np.array([cell.layer for cell in cells]),
        places=np.array([cell.place for cell in cells]),
        sites=sites,
        effects=effects,
        low=low,
        high=high,
        changes=changes,
        base=base,
        source=source,
        control=control or {},
        correlation=correlation,
        labels=given.labels,
        how=how,
        forwards=forwards,
        error=error,
        seed=seed,
    )
