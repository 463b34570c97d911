"""A certificate must be able to fail: for each role the false claims that it catches, one wrong field each.

Every lie is told of models whose own claim is certified, by hand and in kernels, also where sizes coincide.
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.ids import Site
from fmr.runs.run import Run
from fmr.structure.parts import Attention, Memory, Stream, Structure
from tests.structure import heads, memories
from tests.structure.idioms import HEADS, SIZE, Heads, Plain, Stack


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What comes later is masked by a number beside which every score is small."""
    return (q @ k.mT * SIZE**-0.5).masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1) > 0, -1e9).softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first position is masked, too, by a number that is added, which rounds the scores of the query that sees no
    other."""
    mask = torch.ones(q.shape[2], k.shape[2]).triu(1)
    mask[:, 0] = 1.0
    return (q @ k.mT * SIZE**-0.5 + mask * -1e4).softmax(-1) @ v


def left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first positions of the first example are padded, and masked with the least number that there is."""
    seen = torch.ones(len(q), 1, q.shape[2], k.shape[2]).tril()
    seen[0, :, :, :2] = 0.0
    return (q @ k.mT * SIZE**-0.5 + (1 - seen) * torch.finfo(q.dtype).min).softmax(-1) @ v


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads lie with examples."""
    apart, (q, k, v) = q.shape[:2], (one.flatten(0, 1) for one in (q, k, v))
    return (torch.bmm(q, k.mT) * SIZE**-0.5).softmax(-1).bmm(v).unflatten(0, apart)


def distant(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k)).softmax(-1) @ v


def largest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The three largest scores of a row are kept."""
    scores = q @ k.mT * SIZE**-0.5
    return scores.masked_fill(scores < scores.topk(3, -1).values[..., -1:], -torch.inf).softmax(-1) @ v


def in_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SIZE**-0.5
    return scores.masked_fill(scores < scores.sort(-1, descending=True).values[..., 2:3], -1e9).softmax(-1) @ v


def scattered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The three largest scores of a row are laid where nothing else is."""
    scores = q @ k.mT * SIZE**-0.5
    most = scores.topk(3, -1)
    return torch.full_like(scores, -torch.inf).scatter(-1, most.indices, most.values).softmax(-1) @ v


def sunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A score beside those of keys, and the largest subtracted from all."""
    scores = torch.cat([q @ k.mT * SIZE**-0.5, torch.zeros(*q.shape[:3], 1)], -1)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def prefixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """There are keys before those of the positions."""
    k, v = (torch.cat([x[:, :, :3].flip(2), x], 2) for x in (k, v))
    return (q @ k.mT * SIZE**-0.5).softmax(-1) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT * SIZE**-0.5).softmax(-1) @ v


class Other(nn.Module):
    """Layers that look at another input."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.seen = Stack(lambda: Heads(by_hand), Plain), nn.Linear(3, 32)

    def forward(self, ids: Tensor, other: Tensor) -> Tensor:
        context = self.seen(other)
        for one in self.stack.attention:
            one.register_forward_pre_hook(lambda module, given: (given[0], context))
        return self.stack(ids)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "by hand": lambda: Stack(lambda: Heads(by_hand), Plain),
    "kernel": lambda: Stack(lambda: Heads(kernel), Plain),
    "shared": lambda: Stack(lambda: Heads(by_hand, groups=2), memories.Gated),
    "shared in a kernel": lambda: Stack(lambda: Heads(kernel, groups=1), memories.Fused),
    "cross": Other,
    "masked": lambda: Stack(lambda: Heads(masked), Plain),
    "padded": lambda: Stack(lambda: Heads(padded), Plain),
    "left": lambda: Stack(lambda: Heads(left), Plain),
    "prefixed": lambda: Stack(lambda: Heads(prefixed), Plain),
    "folded": lambda: Stack(lambda: Heads(folded), Plain),
    "distant": lambda: Stack(lambda: Heads(distant), Plain),
    "largest": lambda: Stack(lambda: Heads(largest), Plain),
    "in order": lambda: Stack(lambda: Heads(in_order), Plain),
    "scattered": lambda: Stack(lambda: Heads(scattered), Plain),
    "sunk": lambda: Stack(lambda: Heads(sunk), Plain),
    "talking": lambda: Stack(heads.TalkingHeads, Plain),
    "talking by windows": lambda: Stack(heads.TalkingByConvolution, Plain),
}
ALIKE = {
    "alike": MODELS["by hand"],
    "talking alike": MODELS["talking"],
    "left alike": MODELS["left"],
    "largest alike": MODELS["largest"],
    "scattered alike": MODELS["scattered"],
    "one": MODELS["by hand"],
    "one, folded": MODELS["folded"],
}
"""As many examples and positions as heads, or one example."""
EVERY = [*MODELS, *ALIKE]


@cache
def located(name: str) -> tuple[Run, Structure]:
    torch.manual_seed(0)
    ids = torch.randint(
        11, (HEADS, HEADS) if "alike" in name else (1 if name in ("one", "one, folded", "largest") else 2, 5)
    )
    given = (ids, torch.randn(2, 7, 3)) if name == "cross" else (ids,)
    run = fmr.run((MODELS | ALIKE)[name]().eval(), *given)
    return run, fmr.locate(run)


def holds(run: Run, claim: Attention | Memory | Stream) -> bool:
    """Whether a claim is certified."""
    try:
        return bool(claim.check(run))
    except StructureError:
        return False


def exchanged(found: Attention, role: str, a: str, b: str) -> Attention:
    """An attention with two names in the layout of one of its values exchanged."""
    site: Site = getattr(found, role)
    names = {a: b, b: a}
    return replace(found, **{role: replace(site, layout=tuple(names.get(one, one) for one in site.layout or ()))})  # type: ignore[arg-type]


def is_other(lie: Attention, found: Attention) -> bool:
    """Whether a claim differs at all, as exchanging names does nothing where one dimension has both, or none has them."""
    return any(getattr(lie, one.name) != getattr(found, one.name) for one in fields(found))


def of_attention(found: Attention, other: Attention, n: int) -> Iterator[tuple[str, Attention]]:
    for role in ("q", "k", "v", "z", "scores", "pattern"):
        for a, b in (("heads", "examples"), ("heads", "positions"), ("heads", "units"), ("examples", "positions")):
            yield f"{role}: {a} and {b} exchanged", exchanged(found, role, a, b)
        yield f"{role} without a layout", replace(found, **{role: replace(getattr(found, role), layout=None)})  # type: ignore[arg-type]
        yield f"{role} of another", replace(found, **{role: getattr(other, role)})
    for role in ("q", "k", "v", "z", "scores", "pattern"):
        yield f"{role}: positions and units exchanged", exchanged(found, role, "positions", "units")
    kv, size = found.n_kv_heads, found.head_dim
    yield "more heads", replace(found, n_heads=2 * n, n_kv_heads=2 * kv, head_dim=size // 2)
    yield "fewer heads", replace(found, n_heads=n // 2, n_kv_heads=max(1, kv // 2), head_dim=2 * size)
    yield "one head", replace(found, n_heads=1, n_kv_heads=1, head_dim=n * size)
    yield "other units", replace(found, head_dim=2 * size)
    yield from ((f"{m} key-value heads", replace(found, n_kv_heads=m)) for m in (0, 1, 2, 3, 4) if m != kv)
    yield from (
        (kind, replace(found, kind=kind)) for kind in ("self", "cross", "additive", "deformable") if kind != found.kind
    )
    yield "q and k exchanged", replace(found, q=found.k, k=found.q)
    yield "k for q", replace(found, q=found.k)
    yield "q for k", replace(found, k=found.q)
    yield "k for v", replace(found, v=found.k)
    yield "softmax of another", replace(found, softmax=other.softmax)
    for node in found.graph.nodes:
        if node.shape == found.graph[found.scores.id].shape and node.id not in (found.scores.id, found.softmax):
            yield f"{node.id} for scores", replace(found, scores=Site(node.id, layout=found.scores.layout))
    yield "scores for pattern", replace(found, pattern=found.scores)
    yield "pattern for scores", replace(found, scores=found.pattern)
    yield "a softmax over queries", replace(found, dim=-2)
    yield "output of another", replace(found, out=other.out)
    yield "output for z", replace(found, z=found.out) if found.out is not None else other
    yield "no way to the output", replace(found, path=())
    yield "no output", replace(found, out=None, path=())


def of_output(found: Attention, structure: Structure) -> Iterator[tuple[str, Attention]]:
    layer, memory = structure.layers[0], structure.mlps[0]
    assert layer.resid_mid is not None
    for what, name in (("stream", layer.resid_mid.id), ("stream later", layer.resid_post.id), ("norm", memory.source)):
        yield f"the {what} for the output", replace(found, out=Site(fmr.TensorId(name)))
    for role, old in (("q", "positions"), ("z", "heads"), ("pattern", "examples"), ("v", "units")):
        yield f"{role}: {old} called otherwise", exchanged(found, role, old, "queries")


def of_memory(found: Memory, other: Memory, before: str, after: str) -> Iterator[tuple[str, Memory]]:
    for field in ("pre", "post", "out", "keys", "values", "w_in", "w_out", "up", "down", "source"):
        yield f"{field} of another", replace(found, **{field: getattr(other, field)})
    yield "pre for post", replace(found, post=found.pre)
    yield "post for pre", replace(found, pre=found.post)
    yield "keys turned", replace(found, key_dim=1 - found.key_dim)
    yield "values turned", replace(found, value_dim=1 - found.value_dim)
    yield (
        "keys and values exchanged",
        replace(found, keys=found.values, values=found.keys, key_dim=found.value_dim, value_dim=found.key_dim),
    )
    yield "the stream for what is read", replace(found, source=fmr.TensorId(before))
    yield "the stream for the output", replace(found, out=Site(fmr.TensorId(after)))
    yield "a gate inside", replace(found, fused_gate=not found.fused_gate)
    yield "another gate, or none", replace(found, w_gate=None if found.w_gate is not None else other.w_in)
    yield "coefficients shifted", replace(found, first=1)
    yield "coefficients along positions", replace(found, axis=1)
    yield "what is read for what is bent", replace(found, pre=Site(found.source))
    yield "keys for what is bent", replace(found, pre=Site(found.keys))


def of_stream(found: Stream, structure: Structure) -> Iterator[tuple[str, Stream]]:
    first, second, *rest = found.writes
    memory, attention = structure.mlps[0], structure.attention[0]
    for what, name in (("hidden units", memory.post.id), ("what is added", first.added), ("queries", attention.q.id)):
        yield f"{what} for a point", replace(found, points=(*found.points[:2], name, *found.points[2:]))
    yield "a point less", replace(found, points=(found.points[0], *found.points[2:]))
    yield "a write less", replace(found, writes=(first, *rest))
    changed = {
        "before and added exchanged": first._replace(before=first.added, added=first.before),
        "added of another": first._replace(added=second.added),
        "added twice": first._replace(times=2.0),
        "origin of another": first._replace(origin=second.after),
        "after of another": first._replace(after=second.after),
    }
    yield from ((what, replace(found, writes=(write, second, *rest))) for what, write in changed.items())
    for number, write in enumerate(found.writes):
        for point in {*found.points} - {write.origin}:
            others = found.writes[:number], found.writes[number + 1 :]
            yield (
                f"{point} for the origin of {number}",
                replace(found, writes=(*others[0], write._replace(origin=point), *others[1])),
            )
    points, norm = found.points, found.final_norm
    ordered = {
        "points in another order": (points[1], points[0], *points[2:]),
        "a point twice": (points[0], *points),
        "what layers read for a point": (*points[:2], memory.source, *points[2:]),
        "no norm among the points": points[:-1],
    }
    yield from ((what, replace(found, points=names)) for what, names in ordered.items())
    yield "writes in another order", replace(found, writes=(second, first, *rest))
    yield "the last write less", replace(found, writes=found.writes[:-1], points=(*points[:-2], points[-1]))
    yield "no final norm", replace(found, final_norm=None)
    yield "no final norm, nor a point", replace(found, final_norm=None, points=tuple(one for one in points if one != norm))
    assert structure.unembedding is not None
    ends = {"the norm of a layer": memory.source, "logits": structure.unembedding.id, "the last point": rest[-1].after}
    yield from ((f"{what} for the final norm", replace(found, final_norm=name)) for what, name in ends.items())


@pytest.mark.parametrize("name", EVERY)
def test_what_is_true_is_certified_again(name: str) -> None:
    run, structure = located(name)
    assert (len(structure.attention), len(structure.mlps), len(structure.residual.writes)) == (2, 2, 4)
    for found in (*structure.attention, *structure.mlps, structure.residual):
        assert holds(run, found)


@pytest.mark.parametrize("name", EVERY)
def test_no_wrong_field_of_an_attention_is_certified(name: str) -> None:
    run, structure = located(name)
    found, other = structure.attention[:2]
    lies = [*of_attention(found, other, HEADS), *of_output(found, structure)]
    assert [what for what, lie in lies if is_other(lie, found) and holds(run, lie)] == []


def test_what_is_chosen_by_scores_is_not_weighed_by_them() -> None:
    def gathered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        most = (q @ k.mT).topk(3, -1)
        seen = (
            v[:, :, None].expand(-1, -1, q.shape[2], -1, -1).gather(3, most.indices[..., None].expand(*q.shape[:3], 3, SIZE))
        )
        return (most.values.softmax(-1)[..., None, :] @ seen).squeeze(-2)

    run = fmr.run(Stack(lambda: Heads(gathered), Plain).eval(), torch.randint(11, (2, 5)))
    found, _ = fmr.locate(run).attention
    assert holds(run, found)
    assert not holds(run, replace(found, v=found.k))
    assert not holds(run, replace(found, q=found.k, k=found.q))


@pytest.mark.parametrize("name", EVERY)
def test_no_wrong_field_of_a_memory_is_certified(name: str) -> None:
    run, structure = located(name)
    layer = structure.layers[0]
    assert layer.resid_mid is not None
    lies = of_memory(structure.mlps[0], structure.mlps[1], layer.resid_mid.id, layer.resid_post.id)
    assert [what for what, lie in lies if holds(run, lie)] == []


BENT = (Plain, memories.Gated, memories.Bilinear, memories.Fused, memories.FusedOp, memories.Largest, memories.WeightFirst)


def moved(run: Run, found: Memory) -> Iterator[tuple[str, Memory]]:
    """A memory of which one part is what lies beside it in the graph, or the weight of the norm that it reads."""
    graph = run.graph.unfused
    for role in ("pre", "post", "out", "source", "up", "down", "keys", "values", "w_in", "w_out", "w_gate"):
        held = getattr(found, role)
        node = graph[getattr(held, "id", held)] if held is not None else None
        for other in (
            [] if node is None else [*(one.id for one in node.parents), *(one.id for one in graph.readers(node.id))]
        ):
            yield f"{other} for {role}", replace(found, **{role: Site(other) if isinstance(held, Site) else other})  # type: ignore[arg-type]
    yield "the norm's weight for what is read", replace(found, source=fmr.TensorId("param:norms.1.weight"))


@pytest.mark.parametrize("kind", BENT)
def test_no_part_of_a_memory_may_lie_one_op_beside(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    run = fmr.run(Stack(lambda: Heads(by_hand), kind, 1).eval(), torch.randint(11, (2, 5)))
    (found,) = fmr.locate(run).mlps
    assert holds(run, found)
    assert [what for what, lie in moved(run, found) if holds(run, lie)] == []


def test_the_larger_of_two_units_is_no_gate() -> None:
    run = fmr.run(Stack(lambda: Heads(by_hand), memories.Largest, 1).eval(), torch.randint(11, (2, 5)))
    (found,) = fmr.locate(run).mlps
    assert not found.fused_gate
    with pytest.raises(StructureError, match="is no gate and what it gates, for 24 memories"):
        replace(found, fused_gate=True).check(run)


@pytest.mark.parametrize("name", EVERY)
def test_no_wrong_field_of_a_stream_is_certified(name: str) -> None:
    run, structure = located(name)
    assert [what for what, lie in of_stream(structure.residual, structure) if holds(run, lie)] == []
