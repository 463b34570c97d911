"""Where a metric reads the logits of two tokens, no others are made, if the ops allow it; the answer is the loop's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from fmr.sweeps import log_prob, logit_diff
from fmr.sweeps.onreplay import OnReplay
from fmr.sweeps.task import Task
from tests.sweeps.looped import checked

WIDTH, TOKENS = 8, 24


class Model(nn.Module):
    """A block and an unembedding of some kind."""

    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mlp, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH), head
        self.out = nn.Linear(WIDTH, TOKENS)
        self.weight = nn.Parameter(torch.randn(WIDTH, TOKENS))
        self.square = nn.Linear(TOKENS, TOKENS)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        x = x + self.mlp(x).tanh().cumsum(1)
        logits = self.out(3 * x)
        if self.head == "linear":
            return logits
        if self.head == "capped":
            return (logits / 3).tanh() * 3
        if self.head == "precise":
            return logits.double() * 3
        if self.head == "tied":
            return x @ self.embed.weight.T
        if self.head == "columns":
            return torch.addmm(self.out.bias, x.flatten(0, 1), self.weight).view(*x.shape[:2], TOKENS)
        if self.head == "normed":
            return logits.log_softmax(-1)
        if self.head == "mixed":
            return self.square(logits)
        if self.head == "read":
            return {"logits": logits, "most": logits.logsumexp(-1)}
        return 5 * logits.flip(-1)  # the flip is whole, what comes after it is not


NARROWED = {
    "linear": 1,
    "capped": 4,
    "precise": 0,
    "tied": 1,
    "columns": 0,
    "normed": 0,
    "mixed": 1,
    "read": 1,
    "flipped": 1,
}
"""How many values are made in part: none where arguments count them, or where a sum of others would tell in more digits."""


@pytest.mark.parametrize("head", NARROWED)
@pytest.mark.parametrize("examples", [1, 3])
def test_two_tokens_want_two_columns(head: str, examples: int) -> None:
    model, inputs = Model(head).eval(), {"input_ids": torch.randint(0, TOKENS, (examples, 5))}
    sites = [fmr.Site(path, positions=t) for path in ("embed", "mlp") for t in range(5)]
    metric = logit_diff([3] * examples, list(range(5, 5 + examples)))
    grid = checked(model, inputs, sites, edits.Scale(2.0), metric)
    assert grid.how in (("rows", "rows, cut") if head == "precise" else ("rows, cut",)), grid.why
    going = OnReplay(Task(model, inputs, sites, edits.Scale(2.0), metric), None, None, False)
    assert len(going.kind.entries) == NARROWED[head]
    assert (going.entries is not None) is (NARROWED[head] > 0)


@pytest.mark.parametrize("sites", [["out"], ["/view#0", "mlp"]])
def test_what_is_edited_stays_whole(sites: list[str]) -> None:
    model = Model("linear" if "out" in sites else "columns").eval()
    inputs = {"input_ids": torch.randint(0, TOKENS, (2, 5))}

    def turned(value: Tensor, context: object) -> Tensor:
        return value.flip(-1)

    grid = checked(model, inputs, sites, turned, logit_diff(3, 5))
    assert grid.how == "rows, cut", grid.why


def test_a_metric_that_reads_all_tokens_gets_them() -> None:
    model, inputs = Model("linear").eval(), {"input_ids": torch.randint(0, TOKENS, (2, 5))}
    task = Task(model, inputs, ["mlp"], edits.Scale(2.0), log_prob(3))
    assert OnReplay(task, None, None, False).entries is None
    checked(model, inputs, ["mlp"], edits.Scale(2.0), log_prob(3))


def test_what_mixes_entries_only_under_an_edit_is_made_whole() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.a, self.head = nn.Embedding(16, 4), nn.Linear(4, 4), nn.Linear(4, 16)

        def forward(self, input_ids: Tensor) -> Tensor:
            out = self.head(self.a(self.embed(input_ids)))
            return out + (out - 6).relu().cumsum(-1)

    sites = [fmr.Site(path, positions=7, units=u) for path in ("a", "embed") for u in range(4)]
    checked(Head().eval(), {"input_ids": torch.arange(8)[None]}, sites, edits.Scale(-12.0), logit_diff(right=1, wrong=12))
