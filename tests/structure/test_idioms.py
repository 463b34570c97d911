"""What is found in code that nobody has seen is what the code itself tells, no more and no less."""

import itertools

import pytest
import torch
from torch import Tensor

import fmr
from fmr.run import Run
from fmr.structure.parts import AttentionBlock, MemoryBlock, Structure
from tests.structure import memories, projections, scores
from tests.structure.idioms import TOLD, Case, Heads, Plain, Seen, Stack, Truth

CASES: dict[str, Case] = {
    **{f"scores {mix.__name__}": Case(lambda mix=mix: Stack(lambda: Heads(mix), Plain)) for mix in scores.FOUND},
    **{f"heads {kind.__name__}": Case(lambda kind=kind: Stack(kind, Plain)) for kind in projections.FOUND},
    **{
        f"memory {kind.__name__}": Case(lambda kind=kind: Stack(lambda: Heads(scores.einsum), kind))
        for kind in memories.FOUND
    },
    **{f"nothing {mix.__name__}": Case(lambda mix=mix: Stack(lambda: Heads(mix), Plain)) for mix in scores.NOT_FOUND},
}
SIZES = [(2, 5), (1, 4)]
"""Examples and positions; one example, and as many positions as heads, must not be mistaken for anything else."""


def same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.detach().reshape(-1).sort().values, b.detach().reshape(-1).sort().values)


def ran(case: Case, examples: int, length: int) -> tuple[Run, Truth]:
    torch.manual_seed(0)
    model = case.make().eval()
    inputs = case.inputs(examples, length)
    TOLD.append(Truth())
    return fmr.run(model, *inputs), TOLD.pop()


def faults(case: Case, run: Run, truth: Truth) -> list[str]:
    """Everything in which what is located differs from what the model told."""
    found = fmr.locate(run)
    return [
        *unlike("pattern", [seen.pattern for seen in truth.attention], [run[block.pattern] for block in found.attention]),
        *unlike("post", truth.posts, [run[block.post] for block in found.mlps]),
        *[
            f"a value of the stream is missing: {tuple(point.shape)}"
            for point in truth.points
            if not any(same(point, run[name]) for stream in found.streams for name in stream.points)
        ],
        *itertools.chain.from_iterable(
            shapes(run, seen, block)
            for seen in truth.attention
            for block in found.attention
            if same(seen.pattern, run[block.pattern])
        ),
        *(
            f"{block.scope} is in no layer"
            for block in (*found.attention, *found.mlps)
            if case.layers and not _placed(found, block)
        ),
        *([] if case.layers in (None, len(found.layers)) else [f"{len(found.layers)} layers, not {case.layers}"]),
        *(repr(one) for one in found.rejected if "Error" in repr(one) or len(repr(one)) > 300),
    ]


def _placed(found: Structure, block: AttentionBlock | MemoryBlock) -> bool:
    return any(block is other for layer in found.layers for other in (*layer.attentions, *layer.mlps))


def unlike(what: str, true: list[Tensor], found: list[Tensor]) -> list[str]:
    """What is missing and what is there without being true."""
    left = list(found)
    missing = []
    for value in true:
        hit = next((n for n, other in enumerate(left) if same(value, other)), None)
        if hit is None:
            missing.append(f"a {what} is missing: {tuple(value.shape)}")
        else:
            left.pop(hit)
    return missing + [f"an extra {what}: {tuple(value.shape)}" for value in left]


def shapes(run: Run, seen: Seen, block: AttentionBlock) -> list[str]:
    """Where the heads of an attention are not the true ones."""
    told = (seen.heads, seen.groups, seen.size, seen.kind)
    read = (block.n_heads, block.n_kv_heads, block.head_dim, block.kind)
    wrong = [] if told == read else [f"{block.scope}: heads, key-value heads, size, kind are {read}, not {told}"]
    if "heads" in (block.pattern.layout or ()) and seen.heads == block.n_heads > 1:
        alike = all(same(run[block.head(n).pattern], seen.maps[n]) for n in range(seen.heads))
        wrong += [] if alike else [f"{block.scope}: a head's pattern is not its own"]
    return wrong


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_is_located_is_what_is_true(name: str, size: tuple[int, int]) -> None:
    run, truth = ran(CASES[name], *size)
    assert faults(CASES[name], run, truth) == []
