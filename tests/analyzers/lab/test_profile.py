"""Profiles add up to the whole, and count what torch counts."""

import copy
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import analyzers
from analyzers.lab.errors import LabError
from analyzers.lab.flame import tree_of
from tests.residue import model_state, random_state, torch_state

matplotlib.use("Agg")


class Block(nn.Module):
    """A convolution, a product and fused attention, one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.out(self.conv(x).transpose(1, 2))
        h = F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0]
        return self.out(h).relu()


@pytest.fixture
def work(tmp_path: Path) -> tuple[analyzers.Lab, torch.Tensor]:
    return analyzers.Lab(nn.Sequential(Block(), nn.Dropout()).train(), tmp_path / "lab"), torch.randn(2, 3, 10)


def test_its_parts_add_up_to_the_whole(work: Any, tmp_path: Path) -> None:
    lab, x = work
    profile = lab.profile(x)
    assert profile.seconds.sum() == pytest.approx(profile.whole, rel=1e-9)
    assert (profile.seconds >= 0).all()
    for by in ("module", "op", None):
        table = profile.table(by)
        assert table["share"].sum() == pytest.approx(1, rel=1e-9)
        assert table["flops"].sum() == profile.flops.sum()
        assert table["memory"].sum() == profile.memory.sum()
    modules = profile.table("module").set_index("module")
    assert set(modules.index) == {"", "(root)", "0", "0.conv", "0.out", "1"}
    assert modules["calls"].to_dict() | {"": 0} == {"": 0, "(root)": 1, "0": 1, "0.conv": 1, "0.out": 2, "1": 1}
    assert modules.loc["(root)", "with_inner"] == pytest.approx(profile.whole - modules.loc["", "seconds"], rel=1e-9)
    assert modules.loc["0", "with_inner"] == pytest.approx(modules.loc[["0", "0.conv", "0.out"], "seconds"].sum())
    root = tree_of(profile)
    assert root.seconds == pytest.approx(profile.whole)
    profile.plot().savefig(tmp_path / "flame.png")
    assert (tmp_path / "flame.png").stat().st_size > 5000


def test_flops_are_those_of_torchs_counter_and_by_hand(work: Any) -> None:
    lab, x = work
    profile = lab.profile(x)
    counter = FlopCounterMode(display=False)
    with counter:
        lab.model(x)
    rows = {(module, op): flops for module, op, flops in zip(profile.modules, profile.ops, profile.flops, strict=True)}
    by_op = {str(op).replace(".", "::", 1): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert {op: sum(n for (_, one), n in rows.items() if one == op) for op in by_op} == by_op
    assert rows["0.conv", "aten::convolution"] == 2 * (2 * 8 * 8) * (3 * 3)
    assert sum(n for (module, _), n in rows.items() if module == "0.out") == 2 * 2 * (2 * 8) * 8 * 8
    attention = 2 * (2 * 8 * 8) * 8 * 2  # the scores and what they mix: torch counts none of it on a CPU
    assert profile.flops.sum() == counter.get_total_flops() + attention


def test_memory_by_hand(lab: analyzers.Lab) -> None:
    def twice() -> None:
        for _ in range(2):
            torch.zeros(1000, dtype=torch.float32)

    profile = lab.profile(twice)
    assert profile.memory[profile.ops.index("aten::empty")] == 8000
    assert profile.memory.sum() == 8000
    assert profile.peak == 4000


def test_backward_and_any_function(work: Any) -> None:
    lab, x = work
    profile = lab.profile(lambda: lab.model(x).sum().backward())
    forward = lab.profile(x)
    assert profile.seconds.sum() == pytest.approx(profile.whole, rel=1e-9)
    products = forward.flops.sum() - 2304  # the input of the convolution has no gradient
    attention = 2 * (2 * 8 * 8) * 8 * 2  # five products backwards where there are two forwards
    assert profile.flops.sum() == 3 * products + 2 * 2304 - 0.5 * attention + attention


def test_nothing_is_left_behind(work: Any, capfd: pytest.CaptureFixture[str]) -> None:
    import os

    lab, x = work
    drawn = []
    before = torch_state(), model_state(lab.model), random_state(), dict(os.environ)
    lab.profile(lambda: drawn.append(lab.model(x)))
    assert (torch_state(), model_state(lab.model), random_state(), dict(os.environ)) == before
    assert torch.equal(*drawn), "both times from one seed"
    assert capfd.readouterr().err == ""


def test_an_error_in_the_work_is_raised_and_nothing_stays_on(work: Any) -> None:
    lab, x = work
    before = torch_state()
    with pytest.raises(RuntimeError, match=r"size of tensor|shape|expected"):
        lab.profile(torch.randn(2, 5, 10))
    assert torch_state() == before
    assert lab.profile(x).whole > 0


def test_running_statistics_are_those_of_before(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).train()
    lab, x = analyzers.Lab(net, tmp_path / "lab"), torch.randn(8, 4)
    net(x)
    before, places = copy.deepcopy(net.state_dict()), [id(one) for one in net.buffers()]
    lab.profile(x)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    assert [id(one) for one in net.buffers()] == places
    lab.profile(lambda: net(x))  # a function may change what it likes
    assert net[1].num_batches_tracked == before["1.num_batches_tracked"] + 2


def test_misuse(work: Any) -> None:
    lab, x = work
    with pytest.raises(LabError, match=r"lab.profile got 3, expected a function, or the tensors of a forward of the model"):
        lab.profile(3)
    with pytest.raises(LabError, match=r"got no arguments for the model. Expected those of a forward: lab"):
        lab.profile()
    with pytest.raises(LabError, match="The lab has no model to profile"):
        analyzers.Lab(None, lab.folder).profile(x)
    with pytest.raises(LabError, match="by='layer': expected 'module', 'op', or None"):
        lab.profile(x).table("layer")
    with torch.profiler.profile() as other:
        with pytest.raises(LabError, match=r"A profiler of torch is on already.* Leave its block"):
            lab.profile(x)
        torch.ones(2)
    assert "aten::ones" in {one.name for one in other.events()}


def test_a_profile_is_kept_in_a_lab(work: Any) -> None:
    lab, x = work

    @lab.experiment
    def cost(x: torch.Tensor) -> analyzers.Profile:
        return lab.profile(x)

    made = cost(x)
    kept = lab.versions("cost")[0].result
    assert repr(kept) == repr(made)
    assert np.array_equal(kept.flops, made.flops)


@pytest.mark.parametrize("grad", [False, True])
def test_recurrent_kernels_count_each_matrix_for_each_token(lab: analyzers.Lab, grad: bool) -> None:
    model, x = nn.LSTM(4, 5, num_layers=2, bidirectional=True), torch.randn(3, 2, 4)
    matrices = sum(one.numel() for one in model.parameters() if one.dim() > 1)
    with torch.set_grad_enabled(grad):
        flops = [lab.profile(model.to(dtype), x.to(dtype)).flops.sum() for dtype in (torch.float32, torch.float64)]
    assert flops == [2 * 6 * matrices] * 2  # in double it is no kernel
    backward = lab.profile(lambda: nn.LSTM(4, 5)(x)[0].sum().backward()).flops.sum()
    assert backward == 3 * 2 * 6 * (20 * 4 + 20 * 5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_is_one_kernel_counts_as_one_that_is_many(lab: analyzers.Lab) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model, x, padding = nn.TransformerEncoder(layer, 2), torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.bool)
    padding[0, 2:] = True
    with torch.no_grad():
        fused, plain = (lab.profile(model.train(mode), x).flops.sum() for mode in (False, True))
        padded = lab.profile(model.eval(), x, src_key_padding_mask=padding)
        heads = [lab.profile(layer.self_attn.train(mode), x, x, x).flops.sum() for mode in (False, True)]
    assert fused == plain == 2 * (2 * (4 * 64 + 2 * 8 * 16) * 8 + 4 * 8 * (16 + 16))
    assert padded.flops.sum() == 2 * (2 * (4 * 64 + 2 * 8 * 16) * 6 + 4 * 8 * (4 + 16)), "padding is taken out there"
    assert heads[0] == heads[1] > 0
