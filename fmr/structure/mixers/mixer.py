"""One mixer of a model: what it reads off the stream, what it mixes and what it writes, and the proof that it does."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.memories.find import shared_scope
from fmr.structure.normal.match import MOVES, NORM_PARTS, NORMS, below, depends_on
from fmr.structure.proof.certificate import TOLERANCE, Certificate, error, proof, tolerance_of
from fmr.structure.proof.evaluate import Doubles, Values, check_places, double, evaluate, graph_of, own_work


@dataclass(frozen=True, eq=False)
class Mixer:
    """What brings positions together without a softmax: it writes to the stream at one position what it read at others.

    >>> fmr.locate(recurrent).mixers[0]  # a run of a model that goes from token to token
    attention.0  recurrence, causal  certified: mixed ..., state ..., inputs ..., reach ..., gates ... (tolerance 1e-04)

    `reads` are the values of the stream that it reads, `inputs` what it projects of them, in parts; `gates` are those of the
    inputs that act at their own position alone; `output` is what is written. `kind` is "recurrence" (`states` are handed
    from step to step, each a value; or one that sums up what came so far, at each position), "linear attention" (`operands`
    are multiplied, as queries, keys and values are, and nothing bends between), what bends between these and "attention",
    "convolution" or "fixed" (a transform, or weights over positions). `direction` is "causal", "anticausal" or "both", as
    it is measured; None where it was found in a graph alone. `axis` is the dimension of positions,
    `write` the sum of the stream in which it is added, `scope` the module call that holds inputs and output.
    """

    graph: Graph = field(repr=False)
    kind: str
    reads: tuple[TensorId, ...]
    inputs: tuple[Site, ...]
    gates: tuple[Site, ...]
    states: tuple[TensorId, ...]
    output: Site
    operands: tuple[TensorId, ...]
    mixed: TensorId | None
    axis: int
    write: TensorId
    direction: str | None = None
    certified: Certificate | None = None

    @property
    def scope(self) -> str:
        """The module call that holds the inputs, but for values of the stream, and the output."""
        last = self.graph[self.output.id]
        first = next((one.id for one in self.inputs if one.id not in self.reads), last.id)
        return shared_scope(self.graph[first], last)

    @property
    def state(self) -> Site | None:
        """What is carried on after the last step; None where no value is it."""
        return Site(self.states[-1]) if self.states else None

    def reach(self, run: Run | Pass) -> Tensor:
        """Which positions hear which: (hears, heard), measured by changing what is read at one position after the other.

        >>> fmr.locate(recurrent).mixers[0].reach(recurrent)[1]  # what the second position hears
        tensor([ True,  True, False, False, False, False])

        run: one that kept every value (keep="all").
        """
        with own_work():
            graph = graph_of(run, self.graph)
            measure = _Measure(graph, self, run.__getitem__)
            return torch.stack([measure.moved(place) for place in range(graph[self.output.id].shape[self.axis])], 1)

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute the output from the inputs in another run of the code, and measure again what reaches what."""
        with own_work():
            graph = graph_of(run, self.graph)
            check_places(run, (*self.inputs, self.output))
            return certify_mixer(graph, self, run.__getitem__)

    @property
    def size(self) -> str:
        """What it is, in words."""
        return f"{self.kind}, {self.direction}" if self.direction else self.kind

    def __repr__(self) -> str:
        return f"{self.scope or 'root'}  {self.size}  {proof(self.certified)}"


def measured(graph: Graph, found: Mixer, value: Values) -> Mixer:
    """A mixer with the direction in which positions hear one another, and without what the graph says goes in and does not,
    as other slots of one buffer: told from what is read by changing it.

    Where no position hears another it is a `StructureError`.
    """
    direction = direction_of(graph, found, value)
    if not direction:
        raise StructureError("what it writes at one position is made of that position alone")
    inputs = {one.id: double(value(one.id)) for one in found.inputs}
    made = evaluate(graph, found.output.id, inputs, value)
    others = {name: {**inputs, name: _turned(one)} for name, one in inputs.items()}
    idle = {name for name, given in others.items() if torch.equal(made, evaluate(graph, found.output.id, given, value))}
    reads = (name for name in found.reads if any(name == one or depends_on(graph, one, name) for one in {*inputs} - idle))
    heard = tuple(one for one in found.inputs if one.id not in idle)
    return as_measured(found, replace(found, direction=direction, reads=tuple(reads), inputs=heard))


def as_measured(found: Mixer, told: Mixer) -> Mixer:
    """Another reading of a mixer with what was measured of it."""
    kept = [one.id for one in told.inputs]
    gates = tuple(one for one in found.gates if one.id in kept)
    states = found.states
    if len(kept) < len(found.inputs):
        states = tuple(one for one in states if any(depends_on(found.graph, one, name) for name in kept))
    return replace(found, direction=told.direction, reads=told.reads, inputs=told.inputs, gates=gates, states=states)


def direction_of(graph: Graph, found: Mixer, value: Values) -> str:
    """Which way a mixer hands on what it reads in the middle; empty where no other position hears it."""
    length, measure = graph[found.output.id].shape[found.axis], _Measure(graph, found, value)
    moved = {place: measure.moved(place) for place in {(length - 1) // 2, length // 2}}
    later = any(bool(one[place + 1 :].any()) for place, one in moved.items())
    earlier = any(bool(one[:place].any()) for place, one in moved.items())
    return "both" if later and earlier else "causal" if later else "anticausal" if earlier else ""


def certify_mixer(graph: Graph, found: Mixer, value: Values, direction: str | None = None) -> Certificate:
    """Recompute the output from the inputs alone, and from inputs that were made of something else on the stream: nothing
    else goes in, and none is idle. Show that positions hear one another in the direction that is claimed, where it was not
    just measured, that gates act at their own position, that nothing but the states goes from one end to the other, and
    that what is multiplied in a linear attention is not bent. What follows on a proof that fails is left out.

    A mixer whose parts do not follow one another as they are named is a `StructureError`.
    """
    if wrong := _misread(graph, found):
        raise StructureError(wrong)
    value = value if isinstance(value, Doubles) else Doubles(value)
    inputs, recorded = {one.id: value.double(one.id) for one in found.inputs}, value(found.output.id)
    made = evaluate(graph, found.output.id, inputs, value)
    errors: dict[str, float] = {}
    tolerance = tolerance_of(recorded, *(value(name) for name in inputs))
    for what, proof_of in _proofs(graph, found, inputs, made, value, direction):
        errors[what] = proof_of()
        if not errors[what] <= tolerance:
            break
    return Certificate(errors, tolerance)


def _proofs(
    graph: Graph, found: Mixer, inputs: Mapping[TensorId, Tensor], made: Tensor, value: Doubles, direction: str | None
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What is to be shown of a mixer, each with how far it is off."""
    yield "mixed", lambda: error(made, value(found.output.id))
    if found.states:
        yield "state", lambda: _past(graph, found, value)
    if found.operands:
        yield "multiplied", lambda: _bent(graph, found, value)
    yield "inputs", lambda: _anew(graph, found, inputs, value)
    yield "reach", lambda: 0.0 if found.direction == (direction or direction_of(graph, found, value)) != "" else torch.inf
    for gate in found.gates:
        yield "gates", partial(_beside, graph, found, gate.id, inputs, made, value)


def _misread(graph: Graph, found: Mixer) -> str:
    """Which of the parts does not follow where it should; empty where all do."""
    inputs = [one.id for one in found.inputs]
    pairs = [(found.output.id, name) for name in (*inputs, *found.states)]
    pairs += [(found.mixed, name) for name in found.operands if found.mixed is not None]
    for lower, higher in pairs:
        if lower == higher or not depends_on(graph, lower, higher):
            return f"{lower} is not computed from {higher}"
    for name in inputs:
        if not any(name == one or depends_on(graph, name, one) for one in found.reads):
            return f"{name} is not read off {', '.join(found.reads)}"
    others = [gate.id for gate in found.gates if gate.id not in inputs]
    way = below(graph, graph[found.output.id], MOVES | NORMS | NORM_PARTS | {"neg"})
    if not any(node.id == found.write for node, _ in way):
        return f"{found.output.id} is not added in {found.write}, more lies between"
    return f"{others[0]} is a gate and no input" if others else ""


def _anew(graph: Graph, found: Mixer, inputs: Mapping[TensorId, Tensor], value: Doubles) -> float:
    """How far the output of another stream lies from that of the inputs that are made of it; infinite where one is idle."""
    output = found.output.id
    turned = {name: _turned(value.double(name)) for name in found.reads}
    anew = {name: turned[name] if name in turned else evaluate(graph, name, turned, value) for name in inputs}
    made = evaluate(graph, output, anew, value)
    idle = (torch.equal(made, evaluate(graph, output, {**anew, name: one}, value)) for name, one in inputs.items())
    return torch.inf if len(inputs) > 1 and any(idle) else error(made, evaluate(graph, output, turned, value))


def _turned(read: Tensor, axis: int = 0, place: int | None = None) -> Tensor:
    """Other numbers of the same size in place of what is read, at one position or everywhere."""
    noise = torch.randn(read.shape, generator=torch.Generator().manual_seed(0), dtype=read.dtype).to(read.device)
    other = read.mean() + read.std(correction=0).clamp(min=1e-6) * noise
    if place is None:
        return other
    made = read.clone()
    made.select(axis, place).copy_(other.select(axis, place))
    return made


class _Measure:
    """Where the output of a mixer moves when what it reads is changed at one position, while some values are held."""

    def __init__(self, graph: Graph, found: Mixer, value: Values, held: Iterable[TensorId] = ()) -> None:
        self.graph, self.found, self.value = graph, found, value if isinstance(value, Doubles) else Doubles(value)
        shape = graph[found.output.id].shape
        self.read = {name: self.value.double(name) for name in found.reads if graph[name].shape == shape}
        self.held = {name: self.value.double(name) for name in held}
        self.before = self._made(found.output.id)

    def _made(self, name: TensorId, place: int | None = None) -> Tensor:
        """A value where another thing is read at one position."""
        axis = self.found.axis
        read = {one: was if place is None else _turned(was, axis, place) for one, was in self.read.items()}
        return evaluate(self.graph, name, {**read, **self.held}, self.value)

    def moved(self, place: int) -> Tensor:
        """The positions at which the output moves."""
        return _changed(self.found, self.before, self._made(self.found.output.id, place))

    def moves(self, name: TensorId, place: int) -> bool:
        """Whether any number of a value moves."""
        return not torch.equal(self._made(name), self._made(name, place))


def _changed(found: Mixer, before: Tensor, after: Tensor) -> Tensor:
    """At which positions two outputs differ by more than rounding: in double precision, but for weights that were
    transformed when the model ran."""
    off = (after - before).abs().movedim(found.axis, 0).flatten(1).nan_to_num(0.0).amax(1)
    return off > (1e-6 if found.kind == "fixed" else 1e-12) * before.abs().max()


def _beside(
    graph: Graph, found: Mixer, gate: TensorId, inputs: Mapping[TensorId, Tensor], made: Tensor, value: Doubles
) -> float:
    """Infinite where what a gate is at one position moves the output, as made of the inputs, at several."""
    length, shape = made.shape[found.axis], inputs[gate].shape
    for axis in (n for n in (found.axis, *range(len(shape))) if shape[n : n + 1] == (length,)):
        given = {**inputs, gate: _turned(inputs[gate], axis, length // 2)}
        where = _changed(found, made, evaluate(graph, found.output.id, given, value))
        if where.sum() == 1:
            return 0.0
    return torch.inf


def _past(graph: Graph, found: Mixer, value: Doubles) -> float:
    """Infinite where something goes from one end to the other past the states, or nothing goes there anyway; or where
    they are not those from the first step to the last that is read."""
    free, held = _Measure(graph, found, value), _Measure(graph, found, value, _handed(graph, found.states))
    end = graph[found.output.id].shape[found.axis] - 1
    heard, hears = (0, end) if bool(free.moved(0)[end]) else (end, 0)
    early, late = (min(2, end), end - 1) if hears else (max(end - 2, 0), 1)
    if len(found.states) > 1 and (free.moves(found.states[0], early) or not free.moves(found.states[-1], late)):
        return torch.inf
    through = bool(free.moved(heard)[hears]) and bool(held.moved(hears)[hears]) and not bool(held.moved(heard)[hears])
    return 0.0 if through else torch.inf


def _handed(graph: Graph, states: Sequence[TensorId]) -> list[TensorId]:
    """The states that others are made of; the only one of all positions itself."""
    waiting = [parent for name in states for parent in graph[name].parents]
    seen, first = {*waiting}, graph.place(states[0])
    for here in waiting:
        new = [parent for parent in graph[here].parents if parent not in seen and graph.place(parent) >= first]
        seen.update(new)
        waiting += new
    return [name for name in states if name in seen] or [*states]


def _bent(graph: Graph, found: Mixer, value: Doubles) -> float:
    """How far the last product is from being doubled, or left as it is, where an operand is doubled: of the operands the
    second nearest, as values and queries are, and keys need not be."""
    assert found.mixed is not None
    off, made = [torch.inf, torch.inf], value.double(found.mixed)
    for name in reversed(found.operands):
        twice = evaluate(graph, found.mixed, {name: 2 * value.double(name)}, value)
        off.append(min(error(twice, 2 * made), error(twice, made)))
        if sorted(off)[1] <= TOLERANCE:
            break
    return sorted(off)[1]
