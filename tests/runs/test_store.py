"""fmr.store: a run comes back from disk as it was, piece by piece, or there is one clear error."""

import ast
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import fmr
from fmr import IdError, Run, StoreError, TrackError
from fmr.disk.tensors import TensorFile
from tests.runs.stored import FORMS, Tiny, assert_whole, back_from, same

GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}


class Kinds(nn.Module):
    """One value of each kind that is easily lost: dtypes, views, empty and overwritten ones."""

    def forward(self, x: Tensor) -> Tensor:
        _ = [x.to(kind) for kind in (torch.bool, torch.int8, torch.uint16, torch.float16, torch.bfloat16, torch.float8_e5m2)]
        pair = torch.complex(x.double(), x.double() * 2)
        _ = pair.conj(), pair.conj().imag, pair.to(torch.complex64)
        _ = (
            x.t(),
            x.expand(2, 3, 4),
            x.unfold(1, 2, 1),
            x[:, ::2],
            x[:1, 1],
            x[0:0],
            x.view(2, 6),
            x.view(torch.int32),
            x.as_strided((2, 2), (0, 1)),
        )
        y = x + 1
        y[0] = 0
        return y.t().sum()


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def gpt2(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2, attn_implementation=request.param)).eval()


# ---- what comes back


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("params", [False, True])
def test_a_run_comes_back(tiny: Run, tmp_path: Path, form: str, params: bool) -> None:
    back = back_from(tiny, tmp_path / form, params)
    assert isinstance(back, Run)
    assert repr(back).startswith("Run of one pass: Graph of Tiny: 4 ops")
    assert back.output is None
    assert same(back[fmr.Site("/relu#0", units=[0])], tiny[fmr.Site("/relu#0", units=[0])])


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_on_disk(tiny: Run, tmp_path: Path, form: str) -> None:
    tiny.save(tmp_path / form)
    if form == "run":
        graph, values = sorted(os.listdir(tmp_path / form))
        assert graph == "graph.json"
        assert values.startswith("values-")
        assert json.loads((tmp_path / form / graph).read_bytes())["format"] == "fmr.run"
        path = tmp_path / form / values
    else:
        path = tmp_path / form
    with safe_open(path, "pt") as file:
        assert same(file.get_tensor("0:linear/linear#0"), tiny["linear/linear#0"])


def test_an_existing_folder_is_one_whatever_its_name(tiny: Run, tmp_path: Path) -> None:
    (tmp_path / "v1.0").mkdir()
    back_from(tiny, tmp_path / "v1.0")
    assert len(os.listdir(tmp_path / "v1.0")) == 2


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_value_comes_back(tmp_path: Path, form: str) -> None:
    torch.manual_seed(0)
    back_from(fmr.run(Kinds(), torch.randn(3, 4)), tmp_path / form)


def test_gpt2_comes_back_with_the_values_inside_fused_ops(gpt2: nn.Module, tmp_path: Path) -> None:
    run = fmr.run(gpt2, torch.arange(12)[None])
    back = back_from(run, tmp_path / "run.fmr", params=True)
    patterns = run.graph.find("*softmax#0")
    assert len(patterns) == 2
    for node in patterns:
        assert same(back[node], run[node])


def test_a_fused_op_over_parameters_says_what_it_needs(tmp_path: Path) -> None:
    run = fmr.run(nn.MultiheadAttention(4, 2).eval(), *[torch.randn(3, 1, 4)] * 3)
    inner = next(node.id for node in run.graph.find("*softmax#0"))
    assert same(back_from(run, tmp_path / "with.fmr", params=True)[inner], run[inner])
    with pytest.raises(IdError, match=r"'param:in_proj_\w+' belongs to the model .*run\.save\(path, params=True\)"):
        back_from(run, tmp_path / "without.fmr")[inner]


def test_all_passes_of_a_generation_come_back(gpt2: nn.Module, tmp_path: Path) -> None:
    with fmr.track(gpt2) as run:
        gpt2.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(run.passes) == 3
    back_from(run, tmp_path / "run")


@pytest.mark.parametrize("keep", [["linear/linear#0", "input:x"], "*relu*", "none"])
def test_what_was_not_kept_is_not_there(tmp_path: Path, keep: str | list[str]) -> None:
    run = fmr.run(Tiny(), torch.randn(2, 3), keep=keep)
    back = back_from(run, tmp_path / "run.fmr")
    with pytest.raises(IdError, match="did not keep '/add#0'"):
        back["/add#0"]
    if run.last._graph is None:
        with pytest.raises(TrackError, match="recorded no graph"):
            _ = back.graph


def test_gradients_come_back(tmp_path: Path) -> None:
    model = Tiny()
    x = torch.randn(2, 3, requires_grad=True)
    run = fmr.run(model, x, grad=True)
    run["/relu#0"].square().sum().backward()
    back = back_from(run, tmp_path / "run.fmr")
    for name in ("/relu#0", "/add#0", "linear/linear#0", "input:x"):
        assert same(back.grad[name], run.grad[name])
    with pytest.raises(IdError, match="params=True"):
        back.grad["param:linear.weight"]
    back = back_from(run, tmp_path / "run.fmr", params=True)
    assert same(back.grad["param:linear.weight"], model.linear.weight.grad)
    again = back_from(back, tmp_path / "again.fmr", params=True)
    assert same(again.grad["/relu#0"], run.grad["/relu#0"])


def test_a_run_without_history_has_no_gradients(tiny: Run, tmp_path: Path) -> None:
    with pytest.raises(TrackError, match="Track with grad=True"):
        back_from(tiny, tmp_path / "run.fmr").grad["/relu#0"]


def test_a_value_that_was_lost_says_so_again(tmp_path: Path) -> None:
    run = fmr.run(Tiny(), torch.randn(2, 3))
    lost = run.graph["/add#0"].id
    run.last.slots[lost] = None
    del run.last.values[lost]
    for one in (run, back_from(back_from(run, tmp_path / "run.fmr"), tmp_path / "run")):
        with pytest.raises(IdError, match="'/add#0' was overwritten in place"):
            one[lost]


def test_parameters_are_left_to_the_model(tiny: Run, tmp_path: Path) -> None:
    back = back_from(back_from(tiny, tmp_path / "run.fmr"), tmp_path / "again.fmr")
    assert "param:linear.weight" not in back
    for name in ("param:linear.weight", "buffer:shift"):
        with pytest.raises(IdError, match=rf"'{name}' belongs to the model .* Save with run\.save\(path, params=True\)"):
            back[name]


# ---- how it is stored


def test_the_same_elements_are_stored_once(tmp_path: Path) -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, _ = x.view(4, 3, 8).unbind(1)
            y = F.dropout(q, 0.5, False).view(4, 2, 4).transpose(0, 1)
            return y.sum() if y.dim() == 2 else k.expand(6, 4, 8)

    run = fmr.run(Views(), torch.randn(4, 24))
    assert len(run.last.kept) == 9
    back_from(run, tmp_path / "run.fmr")
    with safe_open(tmp_path / "run.fmr", "pt") as file:
        sizes = {name: tuple(file.get_tensor(name).shape) for name in file.keys() if name != "graph.json"}  # noqa: SIM118
    assert sizes == {"0:input:x": (4, 24), "0:/unbind#0:0": (4, 8), "0:/unbind#0:1": (4, 8), "0:/unbind#0:2": (4, 8)}


@pytest.mark.parametrize("form", FORMS)
def test_reading_reads_that_value_alone(tiny: Run, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path / form)
    read: list[str] = []
    for kind in ("content", "text"):
        how = getattr(TensorFile, kind)
        monkeypatch.setattr(TensorFile, kind, lambda self, name, how=how: read.append(name) or how(self, name))
    back = fmr.load(tmp_path / form)
    _ = back.graph, repr(back), "/relu#0" in back, back.last.kept
    assert read == (["graph.json"] if form == "run.fmr" else [])
    read.clear()
    _ = back["/relu#0"]
    assert read == ["0:/relu#0"]


def test_each_reading_is_a_tensor_of_its_own(tiny: Run, tmp_path: Path) -> None:
    back = back_from(tiny, tmp_path / "run.fmr")
    back["/relu#0"].zero_()
    assert same(back["/relu#0"], tiny["/relu#0"])


@pytest.mark.parametrize("form", FORMS)
def test_the_same_run_gives_the_same_bytes(tiny: Run, tmp_path: Path, form: str) -> None:
    back = back_from(tiny, tmp_path / form)
    contents = [path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    back.save(tmp_path / form)
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()] == contents
    assert_whole(back, tiny)


@pytest.mark.parametrize("form", FORMS)
def test_an_open_run_outlives_a_save_over_it(tiny: Run, tmp_path: Path, form: str) -> None:
    back = back_from(tiny, tmp_path / form)
    other = fmr.run(Tiny(), torch.randn(5, 3))
    back_from(other, tmp_path / form)
    assert_whole(back, tiny)


def test_saving_inside_a_block_leaves_no_trace(tmp_path: Path) -> None:
    first = fmr.run(Tiny().eval(), torch.ones(2, 3))

    class Saves(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            first.save(tmp_path / "run.fmr")
            fmr.load(tmp_path / "run.fmr").save(tmp_path / "again.fmr")
            return super().forward(x)

    assert fmr.run(Saves().eval(), torch.ones(2, 3)).graph.fingerprint == first.graph.fingerprint


# ---- what cannot be stored


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda x: x.to_sparse(), "dtype torch.float32, Tensor, layout torch.sparse_coo"),
        (lambda x: torch.nested.nested_tensor([x, x]), "dtype torch.float32, nested Tensor"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "dtype torch.qint8"),
        (lambda x: torch.empty(3, device="meta"), "dtype torch.float32, .* device meta"),
    ],
    ids=["sparse", "nested", "quantized", "meta"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_value_without_plain_elements_is_refused(tmp_path: Path, make: Callable[[Tensor], Tensor], what: str) -> None:
    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return make(x)

    run = fmr.run(Makes(), torch.ones(2, 2))
    name = run.graph.nodes[-1].id
    with pytest.raises(StoreError, match=rf"'{name}' cannot be saved: {what}.*Track with a keep= that leaves it out"):
        run.save(tmp_path / "run.fmr")
    assert os.listdir(tmp_path) == []


def test_a_run_of_nothing_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TrackError, match="Nothing has run yet"):
        Run().save(tmp_path / "run.fmr")


# ---- no pickle


def test_no_module_of_the_store_imports_pickle() -> None:
    for module in ("runs/store", "disk/tensors", "disk/files", "graph/graph"):
        tree = ast.parse((Path(fmr.__file__).parent / f"{module}.py").read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "copyreg"}


def test_saving_and_loading_pickle_and_execute_nothing(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(f"builtins.{name}", refuse)
    back_from(tiny, tmp_path / "run.fmr")


# ---- names and arguments


def test_a_module_of_any_name_comes_back(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("half\ud800", nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.get_submodule("half\ud800")(x)
            return out

    for form in FORMS:
        back_from(fmr.run(Odd(), torch.ones(2)), tmp_path / form)


class Scaled(nn.Module):
    """An attention whose scores are scaled by a number of some kind."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(2, 3, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return x + self.o(z.transpose(1, 2).reshape(2, 3, 8))


@pytest.mark.parametrize("scale", [0.5, np.float32(0.5), np.float64(0.5), np.int64(2)], ids=lambda s: type(s).__name__)
def test_an_attention_scaled_by_a_number_of_numpy_is_found_in_the_file_too(tmp_path: Path, scale: Any) -> None:
    torch.manual_seed(0)
    run = fmr.run(Scaled(scale), torch.randn(2, 3, 8))
    back = back_from(run, tmp_path / "run.fmr", params=True)
    assert [len(fmr.locate(one).attention) for one in (run, back)] == [1, 1]
