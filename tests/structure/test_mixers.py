"""What brings positions together without a softmax is located, as what it is, and false claims of it are refused."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.ids import Site, TensorId
from fmr.runs.run import Run
from fmr.structure.parts import Mixer, Structure
from tests.structure.idioms import WIDTH, Heads, Plain, Stack, joined, split
from tests.structure.mixers import MIXERS, STEPS, Parts, gated


@cache
def located(name: str) -> tuple[Run, Structure]:
    model = MIXERS[name].model()
    run = fmr.run(model, torch.randint(11, (2, STEPS)))
    return run, fmr.locate(run)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_located_as_what_it_is(name: str) -> None:
    _, found = located(name)
    truth = MIXERS[name]
    assert [
        (one.kind, len(one.inputs), len(one.gates), len(one.states), one.direction, one.scope) for one in found.mixers
    ] == [(truth.kind, truth.inputs, truth.gates, truth.states, truth.direction, f"attention.{n}") for n in range(2)]
    assert all(one.certified for one in found.mixers)
    assert [one for one in found.rejected if one.what == "mixer"] == []


def test_a_layer_has_its_mixer_beside_its_memory() -> None:
    run, found = located("gated recurrence")
    assert [(layer.mixer, layer.mlp) for layer in found.layers] == list(zip(found.mixers, found.mlps, strict=True))
    assert found.layers[0].resid_mid is not None
    mixer = found.mixers[0]
    assert repr(found.layers[0]) == "recurrence, causal | 24 memories"
    assert repr(found).startswith("Structure of Stack: 2 layers, 0 attentions, 2 memories, 2 mixers, 2 rejected")
    assert mixer.state is not None
    assert torch.equal(run[mixer.state], run["attention.0/stack#0"][:, -1])
    assert torch.equal(run[mixer.output], run["attention.0"])
    assert found.roles[mixer.gates[0].id] == "gate"
    assert found.notes["attention.0"] == "recurrence, causal"


@pytest.mark.parametrize(
    ("name", "way"), [("gated recurrence", "tril"), ("backward", "triu"), ("one state for all", "contiguous")]
)
def test_which_positions_reach_which_is_measured(name: str, way: str) -> None:
    run, found = located(name)
    every = torch.ones(STEPS, STEPS)
    assert torch.equal(found.mixers[1].reach(run), getattr(every, way)().bool())


def test_another_run_is_checked() -> None:
    _, found = located("delta rule")
    other = fmr.run(MIXERS["delta rule"].model(), torch.randint(11, (3, STEPS)))
    assert found.mixers[0].check(other)


def test_from_a_graph_nothing_is_measured() -> None:
    run, _ = located("products that decay")
    found = fmr.locate(run.graph)
    assert [(one.kind, one.direction, one.certified) for one in found.mixers] == [("linear attention", None, None)] * 2


def test_what_a_mixer_is_made_of_is_explained() -> None:
    _, found = located("gated recurrence")
    mixer = found.mixers[0]
    assert "the input 2 and gate of structure.mixers[0]" in found.explain(mixer.gates[0]).roles
    assert "structure.mixers[0] is certified: recomputed from its parts" in found.explain(mixer.output).text
    assert found.explain(mixer.states[2]).roles == ("the state 2 of structure.mixers[0]",)
    assert "lies inside structure.mixers[0], between its input 0 and its output" in found.explain("attention.0/mul#12").text


class Cells(nn.Module):
    """Layers that add what a cell makes, which begins with no state."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.logits = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11)
        self.cells, self.norms = (nn.ModuleList(make(WIDTH) for _ in range(2)) for make in (self.cell, nn.LayerNorm))

    def cell(self, width: int) -> nn.Module:
        return nn.GRUCell(width, width)

    def steps(self, cell: nn.Module, x: Tensor) -> Tensor:
        h = None
        return torch.stack([h := cell(one, h) for one in x.unbind(1)], 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for cell, norm in zip(self.cells, self.norms, strict=True):
            x = x + self.steps(cell, norm(x))
        logits: Tensor = self.logits(x)
        return logits


class NoStream(Cells):
    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.steps(self.cells[0], self.tokens(ids)))
        return logits


def test_cells_that_begin_with_no_state_write_to_a_stream() -> None:
    found = fmr.locate(fmr.run(Cells().eval(), torch.randint(11, (2, STEPS))))
    assert [(one.kind, len(one.states), one.direction) for one in found.mixers] == [("recurrence", STEPS, "causal")] * 2
    assert [one.mixer for one in found.layers] == list(found.mixers)
    found = fmr.locate(fmr.run(NoStream().eval(), torch.randint(11, (2, STEPS))))
    assert found.mixers == ()
    assert "no part of a mixer: what it makes is added to no residual stream" in found.explain("cells.0@2/gru_cell#0").text


def lies(name: str) -> dict[str, Mixer]:
    """False claims about the first mixer of a model."""
    run, found = located(name)
    true, other, memory = *found.mixers, found.mlps[0]
    told = {
        "another input": replace(true, inputs=(Site("norms.2/layer_norm#0"), *true.inputs[1:])),
        "an input of the next one": replace(true, inputs=(other.inputs[0], *true.inputs[1:])),
        "one more input": replace(true, inputs=(*true.inputs, memory.pre)),
        "the other way": replace(
            true, direction={"causal": "anticausal", "anticausal": "both", "both": "causal"}[true.direction or ""]
        ),
        "the next output": replace(true, output=other.output),
        "a memory": replace(
            true, reads=("/add#1",), inputs=(memory.pre,), gates=(), states=(), operands=(), output=memory.out
        ),
        "a part of the output": replace(true, output=Site(run.graph[true.output.id].parents[0].id)),
    }
    mixing = [one for one in true.inputs if one.id not in {gate.id for gate in true.gates}]
    if len(true.inputs) > 1:
        told |= {
            f"without {n}": replace(true, inputs=tuple(x for x in true.inputs if x is not one))
            for n, one in enumerate(true.inputs)
        }
        told["gates exchanged"] = replace(true, gates=(mixing[-1],))
    if len(true.states) > 1:
        told["the first states"] = replace(true, states=true.states[: STEPS // 2])
        told["the last states"] = replace(true, states=true.states[STEPS // 2 :])
        told["a gate as the state"] = replace(true, states=(mixing[0].id,))
    if true.kind == "linear attention":
        told["a state that is none"] = replace(true, states=(mixing[0].id,))
    return told


NAMES = ["products that decay", "delta rule", "gated recurrence", "gated window", "states summed so far", "transform"]


@pytest.mark.parametrize("name", NAMES)
def test_false_claims_are_refused(name: str) -> None:
    run, found = located(name)
    assert found.mixers[0].check(run)
    certified = []
    for lie, claim in lies(name).items():
        try:
            if claim.check(run):
                certified.append(lie)
        except StructureError:
            continue
    assert certified == []


def test_bent_scores_are_no_linear_attention() -> None:
    run, found = located("sigmoid of scores")
    mixer = found.mixers[0]
    q, k, v = mixer.inputs
    scores, mixed = "attention.0/matmul#0", "attention.0/matmul#1"
    claim = replace(mixer, kind="linear attention", product=TensorId(mixed), operands=(q.id, k.id, v.id))
    assert scores in run
    assert claim.check(run).why.startswith("what is multiplied is bent before")


class Difference(nn.Module):
    """Two softmaxes of one layer, of which one is subtracted: as weights, or what they weigh."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.q, self.k = fused, nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.v, self.out, self.share = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor) -> Tensor:
        (q, other), (k, key) = ([split(one) for one in layer(x).chunk(2, -1)] for layer in (self.q, self.k))
        v = split(self.v(x))
        if self.fused:
            attend = F.scaled_dot_product_attention
            return self.out(joined(attend(q, k, v) - self.share * attend(other, key, v)))
        return self.out(joined(((q @ k.mT).softmax(-1) - self.share * (other @ key.mT).softmax(-1)) @ v))


@pytest.mark.parametrize("fused", [False, True])
def test_a_difference_of_attentions_is_an_attention_and_no_mixer(fused: bool) -> None:
    torch.manual_seed(0)
    found = fmr.locate(fmr.run(Stack(lambda: Difference(fused), Plain, 1).eval(), torch.randint(11, (2, 6))))
    assert (len(found.attention), found.mixers) == (1, ())


class Beside(nn.Module):
    """An attention and a recurrence that read the same and are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.parts = Heads(F.scaled_dot_product_attention), Parts(gated)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x) + 0.5 * self.parts(x)


def test_a_half_of_a_sum_is_found_beside_an_attention_and_the_whole_is_refused() -> None:
    torch.manual_seed(0)
    run = fmr.run(Stack(Beside, Plain).eval(), torch.randint(11, (2, STEPS)))
    found = fmr.locate(run)
    assert [one.scope for one in (*found.attention, *found.mixers)] == [
        f"attention.{n}.{part}" for part in ("heads", "parts") for n in range(2)
    ]
    assert [(layer.attention, layer.mixer) for layer in found.layers] == list(
        zip(found.attention, found.mixers, strict=True)
    )
    mixer, block = found.mixers[0], found.attention[0]
    assert mixer.certified
    assert block.out is not None
    whole = replace(mixer, output=Site(found.residual.writes[0].added))
    assert whole.check(run).why.startswith("what one position makes of another does not go through its states alone")
    assert not replace(whole, states=(), kind="fixed").check(run)
    with pytest.raises(StructureError, match="is not computed from"):
        replace(mixer, output=block.out).check(run)


def test_in_one_position_nothing_is_mixed_and_nothing_fails() -> None:
    found = fmr.locate(fmr.run(MIXERS["gated recurrence"].model(), torch.randint(11, (2, 1))))
    assert found.mixers == ()
    assert [one.reason for one in found.rejected if "failed" in one.reason] == []


def test_active_dropout_is_told() -> None:
    model = MIXERS["products that decay"].model()
    function = MIXERS["products that decay"].function
    for layer in model.attention:
        layer.function = lambda m, x: F.dropout(function(m, x), 0.5, True)
    found = fmr.locate(fmr.run(model, torch.randint(11, (2, STEPS))))
    (reason, _) = (one.reason for one in found.rejected if one.what == "mixer")
    assert reason.startswith("dropout is active (attention.0/dropout#0)")


def three_keys(m: Parts, x: Tensor) -> Tensor:
    q, k, v, other = split(m.q(x)), split(m.k(x)), split(m.v(x)), split(m.g(x))
    scores = torch.einsum("bhid,bhjd,bhkd->bhijk", q, k, other)
    values = v, split(m.one(x)[..., :WIDTH])
    return joined(torch.einsum("bhijk,bhjd,bhkd->bhid", scores.flatten(-2).softmax(-1).view_as(scores), *values))


def places(m: Parts, x: Tensor) -> Tensor:
    q, k = split(m.q(x)), split(m.k(x))
    return joined((q @ k.mT).softmax(-1) @ m.filter[: x.shape[1], : q.shape[-1]])


@pytest.mark.parametrize("function", [three_keys, places])
def test_what_a_softmax_weighs_is_no_linear_attention_and_no_weight_over_positions(function: Any) -> None:
    model = Stack(lambda: Parts(function), Plain).eval()
    found = fmr.locate(fmr.run(model, torch.randint(11, (2, STEPS))))
    assert not found.mixers
    assert sum(one.what == "mixer" and "in no way that is known" in one.reason for one in found.rejected) == 2
