"""One attention of a model: the sites of its values, the shape of its heads, its maps, and the proof that it is one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fmr.errors import IdError, StructureError, number_of, whole_number
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.pictures.heatmap import LARGE, SMALL, Labels, Tokens, chosen, draw
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.attention.certify import certify
from fmr.structure.attention.claim import Claim
from fmr.structure.attention.factors import Factors, Heads, Read, in_order, read_by, written_by
from fmr.structure.attention.halves import map_of
from fmr.structure.attention.maps import maps_of
from fmr.structure.attention.multiplied import mixes_scores
from fmr.structure.attention.scores import products_beside
from fmr.structure.normal.match import come_of
from fmr.structure.proof.certificate import Certificate, error, proof, tolerance_of
from fmr.structure.proof.evaluate import Values, check_places, check_run, graph_of, own_work

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


class Attention(Claim):
    """One attention of a model: the sites of its values, the shape of its heads and its certificate.

    >>> structure.attention[3].maps(run).shape  # (examples, heads, queries, keys)
    torch.Size([1, 4, 6, 6])

    `q`, `k`, `v` are the operands as the products read them (keys and values already repeated for grouped queries);
    `scores` enter the softmax, `pattern` acts on the values before dropout, `z` is what the heads mix, `out` the output of
    their projection (None where none is found below z, as where z is summed up first). Where weights mix heads after the
    softmax, `pattern` and `maps` are what enters that mixture, and no head of z is weighed by one of them alone. The
    `layout` of a site says what the dimensions of its value count.
    `kind` is "self", "cross", "additive" or "deformable"; `certified` is None when found from a graph alone; `scope` is the
    module call that holds it, `index` its place in `structure.attention`.

    `softmax` is its op, `dim` what that adds up to one along, `path` the values from z to what the projection reads. Where
    one softmax is over keys of several kinds, `k` and `v` are those of one of them.

    In differential attention the map of a head is a softmax less a share of another: `q`, `k`, `scores` and `pattern` are
    those of the first, `minus` has those of the second and the share. `maps` are the difference, whose rows do not add up
    to one and may go below zero.
    """

    @property
    def map_sites(self) -> tuple[Site, ...]:
        """What `maps` reads: the pattern; of a differential attention both patterns, and the share of the second."""
        return (self.pattern, *(self.minus.read if self.minus is not None else ()))

    def head(self, index: int) -> Head:
        """The sites of one head.

        >>> run[structure.attention[3].head(2).pattern].shape  # (examples, queries, keys)
        torch.Size([1, 6, 6])

        Where no dimension is that of the heads alone, and for a number that is none of 0 to n_heads - 1, it is a
        `StructureError`; `maps(run)[:, index]` has the pattern of a head also where heads lie in the batch.
        """
        number = whole_number(index)
        if number is None or not 0 <= number < self.n_heads:
            raise StructureError(f"Head {index!r} of {self.scope!r}: expected 0 to {self.n_heads - 1}.")
        return Head(*(self._of_head(role, number) for role in Head._fields))

    def _of_head(self, role: str, head: int) -> Site:
        site: Site = getattr(self, role)
        layout, shape = site.layout or (), self.graph[site.id].shape
        axis = layout.index("heads") if "heads" in layout else None
        if role in ("k", "v") and (self.n_kv_heads == 1 if axis is None else shape[axis] == 1):
            return site  # all heads share it
        if axis is None:
            raise StructureError(
                f"{site.id} has no dimension that counts heads alone: {list(shape)} are {list(layout)}. "
                f"Expected block.maps(run)[:, {head}] for the pattern of one head."
            )
        return replace(site, heads=head, layout=layout, n_heads=shape[axis])

    def maps(self, run: Run | Pass) -> Tensor:
        """The pattern of every head, (examples, heads, queries, keys), however the model lays it out.

        >>> structure.attention[3].maps(run)[0, 2]  # what head 2 of the first example looks at

        run: one that kept the pattern; `fmr.run(model, keep=[structure.attention[3].pattern], **inputs)` is enough. Windows
        of a windowed attention count as examples. A step of one query for which the heads that share keys are laid out as
        its queries is unpacked. A run that lays the pattern out in another way than the one where it was located, and a
        pattern whose heads cannot be told apart, are a `StructureError`; one that is another value there, an `IdError`.
        """
        check_run(run)
        try:
            return map_of(run.__getitem__, self.pattern, self.minus, self.n_heads, self.n_kv_heads)
        except IdError as missing:
            if all(site.id in run for site in self.map_sites):
                raise
            sites = "[block.pattern]" if self.minus is None else "block.map_sites"
            raise IdError(f"{missing} Expected a run that kept it: fmr.run(model, *inputs, keep={sites}).") from None

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute pattern, z and output from their parts in another run of the same code and report the errors.

        >>> structure.attention[3].check(fmr.run(model, **other))
        certified: pattern ..., rows ..., z ..., heads ..., out ... (tolerance 1e-04)

        run: one that kept every value (keep="all"); of others an `IdError` names what is missing.
        """
        with own_work():
            graph = graph_of(run, self.graph)
            check_places(run, (self.q, self.k, self.v, self.scores, *self.map_sites, self.z))
            return certify(graph, self, run.__getitem__)

    def factors(self, run: Run | Pass) -> Factors:
        """The weights of each head, as the projections around the attention read them, proven by a run.

        >>> factors = structure.attention[3].factors(run)
        >>> factors.k.matrix.shape, factors.out.matrix.shape  # (heads, units of a head, width)
        (torch.Size([4, 32, 128]), torch.Size([4, 32, 128]))

        run: one that kept every value (keep="all"). Fused projections, weights of either layout, rotations, normalised
        queries and shared keys are told apart by the graph. An attention whose values are not what these weights make of
        what it reads is a `StructureError` with the reason.
        """
        try:
            with own_work():
                return _factors(graph_of(run, self.graph), self, run.__getitem__)
        except StructureError as refused:
            raise StructureError(f"{self.scope!r} has no weights of single heads: {refused}") from None

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
        maps = self.maps(run)
        row = whole_number(example)
        if row is None or not 0 <= row < len(maps):
            raise StructureError(f"example={example!r}: this run has {len(maps)}. Expected 0 to {len(maps) - 1}.")
        numbers = chosen(heads, self.n_heads)
        labels = Labels.of(tokens, *maps.shape[-2:])
        number = "" if self.index is None else f"[{self.index}]"
        note = f"{self.kind}-attention, {number_of(self.n_heads, 'head')} of {self.head_dim}, example {example}"
        sizes = SMALL if heads is None else LARGE
        return draw(maps[row, numbers], numbers, labels, f"attention{number}  {self.scope or 'root'}", note, sizes)

    @property
    def size(self) -> str:
        """Heads and their size in words."""
        groups = f" ({self.n_kv_heads} key-value)" if self.n_kv_heads != self.n_heads else ""
        less = ", each a softmax less another" if self.minus is not None else ""
        return f"{number_of(self.n_heads, 'head')} of {self.head_dim}{groups}{less}"

    def __repr__(self) -> str:
        return f"{self.scope or 'root'}  {self.kind}  {self.size}  {proof(self.certified)}"


def values_inside(graph: Graph, heads: Sequence[Attention]) -> frozenset[TensorId]:
    """What attentions compute of their queries, keys and values, up to their outputs."""
    ends = (
        (role.id, (one.out or one.z).id)
        for one in heads
        for role in (one.q, one.k, one.v, *((one.minus.q, one.minus.k) if one.minus is not None else ()))
    )
    return frozenset(node.id for start, end in ends for node in come_of(graph, start, end))


def _why_no_factors(found: Attention) -> str:
    """Why heads do not read and write one stream by weights alone; empty where nothing says so."""
    if found.minus is not None:
        return "it takes one pattern from another, expected one of a single softmax"
    if found.kind != "self" or found.out is None:
        ending = "" if found.out else " without an output projection"
        return f"it is {found.kind}-attention{ending}, expected self-attention between projections"
    if any(products_beside(found.graph, found.scores.id, found.q.id, found.k.id)):
        return f"it adds up products of several queries and keys, expected one: {found.q.id} are not all units of a query"
    mixed = mixes_scores(found.graph, found)
    return f"it weighs its scores by one another, in {mixed}, expected those of each head alone" if mixed else ""


def _factors(graph: Graph, found: Attention, value: Values) -> Factors:
    """The weights of each head; that q and k, and v and z, count their units alike is part of what is proven."""
    if reason := _why_no_factors(found):
        raise StructureError(reason)
    heads = Heads(found.n_heads, found.n_kv_heads)
    q = read_by(graph, found.q, heads, value)
    k, v = (read_by(graph, site, heads, value, shared=True) for site in (found.k, found.v))
    assert found.out is not None
    out, written = written_by(graph, found.z, found.path, found.out, heads, value)
    maps = maps_of(value(found.pattern.id).double(), found.pattern, *heads)
    mixed = error(maps @ v.vectors, in_order(value(found.z.id), found.z, heads))
    errors = {
        "q": q.error,
        "k": k.error,
        "v": v.error,
        "q.k": _angles(found, heads, q, k, value),
        "z": mixed,
        "out": written,
    }
    tolerance = tolerance_of(*(value(site.id) for site in (found.q, found.k, found.pattern, found.z, found.out)))
    certificate = Certificate(errors, tolerance)
    if not certificate:
        raise StructureError(f"its values are not what these make: {certificate.why}.")
    return Factors(q.factor, k.factor, v.factor, out, certificate)


def _angles(found: Attention, heads: Heads, q: Read, k: Read, value: Values) -> float:
    """How far the angle between a token's query and its own key is from that before both were rotated alike."""
    turned = [in_order(value(site.id).double(), site, heads, site is found.k) for site in (found.q, found.k)]
    seen = torch.cosine_similarity(turned[0], turned[1], dim=-1)
    return float((torch.cosine_similarity(q.vectors, k.vectors, dim=-1) - seen).abs().max())
