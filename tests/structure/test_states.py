"""States that a stream takes in unusual ways, each on the smallest model that shows it; and what is no state."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.structure.parts import Structure
from tests.structure import blocks
from tests.structure.idioms import TOKENS


def located(model: nn.Module, *inputs: Tensor) -> tuple[Structure, "fmr.Run"]:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    run = fmr.run(model.eval(), *inputs)
    structure = fmr.locate(run)
    for stream in structure.streams:
        for write in stream.writes:
            torch.testing.assert_close(run[write.before] + write.times * run[write.added], run[write.after])
    return structure, run


class Feed(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Three layers; `step` says how a layer writes, `first` and `last` what is done before and after."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.layers = kind, nn.Embedding(9, 8), nn.ModuleList(Feed() for _ in range(3))
        self.norm, self.other, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.scale, self.bias, self.gate = (nn.Parameter(torch.rand(8)) for _ in range(3))

    def step(self, x: Tensor, layer: nn.Module) -> Tensor:
        match self.kind:
            case "convex":
                keep = torch.sigmoid(self.gate)
                return torch.sqrt(1 - keep**2) * x + keep * layer(x)
            case "affine":
                return (x + self.bias) * self.scale + layer(x) * self.gate
            case "normed":
                y = self.norm(x)
                return 2.0 * y + layer(y)
            case "two norms":
                return self.other(self.norm(x + layer(x)))
            case "fourier":
                return x + torch.fft.fftn(x, dim=(1, 2)).real * self.gate
            case "part":
                x = x.clone()
                part = x[:, 1:]
                x[:, 1:] = part + layer(part)
                return x
        return x + layer(x)

    def forward(self, ids: Tensor) -> Tensor | tuple[Tensor, ...]:
        states = [self.embed(ids)]
        for layer in self.layers:
            states.append(self.step(states[-1], layer))
        x = states[-1]
        match self.kind:
            case "pooled":
                states.append(self.norm(F.avg_pool1d(x.mT, 2).mT))
            case "normed twice":
                states.append(self.other(self.norm(x)))
            case "scaled":
                states.append(self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))
                return self.head(states[-1] / 4.0), states[-1]
            case "cut":
                return x[:, 1:].contiguous(), self.head(x[:, 0])
            case "weighed":
                states.append((x * self.head(x).softmax(1)[..., :1]).sum(1))
            case "side exits":
                return torch.stack([self.norm(state) for state in states[1:]]), self.head(x)
        self.states = states
        return self.head(states[-1])


KINDS = ["convex", "fourier", "affine", "normed", "two norms", "part", "pooled", "normed twice", "weighed"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_a_point(kind: str) -> None:
    model = Model(kind)
    structure, run = located(model, torch.arange(6)[None])
    points = [run[point] for stream in structure.streams for point in stream.points]
    for number, state in enumerate(model.states):
        assert any(torch.equal(state, point) for point in points if point.shape == state.shape), f"{number}: {structure}"
    assert len(structure.residual.writes) == 3


def test_what_is_cut_from_the_last_state_and_returned_is_a_point() -> None:
    structure, run = located(Model("cut"), torch.arange(6)[None])
    assert any(torch.equal(run[point], run.output[0]) for point in structure.residual.points if run[point].shape[1] == 5)


def test_a_number_that_a_norm_is_divided_by_is_not_of_the_norm() -> None:
    structure, run = located(Model("scaled"), torch.arange(6)[None])
    assert structure.final_norm is not None
    assert torch.equal(run[structure.final_norm], run.output[1])


def test_norms_through_which_a_stream_is_left_are_points() -> None:
    structure, _ = located(Model("side exits"), torch.arange(6)[None])
    assert {"norm/layer_norm#0", "norm@1/layer_norm#0", "norm@2/layer_norm#0"} <= set(structure.residual.points)
    assert "layers.1.norm/layer_norm#0" not in structure.residual.points


class Hyper(nn.Module):
    """Hyper-connections: four streams that a small matrix for each position mixes at every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 8), nn.ModuleList(Feed() for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(32, 24) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        self.states = [self.embed(ids)[:, :, None].expand(-1, -1, 4, -1).contiguous()]
        for layer, mixer in zip(self.layers, self.maps, strict=True):
            x = self.states[-1]
            into, out, mix = mixer(F.normalize(x.flatten(2), dim=-1)).split([4, 4, 16], -1)
            added = layer((into.sigmoid()[..., None] * x).sum(2))
            mixing = mix.unflatten(-1, (4, 4)).softmax(-1)
            self.states.append(out[..., None] * added[:, :, None] + mixing @ x)
        return self.states[-1].mean(2)


def test_streams_that_are_mixed_go_on() -> None:
    model = Hyper()
    structure, run = located(model, torch.arange(6)[None])
    assert len(structure.residual.writes) == 2
    for state in model.states:
        assert any(torch.equal(state, run[point]) for point in structure.residual.points if run[point].shape == state.shape)


class Gate(nn.Module):
    """A gated recurrent unit written out."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b, c, d, e, f = self.maps
        reset, gate = torch.sigmoid(a(y) + b(x)), torch.sigmoid(c(y) + d(x) - 2.0)
        return (1 - gate) * x + gate * torch.tanh(e(y) + f(reset * x))


class Gated(nn.Module):
    """Layers that a gate writes; or steps that read one more token each."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        self.deep, self.embed, self.head = deep, nn.Embedding(9, 8), nn.Linear(8, 20)
        self.layers, self.gates = (nn.ModuleList(kind() for _ in range(2)) for kind in (Feed, Gate))

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.embed(ids)
        self.states = [tokens if self.deep else tokens[:, :1]]
        for n, (layer, gate) in enumerate(zip(self.layers, self.gates, strict=True)):
            x = self.states[-1]
            self.states.append(gate(x, layer(x) if self.deep else tokens[:, n + 1 : n + 2]))
        return self.head(self.states[-1])


def test_a_gate_that_keeps_a_share_writes_to_a_stream() -> None:
    model = Gated(deep=True)
    structure, run = located(model, torch.arange(6)[None])
    (stream,) = structure.streams
    assert [write.after for write in stream.writes] == ["gates.0/add#3", "gates.1/add#3"]
    assert all(any(torch.equal(state, run[point]) for point in stream.points) for state in model.states)


def test_steps_that_read_other_tokens_write_to_no_stream() -> None:
    assert not any(stream.writes for stream in located(Gated(deep=False), torch.arange(6)[None])[0].streams)


class Stage(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, out, 3, 1 + (out > width), 1), nn.Conv2d(out, out, 3, 1, 1)
        self.norm = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(width, out, 1, 2) if out > width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.norm(self.b(self.a(x).relu()))).relu()


def test_a_projected_shortcut_is_one_write_of_one_stream() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), Stage(4, 8), Stage(8, 8), Stage(8, 16))
    structure, _ = located(model, torch.randn(1, 3, 18, 18))
    (stream,) = (stream for stream in structure.streams if stream.writes)
    assert [write.before for write in stream.writes] == ["3.short/conv2d#0", "3/relu#1", "5.short/conv2d#0"]
    assert {"2/max_pool2d#0", "3/relu#1", "4/relu#1", "5/relu#1"} <= set(stream.points)


class PooledByView(nn.Module):
    """A layer with half as many positions: its shortcut is projected and pooled over pairs."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.short = nn.LayerNorm(width), nn.Linear(width, out)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        short, long = (part.unflatten(1, (2, -1)) for part in (self.short(y), self.down(self.up(y).relu())))
        return short.max(1).values + long.mean(1)


def test_a_shortcut_may_pool_over_a_dimension() -> None:
    structure, _ = located(nn.Sequential(Feed(), PooledByView(8, 16), PooledByView(16, 32)), torch.randn(1, 8, 8))
    (stream,) = (stream for stream in structure.streams if stream.writes)
    assert [write.after for write in stream.writes] == ["1/add#0", "2/add#0"]


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised each time."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class BentFirst(nn.Module):
    """A layer that normalises and bends what it reads, also for its projected shortcut."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.short = nn.GroupNorm(2, width), Standardised(width, out, 1)
        self.a, self.b = Standardised(width, out, 3, 1, 1), Standardised(out, out, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).relu()
        return self.short(y) + self.b(self.a(y).relu())


def test_a_stem_ends_with_its_pool_and_weights_may_be_standardised() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), BentFirst(4, 8), BentFirst(8, 16))
    structure, _ = located(model, torch.randn(1, 3, 18, 18))
    (stream,) = (stream for stream in structure.streams if stream.writes)
    assert [write.after for write in stream.writes] == ["2/add#0", "3/add#0"]
    assert stream.points[0] == "1/max_pool2d#0"


def test_the_states_of_a_plain_stack() -> None:
    layers = [nn.Sequential(nn.Conv2d(n, n + 1, 3), nn.ReLU(), nn.MaxPool2d(2)) for n in range(3, 6)]
    structure, _ = located(nn.Sequential(*layers, nn.Conv2d(6, 2, 1)), torch.randn(1, 3, 32, 32))
    (stack,) = structure.streams
    pools = [point for n in range(3) for point in (f"{n}.1/relu#0", f"{n}.2/max_pool2d#0")]
    assert stack.points == ("input:input", *pools, "3/conv2d#0")
    assert not stack.writes
    assert repr(stack).startswith("no writes, a plain stack of")
    with pytest.raises(StructureError, match="no residual stream"):
        _ = structure.residual
    assert not structure.layers
    assert not structure.roles


class Branches(nn.Module):
    """A plain stack that ends in branches, and classes that are read off its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*(layer for n in (3, 4) for layer in (nn.Conv2d(n, n + 1, 3), nn.ReLU())))
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(5, 5, 3, 1, n, n), nn.ReLU()) for n in (1, 2, 3))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        return (self.head(x.mean((2, 3))), *(branch(x) for branch in self.branches))


def test_the_branches_of_a_stack_are_of_its_states_and_a_head_is_not() -> None:
    (stack,) = located(Branches(), torch.randn(1, 3, 16, 16))[0].streams
    ends = [f"branches.{n}.1/relu#0" for n in range(3)]
    assert stack.points == ("input:x", "stem.1/relu#0", "stem.3/relu#0", *ends)


class Beside(nn.Module):
    """Sums that are no write to a stream."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.layers = nn.ModuleList(Feed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "low rank":
            return self.a(x) + self.c(self.b(x))
        if self.kind == "two branches":
            return self.a(x).relu() + self.b(x).tanh()
        if self.kind == "one for all positions":
            return self.a(x) + self.c(self.b(x.mean(1, keepdim=True)).relu())
        y = self.a(x)
        for layer in self.layers:
            y = y + layer(y)
        return self.b(x) + self.c(y).relu()


@pytest.mark.parametrize(
    ("kind", "writes"), [("low rank", 0), ("two branches", 0), ("one for all positions", 0), ("skip across layers", 2)]
)
def test_other_sums_are_no_writes(kind: str, writes: int) -> None:
    structure, _ = located(Beside(kind), torch.randn(1, 3, 8))
    assert sum(len(stream.writes) for stream in structure.streams) == writes


class Placed(nn.Module):
    """Positions, weighed by the stream, are added to what a layer reads, not to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.rand(3, 8))
        self.layers, self.rates = nn.ModuleList(Feed() for _ in range(2)), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer, rate in zip(self.layers, self.rates, strict=True):
            x = x + layer(x + self.places * rate(x))
        return x


def test_a_sum_that_only_a_branch_reads_is_no_write() -> None:
    structure, _ = located(Placed(), torch.randn(1, 3, 8))
    assert [write.after for write in structure.residual.writes] == ["/add#1", "/add#3"]
    assert len(structure.streams) == 1


@pytest.mark.parametrize("layers", [1, 2])
def test_a_memory_or_a_head_is_no_stack(layers: int) -> None:
    model = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(8, 8), nn.ReLU())))
    assert not located(model, torch.randn(1, 8))[0].streams


def test_a_pattern_of_attention_does_not_mix_streams() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.feed = nn.Linear(8, 8), nn.Linear(8, 8), Feed()

        def forward(self, x: Tensor) -> Tensor:
            z = (self.q(x) @ self.k(x).mT).softmax(-1) @ x
            return z + self.feed(z)

    structure, _ = located(Attend(), torch.randn(1, 2, 3, 8))
    assert structure.residual.points[0] == "/matmul#1"


class Spectral(nn.Module):
    """Layers that mix by a Fourier transform and then remember, and a norm written out that is scaled after its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 8), nn.ModuleList(Feed() for _ in range(2))
        self.norms, self.weight = nn.ModuleList(nn.LayerNorm(8) for _ in range(2)), nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor) -> Tensor:
        self.states = [self.embed(ids)]
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(self.states[-1] + torch.fft.fftn(self.states[-1], dim=(-2, -1)).real)
            self.states.append(x + layer(x))
        x = self.states[-1]
        self.states.append(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))
        return self.head(self.states[-1] / 4)


def test_a_fourier_transform_writes_and_a_norm_ends_with_its_weight() -> None:
    model = Spectral()
    structure, run = located(model, torch.arange(6)[None])
    (stream,) = structure.streams
    assert len(stream.writes) == 4
    assert len(structure.layers) == 2
    assert structure.final_norm is not None
    assert torch.equal(run[structure.final_norm.id], model.states[-1])
    for state in model.states:
        assert any(torch.equal(state, run[point]) for point in stream.points), structure


def test_what_is_taken_away_is_written_minus_once() -> None:
    structure, _ = located(blocks.Layers(blocks.Subtracted()), torch.randint(TOKENS, (2, 5)))
    assert [write.times for write in structure.residual.writes] == [1.0, -1.0]
    assert structure.final_norm is not None


def test_a_stream_that_goes_on_in_another_way_has_no_final_norm() -> None:
    model = blocks.Layers(blocks.Overtaken())
    structure, _ = located(model, torch.randint(TOKENS, (2, 5)))
    assert len(structure.residual.writes) == 1
    assert structure.final_norm is None
    assert structure.unembedding is None
