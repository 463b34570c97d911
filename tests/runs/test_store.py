"""fmr.store: a run comes back from disk as it was, piece by piece, or there is one clear error."""

import ast
import json
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import fmr
from fmr import IdError, Run, StoreError, TrackError
from fmr.disk import files
from fmr.disk.tensors import TensorFile

FORMS = ["run.fmr", "run"]
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout((self.linear(x) + self.shift).relu(), 0.5, self.training)


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


@pytest.fixture(scope="module")
def tiny() -> Run:
    torch.manual_seed(0)
    return fmr.run(Tiny().eval(), torch.randn(2, 3))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def gpt2(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2, attn_implementation=request.param)).eval()


def bits(value: Tensor) -> Tensor:
    plain = value.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_whole(back: Run, run: Run, params: bool = False) -> None:
    """Everything that was kept is there, bit for bit, and nothing else."""
    assert len(back.passes) == len(run.passes)
    for ours, theirs in zip(back.passes, run.passes, strict=True):
        expected = [name for name in theirs.kept if params or not name.startswith(("param:", "buffer:"))]
        assert list(ours.kept) == expected
        assert [name for name in expected if not same(ours[name], theirs[name])] == []
        if theirs._graph is not None:
            assert (ours.graph.nodes, ours.graph.scopes) == (theirs.graph.nodes, theirs.graph.scopes)
            assert ours.graph.fingerprint == theirs.graph.fingerprint


def back_from(run: Run, path: Path, params: bool = False) -> Run:
    run.save(path, params=params)
    back = fmr.load(path)
    assert_whole(back, run, params)
    return back


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
    content = TensorFile.content
    monkeypatch.setattr(TensorFile, "content", lambda self, name: read.append(name) or content(self, name))
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


@pytest.mark.parametrize("name", ["absent/run.fmr", "absent/run", "file/run.fmr", "file"])
def test_a_path_that_cannot_be_written_is_an_error(tiny: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"there is no folder .* Create it first|cannot be made a folder"):
        tiny.save(tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"mine"


# ---- damage


def parts(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


@pytest.mark.parametrize("form", FORMS)
def test_truncated_files_are_one_error(tiny: Run, tmp_path: Path, form: str) -> None:
    tiny.save(tmp_path / form)
    for part in parts(tmp_path / form):
        whole = part.read_bytes()
        for sixteenth in range(16):
            part.write_bytes(whole[: len(whole) * sixteenth // 16])
            with pytest.raises(StoreError, match="is not a file of fmr, or it is damaged"):
                fmr.load(tmp_path / form)
        part.write_bytes(whole)


@pytest.mark.parametrize("form", FORMS)
def test_a_flipped_byte_is_an_error_or_changes_nothing(tiny: Run, tmp_path: Path, form: str) -> None:
    tiny.save(tmp_path / form)
    draw = random.Random(0)
    quiet = flips = 0
    for part in parts(tmp_path / form):
        whole = part.read_bytes()
        with open(part, "r+b", buffering=0) as file:
            # the JSON is covered by a checksum of its own, which tests/test_files.py flips byte by byte
            step = {place for place in range(len(whole)) if not 2000 < place < len(whole) - 200 or place % 17 == 0}
            for place in sorted(step):
                file.seek(place)
                file.write(bytes([whole[place] ^ draw.randrange(1, 256)]))
                flips += 1
                try:
                    assert_whole(fmr.load(tmp_path / form), tiny)
                    quiet += 1
                except StoreError:
                    pass
                file.seek(place)
                file.write(whole[place : place + 1])
    assert_whole(fmr.load(tmp_path / form), tiny)
    assert quiet < 0.01 * flips


def test_a_damaged_value_leaves_the_others_readable(tiny: Run, tmp_path: Path) -> None:
    tiny.save(tmp_path / "run")
    values = next((tmp_path / "run").glob("values-*"))
    whole = bytearray(values.read_bytes())
    whole[-1] ^= 1
    values.write_bytes(whole)
    back = fmr.load(tmp_path / "run")
    assert same(back["input:x"], tiny["input:x"])
    with pytest.raises(StoreError, match=r"the checksum of '0:/relu#0' does not match its bytes"):
        back["/relu#0"]


@pytest.mark.parametrize("form", FORMS)
def test_a_file_swapped_for_another_is_an_error(tiny: Run, tmp_path: Path, form: str) -> None:
    tiny.save(tmp_path / form)
    place = parts(tmp_path / form)[-1]
    for content in (b"", b"\x00" * 64, pickle.dumps({"a": 1}), pickle.dumps([0] * 99), b'{"format": "fmr.run"}'):
        place.write_bytes(content)
        with pytest.raises(StoreError):
            fmr.load(tmp_path / form)
    torch.save({"a": torch.ones(2)}, place)
    with pytest.raises(StoreError):
        fmr.load(tmp_path / form)
    save_file({"a": torch.ones(2)}, place)
    with pytest.raises(StoreError):
        fmr.load(tmp_path / form)


def test_what_is_missing_is_named(tiny: Run, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"absent\.fmr cannot be read .*Expected a run that run\.save\(path\) wrote"):
        fmr.load(tmp_path / "absent.fmr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"graph\.json cannot be read .*Expected the graph\.json of a run"):
        fmr.load(tmp_path / "empty")
    tiny.save(tmp_path / "run")
    next((tmp_path / "run").glob("values-*")).unlink()
    with pytest.raises(StoreError, match=r"values-.* cannot be read .*Expected the values that graph\.json names"):
        fmr.load(tmp_path / "run")


@pytest.mark.parametrize("form", FORMS)
def test_a_newer_schema_says_upgrade(tiny: Run, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "SCHEMA", 3)
        tiny.save(tmp_path / form)
    with pytest.raises(StoreError, match=r"has schema 3, this version of fmr reads schema 2\. Upgrade fmr"):
        fmr.load(tmp_path / form)


def test_a_graph_file_is_not_a_run(tiny: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    tiny.graph.save(tmp_path / "run" / "graph.json")
    with pytest.raises(StoreError, match=r"holds 'fmr\.graph', expected 'fmr\.run'"):
        fmr.load(tmp_path / "run")


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


# ---- killed, failing and competing writers


@pytest.mark.parametrize(
    ("form", "step", "which"),
    [("run.fmr", "fsync", 1), ("run.fmr", "replace", 1), ("run", "fsync", 1), ("run", "replace", 1), ("run", "replace", 2)],
)
def test_a_save_that_fails_leaves_the_earlier_one(
    tiny: Run, tmp_path: Path, form: str, step: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path / form)
    other = fmr.run(Tiny(), torch.randn(5, 3))
    do, calls = getattr(os, step), []

    def fail(*args: object) -> None:
        calls.append(args)
        if len(calls) == which:
            raise OSError("disk full")
        do(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            other.save(tmp_path / form)
    assert_whole(fmr.load(tmp_path / form), tiny)
    assert not list(tmp_path.rglob("*.tmp"))
    back_from(other, tmp_path / form)
    assert len(parts(tmp_path / form)) == (2 if form == "run" else 1)


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tiny: Run, tmp_path: Path) -> None:
    tiny.save(tmp_path / "run")
    mine = {"notes.txt", "values-mine.safetensors", ".hidden.tmp"}
    for name in (
        *mine,
        f"values-{'0' * 32}.safetensors",
        f".values-{'0' * 32}.safetensors.01234567.tmp",
        ".graph.json.89abcdef.tmp",
    ):
        (tmp_path / "run" / name).write_bytes(b"")
    back_from(tiny, tmp_path / "run")
    assert {path.name for path in parts(tmp_path / "run") if not path.name.startswith("values-0")} >= mine
    assert len(parts(tmp_path / "run")) == len(mine) + 2


KILLED = """
import os, random, signal, sys, time
import torch
from torch import nn
import fmr

torch.set_num_threads(1)
draw = random.Random(0)
runs = [fmr.run(nn.Sequential(nn.Linear(4, 4096), nn.ReLU()), torch.full((64, 4), float(n))) for n in range(2)]
for path in sys.argv[1:]:
    runs[0].save(path)
    for _ in range(12):
        child = os.fork()
        if child == 0:
            while True:
                for run in runs:
                    run.save(path)
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        back = fmr.load(path)
        which = int(back["input:input"][0, 0])
        assert len(back.last.kept) == 3
        assert all(torch.equal(back[name], runs[which][name]) for name in back.last.kept)
    runs[1].save(path)
print("whole")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, *(str(tmp_path / form) for form in FORMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "whole\n", done.stderr
    assert len(parts(tmp_path / "run")) == 2


def test_writers_and_a_reader_of_one_folder_do_not_disturb_each_other(tiny: Run, tmp_path: Path) -> None:
    runs = [tiny, fmr.run(Tiny().eval(), torch.randn(5, 3))]
    tiny.save(tmp_path / "run")
    writers = [threading.Thread(target=lambda run=run: [run.save(tmp_path / "run") for _ in range(8)]) for run in runs]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        back = fmr.load(tmp_path / "run")
        assert_whole(back, runs[len(back["input:x"]) == 5])
    for writer in writers:
        writer.join()
    assert len(parts(tmp_path / "run")) == 2
