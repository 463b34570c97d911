"""The graph as a value: looking up, following edges, comparing, checking itself, leaving for networkx."""

import random
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import IdError
from fmr.ids import Parent, TensorId
from fmr.nodes import Node, Scope
from tests.models import build
from tests.small import Fn, random_tree


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        y = self.line(x) * scale
        return {"sum": x + y, "parts": y.split(2, -1)}


def model() -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out = self.block(x, scale=self.scale)
        z = F.scaled_dot_product_attention(*[out["sum"][:, None]] * 3)
        return z.squeeze(1) + out["parts"][0].sum()

    return Fn(forward, block=Block(), scale=nn.Parameter(torch.ones(4)))


@pytest.fixture
def graph() -> fmr.Graph:
    return fmr.run(model(), torch.ones(2, 3, 4)).graph


# ---- looking things up


def test_a_node_is_found_by_id_node_and_site(graph: fmr.Graph) -> None:
    node = graph["block/mul#0"]
    assert (node.id, node.op, node.scope, node.shape) == ("block/mul#0", "mul", "block", (2, 3, 4))
    assert node.parents == ("block.line/linear#0", "param:scale")
    assert [parent.at for parent in node.parents] == ["0", "1"]
    assert (node.dtype, node.device) == (torch.float32, torch.device("cpu"))
    assert graph[node] is graph[fmr.Site("block/mul#0", units=0)] is node
    assert "block/mul#0" in graph
    assert "/scaled_dot_product_attention#0/softmax#0" in graph
    assert "block/mul#1" not in graph
    assert len(graph) == len(list(graph)) == len(graph.nodes)


def test_an_unknown_id_names_the_nearest(graph: fmr.Graph) -> None:
    with pytest.raises(
        fmr.IdError, match=r"Fn has no value 'block/mull#0' in this graph\. Nearest that exist: .*block/mul#0"
    ):
        graph["block/mull#0"]
    with pytest.raises(fmr.IdError, match=r"softmax#0"):
        graph["/scaled_dot_product_attention#0/softmax#1"]


def test_globs_find_nodes_in_execution_order_and_look_inside_fused_ops(graph: fmr.Graph) -> None:
    assert [str(n.id) for n in graph.find("block*/*")] == [
        "block.line/linear#0", "block/mul#0", "block/add#0", "block/split#0:0", "block/split#0:1",
    ]  # fmt: skip
    inside = [str(n.id) for n in graph.find("*/scaled_dot_product_attention#0*")]
    assert inside[0] == "/scaled_dot_product_attention#0"
    assert "/scaled_dot_product_attention#0/softmax#0" in inside
    assert graph.find("nothing*") == ()
    assert len(graph.find("*")) == len(graph) + len(graph.inner("/scaled_dot_product_attention#0"))


def test_a_glob_over_paths_finds_what_module_calls_returned(graph: fmr.Graph) -> None:
    assert [str(n.id) for n in graph.find("blo?k")] == ["block/add#0", "block/split#0:0", "block/split#0:1"]
    assert graph.find("block.line") == (graph.module("block.line").output,)


def test_a_module_call_gives_what_went_in_and_came_out(graph: fmr.Graph) -> None:
    call = graph.module("block")
    assert call.input == ((graph["input:args.0"],), {"scale": graph["param:scale"]})
    assert call.output == {"sum": graph["block/add#0"], "parts": (graph["block/split#0:0"], graph["block/split#0:1"])}
    assert [str(n.id) for n in call.nodes] == [str(n.id) for n in graph.find("block*/*")]
    assert [str(n.id) for n in graph.module("block.line").nodes] == ["block.line/linear#0"]
    root = graph.module("")
    assert root.output.id == "/add#0"
    assert {n.id for n in root.nodes} == {n.id for n in graph.nodes if not n.id.is_source}
    assert repr(call).startswith("block (Block): 5 ops, output ['block/add#0', ")
    with pytest.raises(fmr.IdError, match=r"Fn called no module 'blok'.*Nearest that exist: block"):
        graph.module("blok")


def test_an_argument_is_found_by_name_and_by_position() -> None:
    run = fmr.run(Fn(lambda self, x: F.softmax(x, dim=-1) + torch.softmax(x, 0)), torch.ones(2, 2))
    named, positional = run.graph["/softmax#0"], run.graph["/softmax#1"]
    assert (named.argument("dim", 1), positional.argument("dim", 1), positional.argument("dtype", 2)) == (-1, 0, None)
    assert positional.parent("input", 0) == "input:args.0"
    assert positional.parent("mask") is None


# ---- dataflow, against networkx


def graphs() -> list[fmr.Graph]:
    trees = [fmr.run(random_tree(random.Random(seed)), torch.ones(2, 4)).graph for seed in range(5)]
    gpt2, args, kwargs = build("gpt2")
    return [*trees, fmr.run(gpt2, *args, keep="none", **kwargs).graph]


@pytest.mark.parametrize("which", range(6))
def test_ancestors_descendants_and_paths_are_those_of_networkx(which: int) -> None:
    graph = graphs()[which]
    there = graph.to_networkx()
    place = {str(node.id): number for number, node in enumerate(graph.nodes)}
    rng = random.Random(which)
    for node in rng.sample(graph.nodes, min(12, len(graph))):
        above, below = ([str(n.id) for n in found] for found in (graph.ancestors(node), graph.descendants(node)))
        assert set(above) == networkx.ancestors(there, node.id)
        assert set(below) == networkx.descendants(there, node.id)
        assert above == sorted(above, key=place.__getitem__)
        assert {str(n.id) for n in graph.readers(node)} == set(there.successors(node.id))
        other = rng.choice(graph.nodes)
        expected = (networkx.descendants(there, node.id) | {node.id}) & (networkx.ancestors(there, other.id) | {other.id})
        assert {str(n.id) for n in graph.between(node, other)} == expected
    assert networkx.is_directed_acyclic_graph(there)


def test_a_value_inside_a_fused_op_is_followed_where_the_op_is_written_out(graph: fmr.Graph) -> None:
    inside, op = "/scaled_dot_product_attention#0/softmax#0", "/scaled_dot_product_attention#0"
    whole = graph.unfused
    assert graph.readers(inside) == whole.readers(inside) != ()
    assert graph.ancestors(inside) == whole.ancestors(inside)
    assert graph.descendants(inside) == whole.descendants(inside)
    assert {inside, op, "/add#0"} <= {node.id for node in graph.between(inside, "/add#0")}
    with pytest.raises(IdError, match=r"softmax#0 lies inside a fused op, .* Expected graph.unfused.place\(id\)"):
        graph.place(inside)
    with pytest.raises(IdError, match="has no value '/nothing#0'"):
        graph.place("/nothing#0")


def test_networkx_gets_every_node_and_every_argument(graph: fmr.Graph) -> None:
    there = graph.to_networkx()
    assert set(there.nodes) == {str(node.id) for node in graph.nodes}
    assert there.number_of_edges() == sum(len(node.parents) for node in graph.nodes)
    assert [data["at"] for _, _, data in there.in_edges("block/mul#0", data=True)] == ["0", "1"]
    assert there.nodes["block/mul#0"]["op"] == "mul"
    assert there.nodes["block/mul#0"]["dtype"] == "float32"
    assert there.graph["fingerprint"] == graph.fingerprint
    assert all(type(name) is str for name in there.nodes)


def test_a_graph_with_its_fused_ops_written_out_answers_like_any_other() -> None:
    gpt2, args, kwargs = build("gpt2")
    graph = fmr.run(gpt2, *args, keep="none", **kwargs).graph
    opened = graph.unfused
    (pattern, _) = opened.find("*/softmax#0")
    assert opened[pattern.id] == graph[pattern.id]
    assert len(graph.inner(pattern.scope)) > len(opened.inner(pattern.scope)) == 0
    assert [node.id for node in opened.unfused] == [node.id for node in opened]
    with pytest.raises(fmr.IdError, match="Nearest that exist"):
        opened[pattern.id.replace("softmax#0", "softmax#7")]


# ---- comparing


def test_fingerprints_are_equal_for_equal_dataflow_and_differ_otherwise(graph: fmr.Graph) -> None:
    assert fmr.run(model(), torch.zeros(7, 5, 4)).graph.fingerprint == graph.fingerprint
    assert fmr.run(model().double(), torch.zeros(1, 5, 4).double()).graph.fingerprint == graph.fingerprint
    swapped = fmr.run(Fn(lambda self, x, y: x - y), torch.ones(1), torch.ones(1)).graph
    straight = fmr.run(Fn(lambda self, x, y: y - x), torch.ones(1), torch.ones(1)).graph
    assert swapped.fingerprint != straight.fingerprint


def test_a_difference_lists_what_was_added_removed_and_changed() -> None:
    one = fmr.run(Fn(lambda self, x: (x + 1).relu().tanh()), torch.ones(1)).graph
    two = fmr.run(Fn(lambda self, x: (x + 1).sigmoid().tanh()), torch.ones(1)).graph
    found = one.diff(two)
    assert (found.added, found.removed, found.changed) == (("/sigmoid#0",), ("/relu#0",), ("/tanh#0",))
    assert repr(found).splitlines() == ["1 added, 1 removed, 1 changed", "  + /sigmoid#0", "  - /relu#0", "  ~ /tanh#0"]
    assert found
    assert not one.diff(one)


# ---- checking itself


def broken(graph: fmr.Graph, name: str, **changes: Any) -> fmr.Graph:
    nodes = [node._replace(**changes) if node.id == name else node for node in graph.nodes]
    return fmr.Graph(nodes, graph.scopes, graph.model)


def test_a_sound_graph_passes(graph: fmr.Graph) -> None:
    graph.lint()


def test_a_broken_graph_is_told_apart(graph: fmr.Graph) -> None:
    cases = [
        (broken(graph, "block/mul#0", parents=(Parent("block/nothing#0", "0"),)), "block/nothing#0"),
        (broken(graph, "block/mul#0", parents=(Parent("/add#0", "0"),)), "/add#0"),
        (broken(graph, "block/mul#0", parents=(Parent("block/mul#0", "0"),)), "block/mul#0"),
        (broken(graph, "block/mul#0", id=TensorId("block/add#0")), "block/add#0"),
        (fmr.Graph(graph.nodes[:-1], graph.scopes, graph.model), "/add#0"),
        (fmr.Graph(graph.nodes, [s._replace(output=TensorId("/ghost#0")) for s in graph.scopes], graph.model), "/ghost#0"),
    ]
    for case, name in cases:
        with pytest.raises(fmr.GraphError, match="The graph of Fn breaks") as error:
            case.lint()
        assert name in str(error.value)


def test_a_graph_made_by_hand_is_checked_like_any_other() -> None:
    def node(name: str, *parents: str) -> Node:
        reads = tuple(Parent(parent, str(at)) for at, parent in enumerate(parents))
        return Node(TensorId(name), "add", "", reads, (1,), torch.float32, torch.device("cpu"), {}, "")

    root = Scope("", "", "Toy", None, None, TensorId("/add#1"))
    fmr.Graph([node("input:x"), node("/add#0", "input:x"), node("/add#1", "/add#0", "input:x")], [root], "Toy").lint()
    with pytest.raises(fmr.GraphError, match="Toy"):
        fmr.Graph([node("/add#0", "input:x"), node("input:x"), node("/add#1", "/add#0")], [root], "Toy").lint()


# ---- printing


def test_the_repr_shows_ops_sources_and_outputs(graph: fmr.Graph) -> None:
    text = repr(graph)
    assert text.startswith(f"Graph of Fn: {sum(not n.id.is_source for n in graph.nodes)} ops in 3 module calls, reading ")
    assert "3 params" in text
    assert "1 input" in text
    assert "input   input:args.0 float32[2, 3, 4]" in text
    assert "output  /add#0 float32[2, 3, 4] <- " in text


def test_a_node_prints_its_value_its_reads_and_its_place(graph: fmr.Graph) -> None:
    text = repr(graph["block/mul#0"])
    assert text.startswith("block/mul#0 float32[2, 3, 4] <- block.line/linear#0, param:scale  at ")
    assert text.rpartition(" ")[2].partition(":")[0].endswith("tests/graph/test_graph.py")


def test_the_sources_are_those_that_were_read(graph: fmr.Graph) -> None:
    names = {str(node.id) for node in graph.sources}
    assert names == {"input:args.0", "param:scale", "param:block.line.weight", "param:block.line.bias"}
    assert graph.opaque == ()


# ---- names that are registered, but not used


def test_the_other_name_of_a_module_or_a_tensor_that_has_two_is_told_which_one_it_goes_by() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    model[2].weight = model[0].weight
    run = fmr.run(model, torch.ones(1, 2))
    for ask in (run.graph.module, run.graph.unfused.module):
        with pytest.raises(fmr.IdError, match=r"'3' is registered as '1', too, and goes by that name: '1'\."):
            ask("3")
        with pytest.raises(fmr.IdError, match=r"goes by that name: '1@1'\."):
            ask("3@1")
    for read in (run.graph.__getitem__, run.__getitem__):
        with pytest.raises(fmr.IdError, match=r"'3' is registered as '1', too, and goes by that name: '1/relu#0'\."):
            read("3/relu#0")
        with pytest.raises(fmr.IdError, match=r"goes by that name: 'param:0\.weight'\."):
            read("param:2.weight")
    for name in ("3/relu#0", "param:2.weight"):
        with pytest.raises(fmr.IdError, match=rf"No pass reached '{name}'.*goes by that name"):
            fmr.run(model, torch.ones(1, 2), keep=[name])


def test_a_name_that_nothing_goes_by_is_told_nothing_of_others() -> None:
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    graph = fmr.run(nn.Sequential(shared, nn.Tanh(), shared), torch.ones(1, 2)).graph
    with pytest.raises(fmr.IdError, match=r"'2\.1' is registered as '0\.1', too"):
        graph.module("2.1")
    with pytest.raises(fmr.IdError, match=r"called no module '2\.7' in this pass(?!.*registered)"):
        graph.module("2.7")
