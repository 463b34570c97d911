"""`fmr.locate`: run the matchers over a graph, certify what they find, and put the parts together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeVar

from fmr.errors import IdError, StructureError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.ops.fused import is_fused
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.attention.additive import additive
from fmr.structure.attention.attention import Attention, values_inside
from fmr.structure.attention.certify import certify
from fmr.structure.attention.deformable import deformable
from fmr.structure.attention.differential import differential, subtracted
from fmr.structure.attention.dot_product import dot_product, undivided, used_again, with_others
from fmr.structure.attention.unsoftened import unsoftened
from fmr.structure.axes import Axes
from fmr.structure.ends import _embedding, _unembedding
from fmr.structure.layers import find_layers
from fmr.structure.logits import find_readout
from fmr.structure.memories.find import memory_of
from fmr.structure.memories.memory import Memory, certify_memory
from fmr.structure.memories.router import Router, certify_router, find_routers
from fmr.structure.memories.up_projections import firsts
from fmr.structure.memories.written import why_no_memory
from fmr.structure.mixers.find import Term, find_mixers
from fmr.structure.mixers.mixer import Mixer
from fmr.structure.mixers.prove import ALONE, proven
from fmr.structure.normal.dims import Dims, dims_of
from fmr.structure.normal.form import form_of
from fmr.structure.normal.hidden import bends_alone, hidden_attentions, hidden_memories, is_hidden
from fmr.structure.normal.match import projection
from fmr.structure.normal.value import Value
from fmr.structure.parts import Layer, Structure
from fmr.structure.prints import find_prints
from fmr.structure.proof.certificate import Certificate, Rejected
from fmr.structure.proof.evaluate import Values, own_work, why_without_numbers
from fmr.structure.search import RAGGED, Search
from fmr.structure.streams.coupled import coupled
from fmr.structure.streams.residual import find_streams
from fmr.structure.streams.stack import find_stacks
from fmr.structure.streams.stream import Stream, certify_stream
from fmr.structure.streams.writes import untold, writers

Found = TypeVar("Found")
Answer = TypeVar("Answer")
Default = TypeVar("Default")
Part = TypeVar("Part", Attention, Memory, Mixer, Router, Layer, Structure)


def locate(source: Run | Pass | Graph) -> Structure:
    """Find attention, memories and residual stream of a model in its graph, and certify each from the run's values.

    >>> structure = fmr.locate(run)
    >>> structure.layers[0].attention.pattern
    Site('transformer.h.0.attn/to#0')

    source: a run that kept its values (keep="all"), or a graph; from a graph nothing is proven and `certified` is None.
    So it is of a run on the meta device or in fake tensor mode, and `unproven` says so. A candidate whose parts do not
    reproduce the run is not returned: it stands in `rejected` with the reason.
    """
    if not isinstance(source, (Graph, Run, Pass)):
        raise StructureError(f"fmr.locate got {type(source).__name__}, expected a run or a graph, as in fmr.locate(run).")
    with own_work():
        if isinstance(source, Graph):
            return _Search(source, None).structure()
        unproven = why_without_numbers(source)
        try:
            found = _Search(source.graph, None if unproven else source.__getitem__).structure()
        except IdError:
            _check_kept(source)
            raise
        return replace(found, unproven=unproven)


def _check_kept(run: Run | Pass) -> None:
    """Raise for a run that was asked to keep a part of its values, by which not everything can be proven."""
    one = run.last if isinstance(run, Run) else run
    held = {*one.kept, *one.unsaved, *one.slots}
    kept = sum(node.id in held for node in one.graph.nodes)
    if kept < len(one.graph.nodes):
        raise IdError(
            f"fmr.locate proves what it finds by the values of a run, and this one kept {kept} of {len(one.graph.nodes)}. "
            f"Expected a run with keep='all'; fmr.locate(run.graph) finds without proof."
        )


MATCHERS = (dot_product, deformable, additive)
"""What a softmax may belong to, tried in this order; each answers with an attention, with the reason why it is none
though it looks like one, or, but for the first, with None for what is another's."""

_OF_WEIGHTS = "it is made of weights or constants alone, and looks at no data"

_HALF = "its last stream is a half of one, whose other half goes into the logits, too"

_UNSEEN = "what it makes of the values that are projected for it is hidden from torch, in compiled or foreign code"


def _attention_of(graph: Graph, softmax: Value) -> Attention | Rejected:
    """A softmax as an attention, or with the reason why it is none."""
    reason = ""
    for matcher in MATCHERS:
        answer = matcher(graph, softmax)
        if isinstance(answer, Attention):
            return answer
        reason = answer or reason
    return Rejected(softmax.node.id, "attention", reason)


class _Search(Search):
    """The steps of a search, each of which reads what those before it found."""

    def __init__(self, graph: Graph, value: Values | None) -> None:
        super().__init__(graph, value)
        self.sums: frozenset[TensorId] = frozenset()
        self.axes = Axes(self.graph, Dims())

    def structure(self) -> Structure:
        streams = self._streams()
        sums = frozenset(write.after for stream in streams for write in stream.writes)
        residuals = tuple(self._residual(stream, sums) for stream in streams)
        self.sums = sums
        attention = self._attention()
        self.axes = self.tried(self.end, "axis", lambda: Axes(self.graph, dims_of(self.graph), attention), self.axes)
        mlps = self._memories(residuals, sums, attention)
        attention, mlps = self._named(attention, mlps)
        last = streams[-1] if streams and streams[-1].writes else None
        mixers = self._mixers(residuals, attention, mlps)
        embedding = self.tried(self.end, "embedding", lambda: _embedding(self.graph, last, sums), None)
        unembedding = self.tried(self.end, "unembedding", lambda: _unembedding(self.graph, last, embedding), None)
        look = partial(find_readout, self.graph, last, unembedding, self.value)
        readout = self.tried(self.end, "read-out", look, "the search for it failed, see rejected")
        readout = _HALF if last is not None and last.coupled else readout
        layers = self.tried(self.end, "layer", lambda: find_layers(self.graph, residuals, attention, mlps, mixers), ())
        found = Structure(
            model=self.model,
            attention=tuple(attention),
            mlps=tuple(mlps),
            mixers=tuple(mixers),
            routers=tuple(self._routers(residuals, mlps)),
            streams=residuals,
            layers=tuple(map(self._told, layers)),
            embedding=embedding,
            unembedding=unembedding,
            final_norm=Site(last.final_norm) if last and last.final_norm else None,
            rejected=tuple(self.rejected),
            readout=readout,
            graph=self.graph,
            prints=self.tried(self.end, "weights", lambda: find_prints(self.graph, self.value), {}),
        )
        return self._told(found)

    def _named(self, attention: list[Attention], mlps: list[Memory]) -> tuple[list[Attention], list[Memory]]:
        """The parts with what their dimensions count."""
        told = [self.tried(one.softmax, "axis", partial(self.axes.attention, one), one) for one in attention]
        return told, [self.tried(one.down, "axis", partial(self.axes.memory, one), one) for one in mlps]

    def _told(self, part: Part) -> Part:
        """A part whose sites know where their values are made and what their dimensions count."""
        held = {one.name: getattr(part, one.name) for one in fields(part)}
        sites: dict[str, Any] = {name: self.axes.site(one) for name, one in held.items() if isinstance(one, Site)}
        return self.placed(replace(part, **sites))

    def _candidates(self) -> Iterator[Attention | Rejected]:
        """Each softmax of an unfused graph as an attention, or with the reason why it is none; what hides one."""
        graph = self.graph
        values = self.every("attention", lambda: form_of(graph).values)
        for softmax in (one for one in values if one.kind == "softmax"):
            answer = self.tried(softmax.node.id, "attention", partial(_attention_of, graph, softmax), None)
            if isinstance(answer, Rejected) and 0 in graph[answer.id].shape:
                answer = replace(answer, reason=self.nothing(answer.id) or answer.reason)
            yield from [answer] if answer is not None else []
        yield from (Rejected(one.id, "attention", _OF_WEIGHTS) for one in values if one.node.op == "softmax" != one.kind)
        yield from self.every("attention", undivided, graph)
        yield from self.every("attention", unsoftened, graph, self.sums)
        hidden = self.every("attention", hidden_attentions, graph)
        yield from (Rejected(node.id, "attention", _UNSEEN) for node in hidden)
        for node in graph.nodes:
            if is_fused(node):
                ragged = self.is_ragged(*(parent.id for parent in node.parents))
                reason = RAGGED if ragged else "it was given nothing, in shapes that do not fit"
                yield Rejected(node.id, "attention", reason)

    def _attention(self) -> list[Attention]:
        blocks: list[Attention] = []
        candidates = list(self._candidates())
        plain = [one for one in candidates if isinstance(one, Attention)]
        differences = self.every("attention", differential, self.graph, plain)
        proven = [one for found in differences if (one := self._proven(found)) is not None]
        halves = {name for one in proven if one.minus is not None for name in (one.softmax, one.minus.softmax)}
        for found in candidates:
            if (found.softmax if isinstance(found, Attention) else found.id) in halves:
                continue
            if isinstance(found, Rejected):
                self.rejected.append(found)
            elif (one := self._proven(found)) is not None:
                blocks.append(one)
        blocks = sorted([*blocks, *proven], key=lambda one: self.graph.place(one.softmax)) if proven else blocks
        blocks = [replace(one, index=n) for n, one in enumerate(blocks)]
        for look in (subtracted, used_again, with_others):
            self.rejected += self.every("attention", look, self.graph, blocks)
        return blocks

    def _proven(self, found: Attention) -> Attention | None:
        """An attention with its certificate; None where that fails."""
        return self.claimed(certify, found, "attention", found.softmax, (found.out or found.z).id)

    def _memories(self, residuals: tuple[Stream, ...], sums: frozenset[TensorId], heads: list[Attention]) -> list[Memory]:
        blocks: list[Memory] = []
        inside = self.tried(self.end, "memory", lambda: values_inside(self.graph, heads), frozenset[TensorId]())
        ends = {form_of(self.graph)[one.z.id].id for one in heads}
        carried = ends.union(
            sums, (form_of(self.graph)[point].id for stream in residuals if stream.writes for point in stream.points)
        )
        for node in self.graph.nodes:
            down = projection(self.graph, node)
            if down is None:
                continue
            found = self.tried(node.id, "memory", partial(memory_of, self.graph, down, sums), "")
            if isinstance(found, Memory):
                look = partial(why_no_memory, self.graph, found, residuals, sums, self.axes)
                reason = self.tried(node.id, "memory", look, "")
            else:
                is_second = next(firsts(form_of(self.graph)[down.data], carried), None) is not None
                reason = found if is_second and node.id not in inside else ""
            if reason:
                self.rejected.append(Rejected(node.id, "memory", self.nothing(node.id) or reason))
            if reason or isinstance(found, str):
                continue
            block = self.claimed(certify_memory, found, "memory", found.down, found.out.id)
            if block is not None:
                weights = {name: self.value(name) for name in (found.keys, found.values)} if self.value is not None else {}
                blocks.append(replace(block, weights=weights))
        for second, hidden in self.every("memory", hidden_memories, self.graph, sums):
            whole = second is hidden or not bends_alone(self.graph, hidden)
            reason = f"{'it' if second is hidden else hidden.id} is computed by code that is hidden from torch"
            reason += ", weights and all" * whole
            self.rejected.append(Rejected(second.id, "memory", reason))
        return blocks

    def _mixers(self, residuals: Sequence[Stream], attention: Sequence[Attention], mlps: Sequence[Memory]) -> list[Mixer]:
        """What else brings positions together; of several readings the first that is certified, or why the first is not."""
        known: set[TensorId] = {name for one in attention for name in (one.softmax, one.z.id)} | {one.down for one in mlps}
        mixers: list[Mixer] = []
        for terms in self.every("mixer", find_mixers, self.graph, residuals, known, self.axes):
            before = len(self.rejected)
            terms = [term for term in terms if term.readings or not self._is_hidden(term)]  # of which hidden code is told
            found = next((one for term in terms if (one := self._mixer(term)) is not None), None)
            mixers += [found] if found is not None else []
            why = [one for one in self.rejected[before:] if one.reason] if found is None else []
            self.rejected[before:] = sorted(why, key=lambda one: one.reason == ALONE)[:1]
        return mixers

    def _is_hidden(self, term: Term) -> bool:
        """Whether code that torch does not show lies on the way to what a term adds."""
        return any(map(is_hidden, self.graph.between(term.reads[0], term.outputs[0])))

    def _mixer(self, term: Term) -> Mixer | None:
        """What a term is, with its certificate; from a graph alone the likeliest reading."""
        if self.value is None:
            return next((self.placed(one) for one in term.readings if term.told), None)
        made: list[Mixer] = []

        def prove(graph: Graph, one: Term, value: Values) -> Certificate:
            found, certificate = proven(graph, one, value)
            made.append(found)
            return certificate

        certificate, ok = self.certify(prove, term, "mixer", term.reads[0], term.outputs[0])
        return replace(self.placed(made[0]), certified=certificate) if ok else None

    def _routers(self, residuals: Sequence[Stream], mlps: Sequence[Memory]) -> Iterator[Router]:
        """What sends tokens to the memories of a write."""
        for found in self.every("router", find_routers, self.graph, residuals, mlps):
            if isinstance(found, Rejected):
                self.rejected.append(found)
            elif (one := self.claimed(certify_router, found, "router", found.logits.id, found.write)) is not None:
                yield one

    def _streams(self) -> list[Stream]:
        graph = self.graph
        found = self.every("residual stream", find_streams, graph)
        found = sorted(found, key=lambda stream: graph.place(stream.writes[-1].after))
        sums = {write.after for stream in found for write in stream.writes}
        for node, made in self.every("residual stream", untold, graph, sums):
            reason = f"what it adds is made by code that is hidden from torch ({made.id}), and of what cannot be told"
            self.rejected.append(Rejected(node.id, "residual stream", reason))
        kept = self.every("stack", find_stacks, graph, found)
        for stream in found:
            start, end = stream.writes[0].before, stream.writes[-1].after
            one = self.claimed(certify_stream, stream, "residual stream", start, end)
            kept += [one] if one is not None else []
        return self.tried(self.end, "residual stream", lambda: coupled(graph, kept), kept)

    def _residual(self, stream: Stream, sums: frozenset[TensorId]) -> Stream:
        who = tuple(tuple(node.id for node in writers(self.graph, write, sums)) for write in stream.writes)
        read = tuple(tuple(node.id for node in self.graph.readers(point)) for point in stream.points)
        return replace(stream, writers=who, readers=read)
