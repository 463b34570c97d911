"""Alignment: which node of one graph is which of another."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fmr
from tests.models import build


def graph_of(name: str) -> fmr.Graph:
    model, args, kwargs = build(name)
    return fmr.run(model, *args, keep="none", **kwargs).graph


def test_a_graph_is_aligned_with_itself() -> None:
    graph = graph_of("gpt2_eager")
    found = graph.align(graph)
    assert found.matched == {node.id: node.id for node in graph.nodes}
    assert found.score == 1.0
    assert not found.inserted
    assert not found.removed
    assert not graph.diff(graph)
    assert repr(found) == f"Alignment: {len(graph)} matched (0 renamed), 0 inserted, 0 removed, score 1.000"


def test_two_attention_kernels_differ_inside_attention_only() -> None:
    eager, fused = graph_of("gpt2_eager"), graph_of("gpt2")
    found = eager.align(fused)
    assert {name.scope.rpartition(".")[2] for name in found.removed if name.scope} <= {"attn", "transformer"}
    assert any("scaled_dot_product_attention" in name for name in found.inserted)
    assert found.matched["lm_head/linear#0"] == "lm_head/linear#0"
    assert found.score > 0.75


class Chain(nn.Module):
    """Six ops of two kinds, with more of them in between where asked."""

    def __init__(self, extra: frozenset[int]) -> None:
        super().__init__()
        self.weight, self.extra = nn.Linear(3, 3), extra

    def forward(self, x: Tensor) -> Tensor:
        for step in range(6):
            if step in self.extra:
                x = x.exp()
            x = self.weight(x) if step % 2 else x * 2
        return x


def chain(extra: frozenset[int]) -> fmr.Graph:
    return fmr.run(Chain(extra), torch.ones(2, 3), keep="none").graph


@given(st.frozensets(st.integers(0, 5)))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_inserted_ops_are_found_and_nothing_else(extra: frozenset[int]) -> None:
    plain, longer = chain(frozenset()), chain(extra)
    found = plain.align(longer)
    assert [longer[name].op for name in found.inserted] == ["exp"] * len(extra)
    assert not found.removed
    assert longer.align(plain).removed == found.inserted


class Wrapped(nn.Module):
    """A layer with an adapter around it, as adapters wrap one: the layer moves to `base_layer`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.down, self.up = layer, nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_a_layer_that_was_wrapped_by_an_adapter_is_recognised() -> None:
    base = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    adapted = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Wrapped(nn.Linear(3, 3)))
    x = torch.ones(2, 3)
    one, two = (fmr.run(model, x, keep="none").graph for model in (base, adapted))
    found = one.align(two)
    assert found.renamed == {
        "2/linear#0": "2.base_layer/linear#0",
        "param:2.weight": "param:2.base_layer.weight",
        "param:2.bias": "param:2.base_layer.bias",
    }
    assert {name.scope for name in found.inserted if not name.is_source} == {"2", "2.down", "2.up"}
    assert "5 added, 0 removed, 0 changed, 3 renamed" in repr(one.diff(two))
