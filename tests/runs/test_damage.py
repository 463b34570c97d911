"""Saved runs that are damaged, crafted or no files at all: one clear error, in little memory and time."""

import json
import os
import pickle
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fmr
from fmr import GraphError, Run, StoreError
from fmr.disk import files
from tests.runs.stored import FORMS, assert_whole, parts, same


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


# ---- crafted: every checksum is right


def crafted(run: Run, folder: Path, change: Callable[[Any], object]) -> None:
    run.save(folder)
    body = json.loads(json.loads((folder / "graph.json").read_bytes())["body"])
    change(body)
    (folder / "graph.json").write_bytes(files.seal("run", body))


def read_all(path: Path) -> None:
    back = fmr.load(path)
    graph = back.graph
    graph.lint()
    _ = [back[name] for name in back.last.kept], repr(graph), graph.unfused, list(graph.ids())


def value(row: Any) -> Any:
    return row["passes"][0]["values"]["/relu#0"]


def op(row: Any) -> Any:
    return row["passes"][0]["graph"]["nodes"][-1]


CRAFTED: dict[str, Callable[[Any], object]] = {
    "a shape larger than the data": lambda row: value(row).__setitem__(1, [9, 9]),
    "a shape of text": lambda row: value(row).__setitem__(1, ["x"]),
    "no strides": lambda row: value(row).__setitem__(2, []),
    "negative strides": lambda row: value(row).__setitem__(2, [-1, 1]),
    "a value of no entry": lambda row: value(row).__setitem__(0, "absent"),
    "an entry of a layout": lambda row: row["entries"][0].__setitem__(1, "strided"),
    "an entry of a function": lambda row: row["entries"][0].__setitem__(1, "load"),
    "an entry whose name is a list": lambda row: row["entries"][0].__setitem__(0, [1]),
    "an entry whose shape is text": lambda row: row["entries"][0].__setitem__(2, ["x"]),
    "parents that are a dict": lambda row: op(row).__setitem__(3, {"ab": 1}),
    "a parent that is a dict": lambda row: op(row).__setitem__(3, [[{}, "0"]]),
    "a parent that is not there": lambda row: op(row).__setitem__(3, [["/absent#0", "0"]]),
    "a node that reads itself": lambda row: op(row).__setitem__(3, [[op(row)[0], "0"]]),
    "a node that stands twice": lambda row: row["passes"][0]["graph"]["nodes"].append(op(row)),
    "arguments that are a list": lambda row: op(row).__setitem__(7, []),
    "an argument of no kind": lambda row: op(row).__setitem__(7, {"1": {"code": "x"}}),
    "an argument that is a list": lambda row: op(row).__setitem__(7, {"1": [1]}),
    "a hole of no parent": lambda row: op(row).__setitem__(7, {"1": {"list": [{"hole": "1.0"}]}}),
    "an array of objects": lambda row: op(row).__setitem__(7, {"1": {"array": ["O", [1], [1]]}}),
    "an array with too few numbers": lambda row: op(row).__setitem__(7, {"1": {"array": ["<f4", [10**12], [1]]}}),
    "an ID of another form": lambda row: op(row).__setitem__(0, "relu"),
    "a device of no kind": lambda row: op(row).__setitem__(6, "x"),
    "a shape of nothing": lambda row: op(row).__setitem__(4, [None]),
    "a dtype that is a device": lambda row: op(row).__setitem__(5, {"torch": ["device", "cpu"]}),
    "a call that returned a number": lambda row: row["passes"][0]["graph"]["scopes"][0].__setitem__(5, 5),
    "a call in a number": lambda row: row["passes"][0]["graph"]["scopes"][0].__setitem__(3, 5),
    "passes that are a number": lambda row: row.__setitem__("passes", 5),
    "values in a number": lambda row: row.__setitem__("file", 3),
    "values in a folder": lambda row: row.__setitem__("file", ".."),
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_run_is_one_error(tiny: Run, tmp_path: Path, change: Callable[[Any], object]) -> None:
    crafted(tiny, tmp_path / "run", change)
    with pytest.raises(StoreError, match=r"is not a file of fmr, or it is damaged|cannot be read|is no dtype"):
        read_all(tmp_path / "run")


@pytest.mark.parametrize("name", ["lerp", "multi_head_attention_forward"])
def test_a_fused_op_with_arguments_of_another_is_one_error(tiny: Run, tmp_path: Path, name: str) -> None:
    def change(row: Any) -> None:
        op(row)[:3] = [f"/{name}#0", name, ""]
        for scope in row["passes"][0]["graph"]["scopes"]:
            scope[4:] = [files.encode(None), files.encode(None)]

    crafted(tiny, tmp_path / "run", change)
    with pytest.raises(GraphError, match=rf"/{name}#0 cannot be opened: {name} takes no such arguments \(\w*Error: "):
        read_all(tmp_path / "run")


INCONSISTENT: dict[str, Callable[[Any], object]] = {
    "an op in no call": lambda graph: graph["scopes"].pop(),
    "no calls": lambda graph: graph["scopes"].clear(),
    "a call twice": lambda graph: graph["scopes"].append(graph["scopes"][-1]),
    "a call in none": lambda graph: graph["scopes"][-1].__setitem__(3, "nowhere"),
    "two roots": lambda graph: graph["scopes"][-1].__setitem__(3, None),
}


@pytest.mark.parametrize("change", INCONSISTENT.values(), ids=INCONSISTENT)
def test_calls_that_do_not_fit_are_one_error(tiny: Run, change: Callable[[Any], object]) -> None:
    graph = tiny.graph.to_dict()
    assert fmr.Graph.from_dict(graph).table()
    change(graph)
    with pytest.raises(StoreError, match=r"stands twice or in no other|runs in no module call"):
        fmr.Graph.from_dict(graph)


def test_a_deep_nest_is_one_error(tiny: Run, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    tiny.graph.save(path)
    sealed = {**json.loads(path.read_bytes()), "body": "[" * 10**5}
    text = f"{sealed['format']} {sealed['schema']} {sealed['body']}"
    path.write_text(json.dumps({**sealed, "digest": files.digest(text.encode())}))
    with pytest.raises(StoreError, match="RecursionError"):
        fmr.Graph.load(path)


# ---- files that are no files, or hold less than they say

HEADER = json.dumps({"graph.json": {"dtype": "U8", "shape": [8 << 30], "data_offsets": [0, 8 << 30]}}).encode()


@pytest.mark.parametrize(
    ("name", "head", "size"),
    [
        ("run/graph.json", b"", 1 << 42),
        ("run/graph.json", b'{"format": "fmr.run", "schema": 2, "digest": "', 1 << 42),
        ("run.fmr", (8 * 10**9).to_bytes(8, "little"), 8 << 30),
        ("run.fmr", len(HEADER).to_bytes(8, "little") + HEADER, 8 + len(HEADER) + (8 << 30)),
    ],
    ids=["graph", "graph with a beginning", "header", "graph in a file"],
)
def test_a_file_with_a_large_hole_is_one_error_and_takes_no_memory(
    tmp_path: Path, name: str, head: bytes, size: int
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / name).write_bytes(head)
    try:
        os.truncate(tmp_path / name, size)
    except OSError:
        pytest.skip("the disk takes no such files")
    tracemalloc.start()
    with pytest.raises(StoreError, match="zeros where text was expected"):
        fmr.load(tmp_path / name.partition("/")[0])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 << 20


def special(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    else:
        os.symlink({"zeros": "/dev/zero", "memory": "/proc/self/mem", "folder": path.parent, "loop": path}[kind], path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="the names of such files are those of Linux")
@pytest.mark.parametrize("kind", ["pipe", "zeros", "memory", "folder", "loop"])
@pytest.mark.parametrize("name", ["run.fmr", "run/graph.json", "run/values"])
def test_what_is_no_regular_file_or_cannot_be_read_is_one_error(tiny: Run, tmp_path: Path, name: str, kind: str) -> None:
    tiny.save(tmp_path / "run")
    path = tmp_path / name if name != "run/values" else next((tmp_path / "run").glob("values-*"))
    path.unlink(missing_ok=True)
    special(kind, path)
    with pytest.raises(StoreError, match=r"cannot be read \(|is not a file of fmr"):
        fmr.load(tmp_path / name.partition("/")[0])
    if kind != "folder":
        with pytest.raises(StoreError, match=r"cannot be read \("):
            fmr.Graph.load(path)


@pytest.mark.parametrize("name", ["", "nul\0.fmr", "half\ud800.fmr", "a" * 300, "a" * 300 + ".fmr"])
def test_a_path_that_no_system_takes_is_one_error(
    tiny: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for reach in (fmr.load, fmr.Graph.load, tiny.save, tiny.graph.save):
        with pytest.raises(StoreError, match=r"is no path\. Expected the name of a file|File name too long") as caught:
            reach(name)
        assert str(caught.value).isascii()
    assert os.listdir(tmp_path) == []
