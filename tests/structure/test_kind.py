"""Self or cross, where queries or keys are made of more than one value."""

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.structure.idioms import WIDTH, joined, split


class Layer(nn.Module):
    """An attention whose keys and queries are made of `asked` and `seen`, as a way of making them says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.out, self.more = (nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        seen = {"segment": torch.cat([other, x], 1), "token": torch.cat([x[:, :1], other], 1)}.get(self.how, x)
        q = self.q(x[:, :1] if self.how == "token" else x)
        if self.how in ("turned", "turned across"):  # a matrix for each example
            turn = self.more(other.mean(1))
            q, seen = q @ (turn[:, :, None] * turn[:, None]), other if self.how == "turned across" else x
        if self.how in ("bent", "bent across"):  # a small network makes the keys
            seen = torch.relu(self.more(other if self.how == "bent across" else x))
        q, k, v = split(q), split(self.k(seen)), split(self.v(seen))
        z = (q @ k.mT).softmax(-1) @ v
        return x[:, : q.shape[2]] + self.out(joined(z))


class Layers(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Layer(how) for _ in range(2))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, other)
        return x


KINDS = {
    "segment": "cross",
    "token": "cross",
    "turned": "self",
    "turned across": "cross",
    "bent": "self",
    "bent across": "cross",
}


@pytest.mark.parametrize("how", KINDS)
def test_kinds_of_keys_and_queries_that_are_made_of_two_values(how: str) -> None:
    torch.manual_seed(0)
    found = fmr.locate(fmr.run(Layers(how), torch.randn(2, 6, WIDTH), torch.randn(2, 4, WIDTH)))
    assert [one.kind for one in found.attention] == [KINDS[how]] * 2, found.rejected
    assert all(one.certified for one in found.attention)
