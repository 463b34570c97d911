"""The table of the input tokens that a stream begins with, also where it is narrow or holds several tables."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from tests.structure.blocks import Block
from tests.structure.idioms import TOKENS, WIDTH, weight


class Rows(nn.Module):
    """Two layers on what is made of rows of a table in the way of `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.tokens, self.places = kind, nn.Embedding(40, 5), weight(64, 5)
        self.norm, self.wide, self.wider = nn.LayerNorm(5), nn.Linear(5, WIDTH), nn.Linear(8, WIDTH)
        self.near, self.blocks = nn.Conv1d(5, WIDTH, 3, padding=1), nn.ModuleList(Block() for _ in range(2))
        self.begins = nn.Parameter(torch.arange(2) * TOKENS, requires_grad=False) if kind == "tables" else None

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        ids = ids if self.begins is None else ids + self.begins.repeat(3)
        places = self.places[(ids > 3).cumsum(-1)]
        x = self.tokens.weight[ids] if self.kind == "indexed" else self.tokens(ids)
        match self.kind:
            case "behind places":
                x = self.wide(self.norm(places + x))
            case "factored" | "indexed":
                x = self.wide(self.norm(x + self.places[: ids.shape[1]]))
            case "beside others":
                x = self.wider(torch.cat([x, seen], -1))
            case "bent":
                x = F.relu(self.near(x.mT)).mT
            case _:
                x = F.pad(x, (0, WIDTH - 5))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("factored", "tokens/embedding#0"),
        ("indexed", "/getitem#1"),
        ("behind places", "tokens/embedding#0"),
        ("tables", "tokens/embedding#0"),
        ("beside others", None),
        ("bent", None),
    ],
)
def test_the_table_of_the_tokens(kind: str, found: str | None) -> None:
    torch.manual_seed(0)
    structure = fmr.locate(fmr.run(Rows(kind), torch.randint(TOKENS, (2, 6)), torch.randn(2, 6, 3)))
    assert structure.embedding == (fmr.Site(found) if found else None)
