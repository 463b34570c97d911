"""What heads and memories write is what is told: all of it, nothing beside it, by vectors of the stream."""

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.errors import StructureError
from tests.structure.idioms import HEADS, WIDTH, Plain, Stack, joined, split, weight


class Absorbed(nn.Module):
    """Keys and values are one latent; each head has a matrix for what it mixes, before the projection of all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.latent, self.out = nn.Linear(WIDTH, 5 * HEADS), nn.Linear(WIDTH, 5), nn.Linear(WIDTH, WIDTH)
        self.up = weight(HEADS, 5, WIDTH // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, latent = self.q(x).unflatten(-1, (HEADS, 5)).transpose(1, 2), self.latent(x)[:, None]
        return self.out(joined((q @ latent.mT * 0.4).softmax(-1) @ latent @ self.up))


def test_the_output_of_heads_with_a_matrix_each_is_what_all_are_projected_to() -> None:
    found = fmr.locate(fmr.run(Stack(Absorbed, Plain).eval(), torch.randint(11, (2, 6))))
    assert [str(one.out.id) for one in found.attention if one.out] == [f"attention.{n}.out/linear#0" for n in range(2)]
    assert [one.n_kv_heads for one in found.attention] == [1, 1]


class Latents(nn.Module):
    """A few learned vectors look at the stream; what they see is added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = weight(3, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        q, k, v = split(self.q(latents)), split(self.k(x)), split(self.v(x))
        return latents + self.out(joined((q @ k.mT * 0.3).softmax(-1) @ v))


def test_vectors_that_differ_by_position_are_no_bias_of_an_output() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Latents(), nn.Linear(WIDTH, 7))
    (found,) = fmr.locate(fmr.run(model.eval(), torch.randn(2, 6, WIDTH))).attention
    assert found.out is not None
    assert str(found.out.id) == "1.out/linear#0"


class Groups(nn.Module):
    """Memories in groups, whose keys are one parameter that counts the units of the stream first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(WIDTH, 5, 5), weight(5, 5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btgn,gnd->btd", torch.einsum("btd,dgn->btgn", x, self.up).relu(), self.down)


def test_units_of_the_stream_are_no_experts() -> None:
    found = fmr.locate(fmr.run(Stack(Absorbed, Groups).eval(), torch.randint(11, (2, 6))))
    for expert in (None, 1):
        with pytest.raises(StructureError, match="no row or column is known to be that of one memory"):
            found.mlps[0].memory(2, expert=expert)


class Sinks(nn.Module):
    """A learned score beside those of the keys, from all of which the largest is taken; its share weighs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.sink = weight(HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        scores = q @ k.mT * 0.3
        scores = torch.cat([scores, self.sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
        scores = scores - scores.max(-1, keepdim=True).values
        return self.out(joined(scores.softmax(-1)[..., :-1] @ v))


def test_queries_of_one_head_are_told_beside_a_sink() -> None:
    run = fmr.run(Stack(Sinks, Plain).eval(), torch.randint(11, (2, 6)))
    for block in fmr.locate(run).attention:
        assert torch.equal(run[block.head(2).q], run[block.q.id][:, 2])
        assert torch.equal(run[block.head(2).k], run[block.k.id][:, 2])


class Asked(nn.Module):
    """Learned vectors look at what is there, with as many heads as is said, and are mixed again as queries ask."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.asked, self.heads = weight(5, WIDTH), heads
        self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(one, self.heads) for one in (self.asked.expand(len(x), -1, -1), self.k(x), self.v(x)))
        return self.out(joined((v @ q.mT).softmax(-1) @ ((q @ k.mT * 0.3).softmax(-1) @ v)))


@pytest.mark.parametrize("heads", [1, 4])
def test_learned_queries_of_one_head_are_found_as_those_of_several(heads: int) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Asked(heads), nn.Linear(WIDTH, 7))
    (found,) = fmr.locate(fmr.run(model.eval(), torch.randn(2, 6, WIDTH))).attention
    assert (found.n_heads, found.head_dim, found.kind) == (heads, WIDTH // heads, "cross")


class Multiplied(nn.Module):
    """What heads mix is multiplied, each with what another one mixed or with itself, before it is projected."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        z = (q @ k.mT * 0.3).softmax(-1) @ v
        return self.out(joined(z * (1 + z.roll(self.by, 1))))


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("by", range(4))
def test_heads_that_are_multiplied_with_one_another_do_not_write_a_sum(by: int, length: int) -> None:
    found = fmr.locate(fmr.run(Stack(lambda: Multiplied(by), Plain).eval(), torch.randint(11, (1, length))))
    assert len(found.attention) == (0 if by else 2)
    refused = [one.reason for one in found.rejected if one.what == "attention"]
    assert all(one.startswith("its output is not the sum of what its parts write") for one in refused)
    assert len(refused) == (2 if by else 0)


class Averaged(Multiplied):
    """What heads mix is multiplied with its mean over positions: that of each head, or of another one."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        z = (q @ k.mT * 0.3).softmax(-1) @ v
        return self.out(joined(z * z.mean(2, keepdim=True).roll(self.by, 1)))


@pytest.mark.parametrize("by", range(4))
def test_heads_that_are_multiplied_with_themselves_elsewhere_write_a_sum(by: int) -> None:
    found = fmr.locate(fmr.run(Stack(lambda: Averaged(by), Plain).eval(), torch.randint(11, (1, 6))))
    assert len(found.attention) == (0 if by else 2)
