"""What sends tokens to experts is located with the experts that it weighs, and false claims of it are refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.ids import Site
from fmr.runs.run import Run
from fmr.structure.parts import Structure
from tests.structure import experts
from tests.structure.idioms import WIDTH, Heads, Plain, Stack, weight
from tests.structure.memories import Fused, Squared


@cache
def located(kind: type[nn.Module]) -> tuple[Run, Structure]:
    torch.manual_seed(0)
    model = Stack(lambda: Heads(F.scaled_dot_product_attention), kind, 1).eval()
    run = fmr.run(model, torch.randint(11, (2, 5)))
    return run, fmr.locate(run)


CHOSEN = {experts.ExpertsChosen: 1, experts.ExpertsEmptied: 1, experts.Modules: 2, experts.ModulesWritten: 1}


@pytest.mark.parametrize("kind", experts.FOUND)
def test_a_router_is_located_with_its_experts(kind: type[nn.Module]) -> None:
    run, found = located(kind)
    (router,) = found.routers
    assert router.certified
    assert (router.n, router.scope, router.memories) == (experts.EXPERTS, "memory.0.router", found.mlps)
    assert router.size == f"{CHOSEN.get(kind, 'all')} of 3 experts"
    assert torch.equal(run[router.logits], run["memory.0.router"])
    share = run["memory.0.router"].softmax(-1).reshape(-1, 3)
    kept = share.topk(CHOSEN.get(kind, 3), -1)
    if kind is experts.ModulesMasked:
        share, kept = (one := share.topk(2, -1)).values / one.values.sum(-1, keepdim=True), one
        assert torch.allclose(router.maps(run), torch.zeros(10, 3).scatter(1, kept.indices, share))
    else:
        assert torch.allclose(router.maps(run), torch.zeros(10, 3).scatter(1, kept.indices, kept.values))


def test_a_plain_memory_and_a_gate_have_no_router() -> None:
    assert located(Plain)[1].routers == ()


@pytest.mark.parametrize("kind", [experts.Experts, experts.Modules, experts.ExpertsChosen])
def test_false_claims_are_refused(kind: type[nn.Module]) -> None:
    run, found = located(kind)
    (true,) = found.routers
    assert true.check(run)
    lies = {
        "other scores": replace(true, logits=Site(found.mlps[0].up)),
        "other weights": replace(true, weights=true.logits, indices=None),
        "another write": replace(true, write=found.residual.writes[0].added),
    }
    if true.indices is not None:
        lies["no choice"] = replace(true, indices=None)
        lies["another choice"] = replace(true, indices=Site("input:ids"))
    if len(true.memories) > 1:
        lies["one expert less"] = replace(true, memories=true.memories[1:])
    certified = []
    for lie, claim in lies.items():
        try:
            certified += [lie] if claim.check(run) else []
        except StructureError:
            continue
    assert certified == []


def test_a_router_is_explained_and_printed() -> None:
    _, found = located(experts.Modules)
    (router,) = found.routers
    assert "routers[0]  memory.0.router  2 of 3 experts  certified: weights" in repr(found)
    assert router.indices is not None
    assert found.explain(router.indices).roles == ("the chosen experts of structure.routers[0]",)
    assert found.roles[router.weights.id] == "router"
    assert fmr.locate(found.graph).routers[0].certified is None


class Choosing(experts.Modules):
    """Each expert chooses so many tokens: what a token's experts count for follows from other tokens."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        share, chosen = self.router(rows).softmax(-1).T.topk(self.best, -1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            out = out.index_add(0, chosen[number], expert(rows[chosen[number]]) * share[number, :, None])
        return out.view(x.shape)


class Shared(experts.Modules):
    """All experts for every token, weighed by scores that tokens share among them."""

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(1)
        return sum(share[..., n : n + 1] * expert(x) for n, expert in enumerate(self.experts))


@pytest.mark.parametrize("kind", [Choosing, Shared])
def test_a_choice_that_hears_other_tokens_is_no_router(kind: type[nn.Module]) -> None:
    _, found = located(kind)
    assert found.routers == ()
    assert any("is no router: " in str(one) for one in found.rejected)


class Capacity(experts.Modules):
    """An expert takes one token, and what others are sent there for is left out."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        share, chosen = self.router(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            here = torch.where(chosen == number)[0][:1]
            if len(here):
                out[here] = expert(rows[here]) * share[here, None]
        return out.view(x.shape)


def test_tokens_that_are_left_out_are_not_counted() -> None:
    _, found = located(Capacity)
    assert found.routers == ()
    assert any("as where experts take no more tokens than fit" in one.reason for one in found.rejected)


class Masked(experts.Modules):
    """All experts run; their shares are masked and brought to a sum of one."""

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        share = share * torch.zeros_like(share).scatter(-1, share.topk(self.best, -1).indices, 1.0)
        share = share / share.sum(-1, keepdim=True)
        return sum(share[..., n : n + 1] * expert(x) for n, expert in enumerate(self.experts))


def test_a_mask_and_a_sum_of_shares_belong_to_the_router() -> None:
    run, found = located(Masked)
    (router,) = found.routers
    assert router.certified
    assert ((router.maps(run) > 0).sum(1) == 2).all()


class Dispatched(experts.Modules):
    """Tokens are put in places of their expert by a product, and taken back by another."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        share, chosen = self.router(rows).softmax(-1).max(-1)
        places = torch.zeros(len(rows), experts.EXPERTS, len(rows))
        places[torch.arange(len(rows)), chosen, torch.arange(len(rows))] = 1.0
        read = torch.einsum("tec,td->ecd", places, rows)
        made = torch.stack([expert(read[n]) for n, expert in enumerate(self.experts)])
        return torch.einsum("tec,ecd->td", places * share[:, None, None], made).view(x.shape)


class Beside(experts.Modules):
    """One expert for a token, and one for all."""

    def __init__(self) -> None:
        super().__init__(1)
        self.shared = Squared()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


def test_why_there_is_no_router_is_true() -> None:
    _, found = located(Dispatched)
    reasons = [one.reason for one in found.rejected if one.what == "router"]
    assert reasons == ["memory.0/mul#0, [10, 3, 10], has no number for each of its 3 experts"]
    torch.manual_seed(0)
    model = Stack(lambda: Heads(F.scaled_dot_product_attention), Beside, 1).eval()
    found = fmr.locate(fmr.run(model, torch.tensor([[3]])))
    (reason,) = [one.reason for one in found.rejected if one.what == "router"]
    assert reason.startswith("of its 3 experts this run shows one, memory.0.experts.")


def test_another_run_may_go_to_other_experts() -> None:
    torch.manual_seed(0)
    model = Stack(lambda: Heads(F.scaled_dot_product_attention), lambda: experts.Modules(1), 1).eval()
    runs = [fmr.run(model, torch.tensor([[n]])) for n in range(11)]
    assert len({repr([name for name in run.graph.calls if "experts" in name]) for run in runs}) > 1
    many = fmr.run(model, torch.arange(11)[None])
    (router,) = fmr.locate(many).routers
    assert all(router.check(run) for run in runs)


class Sparse(experts.Experts):
    """Weights for all experts, of which most are zero, and the coefficients weighed in one product of three."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows)
        share = torch.where(torch.arange(3) == 1, scores.softmax(-1), 0.0)
        hidden = torch.einsum("tm,emh->teh", rows, self.up).relu()
        return torch.einsum("teh,ehm,te->tm", hidden, self.down, share).view(x.shape)


def test_experts_that_no_token_goes_to_are_not_asked() -> None:
    run, found = located(Sparse)
    (router,) = found.routers
    assert router.certified
    assert torch.equal(router.maps(run).bool().sum(0), torch.tensor([0, 10, 0]))


class OneUnit(experts.Experts):
    """Experts of one unit, which says nothing to some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(3, WIDTH, 1), weight(3, 1, WIDTH)


class Noisy(experts.Modules):
    """Noise of a size that tokens choose is added to the scores."""

    def __init__(self, best: int = 2) -> None:
        super().__init__(best)
        self.size = nn.Linear(WIDTH, experts.EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, WIDTH)
        clean = self.router(rows)
        scores = clean + torch.zeros_like(clean) * F.softplus(self.size(rows))
        top = scores.topk(self.best, -1)
        share = torch.full_like(scores, float("-inf")).scatter(-1, top.indices, top.values).softmax(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            here = (top.indices == number).any(-1)
            if here.any():
                out[here] += expert(rows[here]) * share[here, number, None]
        return out.view(x.shape)


@pytest.mark.parametrize("kind", [OneUnit, Noisy])
def test_silent_experts_and_noisy_scores_have_a_router(kind: type[nn.Module]) -> None:
    run, found = located(kind)
    (router,) = found.routers
    assert router.certified
    assert router.logits.id == ("memory.0/add#0" if kind is Noisy else "memory.0.router/linear#0")
    assert [one for one in found.rejected if one.what == "router"] == []
    assert torch.allclose(router.maps(run).sum(1), torch.ones(10))


class Shares(nn.Module):
    """Memories of one unit each, each with its share."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * self.router(x).softmax(-1))


def test_what_a_softmax_is_made_of_gates_and_is_no_key() -> None:
    (found,) = located(Shares)[1].mlps
    assert (found.w_in, found.w_gate) == ("param:memory.0.up.weight", "param:memory.0.router.weight")


class Two(nn.Module):
    """One number says how much of each of two memories is written."""

    def __init__(self, lerp: bool = False) -> None:
        super().__init__()
        self.router, self.a, self.b, self.lerp = nn.Linear(WIDTH, 1), Squared(), Squared(), lerp

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).sigmoid()
        a, b = self.a(x), self.b(x)
        return torch.lerp(b, a, share) if self.lerp else share * a + (1 - share) * b


@pytest.mark.parametrize("lerp", [False, True])
def test_one_number_for_two_memories_is_no_router(lerp: bool) -> None:
    found = fmr.locate(
        fmr.run(Stack(lambda: Heads(F.scaled_dot_product_attention), lambda: Two(lerp), 1), torch.tensor([[3, 1]]))
    )
    (reason,) = [one.reason for one in found.rejected if one.what == "router"]
    assert reason.startswith("its single number weighs memory.0.")
    assert reason.endswith("none has one for each of its 2 experts")


@pytest.mark.parametrize("kind", [experts.Modules, experts.ModulesWritten, Noisy])
def test_one_expert_of_one_token_is_told(kind: type[nn.Module]) -> None:
    make = kind if kind is experts.ModulesWritten else lambda: kind(1)
    found = fmr.locate(fmr.run(Stack(lambda: Heads(F.scaled_dot_product_attention), make, 1), torch.tensor([[3]])))
    assert found.routers == ()
    (reason,) = [one.reason for one in found.rejected if one.what == "router"]
    assert reason.startswith("of its 3 experts this run shows one, memory.0.experts.")


class Handed(experts.Modules):
    """The weights of experts, each with a gate, are put in their place while the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Fused() for _ in range(experts.EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        self.experts.to(x.device)
        return super().forward(x)


def test_first_projections_of_experts_are_no_routers() -> None:
    _, found = located(Handed)
    assert [one.reason for one in found.rejected if one.what == "router"] == []
    assert len(found.routers) == 1
