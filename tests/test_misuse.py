"""Natural mistakes: each is told in words what was expected instead."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

import fmr
from tests.models import build

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def given() -> SimpleNamespace:
    model, args, kwargs = build("gpt2_eager")
    run = fmr.run(model, *args, **kwargs)
    structure = fmr.locate(run)
    return SimpleNamespace(
        model=model, run=run, graph=run.graph, structure=structure, block=structure.attention[0], memory=structure.mlps[0]
    )


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda g: g.graph.diff(g.run), "cannot be compared with Run: expected its graph, other.graph"),
        (lambda g: g.graph.align(None), "cannot be compared with NoneType: expected a graph, as run.graph"),
        (lambda g: fmr.census(g.run), "fmr.census got Run, expected a torch.nn.Module"),
        (lambda g: g.block.maps(g.model), "Got GPT2LMHeadModel, expected a run or one of its passes"),
        (lambda g: g.block.maps(g.graph), "Got Graph, expected a run"),
        (lambda g: g.block.maps(torch.ones(2)), "Got Tensor, expected a run"),
        (lambda g: g.block.check(g.model), "Got GPT2LMHeadModel, expected a run"),
        (lambda g: g.memory.check(g.graph), "Got Graph, expected a run"),
        (lambda g: g.structure.residual.check(g.model), "Got GPT2LMHeadModel, expected a run"),
        (lambda g: g.structure.read_out(g.graph, g.structure.layers[0].resid_post), "Got Graph, expected a run"),
        (lambda g: g.block.head("2"), "Head '2' of .*: expected 0 to"),
        (lambda g: g.block.head(1.0), r"Head 1\.0 of .*: expected 0 to"),
        (lambda g: g.memory.memory("1"), "Memory '1' of .*: expected 0 to"),
        (lambda g: g.memory.memory([0, 1]), r"Memory \[0, 1\] of .*: expected 0 to"),
        (lambda g: g.memory.memory(slice(2)), r"Memory slice\(.* of .*: expected 0 to"),
        (lambda g: g.block.plot(g.run, heads="1"), "heads='1': expected some of 0 to"),
        (lambda g: g.block.plot(g.run, heads=1.0), r"heads=1\.0: expected some of 0 to"),
        (lambda g: g.block.plot(g.run, heads=True), "heads=True: expected some of 0 to"),
        (lambda g: g.block.plot(g.run, heads=slice(2)), "heads=slice.*: expected some of 0 to"),
        (lambda g: g.block.plot(g.run, example="0"), "example='0': this run has"),
        (lambda g: g.block.plot(g.run, example=None), "example=None: this run has"),
        (lambda g: g.block.plot(g.run, tokens=[["a"] * 6]), r"tokens of each example\. Expected those .*: tokens\[0\]"),
        (lambda g: g.graph.table(depth="2"), "depth='2' is no depth"),
        (lambda g: g.graph.table(depth=-1), "depth=-1 is no depth"),
        (lambda g: g.graph.table()[None], "The table has no module call None"),
        (lambda g: g.graph.find(None), "graph.find got NoneType, expected a glob"),
        (lambda g: fmr.zoo.photos()["flwer"], "There is no photograph 'flwer'. Expected one of china, flower"),
        (lambda g: g.run["input_ids"], "There is a value 'input:input_ids'"),
        (lambda g: g.run["transformer.wte.weight"], "There is a value 'param:transformer.wte.weight'"),
        (lambda g: g.run["transformer.h.0.attn/softmax"], "There is a value 'transformer.h.0.attn/softmax#0'"),
    ],
)
def test_a_mistake_is_told_what_was_expected(
    mistake: Callable[[SimpleNamespace], Any], message: str, given: SimpleNamespace
) -> None:
    with pytest.raises(fmr.FmrError, match=message):
        mistake(given)


def test_whole_numbers_of_numpy_and_torch_are_numbers(given: SimpleNamespace) -> None:
    block = given.block
    assert block.head(np.int64(1)) == block.head(torch.tensor(1)) == block.head(1)
    for heads in (np.int64(1), torch.tensor(1), torch.tensor([0, 1]), np.array([0, 1]), range(2)):
        figure = block.plot(given.run, heads=heads, example=np.int64(0))
        assert figure.axes[0].get_title() in ("head 0", "head 1")
    assert given.graph.table()["(root)"] == given.graph.table()[""]
