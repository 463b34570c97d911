"""What is found in code that nobody has seen is what the code itself tells, no more and no less."""

import itertools
import random

import pytest
import torch
from torch import Tensor

import fmr
from fmr.runs.run import Run
from fmr.structure.parts import Attention, Memory, Structure
from tests.structure import (
    blocks,
    branches,
    experts,
    heads,
    images,
    memories,
    others,
    pairs,
    projections,
    scores,
    streams,
    wholes,
)
from tests.structure.idioms import HIDDEN, TOKENS, TOLD, Case, Heads, Plain, Seen, Stack, Truth


def ids(examples: int, length: int) -> Tensor:
    return torch.randint(TOKENS, (examples, length))


def features(examples: int, length: int) -> tuple[Tensor]:
    return (torch.randn(examples, length, 7),)


def image(examples: int, length: int) -> tuple[Tensor]:
    return (torch.randn(examples, 3, 8, 12),)


HEADS_FOUND = (*projections.FOUND, *heads.FOUND, *pairs.FOUND)
MEMORIES_FOUND = (*memories.FOUND, *experts.FOUND)

CASES: dict[str, Case] = {
    **{f"scores {mix.__name__}": Case(lambda mix=mix: Stack(lambda: Heads(mix), Plain)) for mix in scores.FOUND},
    **{f"heads {kind.__name__}": Case(lambda kind=kind: Stack(kind, Plain)) for kind in HEADS_FOUND},
    **{
        f"memory {kind.__name__}": Case(lambda kind=kind: Stack(lambda: Heads(scores.einsum), kind))
        for kind in MEMORIES_FOUND
    },
    **{
        f"nothing {mix.__name__}": Case(lambda mix=mix: Stack(lambda: Heads(mix), Plain), reason=reason)
        for mix, reason in scores.NOT_FOUND.items()
    },
    **{f"block {kind.__name__}": Case(lambda kind=kind: blocks.Layers(kind(), kind())) for kind in blocks.FOUND},
    **{
        f"stream {kind.__name__}": Case(kind, layers=n)
        for n, kinds in [*streams.FOUND.items(), *branches.FOUND.items()]
        for kind in kinds
    },
    **{f"steps {kind.__name__}": Case(kind, features, None) for kind in others.STEPS},
    **{f"nothing {kind.__name__}": Case(kind, features, None) for kind in others.NOT_FOUND},
    **{f"graph {kind.__name__}": Case(kind, features, None) for kind in others.GRAPHS},
    "landmarks": Case(lambda: Stack(pairs.Landmarks, Plain), layers=None),
    "several streams": Case(streams.Several, features),
    "one block twice": Case(lambda: blocks.Layers(*[blocks.Block()] * 2)),
    "one forward": Case(wholes.OneForward),
    "one forward, half steps": Case(wholes.OneForwardHalfSteps),
    "translator": Case(wholes.Translator, lambda b, t: (ids(b, t), ids(b, t + 2)), 4),
    "detector": Case(wholes.Detector, image, 2),
    "perceiver": Case(wholes.Perceiver, features, 2),
    "sets": Case(wholes.Sets, features, None),
    "slots": Case(wholes.Slots, features, None),
    "pool": Case(wholes.Pool, features, None),
    "torch": Case(wholes.Torch, lambda b, t: (torch.randn(b, t, 32), torch.randn(b, t + 2, 32)), None),
    "torch, batch first": Case(
        lambda: wholes.Torch(batch_first=True, bias=False),
        lambda b, t: (torch.randn(b, t, 32), torch.randn(b, t + 2, 32)),
        None,
    ),
    "torch, other widths": Case(
        lambda: wholes.Torch(kdim=6, vdim=6, add_bias_kv=True, add_zero_attn=True),
        lambda b, t: (torch.randn(b, t, 32), torch.randn(b, t + 2, 6)),
        None,
    ),
    "resumed": Case(
        wholes.Resumed, lambda b, t: (torch.randn(b, 1, 32), torch.randn(b, 4, t, 8), torch.randn(b, 4, t, 8)), None
    ),
    "compressed": Case(wholes.Compressed, lambda b, t: (torch.randn(b, 5, 32),), None),
    "nothing Excited": Case(wholes.Excited, features, None),
    "soft experts": Case(others.SoftExperts, features, None),
    "notebook": Case(others.Notebook, features, None),
    "vision": Case(images.Vision, image),
    "inside": Case(images.Inside, image),
    "axial": Case(images.Axial, image),
    "tied rows": Case(images.TiedRows, image),
    "denoiser": Case(images.Denoiser, lambda b, t: (torch.randn(b, 3, 8, 12), torch.rand(b, 1)), None),
    "hops": Case(others.Hops, layers=None),
    "mixer": Case(images.Mixer, lambda b, t: (torch.randn(b, 5, 7),), None),
    "mixed first": Case(images.MixedFirst, lambda b, t: (torch.randn(b, 5, 7),), 1),
    "separable": Case(images.Separable, image, None),
}
SIZES = [(2, 5), (1, 4)]
"""Examples and positions; one example, and as many positions as heads, must not be mistaken for anything else."""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, up to a view and the last bits."""
    if a.numel() != b.numel():
        return False
    return torch.allclose(*(t.detach().double().reshape(-1).sort().values for t in (a, b)), atol=1e-6)


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
        *(f"{block.scope}: {block.n} memories" for block in found.mlps if block.n not in (HIDDEN, 5)),
        *(
            f"{block.scope} is in no layer"
            for block in (*found.attention, *found.mlps)
            if case.layers and not _placed(found, block)
        ),
        *([] if case.layers in (None, len(found.layers)) else [f"{len(found.layers)} layers, not {case.layers}"]),
        *(
            []
            if not case.reason or any(case.reason in one.reason for one in found.rejected)
            else [f"not told: {case.reason}"]
        ),
        *(repr(one) for one in found.rejected if "Error" in repr(one) or len(repr(one)) > 300),
    ]


def _placed(found: Structure, block: Attention | Memory) -> bool:
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


def shapes(run: Run, seen: Seen, block: Attention) -> list[str]:
    """Where the heads of an attention are not the true ones."""
    told = (seen.heads, seen.groups, seen.size, seen.kind)
    read = (block.n_heads, block.n_kv_heads, block.head_dim, block.kind)
    wrong = [] if told == read else [f"{block.scope}: heads, key-value heads, size, kind are {read}, not {told}"]
    name, layout = block.pattern.id, block.pattern.layout
    if "heads" in (layout or ()) and seen.heads == block.n_heads > 1:
        alike = all(same(run[fmr.Site(name, heads=n, layout=layout)], seen.maps[n]) for n in range(seen.heads))
        wrong += [] if alike else [f"{block.scope}: a head's pattern is not its own"]
    return wrong


def test_no_case_hides_another_of_the_same_name() -> None:
    for kinds in (HEADS_FOUND, MEMORIES_FOUND):
        assert len({kind.__name__ for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("size", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_what_is_located_is_what_is_true(name: str, size: tuple[int, int]) -> None:
    run, truth = ran(CASES[name], *size)
    assert faults(CASES[name], run, truth) == []


def test_units_that_look_at_units_are_no_attention_of_one_position_either() -> None:
    run, truth = ran(CASES["nothing of_units"], 1, 1)
    assert faults(CASES["nothing of_units"], run, truth) == []


def test_units_that_compete_over_four_positions_are_found_as_over_more() -> None:
    run, truth = ran(CASES["memory Competing"], 2, 4)
    assert faults(CASES["memory Competing"], run, truth) == []


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(20, 60))])
def test_any_attention_goes_with_any_memory_whatever_the_sizes(seed: int) -> None:
    draw = random.Random(seed)
    attention, memory = draw.choice((*scores.FOUND, *HEADS_FOUND)), draw.choice(MEMORIES_FOUND)
    kind = attention if isinstance(attention, type) else lambda: Heads(attention)
    run, truth = ran(Case(lambda: Stack(kind, memory)), draw.choice((1, 2, 4, 8)), draw.choice((3, 4, 5, 8, 24, 32)))
    assert faults(Case(lambda: Stack(kind, memory)), run, truth) == []
