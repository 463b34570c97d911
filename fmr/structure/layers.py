"""Layers: which writes of a residual stream belong together, and the attentions and memories that write in them.

What one call of an entry of a list of modules writes is one layer: `blocks.3`, or `stages.1.blocks.3` where an entry of the
inner list holds all kinds of parts that `stages.1` does. Where no such entry makes the adds, or lists hold attentions and
memories apart, the order tells: a layer ends with its memory, or where the order of memories begins anew. What neither
tells is not known: two halves of a layer with a memory each, written in one `forward`, are two layers.
"""

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from itertools import groupby, pairwise, product
from typing import NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.structure.logits import is_normed_on_its_way
from fmr.structure.normal.match import above, below, depends_on, projection
from fmr.structure.normal.vocabulary import MOVES
from fmr.structure.parts import Attention, Layer, Memory, Mixer
from fmr.structure.streams.stream import Stream, Write


class _Step(NamedTuple):
    """One write of a stream, the parts that write there, and the module call that makes the add."""

    write: Write
    attentions: list[Attention]
    memories: list[Memory]
    mixers: list[Mixer]
    module: str

    @property
    def parts(self) -> tuple[Attention | Memory | Mixer, ...]:
        """What writes there."""
        return *self.attentions, *self.memories, *self.mixers

    @property
    def kinds(self) -> set[type]:
        """Which kinds of parts write there; none where nothing that is known does."""
        return {_kind(part) for part in self.parts}


def _kind(part: Attention | Memory | Mixer) -> type:
    """Which half of a layer a part is: what brings positions together, or a memory."""
    return Memory if isinstance(part, Memory) else Attention


def find_layers(
    graph: Graph,
    residuals: Sequence[Stream],
    attention: Sequence[Attention],
    mlps: Sequence[Memory],
    mixers: Sequence[Mixer],
) -> list[Layer]:
    """The layers of all streams as they end: writes in groups, each with the parts that write in it; what parts write to a
    second stream, too, is no layer more."""
    lists = _Lists([*attention, *mlps, *mixers])
    sums = {write.after for residual in residuals for write in residual.writes}
    ends = [_ends(graph, block, sums) for block in attention]
    found, told = list[Layer](), set[Attention | Memory | Mixer]()
    for residual in sorted(residuals, key=lambda one: -len(one.writes)):
        steps = [
            _Step(
                write,
                [block for block, end in zip(attention, ends, strict=True) if not end.isdisjoint(names)],
                [memory for memory in mlps if memory.down in names],
                [mixer for mixer in mixers if mixer.write == write.after],
                graph[write.after].module,
            )
            for write, names in zip(residual.writes, residual.writers, strict=True)
        ]
        groups = list(_groups(steps, lists))
        normed = residual.final_norm if is_normed_on_its_way(graph, residual) else None
        last = [normed or write.after for write in residual.writes[-1:]]
        posts = [*(group[0].write.before for group in groups[1:]), *last[: len(groups)]]
        pairs = zip(groups, posts, strict=True)
        parts = {part for group in groups for step in group for part in step.parts}
        found += [_layer(graph, group, post) for group, post in pairs if any({*step.parts} - told for step in group)]
        told |= parts
    return sorted(found, key=lambda layer: graph.place(layer.resid_post))


def _ends(graph: Graph, block: Attention, sums: Container[TensorId]) -> set[TensorId]:
    """The values among which the writer of an attention is: what makes its output, or the second half of a projection; where
    none is known all that comes of z up to a projection, or to what is added to a stream."""
    out = (block.out or block.z).id
    known = block.out is not None
    higher = above(graph, out, MOVES | {"add", "sum"})
    lower = below(graph, graph[out], lambda one: one.op in MOVES if known else _goes_on(graph, one, sums))
    return {node.id for node in higher} | {node.id for node, _ in lower}


def _goes_on(graph: Graph, node: Node, sums: Container[TensorId]) -> bool:
    return node.id not in sums and projection(graph, node) is None


def _layer(graph: Graph, steps: list[_Step], post: TensorId) -> Layer:
    """A layer of these writes, with the stream between where a memory reads it just before it writes."""
    attentions = tuple(block for step in steps for block in step.attentions)
    memories = tuple(memory for step in steps for memory in step.memories)
    mixers = tuple(mixer for step in steps for mixer in step.mixers)
    states = ((step.write.before, memory) for step in steps[1:] for memory in step.memories if attentions or mixers)
    mid = next((Site(state) for state, memory in states if depends_on(graph, memory.source, state)), None)  # or in parallel
    return Layer(attentions, memories, Site(steps[0].write.before), mid, Site(post), mixers)


def _entries(module: str) -> list[str]:
    """The entries of lists of modules around a module call, outermost first."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n, part in enumerate(parts, 1) if part.partition("@")[0].isdigit()]


def _list_of(entry: str) -> str:
    return entry.rpartition(".")[0]


class _Lists:
    """The lists of modules that hold parts, and which of the two kinds each of their entries holds."""

    def __init__(self, parts: Sequence[Attention | Memory | Mixer]) -> None:
        self.held: dict[str, set[type]] = defaultdict(set)
        for part in parts:
            for entry in _entries(part.scope):
                self.held[entry].add(_kind(part))
        self.within: dict[str, list[set[type]]] = defaultdict(list)
        for entry, kinds in self.held.items():
            self.within[_list_of(entry)].append(kinds)

    def entry(self, module: str) -> str:
        """The innermost entry around a module call whose list has one that holds all kinds that the one around it does."""
        found = ""
        for entry in _entries(module):
            if not found or self.held[found] in self.within[_list_of(entry)]:
                found = entry
        return found

    def around_halves(self, module: str) -> str | None:
        """The entry around the outermost list of halves that a module call is in; None where it is in none."""
        entries = _entries(module)
        return next((outer for outer, entry in zip(["", *entries], entries, strict=False) if self.halves(entry)), None)

    def halves(self, entry: str) -> bool:
        """Whether the list of an entry holds both, and none of its entries does."""
        kinds = self.within[_list_of(entry)]
        return len(set().union(*kinds)) > 1 and all(len(known) < 2 for known in kinds)


def _groups(steps: list[_Step], lists: _Lists) -> Iterator[list[_Step]]:
    """The writes of a stream in groups: those of one entry, else as their order tells."""
    entries = [lists.entry(step.module) for step in steps]
    whole = {path for path in {_list_of(entry) for entry in entries} if not _takes_turns(path, entries, steps)}
    outer = [lists.around_halves(step.module) for step in steps]
    keys = [entry if _list_of(entry) in whole else "" for entry in entries]
    keys = [entry if around is None else f"{around}:" for entry, around in zip(keys, outer, strict=True)]
    for key, pairs in groupby(zip(keys, steps, strict=True), key=lambda pair: pair[0]):
        group = [step for _, step in pairs]
        if key.endswith(":"):
            yield from _of_halves(group, lists)
        else:
            yield from [group] if key else _by_order(group)


def _of_halves(steps: list[_Step], lists: _Lists) -> list[list[_Step]]:
    """The writes of a list of halves in groups as their order tells; where groups are not alike, each entry is one."""
    groups = list(_by_order(steps))
    kinds = {frozenset(type(part) for step in group for part in step.parts) for group in groups}
    if len(kinds - {frozenset()}) == 1:
        return groups
    entries = groupby(steps, key=lambda step: lists.entry(step.module))
    return [part for _, own in entries for part in _by_order(list(own))]


def _takes_turns(path: str, entries: list[str], steps: list[_Step]) -> bool:
    """Whether parts of a kind that the entries of a list do not write stand between these: each writes half a layer."""
    own = [n for n, entry in enumerate(entries) if entry and _list_of(entry) == path]
    between = steps[own[0] : own[-1] + 1] if own else []
    return set().union(*(step.kinds for step in between)) > set().union(*(steps[n].kinds for n in own))


def _by_order(steps: list[_Step]) -> Iterator[list[_Step]]:
    """Writes in groups that end with a memory each; where one follows another or none is the last, of a period each."""
    kinds, active = [bool(step.memories) for step in steps], [n for n, step in enumerate(steps) if step.kinds]
    ends = [n for n, known in enumerate(kinds, 1) if known]
    if active and (not kinds[active[-1]] or any(a and b for a, b in pairwise(kinds))):
        spans = product(range(active[0] + 1), range(len(kinds), active[-1], -1))
        alike = [(bool(step.memories), any(one.kind in _WINDOWS for one in step.mixers)) for step in steps]
        periods = ((start, end, _period(alike[start:end])) for start, end in spans)
        ends = next((list(range(start, end + 1, size)) for start, end, size in periods if size), ends)
    yield from (steps[start:end] for start, end in pairwise(sorted({0, *ends, len(steps)})))


_WINDOWS = frozenset("convolution network fixed".split())
"""Kinds of mixers that may stand beside an attention in one layer, where a memory would."""


def _period(kinds: Sequence[object]) -> int:
    """After how many entries a sequence repeats itself, to its end; zero where it does not."""
    sizes = (size for size in range(1, len(kinds) // 2 + 1) if len(kinds) % size == 0)
    return next((size for size in sizes if kinds[size:] == kinds[:-size]), 0)
