"""Two streams that write to each other are halves of one and say so; sums of levels, each with a head, are no stream."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.runs.run import Run
from fmr.structure.parts import Structure
from tests.structure.idioms import TOKENS, WIDTH, Heads, Plain


class Coupled(nn.Module):
    """Layers whose attention reads one half and writes to the other, and whose memory does so the other way round."""

    def __init__(self, begin: str, end: str) -> None:
        super().__init__()
        self.begin, self.end = begin, end
        self.tokens, self.halves, self.join = (
            nn.Embedding(TOKENS, WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.looks = nn.ModuleList(Heads(F.scaled_dot_product_attention) for _ in range(2))
        self.mlps, self.norms = (
            nn.ModuleList(Plain() for _ in range(2)),
            nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5)),
        )
        self.logits = nn.Linear(WIDTH, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        a, b = self.halves(x).chunk(2, -1) if self.begin == "halves" else (x, x)
        for n, (look, mlp) in enumerate(zip(self.looks, self.mlps, strict=True)):
            a = a + look(self.norms[2 * n](b))
            b = b + mlp(self.norms[2 * n + 1](a))
            a, b = torch.cat([a, b], -1).chunk(2, -1) if self.begin == "laid beside" else (a, b)
        ends = {"sum": lambda: (a + b) / 2, "beside": lambda: self.join(torch.cat([a, b], -1)), "one": lambda: b}
        ends["stack"] = lambda: torch.stack([a, b]).sum(0)
        logits: Tensor = self.logits(self.norms[-1](ends[self.end]()))
        return logits


class Joint(nn.Module):
    """Two streams with layers of their own, whose attention looks at both."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Linear(3, WIDTH)
        self.looks = nn.ModuleList(Heads(F.scaled_dot_product_attention) for _ in range(2))
        self.mlps = nn.ModuleList(Plain() for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(8))

    def forward(self, ids: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.tokens(ids), self.places(other)
        for n, look in enumerate(self.looks):
            both = look(torch.cat([self.norms[4 * n](a), self.norms[4 * n + 1](b)], 1))
            a, b = a + both[:, : a.shape[1]], b + both[:, a.shape[1] :]
            a, b = a + self.mlps[2 * n](self.norms[4 * n + 2](a)), b + self.mlps[2 * n + 1](self.norms[4 * n + 3](b))
        return a, b


def located(make: Callable[[], nn.Module], *more: Tensor) -> tuple[Run, Structure]:
    torch.manual_seed(0)
    run = fmr.run(make().eval(), torch.randint(TOKENS, (2, 5)), *more)
    return run, fmr.locate(run)


@pytest.mark.parametrize("end", ["sum", "stack", "beside", "one"])
@pytest.mark.parametrize("begin", ["the same", "halves", "laid beside"])
def test_halves_that_write_to_each_other_say_so(begin: str, end: str) -> None:
    run, found = located(lambda: Coupled(begin, end))
    one, other = found.streams
    assert [len(stream.writes) for stream in (one, other)] == [2, 2]
    assert (one.coupled, other.coupled) == (other.writes[-1].after, one.writes[-1].after)
    assert f"a half of one stream with the one that ends in {one.coupled}" in repr(found)
    assert (len(found.attention), len(found.mlps)) == (2, 2)
    assert one.check(run)
    assert other.check(run)
    assert end not in ("sum", "stack") or (found.final_norm is not None and found.final_norm.id == "norms.4/layer_norm#0")
    with pytest.raises(StructureError, match="a half of one"):
        found.read_out(run, other.points[-1])
    with pytest.raises(StructureError, match="is made of it in no layer"):
        replace(one, coupled=one.points[0]).check(run)
    read = {f"norms.{n}/layer_norm#0" for n in range(4)}  # by the layers, which are no ends of a stream
    assert read.isdisjoint((*one.points, *other.points, one.final_norm, other.final_norm))


def test_streams_that_look_at_both_are_two() -> None:
    _, found = located(Joint, torch.randn(2, 4, 3))
    assert [stream.coupled for stream in found.streams if stream.writes] == [None] * 2


class Pyramid(nn.Module):
    """Levels of one width, each projected beside and added to what is below it, with a head for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.beside = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(8, 5) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for layer in self.down:
            x = torch.relu(layer(x))
            levels.append(x)
        total, told = torch.zeros(()), []
        for n in (2, 1, 0):
            total = self.beside[n](levels[n]) + total if told else self.beside[n](levels[n])
            told.append(self.heads[n](total))
        return told


def test_a_pyramid_with_heads_has_no_stream_and_no_memory() -> None:
    torch.manual_seed(0)
    found = fmr.locate(fmr.run(Pyramid().eval(), torch.randn(2, 5, 8)))
    assert [stream for stream in found.streams if stream.writes] == []
    assert found.mlps == ()


class Swapped(nn.Module):
    """Halves that are laid side by side after each write, the one that was written to behind the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.enter, self.mlps = nn.Linear(6, 2 * WIDTH), nn.ModuleList(Plain() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for mlp in self.mlps:
            a, b = x.chunk(2, -1)
            x = torch.cat([b, a + mlp(b)], -1)
        return x


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_halves_that_change_places_are_two(depth: int) -> None:
    torch.manual_seed(0)
    found = fmr.locate(fmr.run(Swapped(depth), torch.randn(2, 5, 6)))
    one, other = found.streams
    assert [len(stream.writes) for stream in (one, other)] == [depth // 2, depth - depth // 2]
    assert (one.coupled, other.coupled) == (other.writes[-1].after, one.writes[-1].after)
    assert len(found.mlps) == depth


class Beside(nn.Module):
    """A narrow stream beside another, from which each of its layers reads first, and to which it is added at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norms = nn.Embedding(TOKENS, WIDTH), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.mlps, self.reads = (
            nn.ModuleList(Plain() for _ in range(2)),
            nn.ModuleList(nn.Linear(WIDTH, 6) for _ in range(3)),
        )
        self.ups, self.downs = (nn.ModuleList(nn.Linear(a, b) for _ in range(2)) for a, b in ((6, 9), (9, 6)))
        self.back, self.logits = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        y = self.reads[0](x)
        for n in range(2):
            x = x + self.mlps[n](self.norms[n](x))
            y = y + self.reads[n + 1](x)
            y = y + self.downs[n](torch.relu(self.ups[n](y)))
        logits: Tensor = self.logits(self.norms[-1](x + self.back(y)))
        return logits


def test_a_stream_that_reads_from_another_and_is_added_to_it_is_one() -> None:
    _, found = located(Beside)
    assert sorted(len(stream.writes) for stream in found.streams) == [3, 3]
    assert len(found.mlps) == 4
