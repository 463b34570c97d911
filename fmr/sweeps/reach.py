"""Which positions an edit reaches: seen by rows of finite noise, whose values are compared with a clean row bit for bit."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from fmr.edits.editor import Editor
from fmr.edits.frames import Frame
from fmr.edits.values import Context
from fmr.ids import Site, TensorId
from fmr.sweeps.cut import WHOLE, Planned, Positions
from fmr.sweeps.questions import reached_by
from fmr.sweeps.rowrun import RowRun
from fmr.sweeps.rows import Grown

SIZES = (1.0, 1000.0)
"""How large the noise is in turn, in standard deviations of the value."""

MOST = 16
"""How many rows there are at most; where they allow it, each position is probed with noise of every size."""


class Noisy:
    """An edit that adds noise of `SIZES`, which take turns over the examples; `number` says which is first."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        draw = torch.Generator().manual_seed(self.number)
        sizes = torch.tensor([SIZES[(self.number + n) % len(SIZES)] for n in range(len(value))])
        noise = torch.randn(value.shape, generator=draw) * sizes.view(-1, *[1] * (value.dim() - 1))
        return value + (value.std() if value.numel() > 1 else 1.0) * noise.to(value)


def _kept(value: Tensor, _: Context) -> Tensor:
    """The edit of the row that the others are compared with."""
    return value


Probe = tuple[Site, int]
"""A site that is edited, and the position at which noise is added there."""


def reached(
    grown: Grown,
    clean: Mapping[TensorId, Tensor],
    probes: Sequence[Probe],
    frames: list[tuple[int, Frame]],
    wanted: set[TensorId],
    plan: Mapping[TensorId, Planned],
    positions: Positions,
    frozen: Set[TensorId],
) -> dict[TensorId, set[int]]:
    """For each value that these probes reach the axes along which no position before that of the edit changes.

    The probes are in the order in which their values are made; those of later values are loud, since what reaches these
    from the first may be bounded on its way. Nothing is said of values that the plan narrows, nor of those
    that do not change; where a probe below which a value lies does not move it, no axis is known.
    """
    each = len(SIZES) if len(probes) * len(SIZES) <= MOST else 1
    rows = [
        (_bare(site), start, Noisy(n + size if site.id == probes[0][0].id else 2 * n + 1))
        for n, (site, start) in enumerate(probes)
        for size in range(each)
    ]
    editors = [Editor({rows[0][0]: _kept}), *(Editor({site.at(positions=start): noise}) for site, start, noise in rows)]
    below = {site.id: reached_by(grown.graph, {site.id}, frozen) for site, _, _ in rows}
    firsts = torch.tensor([start for _, start, _ in rows])[:, None]
    left: dict[TensorId, set[int]] = {}

    def look(going: RowRun, name: TensorId) -> None:
        axis = grown.axes.get(name)
        if axis is None or going.live[name].span != WHOLE:
            return
        value = going.value(name).unflatten(axis.axis, (-1, axis.size)).movedim(axis.axis, 0)
        concerned = [row for row in range(len(value) - 1) if name in below[rows[row][0].id]]
        changed = (value[1:] != value[:1])[concerned] if len(concerned) < len(value) - 1 else value[1:] != value[:1]
        moved = changed.flatten(1).any(1)
        if not moved.any():
            return  # it may be reached by other edits, and nothing is known of what lies below it
        early = torch.arange(positions.count) < firsts[concerned]
        left[name] = {
            place
            for place in (positions.axes(value.shape[1:]) if moved.all() else ())
            if not (positions.changed(changed, place).cpu() & early).any()
        }

    RowRun(grown, clean, editors, frames, wanted, plan, positions, seen=look, guarded=False, frozen=frozen).run()
    return left


def _bare(site: Site) -> Site:
    return replace(site, positions=None, heads=None, units=None)
