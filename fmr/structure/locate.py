"""`fmr.locate`: run the matchers over a graph, certify what they find, and put the parts together."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from fmr.errors import RandomError, StructureError
from fmr.graph import Graph
from fmr.ids import Parent, Site, TensorId
from fmr.inner import is_fused
from fmr.nodes import Node
from fmr.run import Pass, Run
from fmr.structure.attention.additive import additive
from fmr.structure.attention.deformable import deformable
from fmr.structure.attention.dot_product import Attention, Rejected, dot_product, undivided
from fmr.structure.attention.softmax import softmaxes
from fmr.structure.certify import Certificate, certify_attention, certify_memory, certify_stream
from fmr.structure.evaluate import Values
from fmr.structure.layers import find_layers
from fmr.structure.match import ELEMENTWISE, MOVES, NORMS, climb, descend, is_constant, is_random, projection, weights
from fmr.structure.memories.memory import find_memories, only_weighs
from fmr.structure.parts import AttentionBlock, MemoryBlock, Residual, Structure
from fmr.structure.streams.dominate import Flow
from fmr.structure.streams.residual import Stream, find_streams
from fmr.structure.streams.stack import find_stacks
from fmr.structure.streams.writes import writers

Found = TypeVar("Found")


def locate(source: Run | Pass | Graph) -> Structure:
    """Find attention, memories and residual stream of a model in its graph, and certify each from the run's values.

    >>> structure = fmr.locate(run)
    >>> structure.layers[0].attention.pattern
    Site('h.0.attn/softmax#0')

    source: a run that kept its values (keep="all"), or a graph; from a graph nothing is proven and `certified` is None.
    A candidate whose parts do not reproduce the run is not returned: it stands in `rejected` with the reason.
    """
    if isinstance(source, Graph):
        return _Search(source, None).structure()
    if not isinstance(source, (Run, Pass)):
        raise StructureError(f"fmr.locate got {type(source).__name__}, expected a run or a graph, as in fmr.locate(run).")
    return _Search(source.graph, source.__getitem__).structure()


_OF_TABLES = (MOVES - {"cat"}) | NORMS | {"linear", "matmul", "add", "mul"}
"""What rows of a table become before a stream begins."""

MATCHERS = (dot_product, deformable, additive)
"""What a softmax may belong to, tried in this order; each answers with an attention, with the reason why it is none
though it looks like one, or, but for the first, with None for what is another's."""


_RAGGED = (
    "its rows differ in length (a nested tensor), and fmr does not look inside such a kernel; "
    "nn.TransformerEncoder(..., enable_nested_tensor=False) pads them"
)


def find_attention(graph: Graph) -> Iterator[Attention | Rejected]:
    """Each softmax of an unfused graph as an attention, or with the reason why it is none."""
    for softmax in softmaxes(graph):
        reason = ""
        for matcher in MATCHERS:
            answer = matcher(graph, softmax)
            if isinstance(answer, Attention):
                yield answer
                break
            reason = answer or reason
        else:
            yield Rejected(softmax.node.id, "attention", reason)
    yield from undivided(graph)
    yield from (Rejected(node.id, "attention", _RAGGED) for node in graph.nodes if is_fused(node))


class _Search:
    """One search: the graph with fused ops written out, where values come from, and what was rejected so far."""

    def __init__(self, graph: Graph, value: Values | None) -> None:
        self.model, self.graph, self.value = graph.model, graph.unfused, value
        self.rejected: list[Rejected] = []

    def structure(self) -> Structure:
        streams = self._streams()
        sums = frozenset(write.after for stream in streams for write in stream.writes)
        residuals = tuple(self._residual(stream, sums) for stream in streams)
        attention, mlps = self._attention(), self._memories(residuals, sums)
        last = streams[-1] if streams and streams[-1].writes else None
        embedding = _embedding(self.graph, last, sums)
        return Structure(
            model=self.model,
            attention=tuple(attention),
            mlps=tuple(mlps),
            streams=residuals,
            layers=tuple(find_layers(self.graph, residuals, attention, mlps)),
            embedding=embedding,
            unembedding=_unembedding(self.graph, last, embedding),
            final_norm=Site(last.final_norm) if last and last.final_norm else None,
            rejected=tuple(self.rejected),
        )

    def _attention(self) -> list[AttentionBlock]:
        blocks: list[AttentionBlock] = []
        for found in find_attention(self.graph):
            if isinstance(found, Rejected):
                self.rejected.append(found)
                continue
            ends = found.softmax, found.out or found.z
            certificate, ok = self._certify(certify_attention, found, "attention", *ends)
            if ok:
                blocks.append(AttentionBlock(found, self.graph, certificate, len(blocks)))
        return blocks

    def _memories(self, residuals: tuple[Residual, ...], sums: frozenset[TensorId]) -> list[MemoryBlock]:
        written = {name for residual in residuals for names in residual.writers for name in names}
        blocks: list[MemoryBlock] = []
        for found in find_memories(self.graph, sums):
            if found.down not in written:
                self.rejected.append(Rejected(found.down, "memory", "its output is not written to a residual stream"))
                continue
            if only_weighs(self.graph, found, sums):
                self.rejected.append(Rejected(found.down, "memory", "its output only weighs what another part writes"))
                continue
            certificate, ok = self._certify(certify_memory, found, "memory", found.pre, found.out)
            if ok:
                weights = {name: self.value(name) for name in (found.keys, found.values)} if self.value is not None else {}
                blocks.append(MemoryBlock(found, self.graph, weights, certificate))
        return blocks

    def _streams(self) -> list[Stream]:
        flow = Flow(self.graph)
        found = sorted(find_streams(self.graph, flow), key=lambda stream: self.graph.place(stream.writes[-1].after))
        kept = list(find_stacks(self.graph, flow, found))
        for stream in found:
            start, end = stream.writes[0].before, stream.writes[-1].after
            _, ok = self._certify(
                lambda graph, one, value: certify_stream(one, value), stream, "residual stream", start, end
            )
            if ok:
                kept.append(stream)
        return kept

    def _certify(
        self, certify: Callable[[Graph, Found, Values], Certificate], found: Found, what: str, start: TensorId, end: TensorId
    ) -> tuple[Certificate | None, bool]:
        """The certificate of a finding, and whether it may be claimed; otherwise the reason is noted."""
        if self.value is None:
            return None, True
        try:
            certificate = certify(self.graph, found, self.value)
        except (StructureError, RandomError, RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = f"it cannot be recomputed: {error}".partition("\n")[0]
        else:
            if certificate.ok:
                return certificate, True
            random = next((node for node in self.graph.between(start, end) if is_random(node)), None)
            reason = repr(certificate)
            if random is not None:
                reason = f"dropout is active ({random.id}), so it cannot be recomputed; run the model in eval mode"
        self.rejected.append(Rejected(end if what == "residual stream" else start, what, reason))
        return None, False

    def _residual(self, stream: Stream, sums: frozenset[TensorId]) -> Residual:
        who = tuple(tuple(node.id for node in writers(self.graph, write, sums)) for write in stream.writes)
        read = tuple(tuple(node.id for node in self.graph.readers(point)) for point in stream.points)
        return Residual(stream, who, read)


def _embedding(graph: Graph, stream: Stream | None, sums: frozenset[TensorId]) -> Site | None:
    """The look-up of the input tokens that a stream begins with: the first, where their places are looked up and added.

    One above the sums of another stream is meant only where there is no other, one above a projection only where nothing
    else is projected there: a table with fewer units than the stream.
    """

    def looked_up(nodes: Iterable[Node]) -> list[Node]:
        return [node for node in nodes if node.op == "embedding" and _is_given(graph, node.parent("input", 0))]

    def above(stops: frozenset[TensorId], start: TensorId) -> list[Node]:
        ends = climb(graph, start, lambda node: not (node.op == "embedding" or node.id in stops or projection(graph, node)))
        return looked_up(ends)

    def narrow(start: TensorId) -> list[Node]:
        made = list(climb(graph, start, lambda node: node.op in _OF_TABLES and node.id not in sums))
        others = (node for node in made if node.op != "embedding" and not is_constant(graph, node.id))
        only = all(node.op in _OF_TABLES and node.id not in sums for node in others)
        return looked_up(made) if only else []

    start = stream.points[0] if stream is not None else None
    found = (above(sums, start) or above(frozenset(), start) or narrow(start)) if start is not None else []
    return Site(min(found, key=graph.place).id) if found else None


def _is_given(graph: Graph, index: Parent | None) -> bool:
    """Whether what is looked up is an input of the model, in a table of its own or behind others."""
    return index is not None and any(node.op == "input" for node in climb(graph, index.id, MOVES | {"add"}))


def _unembedding(graph: Graph, stream: Stream | None, embedding: Site | None) -> Site | None:
    """The projection of a stream's end to logits: by the table of the embedding, to as many as it has rows, or to more
    than the stream has units."""
    if stream is None:
        return None
    end = stream.final_norm or stream.writes[-1].after
    width, table = graph[end].shape[-1], graph[embedding.id].parent("weight", 1) if embedding is not None else None
    rows = graph[table].shape[0] if table is not None else None
    for node, _ in descend(graph, graph[end], lambda node: node.op in MOVES | NORMS or _scales(graph, node)):
        found = projection(graph, node)
        if found is not None:
            tied = table is not None and table in weights(graph, found.weight)
            if _goes_on(graph, node):
                return None
            if tied or node.shape[-1] > width or node.shape[-1] == rows != width:
                return Site(node.id)
    return None


def _goes_on(graph: Graph, node: Node) -> bool:
    """Whether what a projection makes is projected again: then it makes no logits."""
    below = descend(graph, node, lambda one: one.op in MOVES | ELEMENTWISE | NORMS)
    return any(projection(graph, one) is not None for one, way in below if way)


def _scales(graph: Graph, node: Node) -> bool:
    """Whether a node multiplies one value by constants."""
    return node.op in ("mul", "div") and sum(not weights(graph, parent.id) for parent in node.parents) == 1
