"""Of an output only the entries that a metric reads: two tokens ask for two columns of an unembedding.

As with positions nothing is known of any op: that narrowed operands give the narrowed result is tried on recorded values and
on random ones.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from itertools import product
from typing import Any

from torch import Tensor

from fmr.ids import TensorId
from fmr.sweeps.cut import alike, drawn_like
from fmr.sweeps.rows import Grown, at_rows, same
from fmr.sweeps.steps import Step, run_step


def with_entries(
    grown: Grown, clean: Mapping[TensorId, Tensor], name: TensorId, entries: Tensor, fixed: Set[TensorId]
) -> tuple[Grown, dict[TensorId, Tensor]]:
    """The graph with some entries of a value's last axis alone, and what was recorded of all that has no others now.

    `fixed` are values that stay whole. Where no op can be narrowed, all stays as it is; so on devices other than the CPU,
    where an op may read past the end of wrong operands instead of raising an error.
    """
    if clean[name].device.type != "cpu":
        return grown, {}
    narrowing = Narrowing(grown, clean, entries, fixed)
    if not (narrowing.narrow(name) and narrowing.agrees(name)):
        return grown, {}
    steps = {step.first.id: step for step in narrowing.steps}
    scaled = {at: step._replace(function=steps[at].function) if at in steps else step for at, step in grown.scaled.items()}
    every = tuple(steps.get(step.first.id, step) for step in grown.steps)
    step_of = {node.id: step for step in every for node in step.nodes}
    entries_of = dict.fromkeys(narrowing.values, len(entries))
    return grown._replace(steps=every, scaled=scaled, step_of=step_of, walks={}, entries=entries_of), narrowing.values


class Narrowing:
    """Steps narrowed so far, and the values that they make."""

    def __init__(self, grown: Grown, clean: Mapping[TensorId, Tensor], entries: Tensor, fixed: Set[TensorId]) -> None:
        self.grown, self.clean, self.entries, self.fixed = grown, clean, entries, fixed
        self.steps: list[Step] = []
        self.values: dict[TensorId, Tensor] = {}

    def narrow(self, name: TensorId) -> bool:
        """Narrow the step that makes a value, and those above of which nobody else reads anything; whether it goes."""
        step, axis = self.grown.step_of[name], self.grown.axes.get(name)
        last = self.clean[name].dim() - 1
        if name in self.fixed or step.function is None or len(step.nodes) > 1 or axis is None or axis.axis == last:
            return False
        expected = _selected(self.clean[name], last, self.entries)
        operands = next((one for one in self._operands(step, last, name) if self._holds(step, one, name, expected)), None)
        if operands is None:
            return False
        self.values[name] = expected
        made = {one for one, dim in operands.items() if self._alone(one, step) and dim == self.clean[one].dim() - 1}
        above = {one for one in made if self.narrow(one)}
        self.steps.append(self._narrowed(step, {one: dim for one, dim in operands.items() if one not in above}))
        return True

    def agrees(self, name: TensorId) -> bool:
        """Whether the narrowed steps one after the other make what was recorded, by the measure of clean rows."""
        made: dict[TensorId, Tensor] = {}
        for step in self.steps:
            made.update(self._run(step, {**self._clean_of(step), **made}))
        return same(made[name], self.values[name])

    def _clean_of(self, step: Step) -> dict[TensorId, Tensor]:
        """What was recorded of all that a step reads."""
        return {one: self.clean[one] for one in step.reads}

    def _run(self, step: Step, values: Mapping[TensorId, Tensor]) -> dict[TensorId, Tensor]:
        """What a step makes of one row."""
        scaled = self.grown.scaled.get(step.first.id, step)
        args = tuple(at_rows(item, 1) for item in scaled.args)
        kwargs = tuple((at, at_rows(item, 1)) for at, item in scaled.kwargs)
        return run_step(step._replace(args=args, kwargs=kwargs), values.__getitem__, self.grown.graph.__getitem__)

    def _alone(self, name: TensorId, step: Step) -> bool:
        return not name.is_source and self.grown.graph.readers(name) == (step.first,)

    def _operands(self, step: Step, last: int, name: TensorId) -> Iterator[dict[TensorId, int]]:
        """Which operands may be narrowed along which axis, the most of them first; all whole is no narrowing."""
        length = self.clean[name].shape[last]
        choices = [(-1, *(dim for dim, size in enumerate(self.clean[one].shape) if size == length)) for one in step.reads]
        for dims in sorted(product(*choices), key=lambda dims: dims.count(-1)):
            found = {one: dim for one, dim in zip(step.reads, dims, strict=True) if dim >= 0}
            if found:
                yield found

    def _narrowed(self, step: Step, operands: Mapping[TensorId, int]) -> Step:
        chosen = {at: operands[name] for at, name in step.places if name in operands}
        assert step.function is not None
        return step._replace(function=_reading(step.function, chosen, self.entries))

    def _holds(self, step: Step, operands: Mapping[TensorId, int], name: TensorId, expected: Tensor) -> bool:
        """Whether narrowed operands give the narrowed result, of recorded and of random values."""
        last = expected.dim() - 1
        drawn = drawn_like(self.clean, step.reads)
        try:
            whole = _selected(self._run(step, drawn)[name], last, self.entries)
            narrowed = self._narrowed(step, operands)
            told = (self._run(narrowed, values)[name] for values in (self._clean_of(step), drawn))
            return all(alike(one, other) for one, other in zip(told, (expected, whole), strict=True))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False


def _selected(value: Tensor, dim: int, entries: Tensor) -> Tensor:
    return value.index_select(dim, entries.to(value.device))


def _reading(function: Callable[..., Any], chosen: Mapping[int | str, int], entries: Tensor) -> Callable[..., Any]:
    """A function that reads some entries alone of some of its arguments."""

    def narrowed(*args: Any, **kwargs: Any) -> Any:
        given = [_selected(arg, chosen[at], entries) if at in chosen else arg for at, arg in enumerate(args)]
        named = {at: _selected(arg, chosen[at], entries) if at in chosen else arg for at, arg in kwargs.items()}
        return function(*given, **named)

    return narrowed
