"""Routers: which of several memories a token goes to, and how much each of them counts."""

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from fmr.errors import StructureError, number_of
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.memories.memory import Memory
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import above, between, depends_on, weights
from fmr.structure.normal.value import Value
from fmr.structure.proof.certificate import Certificate, Rejected, error, proof, tolerance_of, unmade
from fmr.structure.proof.evaluate import (
    Doubles,
    Values,
    check_places,
    check_run,
    evaluate,
    graph_of,
    own_work,
    why_unproving,
)
from fmr.structure.streams.identity import OVERWRITES
from fmr.structure.streams.stream import Stream

_CHOICES = frozenset("topk sort max argmax argsort masked_fill scatter lt le gt ge".split())
"""Ops that choose the largest of several, or leave out others."""

_LARGEST = frozenset("topk sort max argmax argsort".split())
"""Ops that say which are the largest."""

_PUT_BACK = OVERWRITES | frozenset("lt le gt ge eq ne".split())
"""Ops that lay numbers where their indices say, or only tell which are larger."""

_SORTED = frozenset("topk sort gather take_along_dim".split())
"""Ops that hand numbers out in the order of their size, or of what was chosen."""

_SHARES = 4
"""In how many parts experts are added up, and how many are looked at one by one."""

_ON_THE_WAY = frozenset("move join affine bend norm softmax statistic".split())
"""What may lie between what a router makes and where it weighs."""


@dataclass(frozen=True, eq=False)
class Router:
    """What sends each token to some of several experts, which are memories, and weighs what they write.

    >>> router = fmr.locate(routed).routers[0]  # a run of a model in which two of three experts see a token
    >>> router.maps(routed).shape, router.memories[0]  # (tokens, experts)
    (torch.Size([10, 3]), memory.0.experts.0  24 memories  certified: ...)

    `logits` are its scores, a number for each expert, `weights` what multiplies the experts, `indices` which experts these
    are for (None where each expert has its weight); `write` is what is added to the stream. `memories` are the experts: one
    memory with a matrix for each, or several, of which those that no token goes to are missing. `n` counts the experts.
    """

    graph: Graph = field(repr=False)
    logits: Site
    weights: Site
    indices: Site | None
    write: TensorId
    memories: tuple[Memory, ...]
    n: int
    scope: str
    certified: Certificate | None = None

    def maps(self, run: Run | Pass) -> Tensor:
        """How much each expert counts for each token: (tokens, experts), zero for those that it does not go to; a row for
        each example where a router looks at whole examples.

        run: one that kept weights and indices; `fmr.run(model, keep=[router.weights, router.indices], **inputs)` is enough.
        """
        check_run(run)
        return _spread(self, run[self.weights].detach(), None if self.indices is None else run[self.indices])

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute the weights and what is written in another run of the same code and report the errors."""
        with own_work():
            graph = graph_of(run, self.graph)
            check_places(run, (self.logits, self.weights))
            return certify_router(graph, self, run.__getitem__, other=graph is not self.graph)

    @property
    def size(self) -> str:
        """How many experts it chooses among, in words."""
        chosen = self.graph[self.weights.id].shape
        several = chosen[-1] if self.indices is not None and len(chosen) == len(self.graph[self.logits.id].shape) else 1
        return f"{several if self.indices is not None else 'all'} of {number_of(self.n, 'expert')}"

    def __repr__(self) -> str:
        return f"{self.scope or 'root'}  {self.size}  {proof(self.certified)}"


def _spread(found: Router, weight: Tensor, indices: Tensor | None) -> Tensor:
    """Weights as (tokens, experts)."""
    if indices is None:
        return weight.reshape(-1, found.n)
    tokens = prod(found.graph[found.logits.id].shape[:-1])
    rows = indices.reshape(tokens, -1)
    return weight.new_zeros(tokens, found.n).scatter_add(1, rows, weight.reshape(rows.shape))


def find_routers(graph: Graph, streams: Sequence[Stream], mlps: Sequence[Memory]) -> Iterator[Router | Rejected]:
    """The projections whose numbers, one for each expert, weigh what the memories of a write make; and those
    that weigh what these read."""
    form = form_of(graph)
    for stream in streams:
        points = {form[name] for name in stream.points}
        for write, names in zip(stream.writes, stream.writers, strict=True):
            held = [one for one in mlps if one.down in names]
            own = {name for one in held for name in (one.w_in, one.w_gate, one.w_out)}
            every = form[write.added].above(lambda one: one not in points) if held else ()  # noqa: B023
            region = {one for one in every if one not in points}
            ups = {form[one.up] for one in held}
            others = (one for one in region - ups if one.kind == "projection")
            made = (one for one in others if own.isdisjoint(weights(graph, one.operands[1])))
            for value in sorted({_summed(one) for one in made}, key=lambda one: graph.place(one.id)):
                if value in region:
                    n, (weight, experts) = value.node.shape[-1], _weighed(value, region, held)
                    if weight is not None and _is_of_experts(graph, experts, n):
                        yield _router(graph, value.node, weight, write.added, experts)
                    elif reason := _why_no_router(graph, value, held, experts):
                        yield Rejected(value.id, "router", reason)


def _summed(logits: Value) -> Value:
    """The scores that are added to others, as noise is, before anything else is made of them."""
    sums = (one for one in logits.users if one.kind == "sum" and one.node.shape == logits.node.shape)
    return next((_summed(one) for one in sums), logits)


def _why_no_router(graph: Graph, logits: Value, held: Sequence[Memory], met: Sequence[Memory]) -> str:
    """Why scores of experts do not weigh what these write; empty where nothing says that they are scores."""
    n, form = logits.node.shape[-1], form_of(graph)
    chooses = any(one.node.op in _LARGEST for one in logits.below(lambda one: one.kind in _ON_THE_WAY))
    if n == 1 and len(met) > 1:
        return f"its single number weighs {met[0].scope} and {met[1].scope}: none has one for each of its {len(met)} experts"
    if n > 1 == len(met) and (chooses or _is_of_experts(graph, held, n)):
        return f"of its {n} experts this run shows one, {met[0].scope}: nothing tells it from the others"
    if not _is_of_experts(graph, held, n):
        return ""
    if any(logits in form[one.source].above(lambda one: True) for one in held):
        return "it weighs what the experts read, and not what they write"
    return "it chooses among experts, and no single value that is made of its scores weighs what they write" * chooses


def _is_of_experts(graph: Graph, held: Sequence[Memory], n: int) -> bool:
    """Whether there may be so many experts: matrices of one memory, or memories."""
    several = [graph[one.keys].shape[0] for one in held if len(graph[one.keys].shape) == 3]
    return n > 1 and ([n] == several if several else 1 < len(held) <= n)


def _weighed(logits: Value, region: Container[Value], held: Sequence[Memory]) -> tuple[Node | None, tuple[Memory, ...]]:
    """What is made of logits before it multiplies what memories make, and these memories."""
    waiting, seen, weighs = [logits], {logits}, dict[TensorId, Node]()
    experts: dict[Memory, None] = {}
    for here in waiting:
        for user in (one for one in here.users if one in region and one not in seen):
            others = [one for one in user.inputs if one not in seen]
            made = {one.id for other in others for one in other.above(lambda one: one in region)}
            weighed = user.kind in ("gate", "product") or user.node.op == "lerp"
            if weighed and (met := [one for one in held if one.down in made or one.up in made]):
                weight = here.unmoved
                node = weight.folded[0] if weight.kind == "statistic" else weight.node
                weighs[node.id] = node
                experts |= dict.fromkeys(met)
            elif weighed or user.kind in _ON_THE_WAY or user.node.op in _CHOICES:
                seen.add(user)
                waiting.append(user)
    return next(iter(weighs.values())) if len(weighs) == 1 else None, tuple(experts)


def _router(graph: Graph, logits: Node, weight: Node, write: TensorId, held: tuple[Memory, ...]) -> Router:
    """A router of these experts; the indices are those that were chosen of what is made of its logits."""
    whole = (one.id for one in between(graph, logits.id, write) if one.dtype == torch.int64 and one.shape == weight.shape)
    chosen = [one for one in whole if depends_on(graph, one, logits.id)]
    own = [one for one in chosen if depends_on(graph, weight.id, one)]
    indices = next(iter([*own[::-1], *chosen]), None)
    dense = weight.shape == logits.shape and not _is_in_another_order(graph, weight)
    return Router(
        graph=graph,
        logits=Site(logits.id),
        weights=Site(weight.id),
        indices=Site(indices) if indices and not dense else None,
        write=write,
        memories=held,
        n=logits.shape[-1],
        scope=logits.module,
    )


def _is_in_another_order(graph: Graph, weight: Node) -> bool:
    """Whether weights are taken from what was sorted, or by what was chosen, and not put back where their experts are."""
    higher = above(graph, weight.id, lambda one: one.op not in _PUT_BACK and one.op not in _SORTED)
    return any(one.op in _SORTED and one.shape == weight.shape for one in higher)


def certify_router(graph: Graph, found: Router, value: Values, other: bool = False) -> Certificate:
    """Recompute the weights from the logits, what is written as the sum of what each expert writes with its weight alone,
    and show that with the weight of one expert alone the others do not matter, and it does; and that what is written for a
    token follows each of its weights, so that none is left out. Of the experts, or of as many choices of a token, the first
    few are looked at. In an `other` run tokens may go to experts that none went to in the run where they were found: these
    are not among the memories.

    Parts that do not follow one another are a `StructureError`.
    """
    way = found.write, found.weights.id, found.logits.id
    if wrong := unmade(graph, pairwise(dict.fromkeys(way))) or why_unproving(way, value):
        raise StructureError(wrong)
    value = value if isinstance(value, Doubles) else Doubles(value)
    logits, weight = (value.double(one.id) for one in (found.logits, found.weights))
    whose = torch.arange(found.n, device=weight.device) if found.indices is None else value(found.indices.id)
    if found.indices is None and weight.shape[-1:] != (found.n,):
        raise StructureError(f"{found.weights.id}, {list(weight.shape)}, has no number for each of its {found.n} experts")
    if whose.shape != (weight.shape if found.indices else weight.shape[-1:]):
        raise StructureError(f"{found.indices} does not say for each of {found.weights} which expert it is for")
    if found.indices is not None and int(whose.max()) >= found.n:
        raise StructureError(f"{found.indices.id} chooses among more than {found.n} experts, as tokens that these would see")
    if _heard_by_others(graph, found, logits, value):
        raise StructureError("what a token's experts count for follows from the scores of other tokens")
    used = whose.expand_as(weight)[weight.nan_to_num() != 0].unique().tolist()
    none = evaluate(graph, found.write, {found.weights.id: torch.zeros_like(weight)}, value)
    shares = [weight * (whose % _SHARES == number) for number in sorted({number % _SHARES for number in used})]
    made = torch.stack([evaluate(graph, found.write, {found.weights.id: one}, value) for one in shares])
    errors = {
        "weights": error(evaluate(graph, found.weights.id, {found.logits.id: logits}, value), weight),
        "sum": error((made - none).sum(0) + none, value(found.write)),
        "experts": 0.0 if _are_apart(graph, found, used, weight, whose, value, other) else torch.inf,
        "tokens": 0.0 if _is_written(graph, found, weight, value) else torch.inf,
    }
    return Certificate(errors, tolerance_of(*(value(one) for one in (found.write, found.weights.id, found.logits.id))))


def _heard_by_others(graph: Graph, found: Router, logits: Tensor, value: Doubles) -> bool:
    """Whether the scores of the first token that has some alone move what experts count for another one, or nothing."""
    tokens = prod(logits.shape[:-1])
    other = logits.clone().reshape(tokens, -1)
    first = int(torch.isfinite(other).all(1).int().argmax())
    other[first] *= 0.5  # which leaves the order of its experts as it was
    given = (logits, other.reshape(logits.shape))
    plain, changed = (evaluate(graph, found.weights.id, {found.logits.id: one}, value) for one in given)
    moved = plain.nan_to_num() != changed.nan_to_num()
    return moved.numel() % tokens != 0 or bool(moved.reshape(tokens, -1)[torch.arange(tokens) != first].any())


def _is_written(graph: Graph, found: Router, weight: Tensor, value: Doubles) -> bool:
    """Whether what is written for a token moves with each weight that it has, and for no other token: of its first choices,
    or experts."""
    tokens = prod(graph[found.logits.id].shape[:-1])
    rows = weight.reshape(tokens, -1)
    heard = _audible(graph, found.memories, value)
    made = evaluate(graph, found.write, {**heard, found.weights.id: weight}, value)
    known = torch.isfinite(made).reshape(tokens, -1).all(1)
    for place in range(min(rows.shape[1], 2 * _SHARES)):
        without = rows.clone()
        without[:, place] = 0.0
        after = evaluate(graph, found.write, {**heard, found.weights.id: without.reshape(weight.shape)}, value)
        moved = (after != made).reshape(tokens, -1).any(1)
        if not torch.equal(moved[known], rows[known, place] != 0.0):
            return False
    return True


def _audible(graph: Graph, memories: Iterable[Memory], value: Doubles) -> dict[TensorId, Tensor]:
    """What enters the nonlinearity of each memory, of such a size that each has coefficients; as it is, it may have none."""
    return {one.pre.id: torch.ones_like(value.double(one.pre.id)) for one in memories if one.pre.id in graph}


def _are_apart(
    graph: Graph, found: Router, used: Sequence[int], weight: Tensor, whose: Tensor, value: Doubles, other: bool
) -> bool:
    """Whether each expert of those that are used, or of the first of them, is heard where it alone has its weight, and no
    other one; in an `other` run some may be unknown."""
    known = [one for one in found.memories if one.down in graph and one.values in graph]
    several = any(len(graph[one.values].shape) == 3 for one in known)
    looked = used if other and not several else used[:_SHARES]
    heard = [frozenset(_heard(graph, known, found, number, weight * (whose == number), value)) for number in looked]
    met = [one for one in heard if one or not other]
    return len({*met}) == len(met) and all(len(one) == 1 for one in met) and bool(met or not known)


def _heard(
    graph: Graph, known: Sequence[Memory], found: Router, number: int, weight: Tensor, value: Doubles
) -> Iterator[tuple[TensorId, int]]:
    """The experts that matter where one alone has its weight: memories, or matrices of the one that holds all, of which
    others than the one of this number are changed at once."""
    for one in known:
        several = len(graph[one.values].shape) == 3
        changed = one.values if several else one.out.id
        plain, heard = value.double(changed), {**_audible(graph, known, value), found.weights.id: weight}
        made = evaluate(graph, found.write, {**heard, changed: plain}, value)
        rows = torch.arange(len(plain)) == number if several else torch.tensor([True])
        for n, which in ((number, rows), (-1, ~rows)):
            other = plain + which.to(plain).reshape(-1, *[1] * (plain.dim() - 1))
            after = evaluate(graph, found.write, {**heard, changed: other}, value)
            if not torch.equal(made.nan_to_num(), after.nan_to_num()):
                yield one.down, n
