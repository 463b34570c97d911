"""Which positions hear which, measured: what is written where what is read is changed at one position."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.proof.again import Again
from fmr.structure.proof.evaluate import Values

PLACES = 3
"""At how many positions a proof changes what is read: the first, the middle and the last."""


class Measure:
    """What becomes of values between what is read off a stream and the sum in which something is added to it.

    `axis` is the dimension of positions.
    """

    def __init__(self, graph: Graph, reads: Iterable[TensorId], write: TensorId, axis: int, value: Values) -> None:
        self.again, self.write, self.axis = Again(graph, reads, value), write, axis
        shape = graph[write].shape
        self.length, self.examples = shape[axis], shape[0] if axis else 1
        self.read = {name: self.again.plain(name) for name in reads if graph[name].shape == shape}
        self.other = {name: turned(one) for name, one in self.read.items()}
        transforms = any(node.op.startswith("fft") for node in graph.between(min(reads, key=graph.place), write))
        self.least = 1e-6 if transforms else 1e-12  # weights that were transformed when the model ran are rounded
        self._moved: dict[object, Tensor] = {}
        self._written: dict[TensorId, bool] = {}
        self._remade: dict[tuple[TensorId, ...], Tensor] = {}
        self._idle: dict[tuple[TensorId, ...], set[TensorId]] = {}
        self._anew: dict[TensorId, tuple[Mapping[TensorId, Tensor], Tensor]] = {}

    @property
    def places(self) -> list[int]:
        """The positions at which a proof changes what is read."""
        return sorted({round(n * (self.length - 1) / (PLACES - 1)) for n in range(PLACES)})

    def moved(self, name: TensorId, place: int, held: Iterable[TensorId] = ()) -> Tensor:
        """The positions at which a value moves where another thing is read at one position, while some values are held."""
        key = name, place, frozenset(held)
        if key not in self._moved:
            self._moved[key] = self.differs(name, self.again.changed(name, self._at(place), key[2]))
        return self._moved[key]

    def moves(self, name: TensorId, place: int) -> bool:
        """Whether any number of a value moves."""
        return not torch.equal(self.again.plain(name), self.again.changed(name, self._at(place)))

    def _at(self, place: int) -> dict[TensorId, Tensor]:
        return {name: at_place(one, self.other[name], self.axis, place) for name, one in self.read.items()}

    def differs(self, name: TensorId, after: Tensor, *more: int) -> Tensor:
        """At which positions, or positions and places of `more` dimensions, a value is another by more than rounding."""
        before, kept = self.again.plain(name), sorted({self.axis, *more})
        off = (after - before).abs().nan_to_num(0.0)
        for dim in reversed([n for n in range(off.dim()) if n not in kept]):
            off = off.amax(dim)
        return off > self.least * before.abs().nan_to_num(0.0).max()

    def direction(self, name: TensorId) -> str:
        """Which way what is read at some positions is handed on; empty where no other position hears it."""
        moved = {place: self.moved(name, place) for place in self.places}
        later = any(bool(one[place + 1 :].any()) for place, one in moved.items())
        earlier = any(bool(one[:place].any()) for place, one in moved.items())
        return "both" if later and earlier else "causal" if later else "anticausal" if earlier else ""

    def farthest(self, name: TensorId) -> tuple[int, int]:
        """The position at which another thing is read and the one farthest from it at which a value moves then."""
        pairs = ((place, n) for place in self.places for n in self.moved(name, place).nonzero().flatten().tolist())
        return max(pairs, key=lambda pair: abs(pair[0] - pair[1]), default=(0, 0))

    def hears(self, name: TensorId) -> bool:
        """Whether a value moves at all with what is read."""
        return any(bool(self.moved(name, place).any()) for place in self.places)

    def alone(self, name: TensorId, held: Iterable[TensorId]) -> bool:
        """Whether each position hears itself at most, while some values are held."""
        moved = ((place, self.moved(name, place, held)) for place in self.places)
        return not any(bool(one[:place].any() or one[place + 1 :].any()) for place, one in moved)

    def written(self, output: TensorId) -> bool:
        """Whether what is another in an output, at some positions of some examples, is another in the sum there, and there
        alone."""
        if output not in self._written:
            made = self.again.plain(output)
            least = 1e-3 * float(self.again.plain(self.write).abs().nan_to_num(0.0).max())
            other, cells = turned(made, least), [n for dim, n in enumerate(made.shape) if dim in (0, self.axis)]
            some = torch.rand(cells, generator=torch.Generator().manual_seed(0)) < 0.5
            some.view(-1)[0], some.view(-1)[-1] = True, False
            self._written[output] = all(self._is_heard_at(mask, output, other) for mask in (some, ~some))
        return self._written[output]

    def _is_heard_at(self, cells: Tensor, output: TensorId, other: Tensor) -> bool:
        """Whether the sum is another where an output is, at these positions of these examples, and nowhere else."""
        made = self.again.plain(output)
        wide = [n if dim in (0, self.axis) else 1 for dim, n in enumerate(made.shape)]
        given = {output: torch.where(cells.reshape(wide).to(made.device), other, made)}
        return torch.equal(self.differs(self.write, self.again.changed(self.write, given), 0).cpu(), cells)

    def remade(self, name: TensorId, inputs: Iterable[TensorId]) -> Tensor:
        """A value as it is made of others as they were recorded."""
        key = name, *inputs
        if key not in self._remade:
            self._remade[key] = self.again.changed(name, {one: self.again.value.double(one) for one in key[1:]})
        return self._remade[key]

    def anew(self, name: TensorId) -> tuple[Mapping[TensorId, Tensor], Tensor]:
        """What is read turned into something else in half of the examples, and what a value is then."""
        if name not in self._anew:
            half = torch.arange(self.examples) < (self.examples + 1) // 2
            given = {}
            for one, was in self.read.items():
                mask = half.reshape(-1, *[1] * (was.dim() - 1)).to(was.device)
                given[one] = torch.where(mask, self.other[one], was)
            self._anew[name] = given, self.again.changed(name, given)
        return self._anew[name]

    def apart(self, name: TensorId) -> bool:
        """Whether half of the examples do not hear the others."""
        before, after = self.again.plain(name), self.anew(name)[1]
        rest = range((self.examples + 1) // 2, self.examples)
        off = (after - before).abs().nan_to_num(0.0)[rest.start : rest.stop]
        return not rest or not bool((off > self.least * before.abs().nan_to_num(0.0).max()).any())

    def beside(self, name: TensorId, gate: TensorId) -> bool:
        """Whether what one value is at one place of some dimension moves a single position of another value."""
        made = self.again.plain(gate)
        other = turned(made)
        for axis in (n for n in range(made.dim()) if made.shape[n] >= self.length):
            after = self.again.changed(name, {gate: at_place(made, other, axis, made.shape[axis] // 2)})
            if self.differs(name, after).sum() == 1:
                return True
        return False

    def spread(self, name: TensorId, mixed: TensorId) -> int:
        """At how many positions a value moves, at most, where one of a few numbers of another value is another."""
        made = self.again.plain(mixed)
        several, numbers = 0, torch.linspace(0, made.numel() - 1, 2 * PLACES).long()
        for number in numbers.tolist():
            given = made.clone()
            given.view(-1)[number] = turned(made).view(-1)[number]
            several = max(several, int(self.differs(name, self.again.changed(name, {mixed: given})).sum()))
        return several

    def idle(self, name: TensorId, inputs: tuple[TensorId, ...]) -> set[TensorId]:
        """Which of some values may be anything for what another is."""
        key = name, *inputs
        if key not in self._idle:
            given = {one: self.again.value.double(one) for one in inputs}
            waiting = self._unmoved(name, given, self.examples) if self.axis else [*inputs]
            self._idle[key] = {one for one in waiting if self._unmoved(name, {one: given[one]}, 1)}
        return self._idle[key]

    def _unmoved(self, name: TensorId, given: Mapping[TensorId, Tensor], several: int) -> list[TensorId]:
        """Which of some values do not move another one, where each is turned in one of several examples, or in all."""
        found, known = list[TensorId](), [one for one, was in given.items() if several == 1 or was.shape[0] == several]
        for start in range(0, len(known), several):
            new = {one: given[one].clone() for one in known[start : start + several]}
            parts = {one: slice(n, n + 1) if several > 1 else slice(None) for n, one in enumerate(new)}
            for one, part in parts.items():
                new[one][part] = turned(given[one])[part]
            after, before = self.again.changed(name, new), self.remade(name, new)  # as they were recorded, rounded
            found += [one for one, part in parts.items() if torch.equal(after[part], before[part])]
        return [*found, *(one for one in given if one not in known)]


def turned(read: Tensor, least: float = 1e-6) -> Tensor:
    """Other numbers of the same size, or that at `least`, in place of what is read."""
    real = torch.view_as_real(read) if read.is_complex() else read
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0), dtype=real.dtype).to(read.device)
    other = real.mean() + real.std(correction=0).clamp(min=least) * noise
    return torch.view_as_complex(other) if read.is_complex() else other


def at_place(was: Tensor, other: Tensor, axis: int, place: int) -> Tensor:
    """A value with the numbers of another one at one place."""
    made = was.clone()
    made.select(axis, place).copy_(other.select(axis, place))
    return made
