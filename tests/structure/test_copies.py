"""Copies of a stream (hyper-connections) are one stream, in one tensor or a list, mixed by weights or by what they hold."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.runs.run import Run
from fmr.structure.parts import Stream, Structure
from tests.structure.idioms import TOKENS, WIDTH, Heads, Plain, weight

COPIES = 3


class Copies(nn.Module):
    """Four parts; each reads a weighed sum of the copies and is written to all of them, which are mixed before."""

    def __init__(self, step: Callable[["Copies", int, Tensor], Tensor], dim: int = 2, folded: bool = False) -> None:
        super().__init__()
        self.step, self.dim, self.folded = step, dim, folded
        self.tokens, self.logits = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.parts = nn.ModuleList(part for _ in range(2) for part in (Heads(F.scaled_dot_product_attention), Plain()))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.mix, self.read, self.write = (weight(4, *shape) for shape in ((COPIES, COPIES), (COPIES,), (COPIES,)))
        self.made = nn.ModuleList(nn.Linear(WIDTH, COPIES + 2) for _ in range(4))

    def part(self, n: int, x: Tensor) -> Tensor:
        made: Tensor = self.parts[n](self.norms[n](x))
        return made

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        examples, length, width = x.shape
        x = x.repeat_interleave(COPIES, 0) if self.folded else x.unsqueeze(self.dim).repeat_interleave(COPIES, self.dim)
        for n in range(4):
            if self.folded:
                x = x.view(examples, COPIES, length, width).transpose(1, 2)
            x = self.step(self, n, x)
            if self.folded:
                x = x.transpose(1, 2).reshape(-1, length, width)
        x = x.view(examples, COPIES, length, width).sum(1) if self.folded else x.sum(self.dim)
        logits: Tensor = self.logits(self.norms[-1](x))
        return logits


def static(m: Copies, n: int, x: Tensor) -> Tensor:
    y = m.part(n, (m.read[n][:, None] * x).sum(2))
    return torch.einsum("mn,bsnd->bsmd", m.mix[n], x) + m.write[n][:, None] * y[:, :, None]


def products(m: Copies, n: int, x: Tensor) -> Tensor:
    y = m.part(n, m.read[n] @ x)
    return m.mix[n] @ x + torch.einsum("bsd,n->bsnd", y, m.write[n])


def first(m: Copies, n: int, x: Tensor) -> Tensor:
    y = m.part(n, torch.einsum("n,bnsd->bsd", m.read[n], x))
    return torch.einsum("mn,bnsd->bmsd", m.mix[n], x) + m.write[n][:, None, None] * y[:, None]


def together(m: Copies, n: int, x: Tensor) -> Tensor:
    mix = torch.cat([m.read[n][:, None], m.mix[n]], 1)
    read, kept = torch.einsum("se,btsd->bted", mix, x).split([1, COPIES], 2)
    return kept + torch.einsum("btd,s->btsd", m.part(n, read.squeeze(2)), m.write[n])


def dynamic(m: Copies, n: int, x: Tensor) -> Tensor:
    made = torch.tanh(m.made[n](F.rms_norm(x, (WIDTH,)))) / 10
    mix = torch.cat([m.read[n][:, None], m.mix[n]], 1) + made[..., : COPIES + 1]
    read, kept = torch.einsum("btse,btsd->bted", mix, x).split([1, COPIES], 2)
    return kept + torch.einsum("btd,bts->btsd", m.part(n, read.squeeze(2)), m.write[n] + made[..., -1])


class Listed(Copies):
    """The copies in a list."""

    def forward(self, ids: Tensor) -> Tensor:
        x = [self.tokens(ids)] * COPIES
        for n in range(4):
            y = self.part(n, sum(self.read[n, i] * x[i] for i in range(COPIES)))  # type: ignore[arg-type]
            mixed = [sum(self.mix[n, i, j] * x[j] for j in range(COPIES)) for i in range(COPIES)]
            x = [mixed[i] + self.write[n, i] * y for i in range(COPIES)]
        logits: Tensor = self.logits(self.norms[-1](sum(x)))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "weights": lambda: Copies(static),
    "products of matrices": lambda: Copies(products),
    "copies before positions": lambda: Copies(first, 1),
    "read and kept together": lambda: Copies(together),
    "read and kept together, in the batch": lambda: Copies(together, folded=True),
    "made of the copies": lambda: Copies(dynamic),
    "made of the copies, in the batch": lambda: Copies(dynamic, folded=True),
    "a list": lambda: Listed(static),
}


def located(model: nn.Module) -> tuple[Run, Structure]:
    torch.manual_seed(0)
    run = fmr.run(model.eval(), torch.randint(TOKENS, (2, 5)))
    return run, fmr.locate(run)


def holds(claim: Stream, run: Run) -> bool:
    try:
        return bool(claim.check(run))
    except StructureError:
        return False


@pytest.mark.parametrize("name", MODELS)
def test_copies_are_one_stream(name: str) -> None:
    run, found = located(MODELS[name]())
    (stream,) = found.streams
    assert len(stream.writes) == 4
    assert [(len(layer.attentions), len(layer.mlps)) for layer in found.layers] == [(1, 1)] * 2
    assert found.final_norm is not None
    assert found.final_norm.id.startswith("norms.4/")
    hidden = found.mlps[0].post.id
    first, *rest = stream.writes
    in_order = tuple(sorted((*stream.points, hidden), key=run.graph.unfused.place))
    assert holds(stream, run)
    assert not holds(replace(stream, points=in_order), run)
    assert not holds(replace(stream, writes=(first._replace(added=rest[0].added), *rest)), run)
    assert not holds(replace(stream, writes=tuple(rest)), run)


class Rows(nn.Module):
    """Rows of an image are mixed by a square matrix, as many as copies may be: a layer, and no copies."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.memory, self.norms = weight(4, 4), Plain(), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.einsum("hg,bgwc->bhwc", self.mix, self.norms[0](x))
        return x + self.memory(self.norms[1](x))


def test_rows_that_are_mixed_are_written() -> None:
    torch.manual_seed(0)
    run = fmr.run(Rows().eval(), torch.randn(2, 4, 5, WIDTH))
    (stream,) = fmr.locate(run).streams
    assert [write.added for write in stream.writes] == ["/einsum#0", "memory.down/linear#0"]
    assert "/einsum#0" not in stream.points
