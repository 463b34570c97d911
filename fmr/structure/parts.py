"""The parts of a model as values: attention, memories, residual stream and layers, each with its sites."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fmr.errors import IdError, StructureError, TrackError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.pictures.heatmap import LARGE, SMALL, Labels, Tokens, chosen, draw, of_heads
from fmr.runs.run import Pass, Run
from fmr.structure.attention.dot_product import Attention, Rejected
from fmr.structure.listing import as_html, as_lines, proof
from fmr.structure.memories.memory import Memory
from fmr.structure.memories.vectors import count, vectors
from fmr.structure.proof.certify import Certificate, certify_attention, certify_memory, certify_stream
from fmr.structure.streams.chain import Write
from fmr.structure.streams.residual import Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Head(NamedTuple):
    """The sites of one attention head."""

    q: Site
    k: Site
    v: Site
    scores: Site
    pattern: Site
    z: Site


@dataclass(frozen=True)
class AttentionBlock:
    """One attention of a model: the sites of its values, the shape of its heads and its certificate.

    >>> run[structure.attention[3].pattern].shape  # (examples, heads, queries, keys)
    torch.Size([2, 12, 32, 32])

    `q`, `k`, `v` are the operands as the products read them (keys and values already repeated for grouped queries);
    `scores` enter the softmax, `pattern` acts on the values, `z` is what the heads mix, `out` the projection's output
    (None where z is used as it is). `kind` is "self", "cross", "additive" or "deformable"; `certified` is None when found
    from a graph alone. `index` is its place in `structure.attention`.
    """

    found: Attention
    graph: Graph = field(repr=False)
    certified: Certificate | None = None
    index: int | None = None

    q = property(lambda self: self._site("q"), doc="Queries, (examples, heads, positions, units).")
    k = property(lambda self: self._site("k"), doc="Keys, as the product reads them, not transposed.")
    v = property(lambda self: self._site("v"), doc="Values, as the product reads them.")
    scores = property(lambda self: self._site("scores"), doc="What enters the softmax: scaled, biased, masked.")
    pattern = property(lambda self: self._site("pattern"), doc="(examples, heads, queries, keys), before dropout.")
    z = property(lambda self: self._site("z"), doc="What each head mixes from its values.")
    n_heads = property(lambda self: self.found.n_heads, doc="Query heads.")
    n_kv_heads = property(lambda self: self.found.n_kv_heads, doc="Key-value heads; fewer where queries share them.")
    head_dim = property(lambda self: self.found.head_dim, doc="Units of a query head: what a score sums over.")
    kind = property(lambda self: self.found.kind, doc='"self", "cross", "additive" or "deformable".')
    scope = property(lambda self: self.found.scope, doc="The module call that holds it.")

    @property
    def out(self) -> Site | None:
        """The output of the projection that mixes the heads; None where z is used as it is."""
        return None if self.found.out is None else Site(self.found.out)

    def head(self, index: int) -> Head:
        """The sites of one head.

        >>> run[structure.attention[3].head(5).pattern].shape  # (examples, queries, keys)
        torch.Size([2, 32, 32])

        Where heads lie in the batch no dimension is theirs, and a number that is not there is none of 0 to n_heads - 1: both
        are a `StructureError`.
        """
        if not 0 <= index < self.n_heads:
            raise StructureError(f"Head {index} of {self.scope!r}: expected 0 to {self.n_heads - 1}.")
        return Head(*(self._site(role, index) for role in Head._fields))

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute pattern, z and output from their parts in another run of the same code and report the errors.

        >>> structure.attention[3].check(fmr.run(model, **other))
        certified: pattern 1e-07, rows 3e-08, z 1e-07, out 3e-07 (tolerance 1e-04)

        run: one that kept every value (keep="all"); of others an `IdError` names what is missing.
        """
        return certify_attention(_graph_of(run, self.graph), self.found, run.__getitem__)

    def plot(
        self,
        run: Run | Pass,
        tokens: Tokens = None,
        heads: int | Sequence[int] | None = None,
        example: int = 0,
    ) -> "Figure":
        """Draw a heat map per head as one matplotlib Figure: queries down, keys across, all on one scale from 0 to 1.

        >>> tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
        >>> structure.attention[3].plot(run, tokens).savefig("heads.png")

        run: one that kept the pattern; `fmr.run(model, keep=[structure.attention[3].pattern], **inputs)` is enough.
        tokens: one per position, or a tuple (queries, keys) where those differ; None draws positions. heads: which ones,
        in larger panels with every token named; None draws all. example: which one of the batch; windows of a windowed
        attention count as examples. A wrong number of tokens is a `DrawError`, a head or an example that is not there a
        `StructureError`, a run without the values an `IdError`; matplotlib comes with `pip install 'fmr[analysis]'`.
        """
        maps = of_heads(self._pattern(run), self._layout("pattern"), self.n_heads, example)
        numbers = chosen(heads, self.n_heads)
        labels = Labels.of(tokens, *maps.shape[-2:])
        number = "" if self.index is None else f"[{self.index}]"
        note = f"{self.kind}-attention, {self.n_heads} heads of {self.head_dim}, example {example}"
        sizes = SMALL if heads is None else LARGE
        return draw(maps[numbers], numbers, labels, f"attention{number}  {self.scope or 'root'}", note, sizes)

    def _pattern(self, run: Run | Pass) -> Tensor:
        try:
            pattern: Tensor = run[self.pattern]
            return pattern
        except IdError as error:
            raise IdError(f"{error} Expected a run that kept it: fmr.run(model, *inputs, keep=[block.pattern]).") from None

    def _site(self, role: str, head: int | None = None) -> Site:
        name = getattr(self.found, role)
        layout = self._layout(role)
        axis = layout.index("heads") if "heads" in layout else None
        if role in ("k", "v") and (self.n_kv_heads == 1 if axis is None else self.graph[name].shape[axis] == 1):
            head = None  # all heads share it
        if head is not None and axis is None:
            raise StructureError(
                f"{name} folds its heads into the batch: no dimension of {list(self.graph[name].shape)} is theirs."
            )
        return Site(name, heads=head, layout=layout)

    def _layout(self, role: str) -> tuple[str, ...]:
        """What each dimension of a value counts."""
        rank = len(self.graph[getattr(self.found, role)].shape)
        usual = ("examples", *(f"axis {n}" for n in range(1, rank - 2)), "positions", "units")
        return self.found.layouts[Head._fields.index(role)] or usual[-rank:]

    @property
    def size(self) -> str:
        """Heads and their size in words."""
        groups = f" ({self.n_kv_heads} key-value)" if self.n_kv_heads != self.n_heads else ""
        return f"{self.n_heads} heads of {self.head_dim}{groups}"

    def __repr__(self) -> str:
        return f"{self.scope or 'root'}  {self.kind}  {self.size}  {proof(self.certified)}"


@dataclass(frozen=True)
class MemoryBlock:
    """One feed-forward memory (Geva et al. 2021): `post` are the coefficients, memory i a key and a value vector.

    >>> key, value = structure.mlps[2].memory(7)

    `pre` enters the nonlinearity, `post` is read by the second projection, `out` is its output. `w_in`, `w_gate` (None
    where nothing gates) and `w_out` name the parameters, or the weight where one is the product of several; `n` counts
    the memories.
    """

    found: Memory
    graph: Graph = field(repr=False)
    weights: Mapping[TensorId, Tensor] = field(repr=False, default_factory=dict)
    certified: Certificate | None = None

    pre = property(lambda self: Site(self.found.pre), doc="What enters the nonlinearity, (examples, positions, memories).")
    post = property(lambda self: Site(self.found.post), doc="The memory coefficients, (examples, positions, memories).")
    out = property(lambda self: Site(self.found.out), doc="The output of the second projection.")
    w_in = property(lambda self: self.found.w_in, doc="The parameter that holds the keys.")
    w_gate = property(lambda self: self.found.w_gate, doc="The parameter of the gate; None where nothing gates.")
    w_out = property(lambda self: self.found.w_out, doc="The parameter that holds the values.")
    scope = property(lambda self: self.found.scope, doc="The module call that holds it.")

    @property
    def n(self) -> int:
        """How many memories it holds."""
        return count(self.graph, self.found)

    def memory(self, index: int, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """The key vector and the value vector of one memory, as slices of the parameters, each as wide as the stream.

        >>> key, value = structure.mlps[2].memory(7)

        expert: which one, where one parameter holds a matrix for each of several. A memory or an expert that is not there,
        and weights of which no row or column is that of one memory, are a `StructureError`.
        """
        if not 0 <= index < self.n:
            raise StructureError(f"Memory {index} of {self.scope!r}: expected 0 to {self.n - 1}.")
        if not self.weights:
            raise StructureError(f"{self.scope!r} was found in a graph alone, which holds no weights. Use fmr.locate(run).")
        return vectors(self.graph, self.found, self.weights, index, expert)

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute coefficients and output in another run of the same code and report the errors."""
        return certify_memory(_graph_of(run, self.graph), self.found, run.__getitem__)

    @property
    def size(self) -> str:
        """How many memories it holds, in words."""
        return f"{self.n}{' gated' if self.w_gate is not None or self.found.fused_gate else ''} memories"

    def __repr__(self) -> str:
        return f"{self.scope or 'root'}  {self.size}  {proof(self.certified)}"


@dataclass(frozen=True)
class Residual:
    """A residual stream: its values in order, each write, and who wrote it; a plain stack of layers has no writes.

    The points of a stack are the values that each of its layers reads: no data goes past any of them.
    """

    stream: Stream
    writers: tuple[tuple[TensorId, ...], ...]
    readers: tuple[tuple[TensorId, ...], ...]

    @property
    def points(self) -> tuple[TensorId, ...]:
        """The values that the stream takes, from the embedding to the final norm."""
        return self.stream.points

    @property
    def writes(self) -> tuple[Write, ...]:
        """Each add: the value before it, what is added, the sum."""
        return self.stream.writes

    def check(self, run: Run | Pass) -> Certificate:
        """Compare each write with the difference that it makes in another run of the same code."""
        return certify_stream(self.stream, run.__getitem__)

    def __repr__(self) -> str:
        if not self.writes:
            return f"no writes, a plain stack of {len(self.points)} states from {self.points[0]} to {self.points[-1]}"
        return f"{len(self.writes)} writes from {self.points[0]} to {self.points[-1]}"


@dataclass(frozen=True)
class Layer:
    """One layer of a residual stream: its attentions and memories, and the stream before, between and after them.

    It is what one call of an entry of a list of modules writes to the stream; `fmr.structure.layers` says what is one where
    no list tells. `resid_mid` is None where attention and memory write at once or one of them is missing.
    """

    attentions: tuple[AttentionBlock, ...]
    mlps: tuple[MemoryBlock, ...]
    resid_pre: Site
    resid_mid: Site | None
    resid_post: Site

    @property
    def attention(self) -> AttentionBlock | None:
        """The first attention of the layer; where it has two kinds that is self-attention, as a rule."""
        return self.attentions[0] if self.attentions else None

    @property
    def mlp(self) -> MemoryBlock | None:
        """The last memory of the layer."""
        return self.mlps[-1] if self.mlps else None

    def __repr__(self) -> str:
        parts = [f"{a.kind} attention, {a.n_heads} heads of {a.head_dim}" for a in self.attentions]
        parts += [f"{m.n} memories" for m in self.mlps]
        return " | ".join(parts) or "no attention, no memories"


@dataclass(frozen=True)
class Structure:
    """The parts of a model that its graph shows, in execution order; `rejected` says why a candidate is not among them.

    `streams` are the plain stacks of layers, which have no writes, and then the residual streams.

    >>> structure.layers[3].attention.pattern
    Site('h.3.attn/softmax#0')
    """

    model: str
    attention: tuple[AttentionBlock, ...]
    mlps: tuple[MemoryBlock, ...]
    streams: tuple[Residual, ...]
    layers: tuple[Layer, ...]
    embedding: Site | None
    unembedding: Site | None
    final_norm: Site | None
    rejected: tuple[Rejected, ...]

    @property
    def residual(self) -> Residual:
        """The residual stream that ends last: the only one of most models, the decoder's of an encoder-decoder."""
        if not self.streams or not self.streams[-1].writes:
            raise StructureError(
                f"{self.model} has no residual stream: no value is added to what was computed from it. "
                "Expected a model with such adds; its plain stacks of layers are in structure.streams."
            )
        return self.streams[-1]

    @property
    def roles(self) -> dict[TensorId, str]:
        """The role of each value that has one: q, k, v, scores, pattern, z, out, pre, post, resid."""
        found: dict[TensorId, str] = {}
        for block in self.attention:
            for role in ("q", "k", "v", "scores", "pattern", "z", "out"):
                name = getattr(block.found, role)
                if name is not None:
                    found.setdefault(name, role)
        for memory in self.mlps:
            for role in ("pre", "post", "out"):
                found.setdefault(getattr(memory.found, role), role)
        for name in (point for stream in self.streams if stream.writes for point in stream.points):
            found.setdefault(name, "resid")
        return found

    @property
    def notes(self) -> dict[str, str]:
        """What pictures say of module calls, by path: heads and memories with their sizes."""
        found: dict[str, dict[str, None]] = {}
        parts: tuple[AttentionBlock | MemoryBlock, ...] = (*self.attention, *self.mlps)
        for part in parts:
            found.setdefault(part.scope, {})[part.size] = None
        return {scope: ", ".join(sizes) for scope, sizes in found.items()}

    def __repr__(self) -> str:
        return "\n".join(as_lines(self))

    def _repr_html_(self) -> str:
        return as_html(self)


def _graph_of(run: Run | Pass, graph: Graph) -> Graph:
    """The graph to recompute a run in: its own, whose shapes are those of its values, where it recorded one."""
    try:
        return run.graph.unfused
    except TrackError:
        return graph
