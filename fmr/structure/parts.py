"""The parts of a model as values: attention, memories, residual stream and layers, each with its sites."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fmr.errors import StructureError
from fmr.graph import Graph
from fmr.ids import Site, TensorId
from fmr.run import Pass, Run
from fmr.structure.attention import Attention, Rejected
from fmr.structure.certify import Certificate, certify_attention, certify_memory
from fmr.structure.memory import Memory
from fmr.structure.residual import Stream, Write


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
    (None where z is used as it is). `kind` is "self" or "cross"; `certified` is None when found from a graph alone.
    """

    found: Attention
    graph: Graph = field(repr=False)
    certified: Certificate | None = None

    q = property(lambda self: self._site("q"), doc="Queries, (examples, heads, positions, units).")
    k = property(lambda self: self._site("k"), doc="Keys, as the product reads them, not transposed.")
    v = property(lambda self: self._site("v"), doc="Values, as the product reads them.")
    scores = property(lambda self: self._site("scores"), doc="What enters the softmax: scaled, biased, masked.")
    pattern = property(lambda self: self._site("pattern"), doc="(examples, heads, queries, keys), before dropout.")
    z = property(lambda self: self._site("z"), doc="What each head mixes from its values.")
    n_heads = property(lambda self: self.found.n_heads, doc="Query heads.")
    n_kv_heads = property(lambda self: self.found.n_kv_heads, doc="Key-value heads; fewer where queries share them.")
    head_dim = property(lambda self: self.found.head_dim, doc="Units of a query or key head.")
    kind = property(lambda self: self.found.kind, doc='"self" or "cross".')
    scope = property(lambda self: self.found.scope, doc="The module call that holds it.")

    @property
    def out(self) -> Site | None:
        """The output of the projection that mixes the heads; None where z is used as it is."""
        return None if self.found.out is None else Site(self.found.out)

    def head(self, index: int) -> Head:
        """The sites of one head."""
        if not 0 <= index < self.n_heads:
            raise StructureError(f"Head {index} of {self.scope!r}: expected 0 to {self.n_heads - 1}.")
        return Head(*(self._site(role, index) for role in Head._fields))

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute pattern, z and output from their parts in another run of the same code and report the errors."""
        return certify_attention(self.graph, self.found, run.__getitem__)

    def _site(self, role: str, head: int | None = None) -> Site:
        name = getattr(self.found, role)
        axis, size = self.found.axes[Head._fields.index(role)], len(self.graph[name].shape)
        names = ["examples", *("heads" if n == axis else f"axis {n}" for n in range(1, size - 2)), "positions", "units"]
        if axis is not None and axis >= size - 2:
            names = ["examples", *("heads" if n == axis else "positions" for n in range(1, size - 1)), "units"]
        if head is not None and axis is None:
            raise StructureError(
                f"{name} folds its heads into the batch: no dimension of {list(self.graph[name].shape)} is theirs."
            )
        return Site(name, heads=head, layout=tuple(names[-size:]))

    def __repr__(self) -> str:
        groups = f" ({self.n_kv_heads} key-value)" if self.n_kv_heads != self.n_heads else ""
        return (
            f"{self.scope or 'root'}  {self.kind}  {self.n_heads} heads of {self.head_dim}{groups}  {_proof(self.certified)}"
        )


@dataclass(frozen=True)
class MemoryBlock:
    """One feed-forward memory (Geva et al. 2021): `post` are the coefficients, memory i a key and a value vector.

    >>> key, value = structure.mlps[2].memory(7)

    `pre` enters the nonlinearity, `post` is read by the second projection, `out` is its output. `w_in`, `w_gate` (None
    where nothing gates) and `w_out` name the parameters; `n` counts the memories.
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
        return self.graph[self.found.post].shape[-1]

    def memory(self, index: int) -> tuple[Tensor, Tensor]:
        """The key vector and the value vector of one memory, as slices of the parameters."""
        if not 0 <= index < self.n:
            raise StructureError(f"Memory {index} of {self.scope!r}: expected 0 to {self.n - 1}.")
        if not self.weights:
            raise StructureError(f"{self.scope!r} was found in a graph alone, which holds no weights. Use fmr.locate(run).")
        keys, values = self.weights[self.w_in], self.weights[self.w_out]
        if keys.dim() != 2 or values.dim() != 2:
            raise StructureError(f"{self.scope!r} holds its weights as {tuple(keys.shape)}: one matrix per expert, not one.")
        key = keys[index] if self.found.in_rows else keys[:, index]
        return key, values[:, index] if self.found.out_columns else values[index]

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute coefficients and output in another run of the same code and report the errors."""
        return certify_memory(self.graph, self.found, run.__getitem__)

    def __repr__(self) -> str:
        gate = " gated" if self.w_gate is not None or self.found.fused_gate else ""
        return f"{self.scope or 'root'}  {self.n}{gate} memories  {_proof(self.certified)}"


@dataclass(frozen=True)
class Residual:
    """A residual stream: its values in order, each write, and who wrote it."""

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

    def __repr__(self) -> str:
        return f"{len(self.writes)} writes from {self.points[0]} to {self.points[-1]}"


@dataclass(frozen=True)
class Layer:
    """One layer of a residual stream: its attentions and memories, and the stream before, between and after them.

    `resid_mid` is None where attention and memory write at once or one of them is missing.
    """

    attentions: tuple[AttentionBlock, ...]
    mlps: tuple[MemoryBlock, ...]
    resid_pre: Site
    resid_mid: Site | None
    resid_post: Site

    @property
    def attention(self) -> AttentionBlock | None:
        """The first attention of the layer, self-attention where it has both kinds."""
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
        if not self.streams:
            raise StructureError(f"{self.model} has no residual stream: no value is added to what was computed from it.")
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
        for stream in self.streams:
            for name in stream.points:
                found.setdefault(name, "resid")
        return found

    def __repr__(self) -> str:
        counts = f"{len(self.layers)} layers, {len(self.attention)} attentions, {len(self.mlps)} memories"
        lines = [f"Structure of {self.model}: {counts}, {len(self.rejected)} candidates rejected"]
        lines += [f"  embedding     {self.embedding.id}"] if self.embedding else []
        lines += [f"  attention[{n}]  {block!r}" for n, block in enumerate(self.attention)]
        lines += [f"  mlps[{n}]       {block!r}" for n, block in enumerate(self.mlps)]
        lines += [f"  residual      {stream!r}" for stream in self.streams]
        lines += [f"  final norm    {self.final_norm.id}"] if self.final_norm else []
        lines += [f"  unembedding   {self.unembedding.id}"] if self.unembedding else []
        lines += [f"  rejected      {one!r}" for one in self.rejected[:8]]
        lines += [f"  rejected      ... and {len(self.rejected) - 8} more"] if len(self.rejected) > 8 else []
        return "\n".join(lines)


def _proof(certificate: Certificate | None) -> str:
    return "not computed" if certificate is None else repr(certificate)
