"""Communities that were found in a network, beside those of networks that are alike but for what makes communities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from analyzers.networks.search import ratio
from analyzers.numbers.embed import Floats, Ints
from analyzers.results import Stored
from fmr.errors import number_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Communities(Stored):
    """Communities among the units of a network, and whether they are more than those of two kinds of nulls.

    >>> communities.table()[["edges", "null", "p_q"]]
       edges            null ...
    0    1.0        shuffled ...
    1    1.0  strengths kept ...
    2    0.1        shuffled ...
    3    0.1  strengths kept ...

    groups: what made the units; group and place: of each unit; labels: its community, of the first of `shares`, largest
    community first, -1 without an edge. shares: which part of the edges was kept, strongest first; kinds: of nulls. q, k,
    ncut: (shares,); null_q, null_k, null_ncut: (shares, kinds, draws), q and k by the same search, ncut at the k of the
    network itself. drift: (kinds,), how far strengths of units were off at most, as a share of the largest. ends and
    sizes: the strongest edges, for pictures. edges: how many there are, by share. mixing: projections that weigh positions
    and leave units alone.
    """

    model: str
    graph: str
    groups: tuple[str, ...] = field(repr=False)
    group: Ints
    place: Ints
    labels: Ints
    shares: tuple[float, ...]
    kinds: tuple[str, ...]
    q: Floats
    k: Ints
    ncut: Floats
    null_q: Floats
    null_k: Ints
    null_ncut: Floats
    drift: Floats
    edges: Ints
    ends: Ints
    sizes: Floats
    mixing: tuple[str, ...]
    settings: dict[str, Any]
    seed: int

    @property
    def names(self) -> list[str]:
        """Each unit as "group:place"."""
        return [f"{self.groups[group]}:{place}" for group, place in zip(self.group, self.place, strict=True)]

    def table(self) -> DataFrame:
        """One row for each share of edges and kind of null: Q and n-cut beside the null's, with z and p.

        >>> communities.table().query("null == 'strengths kept'")

        z_q above 0: more modular than the null; z_ncut below 0: cut more easily. p: the share of nulls that are as extreme,
        (1 + n) / (1 + draws), of Q upwards and of the n-cut downwards. Q of the null is that of its own best number of
        communities, the n-cut at that of the network.
        """
        import pandas as pd

        rows = []
        for n, share in enumerate(self.shares):
            for kind, name in enumerate(self.kinds):
                q, ncut, k = self.null_q[n, kind], self.null_ncut[n, kind], self.null_k[n, kind]
                (z_q, p_q), (z_ncut, p_ncut) = ratio(self.q[n], q, larger=True), ratio(self.ncut[n], ncut, larger=False)
                rows.append(
                    {
                        "edges": share, "null": name, "k": int(self.k[n]), "q": self.q[n], "null_q": q.mean(),
                        "null_q_sd": q.std(ddof=1) if len(q) > 1 else 0.0, "z_q": z_q, "p_q": p_q, "ncut": self.ncut[n],
                        "null_ncut": ncut.mean(), "z_ncut": z_ncut, "p_ncut": p_ncut, "null_k": k.mean(),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def members(self) -> DataFrame:
        """One row a unit: its group, its place there, its community.

        >>> communities.members().groupby("community").group.value_counts()
        """
        import pandas as pd

        groups = [self.groups[group] for group in self.group]
        return pd.DataFrame({"group": groups, "place": self.place, "community": self.labels}, index=self.names)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the network, layers as columns and units in the colour of their community, and Q beside its nulls.

        >>> communities.plot().savefig("communities.png")

        ax: where to draw the network alone; None makes a figure with both.
        """
        from analyzers.networks.pictures import draw
        from fmr.pictures.heatmap import returned

        return returned(draw(self, ax)) if ax is None else draw(self, ax)

    def __repr__(self) -> str:
        isolated = int((self.labels < 0).sum())
        alone = f", {isolated} without an edge" if isolated else ""
        lines = [
            f"Communities of {self.model} ({self.graph}): {number_of(len(self.labels), 'unit')} in "
            f"{number_of(len(self.groups), 'group')}{alone}, "
            f"{number_of(int(self.edges[0]), 'edge')}"
        ]
        for n, share in enumerate(self.shares):
            kept = "all edges" if share >= 1 else f"strongest {100 * share:g} % of edges"
            lines.append(f"  {kept}: Q {self.q[n]:.3f}, n-cut {self.ncut[n]:.3f}, k {self.k[n]}")
            lines += [self._against(n, kind) for kind in range(len(self.kinds))]
        draws = self.null_q.shape[2]
        said = [f"{name} {value}" for name, value in self.settings.items() if name in ("method", "choose", "norm", "fold")]
        lines.append(
            f"  {number_of(draws, 'network')} of each null, the same search in all; {', '.join(said)}; seed {self.seed}"
        )
        if self.mixing:
            lines.append(
                f"  no edges of {number_of(len(self.mixing), 'projection')} over positions: {', '.join(self.mixing[:2])}"
            )
        return "\n".join(lines)

    def _against(self, n: int, kind: int) -> str:
        q, ncut = self.null_q[n, kind], self.null_ncut[n, kind]
        if not len(q):
            return f"    {self.kinds[kind]}: none drawn"
        (z_q, p_q), (z_cut, p_cut) = ratio(self.q[n], q, larger=True), ratio(self.ncut[n], ncut, larger=False)
        cut = f"n-cut {np.nanmean(ncut):.3f}, z {z_cut:+.1f}, p {p_cut:.2g}" if p_cut == p_cut else "n-cut of other k"
        return f"    {self.kinds[kind]}: Q {q.mean():.3f}, z {z_q:+.1f}, p {p_q:.2g}; {cut}"
