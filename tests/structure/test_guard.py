"""One bad spot costs one finding, never the search."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fmr
from fmr.ids import TensorId
from fmr.structure.normal.form import form_of
from tests.small import Fn
from tests.structure import scores
from tests.structure.idioms import WIDTH, Heads, Plain, Stack


def model() -> nn.Module:
    torch.manual_seed(0)
    return Stack(lambda: Heads(scores.einsum), Plain).eval()


def failing(step: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A step of the search that fails at one of its calls."""
    calls: list[Any] = []

    def fail(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == at + 1:
            raise ZeroDivisionError("integer modulo by zero")
        return step(*given)

    return fail


LOCATE = sys.modules["fmr.structure.locate"]


@pytest.mark.parametrize(
    ("step", "at", "left", "what"),
    [
        ("_attention_of", 0, (1, 2, 1, 2), "attention"),
        ("memory_of", -1, (2, 1, 1, 1), "memory"),
        ("find_streams", 0, (2, 0, 0, 0), "residual stream"),
        ("find_stacks", 0, (2, 2, 1, 2), "stack"),
        ("form_of", 0, (0, 2, 1, 2), "attention"),
        ("undivided", 0, (2, 2, 1, 2), "attention"),
        ("hidden_attentions", 0, (2, 2, 1, 2), "attention"),
        ("hidden_memories", 0, (2, 2, 1, 2), "memory"),
        ("find_layers", 0, (2, 2, 1, 0), "layer"),
        ("Axes", 1, (2, 2, 1, 2), "axis"),
        ("_embedding", 0, (2, 2, 1, 2), "embedding"),
        ("_unembedding", 0, (2, 2, 1, 2), "unembedding"),
        ("find_readout", 0, (2, 2, 1, 2), "read-out"),
    ],
)
def test_a_step_that_fails_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, step: str, at: int, left: tuple[int, ...], what: str
) -> None:
    run = fmr.run(model(), torch.randint(11, (2, 5)))
    asked = [value.id for value in form_of(run.graph.unfused).of_kind("projection")]
    at = asked.index(TensorId("memory.0.down/linear#0")) if at < 0 else at
    monkeypatch.setattr(LOCATE, step, failing(getattr(LOCATE, step), at))
    found = fmr.locate(run)
    streams = [one for one in found.streams if one.writes]
    assert (len(found.attention), len(found.mlps), len(streams), len(found.layers)) == left
    (told,) = [one for one in found.rejected if "failed" in one.reason]
    assert told.what == what
    assert told.reason == "looking at it failed (ZeroDivisionError: integer modulo by zero); please report it"


class Empty(nn.Module):
    """Heads and a memory over no examples or no tokens."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.way = heads, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (w(x).view(*x.shape[:2], self.heads, WIDTH // self.heads).transpose(1, 2) for w in self.way[:3])
        x = x + self.way[3](((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        return x + self.way[5](self.way[4](x).relu())


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shape", [(2, 0), (0, 4), (0, 0)], ids=str)
def test_a_run_over_nothing_is_located(shape: tuple[int, int], heads: int) -> None:
    found = fmr.locate(fmr.run(Empty(heads), torch.randn(*shape, WIDTH)))
    assert not [one for one in found.rejected if "failed" in one.reason]
    assert (found.mlps, found.attention) == ((), ())
    assert "way.5/linear#0" in {one.id for one in found.rejected if "that prove anything" in one.reason}


def test_a_kernel_that_was_given_nothing_is_told() -> None:
    q, k = torch.randn(0, 2, 5, 4), torch.randn(0, 3, 6, 4)
    run = fmr.run(Fn(lambda m, q, k: torch.nn.functional.scaled_dot_product_attention(q, k, k)), q, k)
    (told,) = fmr.locate(run).rejected
    assert told.reason == "it was given nothing, in shapes that do not fit"
