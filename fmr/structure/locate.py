"""What `fmr.locate` finds: attention by layer, each with its sites, its certificate, and what was not certified."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fmr.errors import StructureError
from fmr.graph import Graph
from fmr.ids import Site, TensorId
from fmr.run import Pass, Run
from fmr.structure.attention import Attention, Rejected, find_attention
from fmr.structure.certify import Certificate, certify_attention
from fmr.structure.match import is_random

_AXES = ("examples", "heads", "positions", "units")


@dataclass(frozen=True)
class AttentionBlock:
    """One attention of a model: the sites of its values, the shape of its heads and its certificate.

    >>> run[structure.attention[3].pattern].shape  # (examples, heads, queries, keys)
    torch.Size([2, 12, 32, 32])

    `q`, `k`, `v` are the operands as the product reads them (keys and values already repeated for grouped queries);
    `scores` enter the softmax, `pattern` acts on the values, `z` is what the heads mix, `out` the projection's output
    (None where z is used as it is). `kind` is "self" or "cross"; `certified` is None when found from a graph alone.
    """

    found: Attention
    graph: Graph = field(repr=False)
    certified: Certificate | None = None

    @property
    def q(self) -> Site:
        return self._site(self.found.q)

    @property
    def k(self) -> Site:
        return self._site(self.found.k)

    @property
    def v(self) -> Site:
        return self._site(self.found.v)

    @property
    def scores(self) -> Site:
        return self._site(self.found.scores)

    @property
    def pattern(self) -> Site:
        return self._site(self.found.pattern)

    @property
    def z(self) -> Site:
        return self._site(self.found.z)

    @property
    def out(self) -> Site | None:
        return None if self.found.out is None else Site(self.found.out)

    @property
    def n_heads(self) -> int:
        return self.found.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.found.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.found.head_dim

    @property
    def kind(self) -> str:
        return self.found.kind

    @property
    def scope(self) -> str:
        """The module call that holds it."""
        return self.found.scope

    def head(self, index: int) -> "Head":
        """The sites of one head."""
        if not 0 <= index < self.n_heads:
            raise StructureError(f"Head {index} of {self.scope!r}: expected 0 to {self.n_heads - 1}.")
        return Head(*(self._site(name, index) for name in self.found[1:7]))

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute pattern, z and output from their parts in another run of the same code and report the errors."""
        return certify_attention(self.graph, self.found, run.__getitem__)

    def _site(self, name: TensorId, head: int | None = None) -> Site:
        folded = len(self.graph[name].shape) == 3
        return Site(name, heads=head, layout=_AXES[1:] if folded else _AXES)

    def __repr__(self) -> str:
        groups = f" ({self.n_kv_heads} key-value)" if self.n_kv_heads != self.n_heads else ""
        proof = "not computed" if self.certified is None else repr(self.certified)
        return f"{self.scope or 'root'}  {self.kind}  {self.n_heads} heads of {self.head_dim}{groups}  {proof}"


@dataclass(frozen=True)
class Head:
    """The sites of one attention head."""

    q: Site
    k: Site
    v: Site
    scores: Site
    pattern: Site
    z: Site


@dataclass(frozen=True)
class Structure:
    """The parts of a model that its graph shows, in execution order; `rejected` says why a candidate is not among them."""

    model: str
    attention: tuple[AttentionBlock, ...]
    rejected: tuple[Rejected, ...]

    @property
    def roles(self) -> dict[TensorId, str]:
        """The role of each value that has one: q, k, v, scores, pattern, z, out."""
        found: dict[TensorId, str] = {}
        for block in self.attention:
            for role in ("q", "k", "v", "scores", "pattern", "z", "out"):
                name = getattr(block.found, role)
                if name is not None:
                    found.setdefault(name, role)
        return found

    def __repr__(self) -> str:
        lines = [f"Structure of {self.model}: {len(self.attention)} attentions, {len(self.rejected)} candidates rejected"]
        lines += [f"  attention[{n}]  {block!r}" for n, block in enumerate(self.attention)]
        lines += [f"  rejected      {one!r}" for one in self.rejected]
        return "\n".join(lines)


def locate(source: Run | Pass | Graph) -> Structure:
    """Find the attention of a model in its graph, by dataflow alone, and certify each finding from the run's values.

    >>> structure = fmr.locate(run)
    >>> structure.attention[0].pattern
    Site('h.0.attn/softmax#0')

    source: a run that kept its values (keep="all"), or a graph; from a graph nothing is proven and `certified` is None.
    A candidate whose parts do not reproduce the run is not returned: it stands in `rejected` with the reason.
    """
    if isinstance(source, Graph):
        return _collect(source, None)
    if not isinstance(source, (Run, Pass)):
        raise StructureError(f"fmr.locate got {type(source).__name__}, expected a run or a graph, as in fmr.locate(run).")
    return _collect(source.graph, source)


def _collect(graph: Graph, run: Run | Pass | None) -> Structure:
    plain = graph.unfused
    blocks: list[AttentionBlock] = []
    rejected: list[Rejected] = []
    for found in find_attention(plain):
        if isinstance(found, Rejected):
            rejected.append(found)
            continue
        certificate = None if run is None else certify_attention(plain, found, partial(_value, run))
        if certificate is None or certificate.ok:
            blocks.append(AttentionBlock(found, plain, certificate))
        else:
            rejected.append(Rejected(found.softmax, "attention", _why(plain, found, certificate)))
    return Structure(graph.model, tuple(blocks), tuple(rejected))


def _why(graph: Graph, found: Attention, certificate: Certificate) -> str:
    random = [node for node in graph.between(found.softmax, found.out or found.z) if is_random(node)]
    if random:
        return f"dropout is active ({random[0].id}), so it cannot be recomputed; run the model in eval mode"
    return repr(certificate)


def _value(run: Run | Pass, name: TensorId) -> Any:
    return run[name]
