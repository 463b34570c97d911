"""What the tests of saved runs share: a small model, and that a run came back whole."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr import Run

FORMS = ["run.fmr", "run"]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout((self.linear(x) + self.shift).relu(), 0.5, self.training)


def bits(value: Tensor) -> Tensor:
    plain = value.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_whole(back: Run, run: Run, params: bool = False) -> None:
    """Everything that was kept is there, bit for bit, and nothing else."""
    assert len(back.passes) == len(run.passes)
    for ours, theirs in zip(back.passes, run.passes, strict=True):
        expected = [name for name in theirs.kept if params or not name.startswith(("param:", "buffer:"))]
        assert list(ours.kept) == expected
        assert [name for name in expected if not same(ours[name], theirs[name])] == []
        if theirs._graph is not None:
            assert (ours.graph.nodes, ours.graph.scopes) == (theirs.graph.nodes, theirs.graph.scopes)
            assert ours.graph.fingerprint == theirs.graph.fingerprint


def back_from(run: Run, path: Path, params: bool = False) -> Run:
    run.save(path, params=params)
    back = fmr.load(path)
    assert_whole(back, run, params)
    return back


def parts(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]
