"""Sums beside a stream that are no writes to one, and writes that take more than a weight or a shortcut to see."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.structure.parts import Structure
from tests.structure.blocks import Block
from tests.structure.idioms import WIDTH, Plain, weight


def located(model: nn.Module, *inputs: Tensor) -> Structure:
    torch.manual_seed(0)
    return fmr.locate(fmr.run(model.eval(), *inputs))


def sums(structure: Structure) -> list[list[str]]:
    """The sums of the writes of each stream."""
    return [[write.after for write in stream.writes] for stream in structure.streams if stream.writes]


class ReadOff(nn.Module):
    """Three layers, and what is read off the stream at each of them and mixed with what was read before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList(Block() for _ in range(3))
        self.reads, self.rates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), weight(3)

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor | None = None
        for block, read, rate in zip(self.blocks, self.reads, self.rates, strict=True):
            y = read(block.c(x))
            match self.kind:
                case "first again":
                    seen = y if seen is None else seen
                    x = x + torch.tanh(rate * y + seen)
                case "summed":
                    seen = y if seen is None else seen + y
                case "two halves":
                    new, y = torch.cat([y, y.tanh()], -1).chunk(2, -1)
                    x, seen = x + new, y if seen is None else seen + y
            x = block(x)
        return x if seen is None else x.mean() + seen


@pytest.mark.parametrize(("kind", "extra"), [("first again", 3), ("summed", 0), ("two halves", 3)])
def test_what_is_read_off_a_stream_and_summed_up_is_no_stream(kind: str, extra: int) -> None:
    (stream,) = sums(located(ReadOff(kind), torch.randn(2, 5, WIDTH)))
    assert len(stream) == 6 + extra


class Codes(nn.Module):
    """Between two layers each state is exchanged for the nearest code; the gradient goes straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.codes = Block(), Block(), weight(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        nearest = self.codes[(x[:, :, None] - self.codes).square().sum(-1).argmin(-1)]
        return self.second(x + (nearest - x).detach())


def test_a_code_that_takes_the_place_of_a_state_is_not_written() -> None:
    assert [len(stream) for stream in sums(located(Codes(), torch.randn(2, 5, WIDTH)))] == [2, 2]


class Pooled(nn.Module):
    """Layers that mix positions by a mean over a window."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.memories = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)), nn.ModuleList([Plain(), Plain()])

    def forward(self, x: Tensor) -> Tensor:
        for norm, memory in zip(self.norms, self.memories, strict=True):
            y = norm(x).mT
            x = x + (F.avg_pool1d(y, 3, 1, 1, count_include_pad=False) - y).mT
            x = x + memory(norm(x))
        return x


def test_a_mean_over_a_window_is_written() -> None:
    assert [len(stream) for stream in sums(located(Pooled(), torch.randn(2, 5, WIDTH)))] == [4]


class Timed(nn.Module):
    """A layer with a projected shortcut that is told the time: added to each position, and what they are scaled by."""

    def __init__(self, width: int, out: int, scaled: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, out, 3, 1, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.time, self.norm = nn.Linear(5, out), nn.GroupNorm(2, out)
        self.short, self.scaled = nn.Conv2d(width, out, 1), scaled

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y, told = self.a(x.relu()), self.time(time)[:, :, None, None]
        y = self.norm(y) * (1 + told) + told.tanh() if self.scaled else self.norm(y + told)
        return self.short(x) + self.b(y.relu())


class Denoiser(nn.Module):
    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Timed(a, b, scaled) for a, b in pairwise((4, 6, 8, 4)))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, time)
        return x


@pytest.mark.parametrize("scaled", [False, True])
def test_a_projected_shortcut_goes_past_a_layer_that_is_told_the_time(scaled: bool) -> None:
    (stream,) = sums(located(Denoiser(scaled), torch.randn(2, 4, 6, 6), torch.rand(2, 5)))
    assert len(stream) == 3


class Gate(nn.Module):
    """A projection, and beside it what all positions are given, weighed for each: a gate is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        return self.a(x) + self.b(x).sigmoid() * self.c(given)[:, None]


def test_a_condition_that_is_gated_by_position_is_not_written() -> None:
    assert sums(located(Gate(), torch.randn(2, 5, WIDTH), torch.randn(2, WIDTH))) == []


class Pyramid(nn.Module):
    """Plain stages, and a finer map that is added to the coarser one brought to its size."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 6), (6, 8), (8, 10)))
        self.sides = nn.ModuleList(nn.Conv2d(width, 12, 1) for width in (6, 8, 10))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x)
        found = [self.sides[2](maps[2])]
        for side, finer in zip((self.sides[1], self.sides[0]), (maps[1], maps[0]), strict=True):
            found.append(side(finer) + F.interpolate(found[-1], scale_factor=2.0))
        return found


def test_a_pyramid_of_maps_is_no_stream() -> None:
    assert sums(located(Pyramid(), torch.randn(2, 3, 16, 16))) == []


class Asked(nn.Module):
    """Queries read a context; their places are learned and, from the second layer on, corrected by what was read so far."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.places = nn.ModuleList(Block() for _ in range(2)), weight(1, 5, WIDTH)
        self.points, self.back = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        for n, block in enumerate(self.blocks):
            places = self.places + self.back(self.points(x).sigmoid()) if n else self.places
            x = block.a(x + block.attend(x + places, seen))
            x = block.b(x + block.memory(x))
        return x


@pytest.mark.parametrize("examples", [1, 2])
def test_places_that_are_corrected_by_a_stream_are_none(examples: int) -> None:
    (stream,) = sums(located(Asked(), torch.randn(examples, 5, WIDTH), torch.randn(examples, 7, WIDTH)))
    assert len(stream) == 4


class Connected(nn.Module):
    """Three streams that a small matrix for each position mixes, with one more row for what a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.norm = nn.ModuleList(Plain() for _ in range(3)), nn.LayerNorm(WIDTH)
        self.mixes, self.rates = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3)), weight(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None].expand(-1, -1, 3, -1)
        for part, mix, rate in zip(self.parts, self.mixes, self.rates, strict=True):
            mixed = mix(F.normalize(x, dim=-1)).tanh().mT @ x
            x = mixed[:, :, 1:] + rate[:, None] * part(mixed[:, :, 0])[:, :, None]
        return self.norm(x.sum(2))


def test_streams_that_are_mixed_with_what_a_layer_reads_go_on() -> None:
    structure = located(Connected(), torch.randn(2, 5, WIDTH))
    (stream,) = sums(structure)
    assert len(stream) == 3
    assert structure.final_norm is not None
    assert structure.final_norm.id == "norm/layer_norm#0"


class Shifted(nn.Module):
    """A condition that a layer adds to, and a norm that the condition shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.norm(x)
        condition = condition + torch.tanh(self.layer(torch.cat([condition, x], -1)))
        return x + condition


def test_a_stream_that_shifts_a_norm_is_not_written_to_it() -> None:
    found = located(Shifted(), torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH))
    assert sums(found) == [["/add#0"]]


class Chain(nn.Module):
    """Plain layers, one read from another, and what comes out of each summed up at the end."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.sides, self.rates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)), weight(4)
        self.read = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for layer in self.layers:
            x = torch.relu(layer(x))
            outs.append(x)
        match self.kind:
            case "weighed":
                outs = [rate * out for rate, out in zip(self.rates, outs, strict=True)]
            case "projected":
                outs = [side(out) for side, out in zip(self.sides, outs, strict=True)][::-1]
        total = outs[0] + outs[1] + outs[2] + outs[3]
        return self.read(total) if self.kind == "read" else total


@pytest.mark.parametrize("kind", ["plain", "weighed", "projected", "read"])
def test_outputs_of_plain_layers_that_are_summed_up_are_no_stream(kind: str) -> None:
    assert sums(located(Chain(kind), torch.randn(2, 5, WIDTH))) == []


class Beside(nn.Module):
    """A stream, and beside it a sum for a second head: of all updates, or of the state and an update once more."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.blocks, self.head = kind, nn.ModuleList(Block() for _ in range(2)), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        seen, side = [], torch.zeros(())
        for n, block in enumerate(self.blocks):
            y = block.attend(block.a(x), block.a(x))
            seen += [self.head(x + 2 * y)] if self.kind == "first" else []
            before, x = x, x + y
            seen += [self.head(before + 2 * y)] if self.kind == "last" else []
            z = block.memory(block.b(x))
            x = x + z
            side = side + (y + z) if n else y + z
        return [self.head(x), *seen, *([self.head(side)] if self.kind == "all" else [])]


@pytest.mark.parametrize("kind", ["all", "first", "last"])
def test_a_sum_beside_a_stream_is_none(kind: str) -> None:
    found = located(Beside(kind), torch.randn(2, 5, WIDTH))
    (stream,) = (one for one in found.streams if one.writes)
    assert len(stream.writes) == 4
    assert len(found.layers) == 2
