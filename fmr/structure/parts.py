"""The parts of a model as values: attention, memories, residual stream and layers, each with its sites."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from fmr.errors import StructureError, number_of
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Key
from fmr.pictures.notebook import table
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.align import Prints, align
from fmr.structure.attention.attention import Attention, Head
from fmr.structure.explain import Explainer, Explanation
from fmr.structure.frozen import Frozen
from fmr.structure.layer import Layer
from fmr.structure.logits import Readout
from fmr.structure.memories.memory import Memory
from fmr.structure.memories.router import Router
from fmr.structure.mixers.mixer import Mixer
from fmr.structure.proof.certificate import Certificate, Rejected, proof
from fmr.structure.proof.evaluate import check_run
from fmr.structure.streams.stream import Stream, Write

__all__ = [
    "Attention",
    "Certificate",
    "Head",
    "Layer",
    "Memory",
    "Mixer",
    "Rejected",
    "Router",
    "Stream",
    "Structure",
    "Write",
]


_ROLES: dict[type, str] = {Attention: "q k v scores pattern z out", Memory: "pre post out"}
"""The sites of a part that roles are named after."""

_FOLD, _STACKS, _REASONS = 12, 4, 8
"""How many blocks of one size are printed one by one, how many plain stacks, the longest, and how many reasons."""


@dataclass(frozen=True)
class Structure:
    """The parts of a model that its graph shows, in execution order; `rejected` says why a candidate is not among them,
    `unproven` why nothing is certified though there was a run.

    `streams` are the plain stacks of layers, which have no writes, and then the residual streams.

    >>> structure.layers[3].attention.pattern
    Site('transformer.h.3.attn/to#0')
    """

    model: str
    attention: tuple[Attention, ...]
    mlps: tuple[Memory, ...]
    mixers: tuple[Mixer, ...]
    routers: tuple[Router, ...]
    streams: tuple[Stream, ...]
    layers: tuple[Layer, ...]
    embedding: Site | None
    unembedding: Site | None
    final_norm: Site | None
    rejected: tuple[Rejected, ...]
    graph: Graph = field(repr=False)
    prints: Prints = field(repr=False)
    unproven: str = ""
    readout: Readout | str = field(default="", repr=False)

    @property
    def residual(self) -> Stream:
        """The residual stream that ends last: the only one of most models, the decoder's of an encoder-decoder."""
        if not self.streams or not self.streams[-1].writes:
            raise StructureError(
                f"{self.model} has no residual stream: no value is added to what was computed from it. "
                "Expected a model with such adds; its plain stacks of layers are in structure.streams."
            )
        return self.streams[-1]

    def read_out(self, run: Run | Pass | Tensor, site: Key | None = None) -> Tensor:
        """The logits of any point of the residual stream: through the model's own final norm, unembedding, scales and caps.

        >>> structure.read_out(run, structure.layers[2].resid_post).argmax(-1)
        >>> structure.read_out(structure.mlps[2].memory(7)[1]).topk(5)

        run: one that kept the point; `fmr.run(model, keep=[site], **inputs)` is enough. site: a point of the stream, or any
        value of its shape; a site with positions or examples gives the logits of these. In place of both, bare vectors
        (..., width) give logits (..., vocabulary) with the weights of the run where the structure was located; gradients go
        through. All is computed in the dtype of the model. One without logits, or whose norms stand on the stream itself
        (post-norm encoders), is a `StructureError`.
        """
        if isinstance(run, Tensor) and site is None:
            return self._readout().of_vectors(run)
        readout = self._readout()
        check_run(run)
        if site is None:
            raise StructureError(
                "read_out got a run and no site. Expected read_out(run, structure.layers[0].resid_post), or bare vectors."
            )
        assert isinstance(run, (Run, Pass))
        return readout.of(run, site)

    def frozen(self, vectors: Tensor) -> Frozen:
        """The logits of vectors (..., width) as a sum over what these are made of, the scale of the final norm held.

        >>> logits = structure.frozen(run[structure.layers[-1].resid_post][:, -1])
        >>> weights = torch.nn.functional.one_hot(logits.value.argmax(-1), logits.value.shape[-1])
        >>> (direction,) = logits.back(weights).values()  # what each number of the stream adds to the largest logit

        `value` (..., vocabulary) in float64 is affine in the vectors, `rest` what it is without them. A soft cap of the
        logits comes after it; where more than a norm and projections lead to the logits, it is a `StructureError`.
        """
        return self._readout().frozen(vectors)

    def _readout(self) -> Readout:
        if isinstance(self.readout, str):
            raise StructureError(
                f"Nothing can be read out of {self.model}: {self.readout}. Expected pre-norm layers and logits."
            )
        return self.readout

    align = align

    def explain(self, key: Key) -> Explanation:
        """What a value is to the matchers: its roles in findings with their proof, or which matcher stopped where, and why.

        >>> structure.explain("transformer.h.3.ln_1/layer_norm#0")
        transformer.h.3.ln_1/layer_norm#0 is a norm of transformer.h.2/add#1 ...

        key: an ID, inside a fused op too, a node, a site, or the path of a module for what its call returned. One that the
        graph does not have is an `IdError`, which names those that are spelled alike.
        """
        kinds = ("attention", "mlps", "mixers", "routers", "streams", "layers")
        parts = {f"structure.{kind}[{n}]": one for kind in kinds for n, one in enumerate(getattr(self, kind))}
        ends = {"embedding": self.embedding, "unembedding": self.unembedding, "final norm": self.final_norm}
        proofless = self.unproven or "it was located in a graph alone, without values"
        return Explainer(self.graph, parts, ends, self.rejected, proofless).of(self.graph[key])

    @property
    def roles(self) -> dict[TensorId, str]:
        """What values are: q, k, v, scores, pattern, z, out, pre, post, in, gate, state, router or resid."""
        parts: tuple[Attention | Memory, ...] = (*self.attention, *self.mlps)
        told = [(getattr(part, role, None), role) for part in parts for role in _ROLES[type(part)].split()]
        for mixer in self.mixers:
            told += [(one, "gate") for one in mixer.gates] + [(one, "in") for one in mixer.inputs]
            told += [(Site(one), "state") for one in mixer.states] + [(mixer.output, "out")]
        told += [(site, "router") for router in self.routers for site in (router.logits, router.weights)]
        told += [(Site(point), "resid") for stream in self.streams if stream.writes for point in stream.points]
        found: dict[TensorId, str] = {}
        for site, role in told:
            if site is not None:
                found.setdefault(site.id, role)
        return found

    @property
    def notes(self) -> dict[str, str]:
        """What pictures say of module calls, by path: heads, memories and mixers with their sizes."""
        found: dict[str, dict[str, None]] = {}
        parts: tuple[Attention | Memory | Mixer, ...] = (*self.attention, *self.mlps, *self.mixers)
        for part in parts:
            found.setdefault(part.scope, {})[part.size] = None
        return {scope: ", ".join(sizes) for scope, sizes in found.items()}

    def __repr__(self) -> str:
        return "\n".join(_as_lines(self))

    def _repr_html_(self) -> str:
        return _as_html(self)


def _as_lines(structure: Structure) -> Iterator[str]:
    """A structure on about one screen."""
    yield _headline(structure)
    yield from [f"  not certified {structure.unproven}"] if structure.unproven else []
    yield from [f"  embedding     {structure.embedding.id}"] if structure.embedding else []
    for name in ("attention", "mlps", "mixers", "routers"):
        yield from (f"  {name}{row}" for row in _rows(getattr(structure, name)))
    yield from _stream_rows(structure.streams)
    yield from [f"  final norm    {structure.final_norm.id}"] if structure.final_norm else []
    yield from [f"  unembedding   {structure.unembedding.id}"] if structure.unembedding else []
    yield from (f"  rejected      {row}" for row in _reasons(structure))


def _as_html(structure: Structure) -> str:
    """A structure as a table: a row for each part, layer by layer, and what is in none at the end."""
    every: tuple[Attention | Memory | Mixer, ...] = (*structure.attention, *structure.mixers, *structure.mlps)
    groups: list[tuple[str, tuple[Attention | Memory | Mixer, ...]]]
    groups = [(f"layers[{n}]", (*layer.attentions, *layer.mixers, *layer.mlps)) for n, layer in enumerate(structure.layers)]
    placed = {id(part) for _, parts in groups for part in parts}
    groups += [("", (part,)) for part in every if id(part) not in placed]
    named = [("" if n else name, part) for name, parts in groups for n, part in enumerate(parts)]
    rows = [(name, part.scope, part.size, _short(part.certified)) for name, part in named]
    reasons = "\n".join(f"rejected: {row}" for row in _reasons(structure))
    return table(_headline(structure), ("layer", "where", "what", "certificate"), rows, reasons)


def _short(certificate: Certificate | None) -> str:
    """A certificate in few words: the largest of its errors."""
    if certificate is None:
        return "not computed"
    return f"{'certified' if certificate else 'NOT certified'}, error {max(certificate.errors.values()):.0e}"


def _headline(structure: Structure) -> str:
    parts = (
        f"{number_of(len(structure.layers), 'layer')}, {number_of(len(structure.attention), 'attention')}, "
        f"{number_of(len(structure.mlps), 'memory', 'memories')}"
    )
    parts += f", {number_of(len(structure.mixers), 'mixer')}" if structure.mixers else ""
    return f"Structure of {structure.model}: {parts}, {len(structure.rejected)} rejected"


def _reasons(structure: Structure) -> list[str]:
    more = len(structure.rejected) - _REASONS
    return [*map(repr, structure.rejected[:_REASONS]), *([f"... and {more} more"] if more > 0 else [])]


def _rows(blocks: Sequence[Attention | Memory | Mixer | Router]) -> Iterator[str]:
    """A row for each block; where many of one size follow one another, one for all of them with their worst errors."""
    start = 0
    for _, group in groupby(blocks, key=lambda block: (block.size, getattr(block, "kind", ""), block.certified is None)):
        alike = list(group)
        if len(alike) <= _FOLD:
            yield from (f"[{start + n}]  {block!r}" for n, block in enumerate(alike))
        else:
            names = f"{alike[0].scope} ... {alike[-1].scope}"
            kind = f"{getattr(alike[0], 'kind', '')}  ".lstrip()
            worst = proof(_worst([block.certified for block in alike if block.certified is not None]))
            yield f"[{start}..{start + len(alike) - 1}]  {names}  {kind}{alike[0].size}  {worst}"
        start += len(alike)


def _worst(proofs: Sequence[Certificate]) -> Certificate | None:
    """The largest of each error."""
    if not proofs:
        return None
    names = dict.fromkeys(name for proof in proofs for name in proof.errors)
    return Certificate({name: max(p.errors.get(name, 0.0) for p in proofs) for name in names}, proofs[0].tolerance)


def _stream_rows(streams: Sequence[Stream]) -> Iterator[str]:
    """A row for each stream and for the longest of the plain stacks."""
    stacks = sorted((one for one in streams if not one.writes), key=lambda one: -len(one.points))
    short = stacks[_STACKS:]
    yield from (f"  stack         {one!r}" for one in streams if not one.writes and one not in short)
    yield from [f"  stack         ... and {len(short)} shorter ones"] if short else []
    yield from (f"  residual      {one!r}" for one in streams if one.writes)
