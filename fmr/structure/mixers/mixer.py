"""One mixer of a model: what it reads off the stream, what it mixes and what it writes, and the proof that it does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.memories.find import shared_scope
from fmr.structure.mixers.measure import Measure, turned
from fmr.structure.normal.match import below, depends_on
from fmr.structure.normal.vocabulary import MOVES, NORM_PARTS, NORMS
from fmr.structure.normal.walks import walk
from fmr.structure.proof.certificate import TOLERANCE, Certificate, error, proof, tolerance_of, unmade
from fmr.structure.proof.evaluate import Values, check_places, graph_of, own_work, why_unproving

SUMMED = frozenset("cumsum cumprod logcumsumexp cummax cummin".split())
"""Ops that tell something of all places so far."""


@dataclass(frozen=True, eq=False)
class Mixer:
    """What brings positions together without a softmax: it writes to the stream at one position what it read at others.

    >>> fmr.locate(recurrent).mixers[0]  # a run of a model that goes from token to token
    attention.0  recurrence, causal  certified: mixed ..., written ..., state ... (tolerance 1e-04)

    `reads` are the values of the stream that it reads, `inputs` what it projects of them, in parts; `gates` are those of the
    inputs that act at their own position alone; `output` is what is written, after all that moves or masks positions.
    `kind` is how the code does it; the same function may be computed in several of these ways: "recurrence" (`states` are
    handed from step to step, each a value; or one that sums up what came so far, at each position), "linear attention"
    (`operands` are multiplied in `product`, as queries, keys and values are, and nothing bends between), what bends between
    these and "attention", "convolution" (over windows), "network" (positions are projected, and something bends between)
    or "fixed" (a transform, or weights over positions). `mixed` are the values in which positions come together; none where
    states are. `direction` is "causal", "anticausal" or "both", as it is measured at the first, the middle and the last
    position; None where it was found in a graph alone. `axis` is the dimension of positions, `write` the sum of the stream
    in which it is added, `scope` the module call that holds inputs and output.
    """

    graph: Graph = field(repr=False)
    kind: str
    reads: tuple[TensorId, ...]
    inputs: tuple[Site, ...]
    gates: tuple[Site, ...]
    states: tuple[TensorId, ...]
    output: Site
    operands: tuple[TensorId, ...]
    product: TensorId | None
    mixed: tuple[TensorId, ...]
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
            measure = measure_of(graph_of(run, self.graph), self, run.__getitem__)
            return torch.stack([measure.moved(self.output.id, place) for place in range(measure.length)], 1)

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute the output from the inputs in another run of the code, and measure again what reaches what."""
        with own_work():
            graph = graph_of(run, self.graph)
            check_places(run, (*self.inputs, self.output))
            return certify_mixer(self, measure_of(graph, self, run.__getitem__))

    @property
    def size(self) -> str:
        """What it is, in words."""
        return f"{self.kind}, {self.direction}" if self.direction else self.kind

    def __repr__(self) -> str:
        return f"{self.scope or 'root'}  {self.size}  {proof(self.certified)}"


def measure_of(graph: Graph, found: Mixer, value: Values) -> Measure:
    """What a mixer is measured with in a run."""
    return Measure(graph, found.reads, found.write, found.axis, value)


class Told(NamedTuple):
    """What was measured of what a part adds, however it mixes: the output, and which way positions hear one another."""

    output: TensorId
    direction: str


def measured(graph: Graph, outputs: Sequence[TensorId], measure: Measure) -> Told:
    """The first of these values after which nothing moves positions on the way to the sum, and the direction in which
    positions hear one another there.

    Where no position hears another, and where examples do, it is a `StructureError`.
    """
    output = next((one for one in outputs if measure.written(one)), None)
    if output is None:
        raise StructureError(_why_not_written(outputs, measure))
    direction = measure.direction(output)
    if not direction:
        heard = "is made of that position alone" if measure.hears(output) else "does not follow what is read anywhere"
        raise StructureError(f"what it writes at one position {heard}")
    if not measure.apart(output):
        raise StructureError("what it writes of one example is made of others, too")
    return Told(output, direction)


def _why_not_written(outputs: Sequence[TensorId], measure: Measure) -> str:
    """Why no value on the way to a sum is what a mixer writes."""
    last = outputs[-1]
    after = measure.again.changed(measure.write, {last: turned(measure.again.plain(last))})
    if not bool(measure.differs(measure.write, after).any()):
        return f"what it makes, {last}, is lost on the way to {measure.write}"
    return f"what it makes, {last}, is moved, masked or joined with what others make before it is added in {measure.write}"


def as_measured(found: Mixer, told: Told, measure: Measure) -> Mixer:
    """A reading of a mixer with what was measured, and without what the graph says goes in and does not, as other slots of
    one buffer."""
    graph, ids = measure.again.graph, tuple(one.id for one in found.inputs)
    idle = measure.idle(told.output, ids)
    kept = [name for name in ids if name not in idle]
    states = found.states
    if idle:
        states = tuple(one for one in states if any(depends_on(graph, one, name) for name in kept))
    return replace(
        found,
        output=Site(told.output),
        direction=told.direction,
        reads=tuple(name for name in found.reads if any(name == one or depends_on(graph, one, name) for one in kept)),
        inputs=tuple(one for one in found.inputs if one.id in kept),
        gates=tuple(one for one in found.gates if one.id in kept),
        states=states,
    )


def certify_mixer(found: Mixer, measure: Measure) -> Certificate:
    """Recompute the output from the inputs alone, and from inputs that were made of something else on the stream: nothing
    else goes in, and none is idle. Show that what the output is at a position is written there and nowhere else, that
    positions hear one another in the direction that is claimed and examples do not, that nothing but the states, or what
    is mixed, brings them together, that what windows make is not mixed again, that gates act at their own position, and that
    what is multiplied in a linear attention is not bent. What follows on a proof that fails is left out.

    A mixer whose parts do not follow one another as they are named is a `StructureError`.
    """
    graph, value = measure.again.graph, measure.again.value
    if wrong := _misread(graph, found) or why_unproving([found.output.id], value):
        raise StructureError(wrong)
    inputs, recorded = tuple(one.id for one in found.inputs), value(found.output.id)
    errors: dict[str, float] = {}
    tolerance = tolerance_of(recorded, *(value(name) for name in inputs))
    for what, proof_of in _proofs(found, inputs, measure):
        errors[what] = proof_of()
        if not errors[what] <= tolerance:
            break
    return Certificate(errors, tolerance)


def _proofs(found: Mixer, inputs: tuple[TensorId, ...], measure: Measure) -> Iterator[tuple[str, Callable[[], float]]]:
    """What is to be shown of a mixer, each with how far it is off."""
    output, recorded = found.output.id, measure.again.value(found.output.id)
    yield "mixed", lambda: error(measure.remade(output, inputs), recorded)
    yield "written", lambda: _or_not(measure.written(output))
    if found.states:
        yield "state", lambda: _or_not(_through(found, measure))
    else:
        yield "through", lambda: _or_not(measure.alone(output, found.mixed))
    if found.kind == "convolution":
        higher = {one for one in found.mixed if any(depends_on(found.graph, other, one) for other in {*found.mixed} - {one})}
        yield "after", lambda: _or_not(all(measure.spread(output, one) == 1 for one in found.mixed if one not in higher))
    if found.operands:
        yield "multiplied", lambda: _bent(found, measure)
    yield "inputs", lambda: _anew(found, inputs, measure)
    yield "reach", lambda: _or_not(found.direction == measure.direction(output) != "")
    yield "examples", lambda: _or_not(measure.apart(output))
    if found.gates:
        yield "gates", lambda: _or_not(all(measure.beside(output, gate.id) for gate in found.gates))


def _or_not(shown: bool) -> float:
    return 0.0 if shown else torch.inf


def _misread(graph: Graph, found: Mixer) -> str:
    """Which of the parts does not follow where it should; empty where all do."""
    inputs = [one.id for one in found.inputs]
    pairs = [(found.output.id, name) for name in (*inputs, *{*found.states, *found.mixed} - {found.output.id})]
    pairs += [(found.product, name) for name in found.operands if found.product is not None]
    if wrong := unmade(graph, pairs):
        return wrong
    for name in inputs:
        if not any(name == one or depends_on(graph, name, one) for one in found.reads):
            return f"{name} is not read off {', '.join(found.reads)}"
    way = below(graph, graph[found.output.id], MOVES | NORMS | NORM_PARTS | {"neg"})
    if not any(node.id == found.write for node, _ in way):
        return f"{found.output.id} is not added in {found.write}, more lies between"
    others = [gate.id for gate in found.gates if gate.id not in inputs]
    return f"{others[0]} is a gate and no input" if others else ""


def _anew(found: Mixer, inputs: tuple[TensorId, ...], measure: Measure) -> float:
    """How far the output of another stream lies from that of the inputs that are made of it; infinite where one is idle."""
    output, again = found.output.id, measure.again
    read, made = measure.anew(output)
    if len(inputs) > 1 and measure.idle(output, inputs):
        return torch.inf
    return error(again.changed(output, {name: again.changed(name, read) for name in inputs}), made)


def _through(found: Mixer, measure: Measure) -> bool:
    """Whether what goes from one position to the farthest that hears it goes through the states, and through nothing else;
    and whether states of steps are those from the first step to the last that is read."""
    output, end = found.output.id, measure.length - 1
    if any(found.graph[name].op in SUMMED for name in found.states):
        return measure.alone(output, found.states)
    heard, hears = measure.farthest(output)
    early, late = (min(2, end), end - 1) if hears > heard else (max(end - 2, 0), 1)
    handed = _handed(found.graph, found.states)
    if bool(measure.moved(output, heard, handed)[hears]):
        return False
    if len(found.states) > 1:
        return not measure.moves(found.states[0], early) and measure.moves(found.states[-1], late)
    return bool(measure.moved(output, hears, handed)[hears])


def _handed(graph: Graph, states: Sequence[TensorId]) -> list[TensorId]:
    """The states that others are made of; the only one of all positions itself."""
    first, read = graph.place(states[0]), [parent.id for name in states for parent in graph[name].parents]
    higher = {*walk(read, lambda here: [one.id for one in graph[here].parents if graph.place(one) >= first])}
    return [name for name in states if name in higher] or [*states]


def _bent(found: Mixer, measure: Measure) -> float:
    """How far the product is from being doubled, or left as it is, where an operand is doubled: of the operands the second
    nearest, as values and queries are, and keys need not be."""
    assert found.product is not None
    off, made = [torch.inf, torch.inf], measure.again.plain(found.product)
    for name in reversed(found.operands):
        twice = measure.again.changed(found.product, {name: 2 * measure.again.plain(name)})
        off.append(min(error(twice, 2 * made), error(twice, made)))
        if sorted(off)[1] <= TOLERANCE:
            break
    return sorted(off)[1]
