"""Every softmax and every pair of projections is claimed or rejected, and what is said of it names ops that are there."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.graph.graph import Graph
from fmr.nodes import Node
from fmr.structure.parts import Structure
from tests.structure.odd import ODD, Odd

PRODUCTS = frozenset("linear matmul bmm mm addmm baddbmm einsum conv1d conv2d conv3d".split())


def softmaxes(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if re.fullmatch(r"(\w+_)?softm(ax|in)", node.op) and node.op != "log_softmax"]


def projections(graph: Graph) -> dict[str, list[str]]:
    """The products of what is made of an input with a parameter, as it is or moved, each with the former."""
    data, plain, found = set(), set(), {}
    for node in graph.nodes:
        if node.op == "input" or any(parent in data for parent in node.parents):
            data.add(node.id)
        if node.op == "param" or (node.op in ("t", "T", "mT", "transpose", "view") and node.parents[0] in plain):
            plain.add(node.id)
        added = ("0", "input") if node.op in ("addmm", "baddbmm") else ()
        read = [parent.id for parent in node.parents if parent in data and parent.at not in added]
        if node.op in PRODUCTS and read and any(parent in plain for parent in node.parents):
            found[node.id] = read
    return found


def pairs(structure: Structure) -> Iterator[str]:
    """The projections that read numbers which another one made, with none between, and no value of a stream or mixed by
    heads; what only chooses by them reads none, and what is hidden shows none."""
    graph = structure.graph
    known = projections(graph)
    ends = {point for stream in structure.streams if stream.writes for point in stream.points}
    ends |= {block.z.id for block in structure.attention}
    for node in reversed(graph.nodes):
        if node.id in ends and node.op in ("clone", "detach", "to", "contiguous", "dropout", "view"):
            ends.add(node.parents[0].id)
    for name, read in known.items():
        waiting, seen = [one for one in read if one not in ends], set(read)
        for here in waiting:
            if here in known:
                yield name
                break
            new = {parent.id for parent in graph[here].parents if graph[here].op != "opaque"} - ends - seen
            new = {name for name in new if graph[name].dtype.is_floating_point or graph[name].dtype.is_complex}
            seen |= new
            waiting += new


def inside(structure: Structure) -> set[str]:
    """What attentions compute of their queries, keys and values."""
    found = set()
    for block in structure.attention:
        for site in (block.q, block.k, block.v, *((block.minus.q, block.minus.k) if block.minus else ())):
            found |= {node.id for node in structure.graph.between(site.id, (block.out or block.z).id)}
    return found


def untold(structure: Structure) -> list[str]:
    """The softmaxes and the pairs of which nothing is said, and what is said that names an op which is not there."""
    graph, said = structure.graph, {(one.id, one.what) for one in structure.rejected}
    softened = {half.softmax for block in structure.attention for half in (block, block.minus) if half is not None}
    claimed = softened | {memory.down for memory in structure.mlps} | inside(structure)
    asked = [(node.id, "attention") for node in softmaxes(graph)] + [(name, "memory") for name in pairs(structure)]
    wrong = [f"{name}: no word on {what}" for name, what in asked if name not in claimed and (name, what) not in said]
    for text in [*(one.reason for one in structure.rejected), *(repr(structure.explain(name)) for name, _ in asked)]:
        names = [word.strip(".,:;()") for word in text.split() if "#" in word]
        wrong += [f"{name} is not there: {text}" for name in names if name not in graph]
        wrong += [f"raw: {text}"] if re.search(r"looking at it failed|\(\):|\binf\b|\bnan\b|NOT cert", text) else []
    return wrong


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_every_softmax_and_every_pair_of_projections_is_claimed_or_told(name: str) -> None:
    torch.manual_seed(0)
    run = fmr.run(Odd(ODD[name]).eval(), torch.randn(2, 5, 8))
    for source in (run, run.graph):
        structure = fmr.locate(source)
        assert softmaxes(structure.graph) or list(projections(structure.graph))
        assert untold(structure) == []


def test_a_softmax_of_weights_is_told_once() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w.softmax(-1) @ x

    told = [one for one in fmr.locate(fmr.run(Fixed(), torch.randn(2, 5, 8))).rejected if one.what == "attention"]
    assert [(one.id, one.reason) for one in told] == [
        ("/softmax#0", "it is made of weights or constants alone, and looks at no data")
    ]
