"""Many edited runs as the rows of one: rows join where their sites lie, and sentinel rows tell whether rows stay apart."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.edits.editor import Editor
from fmr.edits.frames import Frame
from fmr.errors import ReplayError
from fmr.ids import TensorId
from fmr.sweeps.cut import WHOLE, Planned, Positions, Span
from fmr.sweeps.rows import Axis, Grown, at_rows, same, walk_of
from fmr.sweeps.steps import Step, refuse_resized, refuse_unknown, run_step

HEAD, TAIL = 2, 3
"""Sentinel rows before and behind the edited ones: tainted, clean; tainted, clean, tainted.

They check the sequence of ops, which is the same for all chunks of a sweep: the first chunk has them, the others do without.
"""


class Live(NamedTuple):
    """A value with its rows: how many edited ones had joined when it was made, and which positions it has."""

    value: Tensor
    joined: int
    span: Span = WHOLE


class RowRun:
    """One replay with rows: `editors` has the edits of each, in the order in which they join, `clean` a recorded row.

    If `guarded`, sentinels go with them: before and after them, at all values that `ids` names, if `everywhere`, else two
    before them, where these rows are edited.
    """

    def __init__(
        self,
        grown: Grown,
        clean: Mapping[TensorId, Tensor],
        editors: Sequence[Editor],
        frames: list[tuple[int, Frame]],
        wanted: set[TensorId],
        plan: Mapping[TensorId, Planned] | None = None,
        positions: Positions | None = None,
        seen: Callable[["RowRun", TensorId], None] | None = None,
        guarded: bool = True,
        everywhere: bool = True,
        ids: Mapping[TensorId, TensorId] | None = None,
        frozen: Set[TensorId] = frozenset(),
    ) -> None:
        self.head, self.tail = HEAD if guarded else 0, TAIL if guarded and everywhere else 0
        self.grown, self.clean, self.editors, self.wanted = grown, clean, editors, wanted
        self.plan, self.positions, self.seen = plan or {}, positions, seen
        for editor in editors:
            editor.begin(lambda: frames)
        self.at: dict[TensorId, list[tuple[int, TensorId]]] = {}
        for row, editor in enumerate(editors):
            for name in sorted(editor.ids, key=lambda name: name.is_path):  # what an op made before what a module returned
                self.at.setdefault(name if ids is None else ids[name], []).append((row, name))
        self.tainted = frozenset(ids.values()) if everywhere and guarded and ids is not None else frozenset(self.at)
        self.joined, self.frozen = 0, frozen
        self.live: dict[TensorId, Live] = {}
        self.whole: dict[TensorId, Tensor] = {}

    # ---- running

    @property
    def rows(self) -> int:
        """How many rows there are by now, sentinels included."""
        return self.head + self.joined + self.tail

    @property
    def _spoilt(self) -> set[int]:
        """The sentinels that hold no numbers: the first row, and two of the last three."""
        return {0, self.rows - TAIL, self.rows - 1} if self.tail else {0} if self.head else set()

    def run(self) -> None:
        """Walk the steps; afterwards `outcome` gives the wanted values row by row."""
        joins = self.at.keys() | (self.tainted if self.head else frozenset())
        for step, last_read in walk_of(self.grown, self.wanted, self.at.keys(), self.frozen):
            refuse_unknown(step, bool(self.live))
            if any(name in self.live for name in step.reads):
                planned = self.plan.get(step.first.id)
                for name, value in self.made(step, planned).items() if not self._holds(step) else ():
                    if name in self.frozen:
                        continue
                    self._check_size(name, value, planned)
                    self.live[name] = Live(value, self.joined, WHOLE if planned is None else planned.span)
            for node in step.nodes:
                if node.id in joins:
                    self._join(node.id)
                if self.seen is not None and node.id in self.live:
                    self.seen(self, node.id)
            for name in last_read:
                self.live.pop(name, None)

    def _holds(self, step: Step) -> bool:
        """Whether all that a step makes is frozen."""
        return bool(self.frozen) and all(node.id in self.frozen for node in step.nodes)

    def _check_size(self, name: TensorId, value: Tensor, planned: Planned | None) -> None:
        """Raise where the size of a value depends on the edits."""
        if planned is not None and planned.span != WHOLE:
            return
        axis, was = self.grown.axes.get(name), self.grown.graph[name].shape
        if axis is not None:
            length = self.rows * axis.size
            was = (*was[: axis.axis], length, *was[axis.axis + 1 :])
        if name in self.grown.entries:
            was = (*was[:-1], self.grown.entries[name])
        refuse_resized(name, value, was)

    def made(self, step: Step, planned: Planned | None = None) -> dict[TensorId, Tensor]:
        """The values of a step with the rows that there are now."""
        scaled = self.grown.scaled.get(step.first.id) if planned is None else planned.step
        if scaled is not None:
            args = tuple(at_rows(item, self.rows) for item in scaled.args)
            kwargs = tuple((name, at_rows(item, self.rows)) for name, item in scaled.kwargs)
            step = step._replace(args=args, kwargs=kwargs)
        if planned is None:
            return run_step(step, self.value, self.grown.graph.__getitem__)
        return run_step(step, lambda name: self.value(name, planned.operands[name]), self.grown.graph.__getitem__)

    def value(self, name: TensorId, span: Span = WHOLE) -> Tensor:
        """The positions of a value that are asked for, with as many rows as there are now."""
        live, axis = self.live.get(name), self.grown.axes.get(name)
        if live is None:
            if axis is not None and name in self.grown.counted:
                return self._part(self._counted(name), span)
            return self._repeated(name, axis, span, self.rows)
        if live.joined < self.joined and axis is not None:
            live = self.live[name] = Live(self._longer(live, axis, name), self.joined, live.span)
        if live.span == span:
            return live.value
        if live.span == WHOLE:
            return self._part(live.value, span)
        assert self.positions is not None
        if live.span.axis == span.axis and live.span.start <= span.start:
            return self.positions.again(live.value, live.span, span.start)
        return self._part(self._whole(name, live, axis), span)

    def _part(self, value: Tensor, span: Span) -> Tensor:
        return value if self.positions is None else self.positions.take(value, span)

    def _whole(self, name: TensorId, live: Live, axis: Axis | None) -> Tensor:
        """A value with the recorded positions before those that were computed."""
        assert self.positions is not None
        before, span = self.positions.before(self.clean[name], live.span), live.span
        if axis is None:
            return self.positions.joined(before, live.value, span)
        once = before.unsqueeze(axis.axis)  # all rows show it; the only copy is the joined value
        shown = once.expand(*(self.rows if n == axis.axis else length for n, length in enumerate(once.shape)))
        rows = live.value.unflatten(axis.axis, (self.rows, -1))
        inner = span._replace(axis=span.axis + (span.axis >= axis.axis))
        return self.positions.joined(shown, rows, inner).flatten(axis.axis, axis.axis + 1)

    def _repeated(self, name: TensorId, axis: Axis | None, span: Span, rows: int) -> Tensor:
        """Clean rows of a value."""
        row = self._part(self.clean[name], span)
        return row if axis is None else axis._replace(size=row.shape[axis.axis]).repeated(row, rows)

    def _longer(self, live: Live, axis: Axis, name: TensorId) -> Tensor:
        """A value with clean rows for those that joined since it was made, before the last sentinels."""
        size = live.value.shape[axis.axis] // (self.head + live.joined + self.tail)
        before = (self.head + live.joined) * size
        head = live.value.narrow(axis.axis, 0, before)
        parts = [head, self._repeated(name, axis, live.span, self.joined - live.joined)]
        if self.tail:
            parts.append(live.value.narrow(axis.axis, before, self.tail * size))
        return torch.cat(parts, axis.axis)

    def _counted(self, name: TensorId) -> Tensor:
        """A value that only depends on the number of rows, made for as many as there are."""
        return self.made(self.grown.step_of[name])[name]

    def _join(self, name: TensorId) -> None:
        """Let the rows whose first site this is join, edit this value in each row that has a site here, and taint it."""
        axis, edits = self.grown.axes.get(name), self.at.get(name, [])
        if axis is None:
            raise ReplayError(f"{name} has no row for each example")
        self.joined = max([self.joined, *(row + 1 for row, _ in edits)])
        value = self.value(name).clone()
        if not value.is_floating_point():
            raise ReplayError(f"{name} holds no floating-point numbers, which could tell rows apart")
        for row, asked in edits:
            block = axis.block(value, self.head + row)
            block.copy_(self.editors[row].apply(asked, block.clone()))
        for row in self._spoilt:
            axis.block(value, row).fill_(float("nan"))
        planned = self.plan.get(self.grown.step_of[name].first.id)
        span = WHOLE if planned is None else planned.span
        self.live[name] = Live(self._part(value, span), self.joined, span)

    # ---- the verdict

    def block(self, name: TensorId, row: int) -> Tensor:
        """A value in one row, sentinels counted, as far as it was computed."""
        live, axis = self.live[name], self.grown.axes[name]
        size = live.value.shape[axis.axis] // self.rows
        return live.value.narrow(axis.axis, row * size, size)

    def outcome(self, name: TensorId, row: int) -> Tensor:
        """A wanted value in one edited row, with what was recorded before its positions; it lasts until the next."""
        axis, live = self.grown.axes.get(name), self.live.get(name)
        if axis is None or live is None:
            return self.clean[name]
        self.value(name, live.span)
        block = self.block(name, self.head + row)
        if live.span == WHOLE or self.positions is None:
            return block
        if self.clean[name].shape[live.span.axis] != self.positions.count:
            return self.positions.joined(self.positions.before(self.clean[name], live.span), block, live.span)
        if name not in self.whole:
            self.whole[name] = self.clean[name].clone()
        self.positions.take(self.whole[name], live.span).copy_(block)
        return self.whole[name]

    def check(self) -> None:
        """Raise unless every tainted row is tainted, none of the others is, and clean rows are what was recorded."""
        for name in self.wanted & self.live.keys() if self.head else ():
            axis = self.grown.axes.get(name)
            if axis is None:
                raise ReplayError(f"rows were mixed: {name} has none, but depends on the edits")
            span = self.live[name].span
            value, clean = self.value(name, span), self._part(self.clean[name], span)
            if value.shape[axis.axis] != self.rows * clean.shape[axis.axis]:
                places = self.rows * clean.shape[axis.axis]
                raise ReplayError(f"{name} has {value.shape[axis.axis]} places instead of {places}")
            blocks = [self.block(name, row) for row in range(self.rows)]
            already = int(clean.isnan().sum())
            for row, block in enumerate(blocks):
                nan = int(block.isnan().sum())
                if (row in self._spoilt) != (nan > already):
                    raise ReplayError(f"rows are mixed, or what is no number is replaced, on the way to {name}")
            for row in (1, self.rows - TAIL + 1) if self.tail else (1,):
                if not same(blocks[row], clean):
                    raise ReplayError(f"a row without edits differs from the recording at {name}")
