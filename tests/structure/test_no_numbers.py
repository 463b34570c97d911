"""Where nothing finite can be compared nothing is certified, and of values that are partly NaN the rest is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.structure.parts import Structure
from tests.structure import experts
from tests.structure.idioms import HEADS, SIZE, Heads, Plain, Stack, causal


def left_padded(examples: int, value: float = -torch.inf) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention in which the first position of the first examples is masked, and what comes later: a whole row is."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
        first = torch.zeros(len(q), 1, 1, k.shape[2], dtype=torch.bool)
        first[:examples, :, :, 0] = True
        scores = q @ k.mT * SIZE**-0.5
        return scores.masked_fill(first | causal(scores), value).softmax(-1) @ v

    return mix


def located(examples: int, groups: int = 2) -> Structure:
    torch.manual_seed(0)
    model = Stack(lambda: Heads(left_padded(examples), groups), Plain).eval()
    return fmr.locate(fmr.run(model, torch.randint(11, (4, 4))))


def test_what_is_all_nan_is_told_so() -> None:
    """The first layer makes the first position NaN, which the second hands to all."""
    found = located(4)
    assert [one.scope for one in (*found.attention, *found.mlps)] == ["attention.0", "memory.0"]
    assert len(found.residual.writes) == 4
    told = {one.id: one.reason for one in found.rejected if one.what != "mixer"}
    nan = "the values of {} are all NaN, which proves nothing"
    assert told == {
        "attention.1/softmax#0": nan.format("attention.1/matmul#1"),
        "attention.1.out/linear#0": nan.format("attention.1.out/linear#0"),
        "memory.1.down/linear#0": nan.format("norms.3/layer_norm#0"),
    }


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_where_some_examples_are_nan_the_others_are_compared(groups: int) -> None:
    found = located(2, groups)
    assert found.rejected == ()
    assert [one.n_kv_heads for one in found.attention] == [groups, groups]
    assert all("places" in one.certified.errors for one in found.mlps if one.certified)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_a_run_without_examples_or_positions_certifies_nothing(batch: int, length: int) -> None:
    found = fmr.locate(fmr.run(Stack(Plain, Plain, 1), torch.zeros(batch, length, dtype=torch.int64)))
    assert (found.mlps, found.streams) == ((), ())
    assert {one.reason.rpartition("], ")[2] for one in found.rejected} == {"that prove anything"}


class Broken(nn.Module):
    """A model whose embedding of one token of the first example is NaN."""

    def __init__(self, model: Stack) -> None:
        super().__init__()
        self.model = model
        self.where = nn.Buffer(torch.zeros(2, 5, 1).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)))
        model.tokens.register_forward_hook(lambda module, given, out: out + self.where)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [experts.Experts, experts.Modules, experts.ExpertsChosen])
def test_a_router_is_proven_by_the_tokens_that_are_not_nan(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Broken(Stack(lambda: Heads(left_padded(0)), kind, 1)).eval()
    (router,) = fmr.locate(fmr.run(model, torch.randint(11, (2, 5)))).routers
    assert router.certified
