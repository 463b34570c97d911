"""What is located in programs that nobody wrote: never an error, never a step that failed, and every value is explained."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from tests.promises.test_values import Program, inputs
from tests.structure.test_told import untold

few = settings(derandomize=True, deadline=None, max_examples=30)
seeds = st.integers(0, 10**9)

REFUSED = RuntimeError, IndexError, ValueError, TypeError, AssertionError
"""What torch raises where an op does not fit what it is given."""

Step = Callable[["Layers", random.Random, Tensor, Tensor], Tensor]


def headed(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, -2)


STEPS: list[Step] = [
    lambda m, r, a, b: r.choice(m.maps)(a),
    lambda m, r, a, b: r.choice(m.maps)(a),
    lambda m, r, a, b: r.choice(m.maps)(a).relu(),
    lambda m, r, a, b: a + b,
    lambda m, r, a, b: a + r.choice(m.maps)(b),
    lambda m, r, a, b: a * b,
    lambda m, r, a, b: a @ b.mT,
    lambda m, r, a, b: a @ b,
    lambda m, r, a, b: torch.einsum("...ik,...jk->...ij", a, b),
    lambda m, r, a, b: a.softmax(r.choice([-1, -2, 0])),
    lambda m, r, a, b: (a @ b.mT).softmax(-1) @ b,
    lambda m, r, a, b: F.scaled_dot_product_attention(a, b, b, is_causal=r.random() < 0.5),
    lambda m, r, a, b: m.heads(a, b, b)[0],
    lambda m, r, a, b: F.gelu(a),
    lambda m, r, a, b: a * torch.sigmoid(b),
    lambda m, r, a, b: m.norm(a),
    lambda m, r, a, b: a / a.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt(),
    lambda m, r, a, b: m.conv(a.mT).mT,
    lambda m, r, a, b: headed(a),
    lambda m, r, a, b: a.transpose(1, -2).flatten(2),
    lambda m, r, a, b: a.chunk(2, -1)[0],
    lambda m, r, a, b: a[:, :1],
    lambda m, r, a, b: torch.cat([a, b], r.choice([-1, 1])),
    lambda m, r, a, b: torch.stack([a, b], 1),
    lambda m, r, a, b: a.mean(r.choice([-1, 1]), keepdim=r.random() < 0.5),
    lambda m, r, a, b: a.cumsum(1),
    lambda m, r, a, b: a.exp() / a.exp().sum(-1, keepdim=True),
    lambda m, r, a, b: torch.where(a > b, a, b),
    lambda m, r, a, b: a.topk(2).values,
    lambda m, r, a, b: a.masked_fill(torch.ones(a.shape[-2:]).triu(1).bool(), -1e4),
    lambda m, r, a, b: a.clone().add_(b),
    lambda m, r, a, b: F.embedding(a.argmax(-1), m.table),
    lambda m, r, a, b: a.detach().double().to(b.dtype),
    lambda m, r, a, b: a - a.logsumexp(-1, keepdim=True),
    lambda m, r, a, b: a.sort(-1).values,
    lambda m, r, a, b: a.new_zeros(a.shape).index_add(1, torch.tensor([0, 1]), b[:, :2]),
]


class Layers(nn.Module):
    """A random program of steps that models are made of, over a few values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.maps = seed, nn.ModuleList(nn.Linear(8, n) for n in (8, 8, 8, 4))
        self.heads, self.norm, self.conv = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.Conv1d(8, 8, 1)
        self.table = nn.Parameter(torch.randn(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        rng = random.Random(self.seed)
        values = [x, self.maps[0](x)]
        for _ in range(rng.randint(4, 24)):
            step = rng.choice(STEPS)
            try:
                values.append(step(self, rng, rng.choice(values[-5:]), rng.choice(values[-5:])))
            except REFUSED:
                continue
        return values[-1]


def located(run: fmr.Run) -> list[str]:
    """What is wrong of what is located in a run and in its graph alone."""
    wrong = []
    for source in (run, run.graph):
        found = fmr.locate(source)
        repr(found)
        wrong += untold(found)
        wrong += [
            f"{node.id}: nothing said" for node in found.graph.nodes if not found.explain(node).text.startswith(node.id)
        ]
    return wrong


@pytest.mark.filterwarnings("ignore")
@few
@given(seeds, st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad]))
def test_what_writes_and_views_in_any_order_is_located(seed: int, mode: type) -> None:
    with mode(), fmr.track(model := Program(seed)) as run:
        model(*inputs())
    assert located(run) == []


@pytest.mark.filterwarnings("ignore")
@few
@given(seeds, st.sampled_from([(2, 5, 8), (1, 1, 8), (2, 8, 8), (0, 5, 8)]))
def test_any_steps_of_models_are_located(seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert located(fmr.run(Layers(seed).eval(), torch.randn(shape))) == []
