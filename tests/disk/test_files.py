"""fmr.files, and the graph files made with it: written whole, read back equal, and one error for everything else."""

import json
import math
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fmr
from fmr import Graph, Node, StoreError, TensorId
from fmr.disk import files
from fmr.ids import Parent
from fmr.nodes import Scope

ARGS = {
    "slice": slice(1, None, -2),
    "index": (slice(None), Ellipsis, None, 3),
    "floats": (math.inf, -math.inf, -0.0, 1e-300, 0.1),
    "complex": complex(1.5, -2.0),
    "dtypes": [torch.bfloat16, torch.bool, torch.complex64],
    "format": torch.channels_last,
    "layout": torch.strided,
    "device": torch.device("cpu"),
    "long": tuple(range(64)),
    "text": 'a "quoted" \\ line\n é ☃ \ud800',
    "nest": {"key": (1, [2, {"deep": None}]), 3: True},
    "huge": 2**70,
    "empty": ((), [], {}),
}


def graph_with(args: dict[str, object]) -> Graph:
    source = Node(TensorId("input:x"), "input", "", (), (2, 3), torch.float32, torch.device("cpu"), {}, "")
    op = Node(
        TensorId("a@1/op#0:1"),
        "op",
        "a@1",
        (Parent("input:x", "0.2"),),
        (),
        torch.bool,
        torch.device("meta"),
        args,
        "m.py:3",
    )
    scopes = [
        Scope("", "", "Root", None, ((TensorId("input:x"),), None), {"out": TensorId("a@1/op#0:1")}),
        Scope("a@1", "a", "Part", "", None, (TensorId("a@1/op#0:1"), None)),
    ]
    return Graph([source, op], scopes, "Root")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)[..., 1:].softmax(-1, dtype=torch.float64)
        return torch.cat([y, y.clamp(min=-math.inf)]).to(torch.float32)


def equal(a: Graph, b: Graph) -> bool:
    return (a.nodes, a.scopes, a.model, a.fingerprint) == (b.nodes, b.scopes, b.model, b.fingerprint)


def saved(graph: Graph, folder: Path) -> Path:
    graph.save(folder / "graph.json")
    return folder / "graph.json"


# ---- arguments as JSON


@pytest.mark.parametrize("value", ARGS.values(), ids=ARGS)
def test_argument_comes_back(value: object) -> None:
    back = files.decode(json.loads(json.dumps(files.encode(value), allow_nan=False)))
    assert back == value
    assert repr(back) == repr(value)
    assert type(back) is type(value)


def test_nan_comes_back() -> None:
    back = files.decode(json.loads(json.dumps(files.encode((math.nan, complex(math.nan, math.inf))), allow_nan=False)))
    assert repr(back) == "(nan, (nan+infj))"


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.complex_numbers(allow_nan=False)
)
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.recursive(
        PLAIN, lambda item: st.lists(item) | st.tuples(item, item) | st.dictionaries(KEYS, item) | st.builds(slice, item)
    )
)
def test_any_nest_comes_back(value: object) -> None:
    assert repr(files.decode(json.loads(json.dumps(files.encode(value), allow_nan=False)))) == repr(value)


def test_ids_are_text_and_not_their_printed_form() -> None:
    assert files.encode(TensorId("h/add#0")) == "h/add#0"
    assert files.encode(Parent("h/add#0", "1")) == "h/add#0"
    assert files.encode(torch.Size([2, 3])) == {"tuple": [2, 3]}


def test_other_objects_come_back_as_what_they_print() -> None:
    class Loud:
        def __repr__(self) -> str:
            raise ValueError

    assert files.decode(files.encode(object())) == "<object object>"
    assert files.decode(files.encode(Loud())) == "<Loud>"
    assert len(files.decode(files.encode(range(10**9).__iter__))) < 300


def test_only_dtypes_layouts_and_formats_are_taken_from_torch() -> None:
    with pytest.raises(StoreError, match=r"torch\.load is no dtype, layout or memory format of torch .*Upgrade torch"):
        files.decode({"torch": ["dtype", "torch.load"]})


# ---- whole or not at all


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    files.write_whole(target, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                files.write_whole(target, b"new")
        assert target.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


def test_files_get_the_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    files.write_whole(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_no_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no folder .*absent\. Create it first"):
        files.write_whole(tmp_path / "absent" / "file", b"")


# ---- graphs


def test_graph_comes_back_equal(tmp_path: Path) -> None:
    graph = graph_with(ARGS)
    back = Graph.load(saved(graph, tmp_path))
    assert equal(back, graph)
    assert back.nodes[1].args == ARGS
    assert back.nodes[1].parents[0].at == "0.2"
    assert isinstance(back.scopes[1].output[0], TensorId)


def test_recorded_graph_comes_back_equal(tmp_path: Path) -> None:
    graph = fmr.run(Tiny(), torch.randn(2, 4), keep="none").graph
    back = Graph.load(saved(graph, tmp_path))
    assert equal(back, graph)
    assert back.module("linear").output == graph.module("linear").output
    assert repr(back) == repr(graph)
    back.lint()


def test_truncated_graph_is_one_error(tmp_path: Path) -> None:
    path = saved(graph_with(ARGS), tmp_path)
    whole = path.read_bytes()
    for part in range(16):
        path.write_bytes(whole[: len(whole) * part // 16])
        with pytest.raises(StoreError, match=r"is not a file of fmr, or it is damaged .* save it again"):
            Graph.load(path)


def test_a_flipped_byte_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    graph = graph_with(ARGS)
    whole = saved(graph, tmp_path).read_bytes()
    draw = random.Random(0)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= draw.randrange(1, 256)
        try:
            body = files.unseal("graph", bytes(flipped), "flipped")
        except StoreError:
            continue
        assert equal(Graph.from_dict(body), graph)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, pickle.dumps({"format": "fmr.graph"}), b'{"format": 1}'],
    ids=["empty", "object", "array", "null", "binary", "deep", "pickle", "fields"],
)
def test_foreign_file_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(StoreError, match="is not a file of fmr, or it is damaged"):
        Graph.load(tmp_path / "file")


def test_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(files.seal("run", {}))
    with pytest.raises(StoreError, match=r"holds 'fmr\.run', expected 'fmr\.graph'"):
        Graph.load(tmp_path / "file")


def test_a_sealed_body_of_another_layout_is_one_error(tmp_path: Path) -> None:
    for body in ({}, {"nodes": 3, "scopes": []}, {"nodes": [[1]], "scopes": [], "model": ""}):
        (tmp_path / "file").write_bytes(files.seal("graph", body))
        with pytest.raises(StoreError, match="is not a file of fmr"):
            Graph.load(tmp_path / "file")


def test_a_newer_schema_says_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "SCHEMA", 3)
        path = saved(graph_with({}), tmp_path)
    with pytest.raises(StoreError, match=r"has schema 3, this version of fmr reads schema 2\. Upgrade fmr"):
        Graph.load(path)


def test_the_checksum_covers_the_schema(tmp_path: Path) -> None:
    path = saved(graph_with({}), tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"schema": 2', b'"schema": 1'))
    with pytest.raises(StoreError, match="checksum"):
        Graph.load(path)


@pytest.mark.parametrize("name", ["absent.json", ".", "file/below.json"])
def test_a_path_that_does_not_open_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot be read .*Expected a graph that graph\.save\(path\) wrote"):
        Graph.load(tmp_path / name)
