"""Values as sums over what they are made of, with the scales of norms held."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from fmr.errors import StructureError
from fmr.structure.frozen import frozen
from tests.models import build
from tests.structure.test_logits import MODELS, Codebooks, made

NAMES = [*MODELS, "gpt2", "t5", "whisper", "mamba", "codebooks"]


def located(name: str) -> tuple[fmr.Run, Any]:
    torch.manual_seed(0)
    if name == "codebooks":
        run = fmr.run(Codebooks(joint=False).eval(), torch.randint(20, (2, 5)))
    elif name in MODELS:
        model, ids = made(name)
        for weight in model.parameters():
            weight.data += 0.1 * torch.randn_like(weight)  # norms whose weights and biases matter
        run = fmr.run(model, ids)
    else:
        model, args, kwargs = build(name)
        run = fmr.run(model, *args, **kwargs)
    return run, fmr.locate(run)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_sum_of_what_each_part_of_the_stream_adds(name: str) -> None:
    """Parts chosen at random that sum up to the stream add up to its logits, those that the model returned before a cap."""
    run, structure = located(name)
    end = run[structure.residual.writes[-1].after].detach()
    logits = structure.frozen(end)
    given = end.double().flatten(0, 1)
    weights = torch.randn_like(logits.value)
    (direction,) = logits.back(weights).values()
    one = torch.randn_like(given)
    parts = [(direction * part).sum() for part in (one, given.detach() - one)]
    assert float(sum(parts) + (weights * logits.rest).sum()) == pytest.approx(
        float((weights * logits.value).sum()), abs=1e-9
    )
    assert torch.allclose(logits.value.float(), run[structure.readout.linear].detach().float(), atol=1e-5)


def test_the_scale_is_that_of_the_state_and_is_held() -> None:
    """A part along the stream itself changes no normed value; with the scale held it adds its share."""
    run, structure = located("Llama")
    state = run[structure.layers[-1].resid_post].detach()[0, -1]
    logits = structure.frozen(state)
    (direction,) = logits.back(F.one_hot(torch.tensor(7), 40)).values()
    doubled = structure.read_out(2 * state)
    assert torch.allclose(doubled, structure.read_out(state), atol=1e-4)
    assert float((direction * state).sum()) == pytest.approx(float(logits.value[7]), abs=1e-6)


def test_logits_before_a_soft_cap_are_the_sum() -> None:
    run, structure = located("Gemma2")
    logits = structure.frozen(run[structure.layers[-1].resid_post].detach())
    assert structure.readout.capped
    assert torch.allclose((torch.tanh(logits.value / 3) * 3).float(), run.output.logits, atol=1e-5)


class Normed(nn.Module):
    """What a kind of norm makes of a value."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight, self.bias = kind, nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "layer_norm":
                return F.layer_norm(x, (8,), self.weight, self.bias)
            case "rms_norm":
                return F.rms_norm(x, (8,), weight=self.weight)
            case "group_norm":
                return F.group_norm(x.flatten(0, 1), 2, self.weight, self.bias, eps=1e-3).view_as(x)
            case "normalize":
                return F.normalize(x, dim=-1) * self.weight
            case "in words":
                shifted = x - x.mean(-1, keepdim=True)
                return shifted / (shifted.std(-1, keepdim=True) + 1e-3) * self.weight + self.bias
        return x * torch.sigmoid(x) @ torch.eye(8) + self.bias


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "group_norm", "normalize", "in words"])
def test_norms_of_every_spelling_are_scales_that_are_held(kind: str) -> None:
    torch.manual_seed(0)
    run = fmr.run(Normed(kind), torch.randn(2, 3, 8))
    start, end = (run.graph.nodes[0].id, run.graph.scopes[0].output)
    found = frozen(run.graph.unfused, end, {start: run[start]}, run.__getitem__)
    weights = torch.randn_like(found.value)
    total = (found.back(weights)[start] * run[start]).sum() + (weights * found.rest).sum()
    assert torch.allclose(found.value.float(), run.output, atol=1e-5)
    assert float(total) == pytest.approx(float((weights * found.value).sum()), abs=1e-9)
    assert bool(found.rest.any()) is (kind in ("layer_norm", "group_norm", "in words"))


def test_what_bends_is_refused_by_name() -> None:
    run = fmr.run(Normed("gate"), torch.randn(2, 3, 8))
    start, end = run.graph.nodes[0].id, run.graph.scopes[0].output
    with pytest.raises(StructureError, match=r"is no sum over parts of .*: /sigmoid#0 is not linear in them. Expected proj"):
        frozen(run.graph, end, {start: run[start]}, run.__getitem__)


class AcrossPositions(nn.Module):
    """A stream that is normed over its positions before the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(F.instance_norm(x.mT).mT)


def test_logits_that_positions_share_are_no_sum_over_the_parts_of_one() -> None:
    torch.manual_seed(0)
    run = fmr.run(AcrossPositions().eval(), torch.randint(20, (2, 5)))
    structure = fmr.locate(run)
    with pytest.raises(StructureError, match="are no sum over what is written to its stream: what lies between"):
        structure.frozen(torch.zeros(16))
