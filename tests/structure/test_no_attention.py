"""What only looks like an attention, a stream or a gate is refused with what is true of it; what is found is what acts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.runs.run import Run
from fmr.structure.parts import Structure
from tests.structure import experts
from tests.structure.idioms import HEADS, SIZE, WIDTH, Heads, Plain, Stack, joined, split
from tests.structure.mixers import Parts, heads


def located(
    layer: Callable[[], nn.Module], examples: int = 2, steps: int = 6, memory: type = Plain
) -> tuple[Run, Structure]:
    torch.manual_seed(0)
    model = Stack(layer, memory, 1).eval()
    run = fmr.run(model, torch.randint(11, (examples, steps)))
    return run, fmr.locate(run)


def why(found: Structure, what: str = "attention") -> str:
    """Why the first value that looks like such a part is none."""
    return next(one.reason for one in found.rejected if one.what == what)


class Along(nn.Module):
    """Heads whose weights add up to one along a dimension; few as they are, those of a query may stay below one."""

    def __init__(self, dim: int, number: int, groups: int) -> None:
        super().__init__()
        self.dim, self.number, self.groups = dim, number, groups
        self.q, self.out = nn.Linear(WIDTH, number * 2), nn.Linear(number * 2, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, groups * 2), nn.Linear(WIDTH, groups * 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x), self.number), split(self.k(x), self.groups), split(self.v(x), self.groups)
        return self.out(joined((q @ k.mT).softmax(self.dim) @ v))


@pytest.mark.parametrize(
    ("dim", "number", "groups", "examples", "steps", "over"),
    [(1, 16, 16, 2, 6, "heads"), (1, 32, 32, 1, 2, "heads"), (1, 16, 1, 2, 4, "heads"), (0, 4, 4, 16, 4, "examples")],
)
def test_a_softmax_over_heads_or_examples_is_no_attention(
    dim: int, number: int, groups: int, examples: int, steps: int, over: str
) -> None:
    _, found = located(lambda: Along(dim, number, groups), examples, steps)
    assert found.attention == ()
    assert why(found).startswith(f"its softmax is over {over}: what weighs the values adds up to one over those")


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_softmax_over_keys_or_queries_is_one(dim: int) -> None:
    run, found = located(lambda: Along(dim, 4, 4))
    assert found.attention[0].certified
    assert torch.allclose(found.attention[0].maps(run).sum(dim), torch.ones(2, 4, 6))


def windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys in two windows, of which a softmax says how much each counts."""
    q, k, v = (one.unflatten(2, (2, 3)) for one in (q, k, v))
    return ((q @ k.mT).softmax(2) @ v).flatten(2, 3)


def test_a_softmax_over_windows_is_no_attention() -> None:
    _, found = located(lambda: Heads(windows))
    assert found.attention == ()
    assert why(found).startswith("its softmax is over neither keys nor queries")


class AmongHeads(Heads):
    """The heads of one token attend to one another."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(F.scaled_dot_product_attention)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)) for layer in (self.q, self.k, self.v))
        return self.out(((q @ k.mT).softmax(-1) @ v).flatten(-2))


@pytest.mark.parametrize(("steps", "size"), [(6, SIZE), (HEADS, SIZE), (6, 1)])
def test_heads_that_attend_to_one_another_are_no_attention_among_positions(steps: int, size: int) -> None:
    _, found = located(lambda: AmongHeads(size), steps=steps)
    assert found.attention == ()
    assert why(found) == "its queries and its keys are units of one position: it weighs heads by heads, not positions"


class Mixed(Heads):
    """Weights make other patterns, or other scores, of those of all heads."""

    def __init__(self, over: nn.Module, before: bool = False) -> None:
        super().__init__(self.mixed)
        self.over, self.before = over, before

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return (self.over(scores).softmax(-1) if self.before else self.over(scores.softmax(-1))) @ v


@pytest.mark.parametrize("over", [lambda: nn.Conv2d(HEADS, HEADS, 3, padding=1, bias=False), lambda: nn.Linear(6, 6)])
def test_a_pattern_that_is_mixed_over_queries_or_keys_is_refused(over: Callable[[], nn.Module]) -> None:
    _, found = located(lambda: Mixed(over()))
    assert found.attention == ()
    assert why(found).startswith("weights mix what it gives to several queries or keys, at attention.0.over/")


@pytest.mark.parametrize("before", [True, False])
def test_heads_that_are_weighed_by_one_another_have_no_factors(before: bool) -> None:
    run, found = located(lambda: Mixed(nn.Conv2d(HEADS, HEADS, 1, bias=False), before))
    (block,) = found.attention
    assert torch.allclose(block.maps(run).sum(-1), torch.ones(2, HEADS, 6))  # before they are mixed
    with pytest.raises(
        StructureError, match="by one another, in attention.0.over" if before else "has no weights of single"
    ):
        block.factors(run)


class State(Parts):
    """The delta rule, from a state of zeros that is made as something of the input's kind."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__(State.read)
        self.first = made

    def read(self, x: Tensor) -> Tensor:
        q, k, v = heads(self, x)
        rate, state, made = self.narrow(x).sigmoid().mT, self.first(q[:, :, 0, :, None] * v[:, :, 0, None]), []
        for t in range(x.shape[1]):
            new = (v[:, :, t] - (k[:, :, t, None] @ state)[:, :, 0]) * rate[:, :, t, None]
            state = state + k[:, :, t, :, None] * new[:, :, None]
            made.append((q[:, :, t, None] @ state)[:, :, 0])
        return joined(torch.stack(made, 2))


@pytest.mark.parametrize("made", [torch.zeros_like, lambda x: x.new_zeros(x.shape), lambda x: torch.zeros(x.shape)])
def test_the_state_of_a_loop_is_no_stream(made: Callable[[Tensor], Tensor]) -> None:
    _, found = located(lambda: State(made))
    (stream,) = found.streams
    assert len(stream.writes) == 2
    assert [(one.kind, one.direction) for one in found.mixers] == [("recurrence", "causal")]
    assert not any("sigmoid stands where a softmax would" in one.reason for one in found.rejected)


def negated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return -(q @ k.mT).softmax(-1) @ v


def exchanged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[:, [2, 0, 3, 1]] @ v


def summed_in_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys as three by two, of which the values are summed over the three alone, and a mean is taken of what that gives."""
    pattern = (q @ k.mT).softmax(-1).unflatten(-1, (3, 2))
    return torch.einsum("bhqmn,bhmd->bhqnd", pattern, v[:, :, :3]).mean(3)


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (summed_in_part, "its values are summed over a part of what the softmax is over"),
        (negated, "what weighs the values at attention.0/matmul#1 is the softmax negated"),
        (exchanged, "which dimension of attention.0/getitem#0, [2, 4, 6, 6], counts its 4 heads cannot be followed"),
    ],
)
def test_what_is_said_of_other_patterns_is_true(mix: Callable[[Tensor, Tensor, Tensor], Tensor], reason: str) -> None:
    _, found = located(lambda: Heads(mix))
    assert found.attention == ()
    assert why(found).startswith(reason)


class OfUnits(Heads):
    """What heads mix, weighed by one another or not, says by a softmax how much each unit of a matrix counts."""

    def __init__(self, mixed: bool) -> None:
        super().__init__(torch.matmul)
        self.weights = nn.Parameter(torch.randn(HEADS, HEADS)) if mixed else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (split(one(x)) for one in (self.q, self.k, self.v))
        z = (q @ k.mT).softmax(-1) @ v
        z = z if self.weights is None else torch.einsum("bhqd,hg->bgqd", z, self.weights)
        return self.out(joined(z.softmax(-1) @ (k.mT @ v)))


@pytest.mark.parametrize("mixed", [False, True])
def test_what_a_pattern_mixes_is_no_score_of_its_values(mixed: bool) -> None:
    _, found = located(lambda: OfUnits(mixed))
    assert [(one.kind, one.q.id, one.certified is not None) for one in found.attention] == [
        ("self", "attention.0/transpose#0", True)
    ]
    assert "/softmax#1" in next(one.id for one in found.rejected if one.what == "attention")


class Shares(Heads):
    """What heads write, times what a memory makes of the mean of all tokens: the same for each of them."""

    def __init__(self, words: str) -> None:
        super().__init__(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
        self.memory, self.words = Plain(), words

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        share = self.memory(x.mean(1))
        return torch.einsum(self.words, super().forward(x), share) if self.words else super().forward(x) * share[:, None]


@pytest.mark.parametrize("words", ["", "btd,bd->btd"])
def test_a_memory_that_only_weighs_what_heads_write_is_none(words: str) -> None:
    _, found = located(lambda: Shares(words))
    assert [one.scope for one in found.mlps] == ["memory.0"]
    assert why(found, "memory") == "its output only weighs what another part writes"


class Lazy(nn.Module):
    """Two layers that mix by the pattern of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.out = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        pattern = (split(self.q(x)) @ split(self.k(x)).mT).softmax(-1)
        for v, out in zip(self.v, self.out, strict=True):
            x = x + out(joined(pattern @ split(v(F.layer_norm(x, (WIDTH,))))))
        return x


def test_a_pattern_that_several_layers_share_is_told_where_it_is_used_again() -> None:
    torch.manual_seed(0)
    found = fmr.locate(fmr.run(Lazy().eval(), torch.randn(2, 6, WIDTH)))
    assert [block.z.id for block in found.attention] == ["/matmul#1"]
    again = next(one for one in found.rejected if one.id == "/matmul#2")
    assert again.reason.startswith("it weighs other values by the pattern of /softmax#0")


class Idle(Parts):
    """A gate that is the same whatever is read."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.v(x).cumsum(1) * torch.sigmoid(m.g(x) * 0))


def test_a_gate_that_reads_nothing_is_none() -> None:
    _, found = located(Idle)
    (mixer,) = found.mixers
    assert (mixer.kind, mixer.gates, len(mixer.inputs)) == ("recurrence", (), 1)


def lerped(m: Parts, x: Tensor) -> Tensor:
    made, h = [], torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.lerp(h, m.v(x[:, t]), 0.3)
        made.append(h)
    return torch.stack(made, 1)


def test_steps_of_a_loop_are_known_where_each_is_one_op() -> None:
    _, found = located(lambda: Parts(lerped))
    assert [(one.kind, one.direction) for one in found.mixers] == [("recurrence", "causal")]


class All(experts.Modules):
    """Each token goes to all experts, in the order of their weights."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        top = self.router(x).softmax(-1).topk(experts.EXPERTS, -1)
        out = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            token, place = (top.indices == n).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(x[token]) * top.values[token, place, None])
        return out.unflatten(0, (2, -1))


class Hard(experts.Modules):
    """Each token goes to one expert, which counts in full."""

    def forward(self, x: Tensor) -> Tensor:
        one = F.one_hot(self.router(x).argmax(-1), experts.EXPERTS).to(x)
        return sum((one[..., n, None] * expert(x) for n, expert in enumerate(self.experts)), torch.zeros_like(x))


def test_experts_that_all_see_a_token_are_told_apart_in_the_order_of_their_weights() -> None:
    run, found = located(lambda: Heads(F.scaled_dot_product_attention), memory=All)
    (router,) = found.routers
    assert torch.allclose(router.maps(run), run["memory.0.router"].softmax(-1), atol=1e-6)


def test_a_router_that_only_chooses_is_told() -> None:
    _, found = located(lambda: Heads(F.scaled_dot_product_attention), memory=Hard)
    assert found.routers == ()
    assert why(found, "router").startswith("it chooses among experts, and no single value that is made of its scores weighs")


def pattern(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * SIZE**-0.5).softmax(-1)


CHANGED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "clipped": (
        lambda q, k, v: torch.clip(pattern(q, k) * 1.1 - 0.05, 0, 1) @ v,
        "attention.0/sub#0 changes it (sub, clamp)",
    ),
    "averaged": (
        lambda q, k, v: pattern(q, k).mean(1, keepdim=True) @ v,
        "what weighs the values is told of several",
    ),
    "added up": (lambda q, k, v: pattern(q, k).sum(1)[:, None] @ v, "what weighs the values is told of several"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_becomes_of_a_softmax_before_it_weighs_values_is_told(name: str) -> None:
    mix, reason = CHANGED[name]
    _, found = located(lambda: Heads(mix))
    assert found.attention == ()
    assert why(found).startswith(reason)


class Joined(Heads):
    """Something else is added to what heads mix before the projection: more of what is read, or a learned vector."""

    def __init__(self, beside: bool) -> None:
        super().__init__(lambda q, k, v: pattern(q, k) @ v)
        self.beside = nn.Linear(WIDTH, WIDTH) if beside else None
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        z = joined(self.mix(split(self.q(x)), split(self.k(x)), split(self.v(x))))
        return self.out(z + (self.bias if self.beside is None else self.beside(x)))


def test_a_projection_of_heads_and_something_else_is_no_output_of_the_heads() -> None:
    _, found = located(lambda: Joined(True))
    assert found.attention[0].out is None
    assert (
        why(found, "output")
        == "attention.0.beside/linear#0 is added to attention.0/matmul#1, what heads mix, before both are projected"
    )
    _, found = located(lambda: Joined(False))
    assert found.attention[0].certified
    assert found.attention[0].out is not None


def test_an_exponential_that_nothing_divides_is_named_where_a_softmax_would_be() -> None:
    class Off(Along):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (split(one(x), self.number) for one in (self.q, self.k, self.v))
            return self.out(joined(torch.exp(q @ k.mT) @ v))

    _, found = located(lambda: Off(-1, 4, 4))
    assert found.attention == ()
    assert why(found) == "exp stands where a softmax would, at attention.0/exp#0, as in exp attention"
