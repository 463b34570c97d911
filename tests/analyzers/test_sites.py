"""Where analyzers read: found on the first batch, by plan in later ones, anew where one is laid out otherwise."""

import pytest
import torch
from torch import Tensor, nn

import fmr
from analyzers.sites import found_in, read_at, read_parts
from fmr.errors import IdError
from fmr.structure.parts import Attention, Structure


class Folded(nn.Module):
    """Four heads that lie in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 2)).transpose(1, 2).flatten(0, 1) for f in (self.q, self.k, self.v))
        p = (q @ k.mT).softmax(-1)
        self.maps = p.unflatten(0, (-1, 4)).detach()
        return x + self.o((p @ v).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2))

    def true(self, x: Tensor) -> Tensor:
        self(x)
        return self.maps


def all_of(structure: Structure) -> tuple[Attention, ...]:
    return structure.attention


def test_the_first_batch_is_located_and_later_ones_keep_the_sites_alone() -> None:
    model = Folded().eval()
    blocks, run = found_in(model, {"x": torch.randn(2, 5, 8)}, all_of)
    assert fmr.locate(run).attention[0].pattern == blocks[0].pattern
    x = torch.randn(3, 6, 8)
    later = read_at(model, {"x": x}, [blocks[0].pattern])
    assert torch.allclose(blocks[0].maps(later), model.true(x), atol=1e-6)
    with pytest.raises(IdError, match="did not keep"):
        later[blocks[0].q]


def test_one_example_and_several_may_be_laid_out_otherwise() -> None:
    """Of one example, heads in the batch look like heads alone: with the next batch they are found again, and then kept."""
    model = Folded().eval()
    blocks: tuple[Attention, ...] = ()
    layouts, runs = [], []
    for examples in (1, 3, 1, 2):
        x = torch.randn(examples, 5, 8)
        before = blocks
        blocks, (maps,) = read_parts(
            model, {"x": x}, blocks, lambda structure, run: structure.attention, lambda block: [block.pattern],
            lambda block, run: block.maps(run),
        )  # fmt: skip
        runs.append(blocks is not before)
        assert torch.allclose(maps, model.true(x), atol=1e-6)
        layouts.append(blocks[0].pattern.layout)
    assert runs == [True, True, False, False]
    assert layouts == [("heads", "positions", "units"), *[("examples*heads", "positions", "units")] * 3]
