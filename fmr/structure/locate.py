"""`fmr.locate`: run the matchers over a graph, certify what they find, and put the parts together."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from fmr.errors import RandomError, StructureError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.ops.fused import is_fused
from fmr.runs.run import Pass, Run
from fmr.structure.attention.additive import additive
from fmr.structure.attention.deformable import deformable
from fmr.structure.attention.dot_product import Attention, Rejected, dot_product, undivided
from fmr.structure.attention.softmax import softmaxes
from fmr.structure.ends import _embedding, _unembedding
from fmr.structure.layers import find_layers
from fmr.structure.memories.memory import find_memories, only_weighs
from fmr.structure.normal.match import is_random
from fmr.structure.parts import AttentionBlock, MemoryBlock, Residual, Structure
from fmr.structure.proof.certify import Certificate, certify_attention, certify_memory, certify_stream
from fmr.structure.proof.evaluate import Values
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
