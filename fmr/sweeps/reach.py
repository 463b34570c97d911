"""Which positions an edit reaches: seen by rows of finite noise, whose values are compared with a clean row bit for bit.

What an op makes of one noise may be nothing, as where a comparison does not tip or a gate is shut, and of the edit much.
So where a row of noise leaves something at its positions as it was, the op is tried with others, and what any of them moves
goes on as noise of its own.
"""

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from fmr.edits.editor import Editor
from fmr.edits.frames import Frame
from fmr.edits.values import Context
from fmr.errors import ReplayError
from fmr.ids import Site, TensorId
from fmr.sweeps.cut import WHOLE, Planned, Positions, somewhere
from fmr.sweeps.questions import reached_by
from fmr.sweeps.rowrun import RowRun
from fmr.sweeps.rows import Axis, Grown

SIZES = (1.0, 1000.0)
"""How large the noise is in turn, in standard deviations of the value."""

MOST = 16
"""How many rows there are at most; where they allow it, each position is probed with noise of every size."""

TRIES = 3
"""How often an op is tried with other noise where something is left as it was."""

NEARLY = 0.9
"""The share of what lies side by side that has to change, so that nothing seems hidden; roundings hide some of it."""

Probe = tuple[Site, int]
"""A site that is edited, and the position at which noise is added there."""


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
    probes: Sequence[Probe],
    frames: list[tuple[int, Frame]],
    wanted: set[TensorId],
    plan: Mapping[TensorId, Planned],
    positions: Positions,
    frozen: Set[TensorId],
) -> dict[TensorId, set[int]]:
    """For each value that these probes reach the axes along which no position before that of the edit changes.

    The probes are in the order in which their values are made; those of later values are loud, since what reaches these
    from the first may be bounded on its way. Nothing is said of values that the plan narrows, nor of those that do not
    change; where a probe below which a value lies does not move it, no axis is known.
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
    trials, left = Trials(grown, plan, positions), dict[TensorId, set[int]]()

    def look(going: RowRun, name: TensorId) -> None:
        axis = grown.axes.get(name)
        if axis is None or going.live[name].span != WHOLE:
            return
        concerned = [row for row in range(going.joined - 1) if name in below[rows[row][0].id]]
        changed = trials.changed(going, name, axis)
        changed = changed if len(concerned) == len(changed) else changed[concerned]
        moved = rows_of(changed)
        if not moved.any():
            return  # it may be reached by other edits, and nothing is known of what lies below it
        early = torch.arange(positions.count) < firsts[concerned]
        left[name] = {
            place
            for place in (positions.axes(changed.shape[1:]) if moved.all() else ())
            if not (positions.changed(changed, place).cpu() & early).any()
        }

    RowRun(grown, clean, editors, frames, wanted, plan, positions, seen=look, guarded=False, frozen=frozen).run()
    return left


def _bare(site: Site) -> Site:
    return replace(site, positions=None, heads=None, units=None)


class Trials:
    """What rows of noise change of each value; where an op hides some of it, that of other noise counts too."""

    def __init__(self, grown: Grown, plan: Mapping[TensorId, Planned], positions: Positions) -> None:
        self.grown, self.plan, self.positions = grown, plan, positions
        self.draw = torch.Generator().manual_seed(0)
        self.seen: dict[TensorId, Tensor] = {}

    def changed(self, going: RowRun, name: TensorId, axis: Axis) -> Tensor:
        """What differs from the first row in each of the others, (rows, *row)."""
        step = self.grown.step_of[name]
        value = by_row(going.value(name), axis)
        changed = differing(value)
        noisy = {one: seen for one in step.reads if (seen := self._noise(going, one)) is not None}
        kind = value.is_floating_point() or value.dtype == torch.bool  # other whole numbers may have to fit one another
        if kind and name not in going.at and noisy and not self._shows_all(changed, list(noisy.values())):
            self._put(going, name, self._tried(going, name, axis, noisy))
            value = by_row(going.value(name), axis)
            seen = differing(value)
            changed = self._spread(seen)
            self._renew(going, name, changed & ~seen)
        self.seen = {one: seen for one, seen in self.seen.items() if one in going.live} | {name: changed}
        return changed

    def _noise(self, going: RowRun, name: TensorId) -> Tensor | None:
        """What rows have changed of a value that is read."""
        axis = self.grown.axes.get(name)
        if axis is None or name not in going.live or going.live[name].span != WHOLE:
            return None
        value = by_row(going.value(name), axis)
        if name not in self.seen or len(self.seen[name]) < len(value) - 1:
            self.seen[name] = differing(value)
        return self.seen[name]

    def _shows_all(self, changed: Tensor, noisy: Sequence[Tensor]) -> bool:
        """Whether every row that reads noise has changed, and nearly all that lies beside what did; where nothing lies
        beside it, whether it did at all positions of the noise."""
        if bool((~rows_of(changed) & torch.stack(list(map(rows_of, noisy))).any(0)).any()):
            return False
        wide = [axis for axis in range(2, changed.dim()) if changed.shape[axis] not in (1, self.positions.count)]
        if wide:
            beside = int(somewhere(changed, wide[-1:]).count_nonzero()) * changed.shape[wide[-1]]
            return int(changed.count_nonzero()) >= NEARLY * beside
        seen, *told = (self._places(one) for one in (changed, *noisy))
        return seen is not None and all(one is not None and not bool((one & ~seen).any()) for one in told)

    def _places(self, changed: Tensor) -> Tensor | None:
        """The positions at which rows have changed."""
        axis = next(self.positions.axes(changed.shape[1:]), None)
        return None if axis is None else self.positions.changed(changed, axis)

    def _spread(self, changed: Tensor) -> Tensor:
        """What changed, and all units beside it."""
        if changed.dim() < 3 or changed.shape[-1] == self.positions.count:
            return changed
        return somewhere(changed, [-1], keepdim=True).expand_as(changed)

    def _tried(self, going: RowRun, name: TensorId, axis: Axis, noisy: Mapping[TensorId, Tensor]) -> Tensor:
        """A value as rows, with what other noise in what its op reads makes of what is left as it was."""
        before, step = dict(going.live), self.grown.step_of[name]
        found = by_row(going.value(name), axis)
        for _ in range(TRIES):
            for one, seen in noisy.items():
                self._renew(going, one, seen)
            with suppress(ReplayError, RuntimeError, IndexError, ValueError, TypeError):
                value = by_row(going.made(step, self.plan.get(step.first.id))[name], axis)
                found = torch.where(found == found[:1], value, found)
            going.live.update(before)
        return found

    def _renew(self, going: RowRun, name: TensorId, changed: Tensor) -> None:
        """Put other noise in place of what changed of a value."""
        value = by_row(going.live[name].value, self.grown.axes[name]).clone()
        value[1:] = torch.where(changed, self._drawn(value[1:], value[:1]), value[1:])
        self._put(going, name, value)

    def _put(self, going: RowRun, name: TensorId, rows: Tensor) -> None:
        axis, live = self.grown.axes[name].axis, going.live[name]
        going.live[name] = live._replace(value=rows.movedim(0, axis).flatten(axis, axis + 1))

    def _drawn(self, value: Tensor, clean: Tensor) -> Tensor:
        """Noise of many sizes about the clean row: as large as what changed by, or as what is there."""
        if value.dtype == torch.bool:
            return (torch.rand(value.shape, generator=self.draw) < 0.5).to(value.device)
        if not value.is_floating_point():
            return value
        sizes = 10 ** (4 * torch.rand(value.shape, generator=self.draw) - 1.5)
        noise = (torch.randn(value.shape, generator=self.draw) * sizes).to(value)
        by = (value - clean).float().abs()
        by = by[by > 0]
        scale = torch.stack([_typical(by, 0.5), _typical(clean.float().abs().flatten(), 0.25)]).max()
        drawn: Tensor = clean + noise * scale.to(value)
        return drawn


def differing(rows: Tensor) -> Tensor:
    """What differs from the first row in each of the others."""
    return rows[1:] != rows[:1]


def rows_of(changed: Tensor) -> Tensor:
    """Which rows hold something true."""
    return somewhere(changed, range(1, changed.dim()))


def by_row(value: Tensor, axis: Axis) -> Tensor:
    """A value of many rows as (rows, *row)."""
    rows: Tensor = value.unflatten(axis.axis, (-1, axis.size)).movedim(axis.axis, 0)
    return rows


def _typical(sizes: Tensor, share: float) -> Tensor:
    """A size that such a share of them does not pass; 0 of none."""
    sizes = sizes[sizes.isfinite()]
    found: Tensor = sizes.kthvalue(max(1, int(share * len(sizes)))).values if len(sizes) else sizes.new_zeros(())
    return found
