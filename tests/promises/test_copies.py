"""Copies that Python makes inside a forward: they read what they copy, in every run the same."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fmr

COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a nest": lambda h: copy.deepcopy([h, {"key": h + 1}])[0],
    "copy": copy.copy,
    "torch.Tensor": torch.Tensor,
    "type": lambda h: type(h)(h),
    "a parameter": lambda h: nn.Parameter(h, requires_grad=False),
    "of what nobody holds": lambda h: nn.Parameter(h.exp(), requires_grad=False).log(),
}


class Copying(nn.Module):
    """Copies a value in some way, and goes on with the copy."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        other = h + 1  # which is not copied
        return self.made(h) * 3 + other


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_reads_what_it_copies_and_every_run_has_the_same_graph(name: str) -> None:
    model, x = Copying(COPIES[name]), torch.tensor([1.0, 2.0])
    with torch.no_grad():
        runs = [fmr.run(model, x, keep=keep) for keep in ("all", "none", "all")]
    graph = runs[0].graph
    above = {node.id for node in graph.ancestors("/mul#1")}
    assert "/mul#0" in above
    assert "/add#0" not in above
    assert len({run.graph.fingerprint for run in runs}) == 1
    torch.testing.assert_close(runs[0]["/mul#1"], torch.tensor([6.0, 12.0]))


def test_the_memo_of_a_deepcopy_is_no_argument() -> None:
    with torch.no_grad():
        node = fmr.run(Copying(copy.deepcopy), torch.ones(2)).graph["/deepcopy#0"]
    assert node.parents == ("/mul#0",)
    assert not node.args
