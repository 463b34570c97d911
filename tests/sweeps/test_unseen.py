"""Values that no op was seen to make, above the edits of a sweep: what was recorded stands for every row, if it may."""

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from tests.sweeps.looped import checked


class Masked(nn.Module):
    """Causal attention whose mask is made under vmap, of numbers of examples and positions, or of real tokens too.

    With `between` a module is called before the mask is read, so that nothing is known of what the mask was made of.
    """

    def __init__(self, between: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.idle, self.between = nn.Embedding(16, 8), nn.Identity(), between
        self.qk, self.v, self.mlp, self.head = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor, real: Tensor | None = None) -> Tensor:
        x, count = self.embed(input_ids), torch.arange(input_ids.shape[1])
        mask = self.mask(torch.arange(len(input_ids)), count, real)
        x, hidden = self.idle(x) if self.between else x, ~mask
        q, k = self.qk(x).chunk(2, -1)
        x = x + (q @ k.transpose(1, 2)).masked_fill(hidden, -1e9).softmax(-1) @ self.v(x)
        return self.head(x + self.mlp(x).tanh())

    def mask(self, batch: Tensor, count: Tensor, real: Tensor | None) -> Tensor:
        def allowed(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) & (b >= 0) if real is None else (k <= q) & real.index_select(1, k[None])[:, 0].gather(0, b)

        over_keys = torch.vmap(allowed, in_dims=(None, None, 0))
        over_queries = torch.vmap(over_keys, in_dims=(None, 0, None))
        return torch.vmap(over_queries, in_dims=(0, None, None))(batch, count, count)


SITES = [fmr.Site(path, positions=t) for path in ("qk", "mlp") for t in range(5)]


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("examples", [1, 2])
def test_a_mask_made_under_vmap_is_what_was_recorded(between: bool, examples: int) -> None:
    model, ids = Masked(between).eval(), torch.randint(0, 16, (examples, 5))
    opaque = fmr.run(model, ids).graph.opaque
    assert len(opaque) == 1
    assert bool(opaque[0].parents) is not between
    grid = checked(model, {"input_ids": ids}, SITES, edits.Scale(2.0), lambda out: out[:, -1, 3], at=-1)
    assert grid.how == "rows, cut", grid.why


def test_each_example_keeps_its_own_mask() -> None:
    real = torch.tensor([[True, False, True, True, True], [True, True, True, True, False]])
    inputs = {"input_ids": torch.randint(0, 16, (2, 5)), "real": real}
    grid = checked(Masked().eval(), inputs, SITES, edits.Scale(2.0), lambda out: out[:, -1, 3], at=-1)
    assert grid.how == "rows, cut", grid.why


def test_where_nothing_is_known_of_it_edits_before_it_go_another_way() -> None:
    inputs = {"input_ids": torch.randint(0, 16, (2, 5))}
    grid = checked(Masked(between=True).eval(), inputs, [fmr.Site("embed", positions=2)], edits.Scale(2.0))
    assert grid.how == "batched"
    assert "may depend on what was changed" in grid.why


class Indexed(nn.Module):
    """Rows that are picked, or scaled, by their numbers, which are made under vmap."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x: Tensor) -> Tensor:
        number = torch.vmap(lambda n: n * 1)(torch.arange(len(x)))
        h = self.first(x)
        if self.how == "picked":
            return self.last(h[number])
        return self.last(h * (1 + number[:, None] if self.how == "scaled" else 1 + number.sum()))


@pytest.mark.parametrize("how", ["picked", "scaled", "summed"])
@pytest.mark.parametrize("examples", [1, 2])
def test_rows_that_know_their_numbers_are_no_rows(how: str, examples: int) -> None:
    grid = checked(Indexed(how).eval(), torch.randn(examples, 4), ["first", "last"], edits.Scale(2.0))
    assert grid.how != "rows, cut"
    assert grid.why
