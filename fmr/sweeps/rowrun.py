"""Many edited runs as the rows of one: rows join where their sites lie, and sentinel rows tell whether rows stay apart."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.edits.editor import Editor
from fmr.edits.places import Frame
from fmr.errors import ReplayError
from fmr.ids import TensorId
from fmr.runs.run import Pass
from fmr.sweeps.rows import Axis, Grown, at_rows, same
from fmr.sweeps.steps import Step, run_step

HEAD, TAIL = 2, 3
"""Sentinel rows before and behind the edited ones: tainted, clean; tainted, clean, tainted."""


class Live(NamedTuple):
    """A value with its rows, and how many edited ones had joined when it was made."""

    value: Tensor
    joined: int


class RowRun:
    """One replay with rows: `editors` holds the edits of each row, in the order in which the rows join."""

    def __init__(
        self, grown: Grown, recorded: Pass, editors: Sequence[Editor], frames: list[tuple[int, Frame]], wanted: set[TensorId]
    ) -> None:
        self.grown, self.recorded, self.editors, self.wanted = grown, recorded, editors, wanted
        for editor in editors:
            editor.begin(lambda: frames)
        self.at: dict[TensorId, list[int]] = {}
        for row, editor in enumerate(editors):
            for name in editor.ids:
                self.at.setdefault(name, []).append(row)
        self.joined = 0
        self.live: dict[TensorId, Live] = {}
        self.last = self._last_readers()

    # ---- what is needed, and how long

    def _last_readers(self) -> dict[TensorId, int]:
        """The last step that reads each value, of those that matter."""
        needed = self.wanted | self.at.keys()
        for step in reversed(self.grown.steps):
            if any(node.id in needed for node in step.nodes):
                needed.update(step.reads)
        self.needed = needed
        last: dict[TensorId, int] = {}
        for place, step in enumerate(self.grown.steps):
            if any(node.id in needed for node in step.nodes):
                last.update(dict.fromkeys(step.reads, place))
        return last

    # ---- running

    @property
    def rows(self) -> int:
        """How many rows there are by now, sentinels included."""
        return HEAD + self.joined + TAIL

    def run(self) -> None:
        """Walk the steps; afterwards `outcome` gives the wanted values row by row."""
        for place, step in enumerate(self.grown.steps):
            if not any(node.id in self.needed for node in step.nodes):
                continue
            if any(name in self.live for name in step.reads):
                for name, value in self._made(step).items():
                    self.live[name] = Live(value, self.joined)
            for node in step.nodes:
                if node.id in self.at:
                    self._join(node.id)
            for name in step.reads:
                if self.last.get(name) == place and name not in self.wanted:
                    self.live.pop(name, None)

    def _made(self, step: Step) -> dict[TensorId, Tensor]:
        """The values of a step with the rows that there are now."""
        scaled = self.grown.scaled.get(step.first.id)
        if scaled is not None:
            args = tuple(at_rows(item, self.rows) for item in scaled.args)
            kwargs = tuple((name, at_rows(item, self.rows)) for name, item in scaled.kwargs)
            step = step._replace(args=args, kwargs=kwargs)
        return run_step(step, self.value, self.grown.graph.__getitem__)

    def value(self, name: TensorId) -> Tensor:
        """A value with as many rows as there are now."""
        live, axis = self.live.get(name), self.grown.axes.get(name)
        if axis is None:
            return self.recorded[name] if live is None else live.value
        if live is None:
            if name in self.grown.counted:
                return self._counted(name)
            return axis.repeated(self.clean(name, axis), self.rows)
        if live.joined < self.joined:
            live = self.live[name] = Live(self._longer(live, axis, name), self.joined)
        return live.value

    def clean(self, name: TensorId, axis: Axis) -> Tensor:
        """The row of a value as it was recorded."""
        return axis.clean(self.recorded[name])

    def _longer(self, live: Live, axis: Axis, name: TensorId) -> Tensor:
        """A value with clean rows for those that joined since it was made, before the last sentinels."""
        before = (HEAD + live.joined) * axis.size
        head = live.value.narrow(axis.axis, 0, before)
        tail = live.value.narrow(axis.axis, before, TAIL * axis.size)
        return torch.cat([head, axis.repeated(self.clean(name, axis), self.joined - live.joined), tail], axis.axis)

    def _counted(self, name: TensorId) -> Tensor:
        """A value that only depends on the number of rows, made for as many as there are."""
        return self._made(self.grown.step_of[name])[name]

    def _join(self, name: TensorId) -> None:
        """Let the rows whose first site this is join, and edit this value in each row that has a site here."""
        axis, rows = self.grown.axes.get(name), self.at[name]
        if axis is None:
            raise ReplayError(f"{name} has no row for each example")
        first = not self.joined
        self.joined = max(self.joined, rows[-1] + 1)
        value = self.value(name).clone()
        if not value.is_floating_point():
            raise ReplayError(f"{name} holds no floating-point numbers, which could tell rows apart")
        for row in rows:
            block = axis.block(value, HEAD + row)
            block.copy_(self.editors[row].apply(name, block.clone()))
        if first:
            for row in (0, self.rows - TAIL, self.rows - 1):
                axis.block(value, row).fill_(float("nan"))
        self.live[name] = Live(value, self.joined)

    # ---- the verdict

    def outcome(self, name: TensorId, row: int) -> Tensor:
        """A wanted value in one edited row."""
        axis = self.grown.axes.get(name)
        return self.recorded[name] if axis is None else axis.block(self.value(name), HEAD + row)

    def check(self) -> None:
        """Raise unless every tainted row is tainted, none of the others is, and clean rows are what was recorded."""
        for name in self.wanted & self.live.keys():
            axis = self.grown.axes.get(name)
            if axis is None:
                raise ReplayError(f"rows were mixed: {name} has none, but depends on the edits")
            value, clean = self.value(name), self.clean(name, axis)
            if value.shape[axis.axis] != self.rows * axis.size:
                raise ReplayError(f"{name} has {value.shape[axis.axis]} places instead of {self.rows * axis.size}")
            blocks = [axis.block(value, row) for row in range(self.rows)]
            tainted = {0, self.rows - TAIL, self.rows - 1}
            already = int(clean.isnan().sum())
            for row, block in enumerate(blocks):
                nan = int(block.isnan().sum())
                if (row in tainted) != (nan > already):
                    raise ReplayError(f"rows are mixed, or what is no number is replaced, on the way to {name}")
            for row in (1, self.rows - TAIL + 1):
                if not same(blocks[row], clean):
                    raise ReplayError(f"a row without edits differs from the recording at {name}")
