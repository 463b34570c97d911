"""The runs of a sweep as rows of replays: recordings of the inputs repeated, positions that matter, groups and chunks."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.edits.places import parts
from fmr.errors import EditError, FmrError, IdError, ReplayError
from fmr.ids import Site, TensorId, outer_scope, within
from fmr.nests import ids_in, leaves, taken
from fmr.runs.outputs import exchanged
from fmr.runs.passes import Pass
from fmr.sweeps.bars import bar
from fmr.sweeps.budget import rows_that_fit
from fmr.sweeps.cut import WHOLE, Cut, Planned, Positions, Span
from fmr.sweeps.entries import with_entries
from fmr.sweeps.metrics import READY, LogitDiff, logits_of
from fmr.sweeps.reach import MOST, reached
from fmr.sweeps.rowrun import RowRun
from fmr.sweeps.rows import Counts, Grown, grown, same
from fmr.sweeps.task import Task
from fmr.watching.calls import unwatched

Plan = Mapping[TensorId, Planned]

GROUPS = 8
"""Into how many groups of neighbouring positions rows are parted at most: more save positions and cost calls."""

PROBES = 4
"""How many edited values are probed at most for what they reach."""

BESIDE = 8
"""How many of the others are probed at one position, at most as many as positions and one more, where only the first is
probed at all of them."""


class OnReplay:
    """A task whose runs are rows of replays of its recording. Its errors are reasons to go another way."""

    def __init__(self, task: Task, at: int | None, rows: int | None, progress: bool | None) -> None:
        self.task, self.progress, self.rows = task, progress, task.rows
        self.recorded, self.kind = self._recorded()
        self.ids = {site.id: self._id(site) for row in self.rows for site in row}
        self.frozen = frozenset(self._id(Site(name)) for name in task.frozen)
        self._refuse_upstream({self._id(site) for site in task.always})
        self.clean = Clean(self.kind, self.recorded)
        self._refuse_unlike()
        self.names = self._as_before()
        self.wanted = self._wanted(at)
        self.entries = self._entries()
        self.asked, self.size = rows, 0

    def _recorded(self) -> tuple[Pass, Grown]:
        """The inputs, and with one example more if the model takes the same path; else the inputs twice and three times."""
        base, row, more = self.task.base.last, self.task.examples, None
        try:
            more = self._more(row + 1, keep="all" if row == 1 else "none")
            return base, grown(base.graph, more.graph, Counts(row, row + 1, row))
        except ReplayError:
            if row == 1 and more is None:
                raise
        few = self._more(2 * row, keep="all") if row > 1 or more is None else more
        return few, grown(few.graph, self._more(3 * row, keep="none").graph, Counts(2 * row, 3 * row, row))

    def _more(self, examples: int, keep: str) -> Pass:
        try:
            return self.task.forward(self.task.call.sized(examples), self.task.always, keep=keep).last
        except Exception as error:
            raise ReplayError(f"the model does not run with more examples ({in_short(error)})") from error

    @property
    def edited(self) -> set[TensorId]:
        """The IDs of what is edited."""
        return set(self.ids.values())

    def run(self, cuts: bool) -> dict[int, Tensor]:
        """What is measured of each row; with `cuts`, only positions that edits reach and that the metric needs are made."""
        found: dict[int, Tensor] = {}
        cut = self._cut() if cuts else None
        self.size = 0
        with unwatched():
            chunks = [chunk for start, rows in self._groups(cut) for chunk in self._chunks(cut, start, rows)]
            for number, (plan, rows) in enumerate(bar(chunks, "rows", self.progress, least=3)):
                going = RowRun(
                    self.kind,
                    self.clean,
                    [self.task.editor(row) for row in rows],
                    self.task.frames,
                    set(self.wanted),
                    plan,
                    None if cut is None else cut.positions,
                    everywhere=not number,
                    ids=self.ids,
                    frozen=self.frozen,
                )
                walk(going)
                for place, row in enumerate(rows):
                    found[row] = self.task.measure(self._output(going, place))
        return found

    def _chunks(self, cut: Cut | None, start: int, rows: list[int]) -> Iterator[tuple[Plan | None, list[int]]]:
        """A group of rows in as many parts as memory asks for, with what of each value is made."""
        plan = None if cut is None else cut.plan(start, self.wanted, self._mixing(rows))

        def part(name: TensorId) -> float:
            planned = None if plan is None else plan.get(name)
            return 1.0 if planned is None or cut is None else 1 - planned.span.start / cut.positions.count

        size = self.asked or rows_that_fit(self.kind.graph, self.edited, self.kind.rows, len(rows), self.task.device, part)
        self.size = max(self.size, min(size, len(rows)))
        for at in range(0, len(rows), size):
            yield plan, rows[at : at + size]

    # ---- the rows in the recording

    def _id(self, site: Site) -> TensorId:
        """The ID of a site's value in the recording; of a module call what it returned, if nobody inside it reads that."""
        name, graph = site.id, self.recorded.graph
        if outer_scope(name):
            raise ReplayError(f"{name} lies inside a fused op")
        if not name.is_path:
            return graph[name].id
        names = list(ids_in(graph.module(name).scope.output))
        if len(names) != 1 or any(within(reader.module, name) for reader in graph.readers(names[0])):
            raise ReplayError(f"{name} returned several values, or one that is read inside it")
        return names[0]

    def _refuse_upstream(self, always: set[TensorId]) -> None:
        """Raise where a value that all runs edit would be made again from what rows edit: a replay has it as it was."""
        reached = self.edited
        for step in self.kind.steps if always else ():
            if any(name in reached for name in step.reads):
                if found := always.intersection(node.id for node in step.nodes):
                    raise ReplayError(f"{found.pop()} is edited in every run, and depends on what rows edit")
                reached.update(node.id for node in step.nodes)

    def _place(self, row: int) -> int:
        """Where in the graph a row joins."""
        return min(self.kind.graph.place(self.ids[site.id]) for site in self.rows[row])

    def _mixing(self, rows: Iterable[int]) -> set[TensorId]:
        """Values whose edits may mix positions, and so need them all."""
        return {self.ids[site.id] for row in rows for site in self.rows[row] if not isinstance(site.positions, int)}

    def _refuse_unlike(self) -> None:
        """Raise for a value that nobody saw made, and that is not the same for the same inputs in another row."""
        for node in self.kind.graph.opaque:
            if (axis := self.kind.axes.get(node.id)) is None:
                continue
            try:
                clean, value = self.clean[node.id], self.recorded.as_read(node.id)
            except IdError:
                raise ReplayError(f"{node.id} is gone, and what made it could not be seen") from None
            if not all(same(axis.block(value, row), clean) for row in range(self.kind.rows)):
                raise ReplayError(f"{node.id} differs from row to row, and what makes it could not be seen")

    def _as_before(self) -> list[TensorId]:
        """The IDs of the model's output; what is edited and what comes out must be what it is without repeated inputs."""
        clean, base = self.clean, self.task.base
        names = list(ids_in(self.kind.graph.scopes[0].output))
        tensors = [tensor for _, tensor in leaves(taken(base.output))]
        edited = [(name, base[asked]) for asked, name in self.ids.items()]
        edited += [(name, base[name]) for name in self.frozen]
        pairs = [*edited, *zip(names, tensors, strict=True)] if len(names) == len(tensors) else []
        for name, value in pairs:
            if not (isinstance(value, Tensor) and value.shape == clean[name].shape and same(clean[name], value)):
                raise ReplayError(f"{name} is another value when the inputs are repeated")
        if not pairs:
            raise ReplayError("the model returns something else when the inputs are repeated")
        return names

    def _wanted(self, at: int | None) -> dict[TensorId, Span]:
        """The values that the metric reads, and from which position on."""
        at = getattr(self.task.metric, "at", None) if isinstance(self.task.metric, READY) else at
        if at is None:
            return dict.fromkeys(self.names, WHOLE)
        logits = logits_of(self.task.base.output)
        first = int((torch.as_tensor(at) % logits.shape[1]).min())
        place = next(n for n, (_, tensor) in enumerate(leaves(taken(self.task.base.output))) if tensor is logits)
        return {self.names[place]: Span(1, first)}

    def _entries(self) -> "Entries | None":
        """What is made of the logits, where the metric reads those of a few tokens alone."""
        metric = self.task.metric
        if type(metric) is not LogitDiff:
            return None
        (name,) = self.wanted
        whole, fixed = self.clean[name], {*self.edited, *self.frozen, *self.names} - ({name} - self.edited - self.frozen)
        self.kind, values = with_entries(self.kind, self.clean, name, metric.tokens, fixed)
        self.clean.known.update(values)
        return Entries(metric.tokens, torch.full_like(whole, float("nan"))) if values else None

    def _output(self, going: RowRun, row: int) -> Any:
        """The output of the model as it is in one row."""

        def here(name: TensorId) -> Tensor | None:
            if name not in going.wanted:
                return None
            made = going.outcome(name, row)
            return made if self.entries is None else self.entries.within(made)

        return exchanged(self.task.base.output, self.kind.graph.scopes[0].output, here)

    # ---- positions

    def _cut(self) -> Cut:
        """What is needed to compute some positions alone."""
        frames = self.task.frames
        lengths = {length for length, _ in frames}
        if len(lengths) != 1 or max(lengths) < 3:
            raise ReplayError(f"the inputs hold {sorted(lengths) or 'no'} tokens, and one number above 2 tells positions")
        positions = Positions(lengths.pop(), self.task.examples)
        cut = Cut(self.kind, self.clean, positions, {}, self.frozen)
        with unwatched(), suppress(FmrError):  # sites without positions
            cut = replace(cut, reach=self._reach(cut))
        return cut

    def _reach(self, cut: Cut) -> dict[TensorId, int]:
        """Of each value an axis along which no edit reaches a position before its own.

        A few edited values are probed each by itself; of many the first at all positions, and others beside it at one each.
        """
        plan = cut.plan(0, self.wanted, self._mixing(range(len(self.rows))))
        sites = {self.ids[site.id]: replace(site, id=self.ids[site.id]) for row in self.rows for site in row}
        starts = sorted({self._start(row) for row in range(len(self.rows))} - {0})
        if not starts or len(self._apart(sites)) > PROBES:
            return {}
        draw = Random(0)
        tried = starts if len(starts) <= MOST else sorted({starts[0], starts[-1], *draw.sample(starts, MOST - 2)})
        names = sorted(sites, key=self.kind.graph.place)
        seen: list[dict[TensorId, set[int]]] = []
        for name in names:
            if len(sites) > PROBES and any(name in one for one in seen):
                continue
            if len(seen) == PROBES:
                return {}
            probes = [(sites[name], start) for start in tried]
            if len(sites) > PROBES and not seen:
                others = draw.sample(names[1:], min(BESIDE, len(tried) + 1, len(names) - 1))
                probes += [(sites[other], draw.choice(tried)) for other in sorted(others, key=self.kind.graph.place)]
            wanted, frames = set(self.wanted), self.task.frames
            seen.append(reached(self.kind, self.clean, probes, frames, wanted, plan, cut.positions, self.frozen))
        found = {}
        for name in {name for one in seen for name in one}:
            axes = set.intersection(*(one[name] for one in seen if name in one))
            if axes:
                found[name] = min(axes)
        return found

    def _apart(self, names: Iterable[TensorId]) -> list[TensorId]:
        """Those of these values that none of the others can reach, since what lies between is frozen."""
        found: list[TensorId] = []
        reached: set[TensorId] = set()
        wanted = set(names)
        for step in self.kind.steps:
            for node in step.nodes:
                if node.id not in self.frozen and any(name in reached for name in step.reads):
                    reached.add(node.id)
                elif node.id in wanted:
                    found.append(node.id)
                    reached.add(node.id)
        return found

    def _groups(self, cut: Cut | None) -> list[tuple[int, list[int]]]:
        """The rows in groups of neighbouring first positions, in each in the order in which they join."""
        starts = {row: 0 if cut is None else self._start(row) for row in range(len(self.rows))}
        several = sorted(set(starts.values()))
        wide = -(-len(several) // GROUPS)
        found = []
        for at in range(0, len(several), wide):
            rows = [row for row, start in starts.items() if start in several[at : at + wide]]
            rows.sort(key=self._place)
            found.append((several[at], rows))
        return found

    def _start(self, row: int) -> int:
        """The first position that the edits of a row touch."""
        if any(site.positions is None or self.ids[site.id] not in self.kind.axes for site in self.rows[row]):
            return 0
        columns = torch.arange(max(length for length, _ in self.task.frames))
        starts = []
        for site in self.rows[row]:
            name = self.ids[site.id]
            for part in parts(site, self.clean[name], self.task.frames):
                chosen = part.site.positions
                here = columns[chosen] if isinstance(chosen, slice) else torch.as_tensor(chosen) % len(columns)
                starts.append(int(here.min()) if here.numel() else 0)
        return min(starts, default=0)


def walk(going: RowRun) -> None:
    """Run rows and judge them; what breaks on the way is a reason to go another way."""
    try:
        going.run()
        going.check()
    except (EditError, IdError) as error:  # what needs the model's own call, or the loop shall say it
        raise ReplayError(in_short(error)) from error
    except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ReplayError(f"rows break an op ({in_short(error)})") from error
    for editor in going.editors:
        for entry in editor.entries:
            if not entry.tally.fired:
                raise ReplayError(f"the edit of {entry.site!r} never fired in its row")


class Entries(NamedTuple):
    """Which entries of the logits are made, and a place for them among others, which nobody reads."""

    tokens: Tensor
    whole: Tensor

    def within(self, made: Tensor) -> Tensor:
        """The logits with what was made of them."""
        return self.whole.index_copy_(-1, self.tokens.to(made.device), made)


def in_short(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Clean(Mapping[TensorId, Tensor]):
    """The values of one row of a recording."""

    def __init__(self, kind: Grown, recorded: Pass) -> None:
        self.kind, self.recorded = kind, recorded
        self.known: dict[TensorId, Tensor] = {}

    def __getitem__(self, name: TensorId) -> Tensor:
        found = self.known.get(name)
        if found is None:
            axis, value = self.kind.axes.get(name), self.recorded.as_read(name)
            found = self.known[name] = value if axis is None else axis.clean(value)
        return found

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self.kind.step_of)

    def __len__(self) -> int:
        return len(self.kind.step_of)
