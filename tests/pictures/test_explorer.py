"""Graphs for other programs: Model Explorer's format and GraphML say what the graph says."""

import json
from pathlib import Path
from typing import Any

import networkx
import pytest

import fmr
from fmr.pictures.captions import TIMES
from fmr.pictures.explorer import explorer
from tests.models import ZOO, build

MODELS = ["gpt2", "encoder", "lstm", "shared", "scripted", "parts"]
NODE = {
    "id": str,
    "label": str,
    "namespace": str,
    "attrs": list,
    "incomingEdges": list,
    "inputsMetadata": list,
    "outputsMetadata": list,
}
"""The fields of a node in Model Explorer's format (its graph_builder.py); `style` is optional."""


def graph_of(name: str) -> fmr.Graph:
    model, args, kwargs = build(name)
    return fmr.run(model, *args, keep="none", **kwargs).graph


def nodes_of(graph: fmr.Graph, structure: Any = None) -> dict[str, dict[str, Any]]:
    (only,) = explorer(graph, structure)["graphs"]
    found = {node["id"]: node for node in only["nodes"]}
    assert len(found) == len(only["nodes"])
    return found


def attributes(node: dict[str, Any]) -> dict[str, str]:
    return {pair["key"]: pair["value"] for pair in node["attrs"]}


# ---- Model Explorer


@pytest.mark.parametrize("name", MODELS)
def test_every_value_and_every_argument_is_there(name: str) -> None:
    assert name in ZOO
    graph = graph_of(name)
    nodes = nodes_of(graph)
    assert list(nodes) == [str(node.id) for node in graph.nodes]
    for node in graph.nodes:
        told = nodes[node.id]
        assert [edge["sourceNodeId"] for edge in told["incomingEdges"]] == [str(parent) for parent in node.parents]
        assert [item["attrs"][0]["value"] for item in told["inputsMetadata"]] == [parent.at for parent in node.parents]
        assert attributes(told)["ID"] == node.id


@pytest.mark.parametrize("name", MODELS)
def test_the_format_is_that_of_the_viewer(name: str) -> None:
    graph = graph_of(name)
    whole = explorer(graph.unfused, fmr.locate(graph))
    assert set(whole) == {"label", "graphs"}
    (only,) = whole["graphs"]
    assert set(only) == {"id", "nodes", "groupNodeAttributes", "layoutConfigs"}
    for node in only["nodes"]:
        assert {field: type(value) for field, value in node.items() if field != "style"} == NODE
        pairs = [
            *node["attrs"],
            *(pair for item in node["inputsMetadata"] + node["outputsMetadata"] for pair in item["attrs"]),
        ]
        assert all(set(pair) == {"key", "value"} and all(isinstance(text, str) for text in pair.values()) for pair in pairs)
        assert ";" not in node["namespace"]
        assert not node["namespace"].startswith("/")
    for told in only["groupNodeAttributes"].values():
        assert all(isinstance(text, str) for text in told.values())


def test_module_calls_become_layers_in_layers() -> None:
    graph = graph_of("gpt2")
    (only,) = explorer(graph)["graphs"]
    nodes = {node["id"]: node for node in only["nodes"]}
    assert nodes["transformer.h.0.attn.c_attn/addmm#0"]["namespace"] == "transformer/h.0/attn/c_attn"
    assert nodes["param:transformer.h.0.attn.c_attn.weight"]["namespace"] == "transformer/h.0/attn/c_attn"
    assert nodes["param:transformer.h.0.attn.c_attn.weight"]["label"] == "weight"
    assert nodes["input:input_ids"]["namespace"] == ""
    assert len(only["groupNodeAttributes"]) == len(graph.scopes)
    assert {node["namespace"] for node in only["nodes"]} <= set(only["groupNodeAttributes"])
    assert only["groupNodeAttributes"]["transformer/h.0/attn"]["class"] == "GPT2Attention"


def test_a_fused_op_that_is_written_out_is_a_layer() -> None:
    graph = graph_of("gpt2").unfused
    (pattern, *_) = graph.find("*/softmax#0")
    assert nodes_of(graph)[pattern.id]["namespace"] == "transformer/h.0/attn/scaled_dot_product_attention#0"


def test_roles_name_and_colour_values() -> None:
    graph = graph_of("gpt2_eager")
    structure = fmr.locate(graph)
    block = structure.attention[0]
    nodes = nodes_of(graph, structure)
    pattern = nodes[block.pattern.id]
    assert pattern["label"] == f"pattern: {block.pattern.id.rpartition('/')[2]}"
    assert attributes(pattern)["role"] == "pattern"
    looks = [nodes[site.id]["style"]["backgroundColor"] for site in (block.q, block.k, block.v, block.scores, block.pattern)]
    assert len(set(looks)) == 5
    assert "style" not in nodes["input:input_ids"]
    (only,) = explorer(graph, structure)["graphs"]
    assert only["groupNodeAttributes"]["transformer/h.0/attn"]["structure"] == "2 heads of 8"


def test_a_value_says_its_shape_arguments_and_call_site() -> None:
    graph = graph_of("gpt2_eager")
    node = graph["transformer.h.0.attn/softmax#0"]
    told = nodes_of(graph)[node.id]
    made = {pair["key"]: pair["value"] for pair in told["outputsMetadata"][0]["attrs"]}
    assert made == {"shape": TIMES.join("2266"), "dtype": "float32", "device": "cpu"}
    assert attributes(told)["call site"] == node.where
    assert attributes(told)["argument dim"] == "-1"


def test_the_file_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    graph_of("gpt2").save_explorer(first)
    graph_of("gpt2").save_explorer(second)
    assert first.read_bytes() == second.read_bytes()
    assert json.loads(first.read_text())["label"] == graph_of("gpt2").model
    with pytest.raises(fmr.StoreError, match="there is no folder"):
        graph_of("gpt2").save_explorer(tmp_path / "none" / "a.json")


def test_what_is_no_structure_is_refused() -> None:
    with pytest.raises(fmr.DrawError, match="structure=7 names no roles"):
        explorer(graph_of("gru"), 7)


# ---- GraphML


@pytest.mark.parametrize("name", [*MODELS, "in_place", "vmapped"])
def test_graphml_holds_the_whole_graph(name: str, tmp_path: Path) -> None:
    graph = graph_of(name)
    here = graph.to_networkx()
    networkx.write_graphml(here, tmp_path / "model.graphml")
    there = networkx.read_graphml(tmp_path / "model.graphml")
    assert dict(there.nodes(data=True)) == dict(here.nodes(data=True))
    edges = [sorted((a, b, at) for a, b, at in one.edges(data="at")) for one in (here, there)]
    assert edges[0] == edges[1]
    assert there.graph["model"] == graph.model
