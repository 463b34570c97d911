"""A model as nodes that write to its residual stream and read from it: embedding, heads, memories, logits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyzers.circuits.choice import Bools
from analyzers.circuits.ways import Way, sources
from analyzers.protocol import AnalyzerError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.runs.passes import Pass
from fmr.structure.normal.vocabulary import NONLINEAR, NORMS, STATISTICS
from fmr.structure.parts import Attention, Memory, Structure
from fmr.structure.streams.stream import Write

_BENDS = NORMS | NONLINEAR | STATISTICS - {"mean"}
"""Ops that are not linear in what they read."""

EMBEDDING, LOGITS = "embedding", "logits"


@dataclass(frozen=True, eq=False)
class Input:
    """What a component reads of the stream for one purpose: the queries, keys or values of its heads, or all of it.

    `point` is the value of the stream that is read, `value` what becomes of it along `way`, `before` how many nodes have
    written by then. Each reader sees the stream for itself: it fills the slices `groups` of `value` along `axis`, or all of
    it where that is None. `first` is the number of the first reader.
    """

    role: str
    point: TensorId
    before: int
    way: Way
    axis: int | None
    groups: tuple[tuple[int, ...], ...]
    first: int

    @property
    def value(self) -> TensorId:
        """What the component makes of the stream before all else."""
        return self.way.end

    @property
    def readers(self) -> range:
        """The numbers of the readers."""
        return range(self.first, self.first + len(self.groups))

    def part(self, value: Tensor, group: Sequence[int]) -> list[Tensor]:
        """The slices of a value that one reader fills, as views."""
        return [value] if self.axis is None else [value.select(self.axis, place) for place in group]


@dataclass(frozen=True, eq=False)
class Component:
    """The heads of an attention, or a memory: what it reads, what it makes of that, and what it writes to the stream.

    `core` leads from the inputs to what is made, `write` from there to what is added, `times` how often. Where `axis` is
    that of heads, each head is a writer of its own; where a norm follows them before the stream, they are one. `feeds` says
    which reader goes into which writer: (readers, writers).
    """

    inputs: tuple[Input, ...]
    core: Way
    write: Way
    times: float
    axis: int | None
    writers: range
    feeds: Bools

    @property
    def readers(self) -> range:
        """The numbers of all of its readers."""
        return range(self.inputs[0].first, self.inputs[-1].readers.stop)

    def written(self, made: Tensor, base: Pass, places: Iterable[int] | None = None) -> Tensor:
        """What the writers, or some of them, add to the stream if they make this, without what is added in any case:
        (writers, numbers of the stream)."""
        start = self.write.starts[0]
        nothing = self.write({start: torch.zeros_like(made)}, base)
        parts = []
        for place in range(len(self.writers)) if places is None else places:
            alone = made if self.axis is None else _alone(made, self.axis, place)
            parts.append((self.times * (self.write({start: alone}, base) - nothing)).flatten())
        return torch.stack(parts)


def _alone(made: Tensor, axis: int, place: int) -> Tensor:
    found = torch.zeros_like(made)
    found.select(axis, place).copy_(made.select(axis, place))
    return found


@dataclass(frozen=True, eq=False)
class Wiring:
    """All nodes of a model in execution order: the names of the writers and of the readers, and who may hear whom.

    `start` and `end` are the stream before the first write and after the last. An edge leads from a writer to a reader;
    `allowed` (writers, readers) has all of them. `node_of` is the node that a reader belongs to, for pictures.
    """

    graph: Graph
    components: tuple[Component, ...]
    start: TensorId
    end: TensorId
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    allowed: Bools = field(repr=False)

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """Everything that is read of the stream, the logits last."""
        last = Input(
            "", self.end, len(self.writers), Way(self.graph, [self.end], self.end), None, ((),), len(self.readers) - 1
        )
        return (*(one for component in self.components for one in component.inputs), last)

    @cached_property
    def feeds(self) -> Bools:
        """Which reader goes into which writer, (readers, writers)."""
        found = np.zeros((len(self.readers), len(self.writers)), bool)
        for one in self.components:
            found[one.readers.start : one.readers.stop, one.writers.start : one.writers.stop] = one.feeds
        return found

    @property
    def values(self) -> list[TensorId]:
        """All that a run must keep to be compared with another."""
        found = {self.start: None, self.end: None}
        for component in self.components:
            ways = [component.core, component.write, *(one.way for one in component.inputs)]
            for way in ways:
                found |= dict.fromkeys([*way.starts, way.end])
        return [*found, *sorted(self.beside - found.keys())]

    @property
    def beside(self) -> set[TensorId]:
        """What readers read beside the stream, weights apart: masks, positions."""
        ways = [way for one in self.components for way in (one.core, *(read.way for read in one.inputs))]
        return {name for way in ways for name in way.beside if self.graph[name].op not in ("param", "buffer")}


def wiring_of(structure: Structure, base: Pass) -> Wiring:
    """The nodes of the residual stream of a model, in the graph of a recorded pass.

    >>> wiring_of(fmr.locate(run), run.last).writers[:3]
    ('embedding', 'head 0.0', 'head 0.1')

    `AnalyzerError` where norms stand on the stream itself, and where what a part reads of it cannot be told.
    """
    return _Builder(structure, base).build()


class _Builder:
    """The nodes of a stream, found write by write."""

    def __init__(self, structure: Structure, base: Pass) -> None:
        self.structure, self.base, self.graph = structure, base, base.graph
        self.writes, self.own = structure.residual.writes, {node.id for node in base.graph.nodes}
        self.before = dict.fromkeys(self._handed_on(self.writes[0].before), 1)
        self.writers, self.readers = [EMBEDDING], list[str]()
        self.components: list[Component] = []
        self.heads = {self._outer(block.z.id): block for block in structure.attention}
        self.memories = {memory.out.id: memory for memory in structure.mlps}

    def build(self) -> Wiring:
        for place, write in enumerate(self.writes):
            again = self._handed_on(write.before)
            if place and self.writes[place - 1].after not in again:
                raise AnalyzerError(
                    f"{self.structure.model} changes its residual stream between two writes ({self.writes[place - 1].after} "
                    f"and {write.before}), as norms on the stream do, so that what is read is no sum of what nodes wrote. "
                    "Expected a pre-norm model."
                )
            self.before |= dict.fromkeys(again, len(self.writers))
            self._add(write)
            self.before[write.after] = len(self.writers)
        self.readers.append(LOGITS)
        allowed = np.zeros((len(self.writers), len(self.readers)), bool)
        for component in self.components:
            for one in component.inputs:
                allowed[: one.before, one.first : one.readers.stop] = True
        allowed[:, -1] = True
        ends = self.writes[0].before, self.writes[-1].after
        return Wiring(self.graph, tuple(self.components), *ends, tuple(self.writers), tuple(self.readers), allowed)

    def _handed_on(self, name: TensorId) -> list[TensorId]:
        """A value, and those above it that hold the same numbers in the same order: reshaped, cast."""
        found = [name]
        while len(parents := self.graph[found[-1]].parents) == 1:
            value, above = self.base[name], self.base[parents[0].id]
            if above.numel() != value.numel() or not above.flatten().to(value.dtype).equal(value.flatten()):
                break
            found.append(parents[0].id)
        return found

    def _add(self, write: Write) -> None:
        """The components that make what is added: attentions and memories, else all of the write as one."""
        known = self.heads.keys() | self.memories.keys() | self.before.keys()
        made = sources(self.graph, write.added, known) if write.added not in known else {write.added}
        if not made or made & self.before.keys():
            self._add_whole(write, made)
            return
        layer = self._layer(write)
        for name in sorted(made, key=self.graph.place):
            way = Way(self.graph, [name], write.added)
            if name in self.heads:
                self._add_heads(self.heads[name], way, write.times, layer)
            else:
                self._add_memory(self.memories[name], way, write.times, layer)

    def _add_whole(self, write: Write, made: set[TensorId]) -> None:
        """One component for all that is added: gated heads, experts, and what is neither attention nor memory."""
        way = Way(self.graph, [self._point(write.added)], write.added)
        kinds = {kind for kind, known in (("attention", self.heads), ("mlp", self.memories)) if made & known.keys()}
        name = f"{kinds.pop()} {self._layer(write)}" if len(kinds) == 1 else f"write {self.writes.index(write)}"
        self._finish(name, way, Way(self.graph, [write.added], write.added), write.times)

    def _add_memory(self, memory: Memory, write: Way, times: float, layer: int) -> None:
        """A memory reads what its first projection does, if nothing else reads that."""
        end, write = self._ends(write)
        core = Way(self.graph, [memory.source], end)
        if memory.source in self.before or not self._is_alone(core):
            core = Way(self.graph, [end], end)
        point = self._point(core.starts[0])
        self._finish(f"mlp {layer}", Way(self.graph, [point], core.starts[0]), write, times, core)

    def _ends(self, write: Way) -> tuple[TensorId, Way]:
        """What a component makes, and the way from there to what is added, which must be linear: where a norm lies on it,
        what is added is all that it makes."""
        bent = any(step.first.op in _BENDS for step in write.steps)
        return (write.end, Way(self.graph, [write.end], write.end)) if bent else (write.starts[0], write)

    def _finish(self, name: str, read: Way, write: Way, times: float, core: Way | None = None) -> None:
        """A component of one reader and one writer."""
        one = Input("", read.starts[0], self.before[read.starts[0]], read, None, ((),), len(self.readers))
        self.readers.append(self._new(name, self.readers))
        core = core or Way(self.graph, [read.end], read.end)
        writers = range(len(self.writers), len(self.writers) + 1)
        self.components.append(Component((one,), core, write, times, None, writers, np.ones((1, 1), bool)))
        self.writers.append(self._new(name, self.writers))

    def _add_heads(self, block: Attention, write: Way, times: float, layer: int) -> None:
        inputs, feeds = [], []
        for role in "qkv":
            value, axis, owners = self._operand(block, role)
            groups = tuple(tuple(np.flatnonzero(owners == one).tolist()) for one in np.unique(owners))
            point = self._point(value)
            way = Way(self.graph, [point], value)
            count = 0 if axis is None else self.graph[value].shape[axis]
            filled = groups if count == block.n_heads else tuple((place,) for place in range(max(count, 1)))
            inputs.append(Input(role, point, self.before[point], way, axis, filled, len(self.readers)))
            self.readers += [self._new(f"{_called(layer, group)} {role}", self.readers) for group in groups]
            feeds += [np.isin(np.arange(block.n_heads), group) for group in groups]
        made, write = self._ends(write)
        core = Way(self.graph, [one.value for one in inputs], made)
        layout = block.z.layout or ()
        if "heads" not in layout or len({one.value for one in inputs}) < 3 or not self._is_alone(core):
            raise self._untold(block)
        apart = made == self._outer(block.z.id)
        names = [_called(layer, [head]) for head in range(block.n_heads)] if apart else [f"attention {layer}"]
        fed = np.array(feeds) if apart else np.ones((len(feeds), 1), bool)
        writers = range(len(self.writers), len(self.writers) + len(names))
        axis = layout.index("heads") if apart else None
        self.components.append(Component(tuple(inputs), core, write, times, axis, writers, fed))
        self.writers += [self._new(name, self.writers) for name in names]

    def _operand(self, block: Attention, role: str) -> tuple[TensorId, int | None, NDArray[np.int64]]:
        """Queries, keys or values as the model itself makes them, the axis of their heads, and whose they are: for each
        head of the attention the one that it reads. Keys and values that several heads share are one."""
        site: Site = getattr(block, role)
        value, layout = self._outer(site.id), site.layout or ()
        axis = layout.index("heads") if "heads" in layout else None
        given, read = self.base[value].detach(), self.base[site.id].detach()
        if (axis is None and role == "q") or given.dim() != read.dim():
            raise self._untold(block)
        if axis is None or given.shape[axis] == 1:
            return value, axis, np.zeros(block.n_heads, np.int64)
        if read.shape[axis] != block.n_heads:
            raise self._untold(block)
        kept = given.unbind(axis)
        owners = [next((n for n, one in enumerate(kept) if one.equal(head)), -1) for head in read.unbind(axis)]
        if role != "q" and len(set(owners)) != block.n_kv_heads:
            raise self._untold(block)
        return value, axis, np.array(owners if role != "q" else range(block.n_heads))

    def _is_alone(self, core: Way) -> bool:
        """Whether nothing else that goes on to the logits reads what a component makes of the stream before all else."""
        own = {node.id for step in core.steps for node in step.nodes}
        others = [node.id for name in core.starts for node in self.graph.readers(name) if node.id not in own]
        for name in others:  # grows while it is read
            if name == self.writes[-1].after:
                return False
            others += [node.id for node in self.graph.readers(name) if node.id not in others]
        return True

    def _outer(self, name: TensorId) -> TensorId:
        """A value of a fused op as what the op was given, if it is made of that alone."""
        while name not in self.own:
            parents = self.graph.unfused[name].parents
            if len(parents) != 1:
                break
            name = parents[0].id
        return name

    def _point(self, value: TensorId) -> TensorId:
        """The one value of the stream that another is made of."""
        found = sources(self.graph, value, self.before.keys()) if value in self.own else set()
        if len(found) != 1:
            raise AnalyzerError(
                f"{value} is made of {len(found)} values of the residual stream ({', '.join(sorted(found)) or 'none'}), "
                f"expected one, so that no edges of {self.structure.model} lead there."
            )
        return found.pop()

    def _untold(self, block: Attention) -> AnalyzerError:
        return AnalyzerError(
            f"The heads of {block.scope!r} cannot be told apart in its queries, keys, values and z ({block.q.layout}, "
            f"{block.k.layout}, {block.v.layout}, {block.z.layout}). Expected values of its own with a dimension of heads."
        )

    def _layer(self, write: Write) -> int:
        """The number of the layer that a write belongs to."""
        place = self.graph.place(write.after)
        ends = (self.graph.place(layer.resid_post.id) for layer in self.structure.layers)
        return sum(end < place for end in ends)

    def _new(self, name: str, names: Sequence[str]) -> str:
        return name if name not in names else self._new(name + "'", names)


def _called(layer: int, heads: Sequence[int]) -> str:
    """The heads of a layer: "head 3.5", or "heads 3.0-2" for those that share keys or values."""
    if len(heads) == 1:
        return f"head {layer}.{heads[0]}"
    run = list(heads) == list(range(heads[0], heads[-1] + 1))
    return f"heads {layer}.{f'{heads[0]}-{heads[-1]}' if run else ','.join(map(str, heads))}"
