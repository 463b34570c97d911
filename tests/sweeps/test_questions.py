"""Numbers, texts and sizes by which a model's Python may go: under edits that change them a replay is refused by name."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr import edits
from fmr.errors import ReplayError
from tests.small import Fn

TOLD: dict[str, Callable[[Tensor], float]] = {
    "format": lambda y: float(f"{y.max():.3f}"),
    "str": lambda y: len(str(y)),
    "repr": lambda y: float(repr(y.max())[7:-1]),
    "percent": lambda y: float("%.2f" % y.max()),  # noqa: UP031
    "pickle": lambda y: sum(pickle.dumps(y)),
    "save": lambda y: _saved(y),
    "item of aten": lambda y: torch.ops.aten.item.default(y.max()),
    "scalar of aten": lambda y: torch.ops.aten._local_scalar_dense(y.max()),
    "equal of aten": lambda y: float(torch.ops.aten.equal.default(y > 1, y > -9)),
}


def _saved(y: Tensor) -> int:
    file = io.BytesIO()
    torch.save(y, file)
    return sum(file.getvalue())


@pytest.mark.parametrize("way", TOLD)
def test_a_text_or_an_overload_tells_numbers(way: str) -> None:
    run = fmr.run(Fn(lambda self, x: (x * 2) * TOLD[way](x * 3)), torch.tensor([[0.5, 1.0], [0.25, 2.0]]))
    with pytest.raises(
        ReplayError, match=r"/(mul#\d|max#0|gt#\d) changes under these edits, and the model's Python asked.*test_questions"
    ):
        fmr.replay(run, edits={"input:args.0": edits.Scale(-3.0)})
    assert torch.equal(fmr.replay(run, edits={"input:args.0": edits.Scale(1.0)}).output, run.output)


SIZES: dict[str, Callable[[Tensor], int]] = {
    "nonzero": lambda y: len((y > 1).nonzero()),
    "as_tuple": lambda y: len((y > 1).nonzero(as_tuple=True)[0]),
    "argwhere": lambda y: len(torch.argwhere(y > 1)),
    "where": lambda y: torch.where(y > 1)[0].numel(),
    "mask": lambda y: y[y > 1].numel(),
    "mask of rows": lambda y: y[:, y[0] > 1].numel(),
    "masked_select": lambda y: len(y.masked_select(mask=y > 1)),
    "unique": lambda y: len((y > 1).unique()),
    "unique_consecutive": lambda y: len((y > 1).unique_consecutive()),
    "bincount": lambda y: len((y > 1).long().flatten().bincount()),
    "repeats": lambda y: len(torch.repeat_interleave((y > 1).long().flatten())),
    "repeat_interleave": lambda y: len(y.flatten().repeat_interleave(repeats=(y > 1).long().flatten())),
    "tensor_split": lambda y: len(y.flatten().tensor_split((y > 1).sum().view(1))[0]),
    "one_hot": lambda y: F.one_hot((y > 1).long()).shape[-1],
    "slice": lambda y: len(y.flatten()[: (y > 1).sum()]),
    "arange": lambda y: len(torch.arange((y > 1).sum())),
    "new_zeros": lambda y: len(y.new_zeros((y > 1).sum())),
    "split": lambda y: len(y.flatten().split([(y > 1).sum(), (y <= 1).sum()])[0]),
    "topk": lambda y: y.flatten().topk((y > 1).sum())[0].numel(),
    "aten": lambda y: len(torch.ops.aten.nonzero(self=y > 1)),
    "aten with a mask": lambda y: len(torch.ops.aten.index.Tensor(y, [y > 1])),
    "pad_sequence": lambda y: torch.nn.utils.rnn.pad_sequence([y[0][y[0] > 1], y[1][y[1] > 1]]).numel(),
}


@pytest.mark.parametrize("way", SIZES)
def test_a_size_by_which_the_models_python_goes_may_not_change(way: str) -> None:
    model = Fn(lambda self, x: (x * 2) * (1 + SIZES[way](x * 3)))
    run = fmr.run(model, torch.tensor([[0.5, 1.0], [0.25, 2.0]]))
    with pytest.raises(ReplayError, match=r"has shape .* under these edits, expected .*its size depends on values"):
        fmr.replay(run, edits={"input:args.0": edits.Scale(0.1)})
    edit = {"input:args.0": edits.Scale(1.01)}
    assert torch.equal(fmr.replay(run, edit).output, fmr.run(model, run["input:args.0"], edits=edit).output)
    before = fmr.replay(run, edits={"input:args.0": edits.Scale(0.1)}, want="/mul#0")
    assert torch.equal(before["/mul#0"], run["input:args.0"] * 0.1 * 2)


def test_a_size_that_is_frozen_stays_and_one_that_an_edge_changes_is_refused() -> None:
    run = fmr.run(Fn(lambda self, x: x * len((x + 1 > 1.5).nonzero())), torch.tensor([0.25, 1.0]))
    small = {"input:args.0": edits.Scale(0.1)}
    assert torch.equal(fmr.replay(run, small, freeze=["/nonzero#0"]).output, run["input:args.0"] * 0.1)
    with pytest.raises(ReplayError, match=r"/nonzero#0 has shape \(0, 1\) under these edits, expected \(1, 1\)"):
        fmr.replay(run, {fmr.Edge("input:args.0", "/gt#0"): edits.Zero()})


def test_a_loop_over_experts_is_swept_one_by_one() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y, out = self.gate(x), torch.zeros_like(x)
        for expert in range(3):
            rows = torch.where(y.argmax(1) == expert)[0]
            if rows.numel():
                out[rows] = x[rows] * (expert + 1)
        return out

    torch.manual_seed(0)
    model, x = Fn(forward, gate=nn.Linear(4, 3)), torch.randn(4, 4)
    sites = [fmr.Site("gate", units=unit) for unit in range(3)]
    grid = fmr.sweep(model, x, sites, edits.Add(5.0), lambda out: out.sum(-1), progress=False)
    assert grid.how == "loop"
    assert "how many elements /where#0:0 has depends on values" in grid.why
    for site, value in zip(sites, grid.values, strict=True):
        assert torch.equal(value, fmr.run(model, x, edits={site: edits.Add(5.0)}).output.sum(-1))


def _gradient(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = (x * 2).detach().requires_grad_()
        (y**3).sum().backward()
    assert y.grad is not None
    return y.grad


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda self, x: copy.deepcopy(x * 2) + 1,
            "/deepcopy#0 cannot be computed again: its function is not one of torch's",
        ),
        (_gradient, r"/grad#1 cannot be computed again: what backward\(\) leaves in .grad is not recorded"),
    ],
)
def test_what_no_function_of_its_values_makes_is_refused_by_name(forward: Any, message: str) -> None:
    run = fmr.run(Fn(forward), torch.ones(2, 3))
    with pytest.raises(ReplayError, match=message):
        fmr.replay(run, edits={"/mul#0": edits.Scale(3.0)})
    assert "not made again" in repr(run.verify())
