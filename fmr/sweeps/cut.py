"""Which positions of a value have to be computed: those that an edit reaches and that what is read needs.

Nothing is known of any op. Whether it can be narrowed is tried on the recorded values, and on random ones, since recorded
ones may be nothing to it (as zeros to a sum): narrowed operands must give the narrowed result, at three starts. What an edit
reaches is seen by rows of finite noise, bit for bit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.graph.state import casting
from fmr.ids import TensorId
from fmr.sweeps.rows import Grown, Scaled, at_rows
from fmr.sweeps.steps import Read, Step, again


class Span(NamedTuple):
    """Positions from a start on, along an axis of a value; the axis may count examples and positions at once."""

    axis: int
    start: int


WHOLE = Span(-1, 0)
"""All positions."""

LARGE = 2**22
"""How many numbers an operand has that is not worth a copy in double precision, as an unembedding."""


class Rule(NamedTuple):
    """How a step makes a part of its result: the axis along which each operand is narrowed (-1: it is read as a whole), and
    whether numbers that count positions shrink with them."""

    operands: tuple[int, ...]
    shrinks: bool


@dataclass
class Positions:
    """The positions of a pass: how many, and for how many examples in a row."""

    count: int
    examples: int

    def take(self, value: Tensor, span: Span) -> Tensor:
        """The part of a value of one row or more, each with whole positions."""
        if span.start == 0:
            return value
        length = value.shape[span.axis]
        if length == self.count:
            return value.narrow(span.axis, span.start, self.count - span.start)
        split = value.unflatten(span.axis, (length // self.count, self.count))
        part: Tensor = split.narrow(span.axis + 1, span.start, self.count - span.start)
        return part.flatten(span.axis, span.axis + 1)

    def again(self, value: Tensor, span: Span, start: int) -> Tensor:
        """The part from a later start on of a value that begins at `span`."""
        left = self.count - span.start
        length = value.shape[span.axis]
        if length == left:
            return value.narrow(span.axis, start - span.start, self.count - start)
        split = value.unflatten(span.axis, (length // left, left))
        part: Tensor = split.narrow(span.axis + 1, start - span.start, self.count - start)
        return part.flatten(span.axis, span.axis + 1)

    def before(self, value: Tensor, span: Span) -> Tensor:
        """What comes before a start, of a value of one row with whole positions."""
        length = value.shape[span.axis]
        if length == self.count:
            return value.narrow(span.axis, 0, span.start)
        split = value.unflatten(span.axis, (length // self.count, self.count))
        part: Tensor = split.narrow(span.axis + 1, 0, span.start)
        return part.flatten(span.axis, span.axis + 1)

    def changed(self, rows: Tensor, axis: int) -> Tensor:
        """Which positions along an axis of a row hold something true, (rows, positions), for rows (rows, *row)."""
        split = rows if rows.shape[axis + 1] == self.count else rows.unflatten(axis + 1, (-1, self.count))
        place = axis + 1 if split is rows else axis + 2
        return somewhere(split, [dim for dim in range(1, split.dim()) if dim != place])

    def axes(self, shape: Sequence[int]) -> Iterator[int]:
        """The axes of a row's value that may count positions."""
        for axis, length in enumerate(shape):
            if length == self.count or (axis == 0 and length == self.count * self.examples):
                yield axis

    def joined(self, prefix: Tensor, value: Tensor, span: Span) -> Tensor:
        """A value with what comes before its start."""
        if prefix.shape[span.axis] == span.start:
            return torch.cat([prefix, value], span.axis)
        left = self.count - span.start
        rows = value.shape[span.axis] // left
        parts = prefix.unflatten(span.axis, (rows, span.start)), value.unflatten(span.axis, (rows, left))
        return torch.cat(parts, span.axis + 1).flatten(span.axis, span.axis + 1)


class Planned(NamedTuple):
    """What of a step is computed, how it reads its operands, and the step with numbers that grow, if it has any."""

    span: Span
    operands: Mapping[TensorId, Span]
    step: Step | None


@dataclass
class Cut:
    """Plans which positions are computed; `reach` is the axis along which no value before an edit's position changes."""

    grown: Grown
    clean: Mapping[TensorId, Tensor]
    positions: Positions
    reach: Mapping[TensorId, int]
    frozen: Set[TensorId] = frozenset()
    rules: dict[tuple[object, ...], Rule | None] = field(default_factory=dict)
    known: dict[tuple[TensorId, int], Rule | None] = field(default_factory=dict)

    @cached_property
    def made(self) -> list[tuple[Step, tuple[TensorId, ...]]]:
        """The steps, last first, with the values that they make."""
        steps = [step for step in reversed(self.grown.steps) if not step.is_source]
        return [(step, tuple(node.id for node in step.nodes)) for step in steps]

    def plan(self, start: int, wanted: Mapping[TensorId, Span], edited: set[TensorId]) -> dict[TensorId, Planned]:
        """The plan for rows whose edits begin at a position, by the first output of each step that is narrowed.

        `edited` are values whose edits may mix positions, and so need them all.
        """
        need: dict[TensorId, Span] = {name: self._reached(name, span, start) for name, span in wanted.items()}
        for name in edited:
            need[name] = self._reached(name, WHOLE, start)
        plan: dict[TensorId, Planned] = {}
        for step, names in self.made:
            asked = [name for name in names if name in need and name not in self.frozen]
            if not asked:
                continue
            span = self._reached(asked[0], need[asked[0]], start)
            if any(self._reached(name, need[name], start) != span for name in asked[1:]):
                span = WHOLE
            rule = self._rule(step, span.axis) if span != WHOLE else None
            if rule is None:
                self._ask(need, dict.fromkeys(step.reads, WHOLE))
                continue
            part = tuple(WHOLE if axis < 0 else Span(axis, span.start) for axis in rule.operands)
            operands = dict(zip(step.reads, part, strict=True))
            self._ask(need, operands)
            narrowed = self._shrunk(step, span.start) if rule.shrinks else self.grown.scaled.get(step.nodes[0].id)
            plan[step.nodes[0].id] = Planned(span, operands, narrowed)
        return plan

    def _reached(self, name: TensorId, span: Span, start: int) -> Span:
        """What has to be computed of a value: nothing before the edits, where they reach nothing there."""
        axis = self.reach.get(name)
        if span == WHOLE:
            return WHOLE if axis is None or start == 0 else Span(axis, start)
        return Span(span.axis, max(span.start, start)) if axis == span.axis else span

    @staticmethod
    def _ask(need: dict[TensorId, Span], operands: Mapping[TensorId, Span]) -> None:
        """Add what a step reads to what is needed: the earliest start, or all where axes differ."""
        for name, span in operands.items():
            known = need.get(name)
            if known is None or known == span:
                need[name] = span
            else:
                need[name] = Span(span.axis, min(span.start, known.start)) if known.axis == span.axis else WHOLE

    # ---- what can be narrowed, tried on recorded values

    def _rule(self, step: Step, axis: int) -> Rule | None:
        """How to make a part of a step's result; None where no narrowing of operands gives it."""
        place = (step.nodes[0].id, axis)
        if step.function is None:
            return None
        if place not in self.known:
            shapes = tuple(tuple(self.clean[name].shape) for name in step.reads)
            key = (step.function, repr(step.first.args), shapes, tuple(at for at, _ in step.places), axis)
            if key not in self.rules:
                self.rules[key] = self._try(step, axis)
            self.known[place] = self.rules[key]
        return self.known[place]

    def _try(self, step: Step, axis: int) -> Rule | None:
        choices = [(-1, *self.positions.axes(self.clean[name].shape)) for name in step.reads]
        tried = sorted(product(*choices), key=lambda combo: combo.count(-1))[:64]
        count = self.positions.count
        starts = {count // 2, count - 2, count - 1}
        whole = self.grown.scaled.get(step.first.id, step)
        values = self._at_hand(whole)
        if not values:
            return None
        given = drawn_like(values, step.reads)
        drawn = {**given, **self._made(whole, given.__getitem__)}
        for operands, shrinks in product(tried, (False, True)):
            rule = Rule(operands, shrinks)
            if all(self._holds(step, axis, rule, start, values) for start in starts):
                return rule if all(self._holds(step, axis, rule, start, drawn) for start in starts) else None
        return None

    def _at_hand(self, step: Step) -> Mapping[TensorId, Tensor]:
        """What a step reads and makes, on the host, in double precision unless large; nothing if it does not run there.

        Wrong operands are an error there. On another device a kernel may read past their end, and all its memory is lost.
        """
        large = any(self.clean[name].numel() > LARGE for name in step.reads)
        read = {name: _precise(self.clean[name], torch.float32 if large else torch.float64) for name in step.reads}
        made = self._made(step, read.__getitem__)
        return {**read, **made} if made else {}

    def _holds(self, step: Step, axis: int, rule: Rule, start: int, values: Mapping[TensorId, Tensor]) -> bool:
        """Whether narrowed operands give the narrowed result."""
        spans = dict(zip(step.reads, rule.operands, strict=True))

        def read(name: TensorId) -> Tensor:
            return values[name] if spans[name] < 0 else self.positions.take(values[name], Span(spans[name], start))

        if step.first.id not in values:
            return False
        narrowed = self._shrunk(step, start) if rule.shrinks else self.grown.scaled.get(step.first.id, step)
        made = self._made(narrowed, read)
        return bool(made) and all(
            axis < value.dim() and alike(value, self.positions.take(values[name], Span(axis, start)))
            for name, value in made.items()
            if values[name].dim() > axis
        )

    def _made(self, step: Step, read: Read) -> dict[TensorId, Tensor]:
        """What a step makes of one row of these values; nothing where it takes no such operands."""
        args = tuple(at_rows(item, 1) for item in step.args)
        kwargs = tuple((name, at_rows(item, 1)) for name, item in step.kwargs)
        try:
            with casting(()):
                return again(step._replace(args=args, kwargs=kwargs), read, self.grown.graph.__getitem__)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return {}

    def _shrunk(self, step: Step, start: int) -> Step:
        """A step whose numbers that count positions count those from a start on."""
        step = self.grown.scaled.get(step.first.id, step)
        args = tuple(self._less(item, start) for item in step.args)
        return step._replace(args=args, kwargs=tuple((name, self._less(item, start)) for name, item in step.kwargs))

    def _less(self, item: object, start: int) -> object:
        count = self.positions.count
        if isinstance(item, Scaled):
            return Scaled(item.base, item.step // count * (count - start)) if item.step % count == 0 else item
        if type(item) is int:
            return count - start if item == count else item
        if isinstance(item, torch.Size):
            item = tuple(item)
        if type(item) in (tuple, list):
            return type(item)(self._less(one, start) for one in item)  # type: ignore[call-arg, attr-defined]
        return item


def somewhere(true: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """Whether anything is true along some dimensions; in numbers, which is several times as fast as `any`."""
    if not dims:
        return true
    return true.view(torch.uint8).amax(tuple(dims), keepdim).bool() if true.numel() else true.any(tuple(dims), keepdim)


def drawn_like(values: Mapping[TensorId, Tensor], names: Iterable[TensorId]) -> dict[TensorId, Tensor]:
    """Random values of the same shapes and types, whole numbers within the same bounds; sources stay what they are."""
    draw = torch.Generator().manual_seed(0)
    return {name: values[name] if name.is_source else _drawn(values[name], draw) for name in names}


def _drawn(value: Tensor, draw: torch.Generator) -> Tensor:
    if value.is_floating_point() or value.is_complex():
        return torch.randn(value.shape, generator=draw).to(value)
    low, high = (int(value.min()), int(value.max())) if value.numel() else (0, 0)
    high = max(high, low + 1) if value.dtype != torch.bool else 1
    return torch.randint(min(low, high - 1), high + 1, value.shape, generator=draw).to(value)


def _precise(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value on the CPU in such precision, or its own if that is better, so that roundings are no other result."""
    if not (value.is_floating_point() or value.is_complex()):
        return value.to("cpu")
    return value.to("cpu", torch.promote_types(value.dtype, dtype))


def alike(value: Tensor, expected: Tensor) -> bool:
    """Whether an op made the same of narrowed operands, up to rounding."""
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    value, expected = value.detach(), expected.detach()
    if not value.is_floating_point():
        return torch.equal(value, expected)
    limit = 1e-10 if value.dtype == torch.float64 else 1e-5
    scale = float(expected[torch.isfinite(expected)].abs().max()) if torch.isfinite(expected).any() else 0.0
    return torch.allclose(value, expected, rtol=0, atol=limit * scale + 1e-12, equal_nan=True)
