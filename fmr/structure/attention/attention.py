"""One attention of a model: the sites of its values, the shape of its heads, its maps, and the proof that it is one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fmr.errors import IdError, StructureError, number_of, whole_number
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.pictures.heatmap import LARGE, SMALL, Labels, Tokens, chosen, draw
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.attention.definition import MULTIPLY, Claim, come_of, miscounted, misread, mistaken, mixes, own_rows
from fmr.structure.attention.factors import Factors, Heads, Read, in_order, named_like, read_by, written_by
from fmr.structure.attention.maps import maps_of
from fmr.structure.normal.indices import iota, trace
from fmr.structure.normal.match import NONLINEAR, NORMS, STATISTICS, between, projection
from fmr.structure.proof.certificate import TOLERANCE, Certificate, error, proof, tolerance_of
from fmr.structure.proof.evaluate import Values, check_places, check_run, evaluate, graph_of, own_work

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


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of a model: the sites of its values, the shape of its heads and its certificate.

    >>> structure.attention[3].maps(run).shape  # (examples, heads, queries, keys)
    torch.Size([1, 4, 6, 6])

    `q`, `k`, `v` are the operands as the products read them (keys and values already repeated for grouped queries);
    `scores` enter the softmax, `pattern` acts on the values before dropout, `z` is what the heads mix, `out` the output of
    their projection (None where z is used as it is). The `layout` of a site says what the dimensions of its value count.
    `kind` is "self", "cross", "additive" or "deformable"; `certified` is None when found from a graph alone; `scope` is the
    module call that holds it, `index` its place in `structure.attention`.

    `softmax` is its op, `dim` what that adds up to one along, `path` the values from z to what the projection reads. Where
    one softmax is over keys of several kinds, `k` and `v` are those of one of them.
    """

    graph: Graph = field(repr=False)
    softmax: TensorId
    q: Site
    k: Site
    v: Site
    scores: Site
    pattern: Site
    z: Site
    out: Site | None
    n_heads: int
    n_kv_heads: int
    head_dim: int
    kind: str
    scope: str
    dim: int = -1
    path: tuple[TensorId, ...] = ()
    certified: Certificate | None = None
    index: int | None = None

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
            value = run[self.pattern]
        except IdError as missing:
            if self.pattern.id in run:
                raise
            raise IdError(f"{missing} Expected a run that kept it: fmr.run(model, *inputs, keep=[block.pattern]).") from None
        return maps_of(value.detach(), self.pattern, self.n_heads, self.n_kv_heads)

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute pattern, z and output from their parts in another run of the same code and report the errors.

        >>> structure.attention[3].check(fmr.run(model, **other))
        certified: pattern ..., rows ..., z ..., heads ..., out ... (tolerance 1e-04)

        run: one that kept every value (keep="all"); of others an `IdError` names what is missing.
        """
        with own_work():
            graph = graph_of(run, self.graph)
            check_places(run, (self.q, self.k, self.v, self.scores, self.pattern, self.z))
            return certify_attention(graph, self, run.__getitem__)

    def factors(self, run: Run | Pass) -> Factors:
        """The weights of each head, as the projections around the attention read them, proven by a run.

        >>> factors = structure.attention[3].factors(run)
        >>> factors.k.matrix.shape, factors.out.matrix.shape  # (heads, units of a head, width)
        (torch.Size([4, 32, 128]), torch.Size([4, 32, 128]))

        run: one that kept every value (keep="all"). Fused projections, weights of either layout, rotations, normalised
        queries and shared keys are told apart by the graph. An attention whose values are not what these weights make of
        what it reads is a `StructureError` with the reason.
        """
        if self.kind != "self" or self.out is None:
            raise StructureError(
                f"{self.scope!r} is {self.kind}-attention{'' if self.out else ' without an output projection'}, expected "
                "self-attention between projections: only its heads read and write one stream by weights alone."
            )
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
        return f"{number_of(self.n_heads, 'head')} of {self.head_dim}{groups}"

    def __repr__(self) -> str:
        return f"{self.scope or 'root'}  {self.kind}  {self.size}  {proof(self.certified)}"


def values_inside(graph: Graph, heads: Sequence[Attention]) -> frozenset[TensorId]:
    """What attentions compute of their queries, keys and values, up to their outputs."""
    ends = ((role.id, (one.out or one.z).id) for one in heads for role in (one.q, one.k, one.v))
    return frozenset(node.id for start, end in ends for node in come_of(graph, start, end))


def certify_attention(graph: Graph, found: Attention, value: Values) -> Certificate:
    """Recompute the pattern from q, k, mask and scale, z from pattern and v, and the output from the single heads.

    That heads are such is shown by taking one head's pattern away: the mixed values of the others stay.

    The pattern must also be a distribution: nothing negative, no row above one. Where a norm or a nonlinearity lies between
    the heads and their projection, what one head writes is not defined; then the output is recomputed from all at once.

    Where layouts name the dimensions of its values, z is also the pattern times the values as they are named, and one query
    moves its own row of the scores, one key those of its head. Parts that do not follow one another as they are named, heads
    that are as many as is not said, and values that are constants are a `StructureError`.

    In half precision large scores are rounded so coarsely that their softmax shows it. Then the scores are compared, and the
    pattern is recomputed from them; z also from q, k and v, since a kernel does not round the scores that it keeps inside.
    """
    claim = Claim(*(getattr(found, name) for name in Claim._fields))
    if not value(found.pattern.id).numel():
        raise StructureError(
            f"{found.pattern.id} has no numbers, {list(graph[found.pattern.id].shape)}, that prove anything"
        )
    if wrong := misread(graph, claim) or miscounted(graph, claim, value) or mistaken(graph, claim, value):
        raise StructureError(wrong)
    q, k, v, pattern, z = (value(site.id) for site in (found.q, found.k, found.v, found.pattern, found.z))
    tolerance = tolerance_of(q, k, pattern, z, value((found.out or found.z).id))
    coarse = tolerance > TOLERANCE
    keys = {found.q.id: q, found.k.id: k}
    mixed = evaluate(graph, found.z.id, {found.pattern.id: pattern, found.v.id: v}, value)
    errors = {
        "pattern": _rounded(graph, found, keys, value) if coarse else _again(graph, found.pattern.id, keys, value),
        "rows": max(
            _excess(value(found.softmax), found.dim, graph[found.softmax].op == "softmax"),
            min(_excess(pattern, dim) for dim in {-1, found.dim} if _is_of_places(found, dim)),
        ),
        "z": error(mixed, z),
        **_heads(graph, found, pattern, mixed, value),
    }
    if found.kind in MULTIPLY:
        told = [mixes(graph, claim, pattern, v, mixed), own_rows(graph, claim, value)]
        errors |= {"layout": max(known)} if (known := [one for one in told if one is not None]) else {}
    if coarse:
        errors["z"] = min(errors["z"], _again(graph, found.z.id, {**keys, found.v.id: v}, value))
    if found.out is not None and found.kind in MULTIPLY:
        out = found.out.id
        bent = _bent(graph, found.z.id, out)
        whole = evaluate(graph, out, {found.z.id: z}, value) if bent else _sum_of_heads(graph, found, out, value)
        errors["out"] = error(whole, value(out))
    return Certificate(errors, tolerance)


def _factors(graph: Graph, found: Attention, value: Values) -> Factors:
    """The weights of each head; that q and k, and v and z, count their units alike is part of what is proven."""
    heads = Heads(found.n_heads, found.n_kv_heads)
    found = replace(found, q=named_like(found.q, found.pattern), k=named_like(found.k, found.pattern))
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


def _heads(graph: Graph, found: Attention, pattern: Tensor, mixed: Tensor, value: Values) -> dict[str, float]:
    """How far the mixed values of other heads move when one head's pattern is taken away; nothing where heads are folded
    into the batch, or weighed by one another."""
    maps, values = found.pattern.layout or (), found.z.layout or ()
    weighed = (projection(graph, node) for node in between(graph, found.pattern.id, found.z.id))
    if "heads" not in maps or "heads" not in values or any(one is not None for one in weighed):
        return {}
    row, axis = maps.index("heads"), values.index("heads")
    if not pattern.shape[row] == mixed.shape[axis] == found.n_heads:
        return {"heads": float("inf")}
    without = pattern.detach().clone()
    without.select(row, -1).zero_()
    moved = evaluate(graph, found.z.id, {found.pattern.id: without, found.v.id: value(found.v.id)}, value)
    moved.select(axis, -1).copy_(mixed.select(axis, -1))
    return {"heads": error(moved, mixed)}


def _again(graph: Graph, name: TensorId, given: Mapping[TensorId, Tensor], value: Values) -> float:
    """How far a value lies from what comes of given ones."""
    return error(evaluate(graph, name, given, value), value(name))


def _rounded(graph: Graph, found: Attention, keys: Mapping[TensorId, Tensor], value: Values) -> float:
    """How far scores lie from what comes of queries and keys, each as far as it counts, or the pattern from what comes of
    the scores."""
    recorded, weights = (value(name).detach().double() for name in (found.scores.id, found.softmax))
    off = (evaluate(graph, found.scores.id, keys, value) - recorded).abs() / recorded.abs().clamp(min=1.0)
    return max(
        float((off * weights).nan_to_num(0.0).max()), _again(graph, found.pattern.id, {found.scores.id: recorded}, value)
    )


def _bent(graph: Graph, start: TensorId, end: TensorId) -> bool:
    """Whether a normalisation or a nonlinearity lies between two values."""
    bends = NORMS | NONLINEAR | STATISTICS - {"mean"}
    return any(node.op in bends for node in between(graph, start, end))


def _is_of_places(found: Attention, dim: int) -> bool:
    """Whether a dimension of a pattern counts queries or keys: over heads or examples it need not add up to one."""
    layout = found.pattern.layout
    return dim == -1 or layout is None or layout[dim] not in ("heads", "examples")


def _excess(pattern: Tensor, dim: int, whole: bool = False) -> float:
    """How far a pattern goes below zero, or its rows along a dimension above one; or, where they are `whole`, from one.

    Rows that are masked as a whole are zero, or no numbers.
    """
    known = pattern.detach().double().nan_to_num(0.0)
    sums = known.sum(dim)
    over = torch.minimum((sums - 1).abs(), sums.abs()) if whole else (sums - 1).clamp(min=0)
    return max(float(over.max()), float((-known).clamp(min=0).max()))


def _sum_of_heads(graph: Graph, found: Attention, out: TensorId, value: Values) -> Tensor:
    """The output as the sum of what each head writes alone, plus the bias once."""
    read, whose = _told_apart(graph, found)
    z = value(read)
    bias = evaluate(graph, out, {read: torch.zeros_like(z)}, value)
    total = bias.clone()
    for head in range(found.n_heads):
        alone = z * (whose % found.n_heads == head).to(z.device)
        total += evaluate(graph, out, {read: alone}, value) - bias
    return total


def _told_apart(graph: Graph, found: Attention) -> tuple[TensorId, Tensor]:
    """A value in which the heads are told apart, and the head of each of its numbers, counted on where there are more.

    It is what the projection reads, as a norm may stand between it and z; z itself where that is put together from several.
    """
    shape, layout = graph[found.z.id].shape, found.z.layout or ()
    lead = [size if name == "heads" else 1 for size, name in zip(shape, layout, strict=False)]
    number = iota(*(lead if "heads" in layout else (*shape[:-1], 1)))
    whose = trace(graph, number.expand(shape), tuple(graph[name] for name in found.path))
    return (found.z.id, number) if whose is None or bool((whose < 0).any()) else (found.path[-1], whose)
