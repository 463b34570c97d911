"""Which positions an edit reaches: seen by rows of finite noise, whose values are compared with a clean row bit for bit."""

from dataclasses import replace

import torch
from torch import Tensor

from fmr.edits.editor import Editor
from fmr.edits.places import Frame
from fmr.edits.values import Context
from fmr.ids import Site, TensorId
from fmr.runs.passes import Pass
from fmr.sweeps.cut import Positions
from fmr.sweeps.rowrun import HEAD, RowRun
from fmr.sweeps.rows import Grown

SIZES = (1.0, 1000.0)
"""How large the noise is, in standard deviations of the value."""


class Noisy:
    """An edit that adds noise of a size relative to the value."""

    def __init__(self, size: float) -> None:
        self.size = size

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        draw = torch.Generator().manual_seed(int(self.size))
        noise = torch.randn(value.shape, generator=draw).to(value)
        return value + self.size * (value.std() if value.numel() > 1 else 1.0) * noise


def reached(
    grown: Grown, recorded: Pass, site: Site, frames: list[tuple[int, Frame]], wanted: set[TensorId], positions: Positions
) -> dict[TensorId, int]:
    """For each value an axis along which no position before that of an edit changes, if there is one."""
    starts = sorted({1, positions.count // 2, positions.count - 1})
    probes = [(start, Noisy(size)) for start in starts for size in SIZES]
    bare = replace(site, positions=None, heads=None, units=None)
    editors = [Editor({bare.at(positions=start): noise}) for start, noise in probes]
    left: dict[TensorId, list[int]] = {}

    def look(name: TensorId) -> None:
        if name not in grown.axes:
            return
        rows = going.value(name)
        size = rows.shape[grown.axes[name].axis] // going.rows
        blocks = rows.split(size, grown.axes[name].axis)
        clean = blocks[1]
        axes = list(positions.axes(clean.shape))
        for row, (start, _) in enumerate(probes[: going.joined]):
            changed = blocks[HEAD + row] != clean
            axes = [axis for axis in axes if not positions.before_any(changed, axis, start)]
        left[name] = axes

    going = RowRun(grown, recorded, editors, frames, wanted, seen=look)
    going.run()
    going.check()
    return {name: axes[0] for name, axes in left.items() if axes}
