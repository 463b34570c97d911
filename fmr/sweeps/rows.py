"""How a recorded pass grows by rows: which axis of each value counts rows, and which numbers among arguments do.

Two recordings of the same inputs with more and with fewer examples are compared; nothing is known beforehand of any layout.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.errors import ReplayError
from fmr.graph.graph import Graph
from fmr.ids import OPAQUE, TensorId
from fmr.nodes import Node
from fmr.sweeps.steps import Step, steps_of


class Counts(NamedTuple):
    """How many examples two recordings have, and how many of them make a row."""

    few: int
    more: int
    row: int

    def each(self, few: int, more: int) -> int:
        """By how much a number rises with each example."""
        return (more - few) // (self.more - self.few)


class Axis(NamedTuple):
    """The axis of a value that counts rows, and how many of its places belong to one row."""

    axis: int
    size: int

    def clean(self, value: Tensor) -> Tensor:
        """The first row of a recorded value."""
        return value.narrow(self.axis, 0, self.size)

    def repeated(self, row: Tensor, rows: int) -> Tensor:
        """So many copies of a row; without memory of their own where each row has one place."""
        if self.size == 1:
            return row.expand(*row.shape[: self.axis], rows, *row.shape[self.axis + 1 :])
        return row.repeat(*(rows if axis == self.axis else 1 for axis in range(row.dim())))

    def block(self, value: Tensor, row: int) -> Tensor:
        """One row of a value of many."""
        return value.narrow(self.axis, row * self.size, self.size)


class Scaled(NamedTuple):
    """A number among arguments that grows with the number of rows."""

    base: int
    step: int

    def at(self, rows: int) -> int:
        """The number where there are so many rows."""
        return self.base + self.step * rows


class Grown(NamedTuple):
    """A graph that can be run with any number of rows.

    `rows` is how many it was recorded with; `axes` gives the axis that counts rows of each value that has one, `scaled` the
    steps whose arguments do; `counted` are values made of the number of rows alone, as `arange(batch)`; `step_of` is the
    step that makes a value; `entries` says how many entries of its last axis a value has where they are not all made.
    `walks` remembers which steps matter for what.
    """

    graph: Graph
    rows: int
    steps: tuple[Step, ...]
    axes: Mapping[TensorId, Axis]
    scaled: Mapping[TensorId, Step]
    counted: frozenset[TensorId]
    step_of: Mapping[TensorId, Step]
    walks: dict[object, "Walk"]
    entries: Mapping[TensorId, int] = {}


def grown(few: Graph, more: Graph, counts: Counts) -> Grown:
    """What recordings with these numbers of examples tell; a `ReplayError` where they differ in more than that."""
    if few.fingerprint != more.fingerprint:
        raise ReplayError("the model takes another path for another number of examples")
    axes = {a.id: axis for a, b in zip(few.nodes, more.nodes, strict=True) if (axis := _axis(a, b, counts)) is not None}
    steps, again = steps_of(few), steps_of(more)
    scaled = {
        one.first.id: grown_step
        for one, other in zip(steps, again, strict=True)
        if (grown_step := _grown_step(one, other, counts)) is not None
    }
    step_of = {node.id: step for step in steps for node in step.nodes}
    return Grown(few, counts.few // counts.row, steps, axes, scaled, frozenset(_counted(few, axes)), step_of, {})


Walk = tuple[tuple[Step, tuple[TensorId, ...]], ...]
"""The steps that matter, in order, each with the values that nobody reads after it."""


def walk_of(grown: Grown, wanted: Set[TensorId], edited: Set[TensorId], frozen: Set[TensorId]) -> Walk:
    """The steps on the way to what is wanted or edited; what is wanted lasts."""
    key = frozenset(wanted), frozenset(edited), frozenset(frozen)
    if key not in grown.walks:
        grown.walks[key] = _walk(grown.steps, wanted, {*wanted, *edited}, frozen)
    return grown.walks[key]


def _walk(steps: Sequence[Step], wanted: Set[TensorId], needed: set[TensorId], frozen: Set[TensorId]) -> Walk:
    for step in reversed(steps):
        if any(node.id in needed and node.id not in frozen for node in step.nodes):
            needed.update(step.reads)
    found: list[tuple[Step, tuple[TensorId, ...]]] = []
    read: set[TensorId] = set()
    for step in reversed(steps):
        if any(node.id in needed for node in step.nodes):
            found.append((step, tuple(name for name in step.reads if name not in read and name not in wanted)))
            read.update(step.reads)
    return tuple(reversed(found))


def _axis(few: Node, more: Node, counts: Counts) -> Axis | None:
    """The axis of a value that counts rows."""
    if len(few.shape) != len(more.shape):
        raise ReplayError(f"{few.id} has {len(few.shape)} dimensions, and {len(more.shape)} with more examples")
    differ = [axis for axis, (a, b) in enumerate(zip(few.shape, more.shape, strict=True)) if a != b]
    if not differ:
        return None
    axis = differ[0]
    each = counts.each(few.shape[axis], more.shape[axis])
    if len(differ) > 1 or few.shape[axis] != counts.few * each or more.shape[axis] != counts.more * each:
        raise ReplayError(f"{few.id} does not grow by a row for each example: {list(few.shape)}, then {list(more.shape)}")
    return Axis(axis, each * counts.row)


def _grown_step(few: Step, more: Step, counts: Counts) -> Step | None:
    """A step with numbers that grow in place of those that do; None where all stay."""
    if few.first.args == more.first.args:
        return None
    if few.function is None:
        raise ReplayError(f"{few.first.id} is called with other arguments for more examples")
    args = tuple(_scaled(a, b, few, counts) for a, b in zip(few.args, more.args, strict=True))
    kwargs = tuple((name, _scaled(a, dict(more.kwargs)[name], few, counts)) for name, a in few.kwargs)
    return few._replace(args=args, kwargs=kwargs)


def _scaled(few: Any, more: Any, step: Step, counts: Counts) -> Any:
    """An argument with what grows in it."""
    if type(few) is int and type(more) is int:
        each = counts.each(few, more)
        return few if few == more else Scaled(few - counts.few * each, each * counts.row)
    if isinstance(few, (tuple, list)) and isinstance(more, (tuple, list)) and len(few) == len(more):
        items = [_scaled(a, b, step, counts) for a, b in zip(few, more, strict=True)]
        return items if isinstance(few, list) else tuple(items)
    if isinstance(few, slice) and isinstance(more, slice):
        return slice(*(_scaled(getattr(few, at), getattr(more, at), step, counts) for at in ("start", "stop", "step")))
    if type(few) is type(more) and (few is more or few == more):
        return few
    raise ReplayError(f"{step.first.id} is called with {few!r}, and with {more!r} for more examples")


def at_rows(argument: Any, rows: int) -> Any:
    """An argument as it is where there are so many rows."""
    if isinstance(argument, Scaled):
        return argument.at(rows)
    if type(argument) in (tuple, list):
        return type(argument)(at_rows(item, rows) for item in argument)
    if isinstance(argument, slice):
        return slice(at_rows(argument.start, rows), at_rows(argument.stop, rows), at_rows(argument.step, rows))
    return argument


def _counted(graph: Graph, axes: Mapping[TensorId, Axis]) -> set[TensorId]:
    """Values that count rows and that no input with rows went into; of those that could not be seen nothing is known."""
    found: set[TensorId] = set()
    of_rows: set[TensorId] = set()
    for node in graph.nodes:
        if node.id in axes:
            given = node.id.is_source or node.op == OPAQUE or any(parent in of_rows for parent in node.parents)
            (of_rows if given else found).add(node.id)
    return found


def same(value: Tensor, clean: Tensor) -> bool:
    """Whether a row is what it was in the recording, up to the rounding of larger products."""
    if value.shape == clean.shape and value.stride() == clean.stride() and value.data_ptr() == clean.data_ptr():
        return True
    limit = tolerance(clean.dtype)
    value, clean = value.detach().double(), clean.detach().double()
    scale = clean.abs().nan_to_num(0, 0, 0).max() if clean.numel() else clean.new_zeros(())
    finite = torch.isfinite(clean)
    return torch.equal(torch.isfinite(value), finite) and bool(
        ((value - clean)[finite].abs() <= limit * scale + 1e-12).all()
    )


def tolerance(dtype: torch.dtype) -> float:
    """How far rounding takes numbers of a type apart in a model, relative to the largest."""
    return {torch.float64: 1e-9, torch.float16: 1e-2, torch.bfloat16: 6e-2}.get(dtype, 1e-5)
