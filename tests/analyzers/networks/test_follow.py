"""The graph of units, held against graphs made by hand of models that are known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from analyzers import AnalyzerError, Modularity
from analyzers.networks.net import Net


def net_of(model: nn.Module, inputs: Any, **settings: Any) -> Net:
    torch.manual_seed(0)
    return Modularity(model.eval(), **settings).update(inputs).net()


def matrix(net: Net, made: str, read: str) -> np.ndarray:
    """The edges between two groups, (units of the first, of the second)."""
    rows, columns = (np.flatnonzero(net.group == net.groups.index(name)) for name in (made, read))
    found: np.ndarray = net.adjacency().toarray()[np.ix_(rows, columns)]
    return found


def close(found: np.ndarray, wanted: Tensor) -> None:
    np.testing.assert_allclose(found, wanted.detach().double().numpy(), rtol=1e-5)


def sizes(net: Net) -> dict[str, int]:
    return {name: int((net.group == n).sum()) for n, name in enumerate(net.groups)}


@pytest.mark.parametrize("shape", [(16,), (1, 16), (5, 16), (5, 1, 4, 4)])
def test_a_plain_network_of_neurons(shape: tuple[int, ...]) -> None:
    model = fmr.zoo.models.MLP([16, 8, 6, 3]) if len(shape) > 1 else nn.Sequential(nn.Linear(16, 8), nn.ReLU())
    net = net_of(model, torch.randn(shape))
    first = model.hidden[0] if len(shape) > 1 else model[0]
    close(matrix(net, net.groups[1], "input"), first.weight.abs())
    if len(shape) > 1:
        assert sizes(net) == {"input": 16, "hidden.0": 8, "hidden.1": 6, "output": 3}
        close(matrix(net, "output", "hidden.1"), model.output.weight.abs())
        assert matrix(net, "hidden.1", "input").sum() == 0


@pytest.mark.parametrize(("norm", "p"), [("l1", 1), ("l2", 2)])
def test_kernels_and_the_places_of_a_channel_count_by_their_norm(norm: str, p: int) -> None:
    model = fmr.zoo.models.CNN(channels=[1, 4, 6], size=8, classes=3)
    net = net_of(model, torch.randn(2, 1, 8, 8), norm=norm)
    assert sizes(net) == {"input": 1, "conv1": 4, "conv2": 6, "output": 3}
    close(matrix(net, "conv2", "conv1"), model.conv2.weight.flatten(2).norm(p, -1))
    close(matrix(net, "output", "conv2"), model.output.weight.reshape(3, 6, 4).norm(p, -1))


class Residual(nn.Module):
    """Convolutions with batch norm, one around which its input goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        for norm in (self.norm, self.last):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.last(self.down(self.depth(F.relu(self.norm(self.up(x))))))


def scale(norm: nn.BatchNorm2d) -> Tensor:
    return norm.weight / (norm.running_var + norm.eps).sqrt()


def test_residual_channels_are_one_unit_and_scales_are_folded_in() -> None:
    model, images = Residual(), torch.randn(2, 3, 6, 6)
    net = net_of(model, images, fold="all")
    assert sizes(net) == {
        "input": 3,
        "stem": 4,
        "up": 8,
    }  # what `down` makes is the stem's, what `depth` makes the channels' own
    filters = model.depth.weight.flatten(1).norm(2, -1)
    up = model.up.weight[:, :, 0, 0].abs() * scale(model.norm)[:, None]
    down = model.down.weight[:, :, 0, 0].abs() * scale(model.last)[:, None] * filters
    close(matrix(net, "up", "stem"), up + down.T)
    after = model.down.weight[:, :, 0, 0].abs() * scale(model.last)[:, None]
    close(matrix(net_of(model, images), "up", "stem"), up + after.T)
    bare = model.up.weight[:, :, 0, 0].abs() + model.down.weight[:, :, 0, 0].abs().T
    close(matrix(net_of(model, images, fold="none"), "up", "stem"), bare)


class Whole(nn.Module):
    """Any function of layers as a module."""

    def __init__(self, code: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.code = code
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.code(self, *inputs)


def test_a_layer_that_is_called_twice_has_units_for_each_call() -> None:
    model = Whole(lambda m, x: m.again(F.relu(m.again(m.first(x)))), first=nn.Linear(5, 4), again=nn.Linear(4, 4))
    net = net_of(model, torch.randn(3, 5))
    assert sizes(net) == {"input": 5, "first": 4, "again": 4, "again@1": 4}
    close(matrix(net, "again", "first"), model.again.weight.abs())
    close(matrix(net, "again@1", "again"), model.again.weight.abs())


def test_a_layer_of_which_nothing_is_made_twice_counts_once() -> None:
    model = Whole(
        lambda m, x: m.last(F.relu(m.first(x)) * torch.sigmoid(m.first(x))), first=nn.Linear(5, 4), last=nn.Linear(4, 2)
    )
    net = net_of(model, torch.randn(3, 5))
    close(matrix(net, "first", "input"), model.first.weight.abs())


def test_branches_part_and_meet() -> None:
    model = Whole(
        lambda m, x: m.last(torch.cat([F.relu(m.a(x)), torch.tanh(m.b(x))], -1)),
        b=nn.Linear(6, 3), a=nn.Linear(6, 4), last=nn.Linear(7, 2),
    )  # fmt: skip
    net = net_of(model, torch.randn(3, 6))
    close(matrix(net, "last", "a"), model.last.weight[:, :4].abs())
    close(matrix(net, "last", "b"), model.last.weight[:, 4:].abs())
    assert matrix(net, "a", "b").sum() == 0


def test_units_are_followed_through_shuffles_flips_and_slices() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        made = m.first(x).reshape(len(x), 2, 3).transpose(1, 2).reshape(len(x), 6).flip(-1)
        return m.last(made[:, 1:])

    model = Whole(code, first=nn.Linear(4, 6), last=nn.Linear(5, 2))
    net = net_of(model, torch.randn(3, 4))
    order = torch.arange(6).reshape(2, 3).T.reshape(6).flip(0)[1:]
    wanted = torch.zeros(2, 6)
    wanted[:, order] = model.last.weight.detach().abs()
    close(matrix(net, "last", "first"), wanted)


def test_groups_of_channels_and_turned_kernels() -> None:
    model = Whole(
        lambda m, x: m.back(m.grouped(m.first(x))),
        first=nn.Conv1d(2, 6, 1), grouped=nn.Conv1d(6, 4, 3, groups=2), back=nn.ConvTranspose1d(4, 6, 3, groups=2),
    )  # fmt: skip
    net = net_of(model, torch.randn(2, 2, 9))
    sized, wanted = model.grouped.weight.norm(2, -1), torch.zeros(4, 6)
    wanted[:2, :3], wanted[2:, 3:] = sized[:2].detach(), sized[2:].detach()
    close(matrix(net, "grouped", "first"), wanted)
    sized, wanted = model.back.weight.norm(2, -1).detach(), torch.zeros(6, 4)
    wanted[:3, :2], wanted[3:, 2:] = sized[:2].T, sized[2:].T
    close(matrix(net, "back", "grouped"), wanted)


def test_gates_and_squeezes() -> None:
    def code(m: Any, x: Tensor) -> Tensor:
        made = m.first(x)
        squeezed = torch.sigmoid(m.out(F.relu(m.into(F.adaptive_avg_pool2d(made, 1)))))
        return m.last(made * squeezed * m.where(made).sigmoid())

    layers = {
        name: nn.Conv2d(a, b, 1)
        for name, a, b in (("first", 3, 4), ("into", 4, 2), ("out", 2, 4), ("where", 4, 1), ("last", 4, 5))
    }
    net = net_of(Whole(code, **layers), torch.randn(2, 3, 4, 4))
    assert sizes(net) == {"input": 3, "first": 4, "into": 2, "where": 1, "last": 5}
    both = layers["into"].weight[:, :, 0, 0].abs() + layers["out"].weight[:, :, 0, 0].abs().T
    close(matrix(net, "into", "first"), both)


def test_a_mixer_over_positions_leaves_units_alone_and_says_so() -> None:
    model = Whole(
        lambda m, x: m.last(m.first(x) + m.mix(m.first(x).transpose(1, 2)).transpose(1, 2)),
        first=nn.Linear(4, 6), mix=nn.Linear(5, 5), last=nn.Linear(6, 2),
    )  # fmt: skip
    found = Modularity(model.eval(), draws=1, edges=[1.0]).run(torch.randn(2, 5, 4), progress=False)
    assert found.groups == ("input", "first", "last")
    assert found.mixing == ("mix/linear#0",)
    assert "no edges of 1 projection over positions: mix/linear#0" in repr(found)


class Attending(nn.Module):
    """A layer of attention and memories, written by hand, with gates or without, norm before or after."""

    def __init__(self, gated: bool, after: bool) -> None:
        super().__init__()
        self.emb, self.gated, self.after = nn.Embedding(11, 8), gated, after
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.n1, self.n2 = nn.LayerNorm(8), nn.LayerNorm(8)
        for norm in (self.n1, self.n2):
            nn.init.uniform_(norm.weight, 0.5, 2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gated else F.gelu(self.up(x)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        if self.after:
            x = self.n1(x + self.attend(x))
            return self.n2(x + self.feed(x))
        x = x + self.attend(self.n1(x))
        return x + self.feed(self.n2(x))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 6)])
def test_a_transformer_of_residual_channels_heads_and_memories(gated: bool, after: bool, shape: tuple[int, int]) -> None:
    model, ids = Attending(gated, after), torch.randint(11, shape, generator=torch.Generator().manual_seed(0))
    net, plain = net_of(model, ids, fold="all"), net_of(model, ids)
    memory = "gate" if gated else "up"
    assert sizes(net) == {"emb": 8, "qkv": 24, memory: 12}
    read = model.n1.weight.detach() if after else model.n2.weight.detach()
    keys = model.up.weight.abs() + (model.gate.weight.abs() if gated else 0)
    close(matrix(net, memory, "emb"), keys * read + model.down.weight.abs().T)
    close(matrix(plain, memory, "emb"), keys + model.down.weight.abs().T)
    heads = model.qkv.weight.detach().abs() * (1 if after else model.n1.weight.detach())
    heads[16:] += model.proj.weight.detach().abs().T  # z has the units of the values
    close(matrix(net, "qkv", "emb"), heads)


@pytest.mark.parametrize("how", ["loop", "sorted", "chosen"])
def test_experts_have_units_of_their_own_and_write_to_the_same_channels(how: str) -> None:
    up, down = nn.Parameter(torch.randn(3, 4, 8)), nn.Parameter(torch.randn(3, 8, 4))

    def code(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        weights, expert = m.router(x).softmax(-1).topk(2, -1)
        if how == "loop":
            out = torch.zeros_like(x)
            for n in range(3):
                rows, k = torch.where(expert == n)
                out.index_add_(0, rows, F.relu(x[rows] @ up[n]) @ down[n] * weights[rows, k, None])
            return x + out
        order = expert.flatten().argsort(stable=True)
        rows = x[order // 2]
        if how == "chosen":
            made = torch.bmm(F.relu(torch.bmm(rows[:, None], up[expert.flatten()[order]])), down[expert.flatten()[order]])[
                :, 0
            ]
        else:
            ends = torch.bincount(expert.flatten(), minlength=3).cumsum(0).int()
            made = F.grouped_mm(F.relu(F.grouped_mm(rows, up, offs=ends)), down, offs=ends)
        made = made * weights.flatten()[order][:, None]
        return x + made[order.argsort()].view(len(x), 2, 4).sum(1)

    torch.manual_seed(1)
    model = Whole(code, first=nn.Linear(5, 4), router=nn.Linear(4, 3))
    model.up, model.down = up, down
    inputs = torch.randn(16, 5)
    if how == "chosen":
        with pytest.raises(AnalyzerError, match=r"/bmm#0 reads what /getitem#\d \(getitem\) made"):
            net_of(model, inputs)
        return
    net = net_of(model, inputs)
    assert sorted(sizes(net).values()) == [3, 4, 5, 8, 8, 8]
    experts = [name for name, size in sizes(net).items() if size == 8]
    for n, name in enumerate(experts):
        close(matrix(net, name, "first"), (up[n].abs() + down[n].abs().T).T)


def test_memories_alone() -> None:
    model, tokenizer = fmr.zoo.load("facts")
    net = Modularity(model, tokenizer, layers="memories").update("Junel Dunoth grew up").net()
    assert sizes(net) == {"transformer.wte": 128} | {f"transformer.h.{n}.mlp.c_fc": 512 for n in range(4)}
    mlp = model.transformer.h[2].mlp
    close(matrix(net, "transformer.h.2.mlp.c_fc", "transformer.wte"), mlp.c_fc.weight.abs().T + mlp.c_proj.weight.abs())


def test_only_some_layers() -> None:
    net = net_of(fmr.zoo.models.MLP([16, 8, 6, 3]), torch.randn(2, 16), scope="hidden.*")
    assert sizes(net) == {"input": 16, "hidden.0": 8, "hidden.1": 6}


def test_a_layer_after_what_cannot_be_followed_is_named_with_the_op() -> None:
    model = Whole(lambda m, x: m.last(torch.sort(m.first(x)).values), first=nn.Linear(5, 4), last=nn.Linear(4, 2))
    with pytest.raises(
        AnalyzerError, match=r"last/linear#0 reads what /sort#0:0 \(sort\) made, in which units cannot be followed.*scope="
    ):
        net_of(model, torch.randn(3, 5))
    assert sizes(net_of(model, torch.randn(3, 5), scope="first")) == {"input": 5, "first": 4}


def test_batch_norm_by_the_batch_is_no_scale_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).train()
    with pytest.raises(
        AnalyzerError, match=r"1/batch_norm#0 normalises by the statistics of its batch.*model.eval\(\), or fold='none'"
    ):
        Modularity(model).update(torch.randn(3, 5))
    assert len(Modularity(model, fold="none").update(torch.randn(3, 5)).net()) == 9


def test_half_precision_is_counted_alike() -> None:
    model = fmr.zoo.load("digits-mlp").model
    plain = net_of(model, torch.randn(2, 64)).adjacency().toarray()
    half = net_of(model.to(torch.bfloat16), torch.randn(2, 64, dtype=torch.bfloat16)).adjacency().toarray()
    np.testing.assert_allclose(half, plain, rtol=0.02, atol=1e-6)
