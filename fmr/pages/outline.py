"""What a page shows of a structure before any value: layers with their parts, and which stream each belongs to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fmr.errors import StructureError
from fmr.ids import Site, TensorId
from fmr.pages.arrays import Json
from fmr.structure.ends import _embedding
from fmr.structure.layer import Layer
from fmr.structure.normal.match import depends_on
from fmr.structure.parts import Attention, Memory, Mixer, Stream, Structure, Write
from fmr.structure.proof.certificate import proof


@dataclass(frozen=True)
class Row:
    """One layer as the page counts them: its name, the stream that it writes to, and the places of its parts in the
    structure; what is in no layer is a row without one."""

    name: str
    layer: Layer | None
    stream: int | None
    attentions: tuple[int, ...] = ()
    mlps: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """What is in it, in words."""
        return repr(self.layer) if self.layer is not None else "in no layer"


@dataclass(frozen=True)
class Outline:
    """The layers of a structure in order, and its residual streams."""

    structure: Structure
    streams: tuple[Stream, ...]
    rows: tuple[Row, ...]

    def stream_of(self, attention: int) -> int | None:
        """Which stream the queries of an attention come from."""
        return next((row.stream for row in self.rows if attention in row.attentions), None)

    def keys_of(self, attention: int) -> int | None:
        """Which stream the keys of an attention come from: its own, or of a cross-attention the last one before it."""
        found, own = self.structure.attention[attention], self.stream_of(attention)
        if found.kind != "cross":
            return own
        graph, others = self.structure.graph, (n for n in reversed(range(len(self.streams))) if n != own)
        return next((n for n in others if depends_on(graph, found.k.id, self.streams[n].points[-1])), None)

    def tokens_of(self, stream: int) -> TensorId | None:
        """The token IDs that a stream begins with."""
        sums = frozenset(write.after for one in self.streams for write in one.writes)
        site = _embedding(self.structure.graph, self.streams[stream], sums) if self.streams else self.structure.embedding
        index = self.structure.graph[site.id].parent("input", 0) if site is not None else None
        return index.id if index is not None else None

    def told(self) -> Json:
        """The outline in plain types."""
        one = self.structure
        return {
            "model": one.model,
            "summary": repr(one).partition("\n")[0],
            "unproven": one.unproven,
            "layers": [
                {"name": row.name, "kind": row.kind, "stream": row.stream, "attentions": row.attentions, "mlps": row.mlps}
                for row in self.rows
            ],
            "attentions": [
                {
                    **_part(found),
                    "kind": found.kind,
                    "heads": found.n_heads,
                    "own": self.stream_of(n),
                    "keys": self.keys_of(n),
                }
                for n, found in enumerate(one.attention)
            ],
            "mlps": [_part(found) for found in one.mlps],
            "mixers": [_part(found) for found in one.mixers],
            "streams": [f"{stream!r}: {proof(stream.certified)}" for stream in one.streams],
            "rejected": [repr(reason) for reason in one.rejected],
        }


def outline_of(structure: Structure) -> Outline:
    """The layers of a structure as rows of a page; a structure without any part that has a value to show is refused."""
    if not structure.layers and not structure.attention and not structure.mlps:
        raise StructureError(
            f"{structure.model} has no attention, no memory and no layer that a page could show. Expected a structure with "
            "some; run.graph.save_svg draws any model."
        )
    streams = tuple(stream for stream in structure.streams if stream.writes)
    rows = [_row(structure, streams, n) for n in range(len(structure.layers))]
    placed = {n for row in rows for n in row.attentions}, {n for row in rows for n in row.mlps}
    counts = len(structure.attention), len(structure.mlps)
    rest = [tuple(n for n in range(count) if n not in known) for count, known in zip(counts, placed, strict=True)]
    if any(rest):
        rows.append(Row("apart", None, None if streams else 0, rest[0], rest[1]))
    return Outline(structure, streams, tuple(rows))


def _row(structure: Structure, streams: tuple[Stream, ...], n: int) -> Row:
    layer = structure.layers[n]
    stream = next((k for k, one in enumerate(streams) if layer.resid_pre.id in one.points), None)
    attentions = _places(structure.attention, layer.attentions)
    return Row(str(n), layer, stream, attentions, _places(structure.mlps, layer.mlps))


def _places(every: Sequence[Attention | Memory], some: Sequence[Attention | Memory]) -> tuple[int, ...]:
    """Where parts of a layer stand among all parts; they are other objects there, and known by what they make."""
    known = {_made(part): n for n, part in enumerate(every)}
    return tuple(known[_made(part)] for part in some if _made(part) in known)


def _made(part: Attention | Memory) -> TensorId:
    return part.pattern.id if isinstance(part, Attention) else part.post.id


def _part(part: Attention | Memory | Mixer) -> Json:
    return {"scope": part.scope or "root", "size": part.size, "proof": proof(part.certified)}


@dataclass(frozen=True)
class Written:
    """One write of a layer: the value that is added, how often, and the kinds of parts that make it."""

    site: Site
    times: float
    kinds: tuple[str, ...]


def writes_of(outline: Outline, row: Row) -> Iterator[Written]:
    """What a layer adds to its stream, in order, with what makes it; a part counts for the first write made of it."""
    layer, graph = row.layer, outline.structure.graph
    if layer is None or row.stream is None:
        return
    left: list[tuple[str, TensorId]] = [("attention", (one.out or one.z).id) for one in layer.attentions]
    left += [("mixer", one.output.id) for one in layer.mixers] + [("memory", one.out.id) for one in layer.mlps]
    for write in _between(outline, row):
        made = [(kind, out) for kind, out in left if write.added == out or depends_on(graph, write.added, out)]
        left = [one for one in left if one not in made]
        site = Site(write.added, layout=layer.resid_post.layout)
        yield Written(site, write.times, tuple(dict.fromkeys(kind for kind, _ in made)))


def _between(outline: Outline, row: Row) -> Iterator[Write]:
    """The writes of a layer."""
    assert row.layer is not None
    assert row.stream is not None
    graph = outline.structure.graph
    first, last = graph.place(row.layer.resid_pre.id), graph.place(row.layer.resid_post.id)
    for write in outline.streams[row.stream].writes:
        if first < graph.place(write.after) <= last:
            yield write
