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


def reached(
    grown: Grown,
    clean: Mapping[TensorId, Tensor],
    site: Site,
    frames: list[tuple[int, Frame]],
    wanted: set[TensorId],
    plan: Mapping[TensorId, Planned],
    positions: Positions,
    frozen: Set[TensorId],
    starts: Sequence[int],
) -> dict[TensorId, set[int]]:
    """For each value that an edit of a site reaches the axes along which no position before that of the edit changes.

    Nothing is said of values that the plan narrows, nor of those that do not change.
    """
    each = len(SIZES) if len(starts) * len(SIZES) <= MOST else 1
    probes = [(start, Noisy(n + size)) for n, start in enumerate(starts) for size in range(each)]
    bare = replace(site, positions=None, heads=None, units=None)
    editors = [Editor({bare: _kept}), *(Editor({bare.at(positions=start): noise}) for start, noise in probes)]
    left: dict[TensorId, set[int]] = {}

    def look(going: RowRun, name: TensorId) -> None:
        if name not in grown.axes or going.live[name].span != WHOLE:
            return
        axis = grown.axes[name]
        rows = going.value(name)
        alone = axis.block(rows, 0)
        changed = [axis.block(rows, row + 1) != alone for row in range(len(probes))]
        moved = [bool(one.any()) for one in changed]
        if not any(moved):
            return  # it may be reached by other edits, and nothing is known of what lies below it
        left[name] = {
            place
            for place in (positions.axes(alone.shape) if all(moved) else ())
            if not any(positions.before_any(one, place, start) for one, (start, _) in zip(changed, probes, strict=True))
        }

    RowRun(grown, clean, editors, frames, wanted, plan, positions, seen=look, guarded=False, frozen=frozen).run()
    return left
