"""The runs of a sweep as one forward of the model itself: inputs repeated, each block of examples with edits of its own."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fmr.edits.editor import Editor
from fmr.edits.values import Context
from fmr.errors import EditError, IdError, ReplayError
from fmr.ids import Site, TensorId
from fmr.nests import leaves, taken
from fmr.runs.outputs import with_tensors
from fmr.sweeps.bars import bar
from fmr.sweeps.budget import rows_that_fit
from fmr.sweeps.onreplay import in_short
from fmr.sweeps.rows import Axis, same
from fmr.sweeps.task import Task, editor_of

PROBES = 2
"""How many rows run between tainted ones, before all run between clean ones alone."""


class Batched:
    """A task whose runs are blocks of the model's own forward.

    A few rows go first, between tainted blocks: what is no number must stay in its block. Taint may keep the model from a
    path that it takes by its values, so the rows themselves lie between clean blocks alone, which must be as before.
    """

    def __init__(self, task: Task, rows: int | None, progress: bool | None) -> None:
        self.task, self.progress, graph = task, progress, task.base.graph
        sources = {node.id for node in graph.nodes if node.op == "input"}
        self.size = rows or rows_that_fit(graph, sources, 1, len(task.rows), task.device)

    def run(self) -> dict[int, Tensor]:
        """What is measured of each row."""
        every = list(range(len(self.task.rows)))
        probes = every[:: max(1, len(every) - 1)][:PROBES]
        self._forward(probes, "TC", "TCT")
        found: dict[int, Tensor] = {}
        chunks = [every[at : at + self.size] for at in range(0, len(every), self.size)]
        for rows in bar(chunks, "batches", self.progress, least=3):
            for row, output in zip(rows, self._forward(rows, "C", "C"), strict=True):
                found[row] = self.task.measure(output)
        return found

    def _forward(self, rows: Sequence[int], head: str, tail: str) -> list[Any]:
        """The outputs of these rows, run between sentinels: T is tainted, C is clean."""
        editors = [editor_of(self.task.held(row)) for row in rows]
        for editor in editors:
            editor.begin(lambda: self.task.frames)
        kinds = [*head, *editors, *tail]
        blocks = Blocks(self.task, kinds)
        edited = editors if "T" not in kinds else [editor_of(self.task.held(row)) for row in range(len(self.task.rows))]
        names = dict.fromkeys(name for editor in edited for name in editor.ids)
        try:
            every = self.task.both({Site(name): [blocks] for name in names})
            run = self.task.forward(self.task.call.sized(len(kinds) * self.task.examples), every, keep=())
        except ReplayError:
            raise
        except Exception as error:
            raise ReplayError(f"the model does not run with more examples ({in_short(error)})") from error
        for editor in editors:
            for entry in editor.entries:
                if not entry.tally.fired:
                    raise ReplayError(f"the edit of {entry.site!r} never fired in its row")
        return self._judged(run.output, kinds)

    def _judged(self, output: Any, kinds: Sequence[Any]) -> list[Any]:
        """The output of each edited row; a `ReplayError` where a sentinel is not what it must be."""
        base = self.task.base.output
        were = [tensor for _, tensor in leaves(taken(base))]
        now = [tensor for _, tensor in leaves(taken(output))]
        if len(were) != len(now):
            raise ReplayError("the model returns something else when the inputs are repeated")
        split = [blocks_of(a, b, len(kinds), "the output") for a, b in zip(were, now, strict=True)]
        nan = [int(was.isnan().sum()) for was in were]
        for place, kind in enumerate(kinds):
            here = [blocks[place] for blocks in split]
            tainted = any(int(one.isnan().sum()) > count for one, count in zip(here, nan, strict=True))
            if "T" in kinds and tainted != (kind == "T"):
                raise ReplayError("rows are mixed, or what is no number is replaced, on the way to the output")
            if kind == "C" and not all(same(one, was) for one, was in zip(here, were, strict=True)):
                raise ReplayError("a row without edits differs from the run without edits")
        return [
            with_tensors(base, [blocks[place] for blocks in split])
            for place, kind in enumerate(kinds)
            if isinstance(kind, Editor)
        ]


class Blocks:
    """The edit of a value that holds the blocks of many rows; `kinds` has the editor of each, or which sentinel it is."""

    def __init__(self, task: Task, kinds: Sequence[Any]) -> None:
        self.task, self.kinds = task, kinds

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        name, clean = context.id, self.task.base[context.id]
        made = value.clone()
        if not made.is_floating_point():
            raise ReplayError(f"{name} holds no floating-point numbers, which could tell rows apart")
        if made.shape == clean.shape:
            raise ReplayError(f"{name} has no row for each example")
        given = self._given(context)
        for place, (kind, block) in enumerate(zip(self.kinds, blocks_of(clean, made, len(self.kinds), name), strict=True)):
            if kind == "T":
                block.fill_(float("nan"))
            elif kind == "C":
                if not same(block, clean):
                    raise ReplayError(f"{name} is another value when the inputs are repeated")
            elif name in kind.by_id:
                block.copy_(self._edited(kind, name, block, given, place))
        return made

    def _given(self, context: Context) -> Sequence[Tensor | None]:
        """What the module call was given, by block."""
        if context.given is None:
            return [None] * len(self.kinds)
        first = context.given
        if not first.dim() or len(first) % len(self.kinds):
            raise ReplayError(f"{context.id} was given a tensor without a row for each example")
        return list(first.split(len(first) // len(self.kinds)))

    @staticmethod
    def _edited(editor: Editor, name: TensorId, block: Tensor, given: Sequence[Tensor | None], place: int) -> Tensor:
        try:
            return editor.apply(name, block.clone(), given[place])
        except (EditError, IdError) as error:  # which the loop shall say
            raise ReplayError(in_short(error)) from error


def blocks_of(clean: Tensor, value: Tensor, many: int, what: str) -> list[Tensor]:
    """A value of many rows row by row, by what it is without them; the same for all where it does not grow."""
    if value.dim() != clean.dim():
        raise ReplayError(f"{what} has {value.dim()} dimensions, and {clean.dim()} without repeated inputs")
    differ = [axis for axis, (a, b) in enumerate(zip(clean.shape, value.shape, strict=True)) if a != b]
    if not differ:
        return [value] * many
    if len(differ) > 1 or value.shape[differ[0]] != many * clean.shape[differ[0]]:
        raise ReplayError(f"{what} does not grow by a row for each example: {list(clean.shape)}, then {list(value.shape)}")
    axis = Axis(differ[0], clean.shape[differ[0]])
    return [axis.block(value, row) for row in range(many)]
