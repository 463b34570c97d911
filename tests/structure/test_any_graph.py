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


WEIRD: list[Step] = [
    lambda m, r, a, b: (a @ b.mT).softmax(-1) @ b - 0.5 * ((b @ a.mT).softmax(-1) @ b),
    lambda m, r, a, b: ((a @ b.mT).softmax(-1) - m.table[0, 0] * (b @ a.mT).softmax(-1)) @ b,
    lambda m, r, a, b: a.softmax(-1) - b.softmax(-1) * m.table[0, 1],
    lambda m, r, a, b: torch.einsum("n...->...", torch.stack([a, b])),
    lambda m, r, a, b: torch.einsum("n...,n->...", torch.stack([a, b]), torch.tensor([0.2, 0.8])),
    lambda m, r, a, b: torch.einsum("...ij->...ji", a),
    lambda m, r, a, b: torch.einsum("bij,bkj,bkl->bil", a, b, b),
    lambda m, r, a, b: torch.einsum(a, [0, 1, 2], b, [0, 3, 2], [0, 1, 3]),
    lambda m, r, a, b: torch.fft.fft(a).real,
    lambda m, r, a, b: (torch.complex(a, b) @ torch.complex(b, a).mT).abs().softmax(-1) @ b,
    lambda m, r, a, b: (a[0].to_sparse() @ b[0].mT)[None],
    lambda m, r, a, b: torch.sparse.softmax(a[0].to_sparse(), -1).to_dense()[None],
    lambda m, r, a, b: (a * 10).long().softmax(-1, dtype=torch.float32) @ b,
    lambda m, r, a, b: (a @ b[:, :0].mT).softmax(-1) @ b[:, :0],
    lambda m, r, a, b: F.scaled_dot_product_attention(a[..., :0], b[..., :0], b),
    lambda m, r, a, b: F.scaled_dot_product_attention(a[:, None], b[:, None], b[:, None], (a @ b.mT)[:, None])[:, 0],
    lambda m, r, a, b: a.scatter(-1, b.argmax(-1, keepdim=True), 0.0),
    lambda m, r, a, b: torch.zeros_like(a, dtype=torch.bool).scatter(-1, b.argsort(-1)[..., :2], True).float() * a,
    lambda m, r, a, b: torch.addmm(a[0], b[0], m.maps[0].weight)[None],
    lambda m, r, a, b: torch.baddbmm(a @ b.mT, a, b.mT).softmax(-1) @ b,
    lambda m, r, a, b: torch.cdist(a, b).neg().softmax(-1) @ b,
    lambda m, r, a, b: (a[..., None, :] * b[..., None]).sum(-1).softmax(-1),
    lambda m, r, a, b: torch.tensordot(a, b, ([2], [2])).flatten(2),
    lambda m, r, a, b: torch.kron(a[0], b[0])[None, :8, :8],
    lambda m, r, a, b: torch.vmap(torch.softmax, in_dims=(0, None))(a, -1),
    lambda m, r, a, b: torch.nested.nested_tensor([a[0], b[0]]).to_padded_tensor(0.0),
    lambda m, r, a, b: m.maps[0](a) * F.silu(m.maps[1](b)),
    lambda m, r, a, b: F.conv1d(a, b),
    lambda m, r, a, b: a[b > 0],
    lambda m, r, a, b: a.mean((0, 1)),
    lambda m, r, a, b: a.sum(),
]


class Weird(Layers):
    """A random program of two inputs and of ops that models seldom use, whose output is a nest, a value or a generator."""

    def forward(self, x: Tensor, y: Tensor) -> object:  # type: ignore[override]
        rng = random.Random(self.seed)
        values = [x, y, self.maps[0](x)]
        for _ in range(rng.randint(4, 24)):
            step = rng.choice(STEPS if rng.random() < 0.5 else WEIRD)
            try:
                made = step(self, rng, rng.choice(values[-6:]), rng.choice(values[-6:]))
            except (*REFUSED, NotImplementedError):
                continue
            values += [made] if made.numel() < 20_000 else []
        nest = {"last": values[-1], "others": [values[-2], (values[-3], None, 3)]}
        return rng.choice([values[-1], nest, (one for one in values[-3:])])


@pytest.mark.filterwarnings("ignore")
@few
@given(seeds, st.sampled_from([(2, 5, 8), (1, 1, 8), (2, 4, 8), (0, 5, 8)]))
def test_ops_that_models_seldom_use_are_located(seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert located(fmr.run(Weird(seed).eval(), torch.randn(shape), torch.randn(shape))) == []
