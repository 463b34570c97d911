"""A site means one place: what is read there is what an edit there is given, under padding, with a cache, in a file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import IdError, Site, edits

MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
LAYER = Site("transformer.h.1")


@pytest.fixture(scope="module", params=["left", "right"])
def padded(request: pytest.FixtureRequest) -> dict[str, Any]:
    mask = MASK if request.param == "left" else MASK.flip(1)
    ids = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0)).where(mask.bool(), 2)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("positions", [1, -1, [0, 2], slice(1, 3), [[0], [4]], slice(-2, None)])
@pytest.mark.parametrize("keep", ["all", [LAYER]])
def test_putting_back_what_was_read_changes_nothing(
    positions: Any, keep: Any, padded: dict[str, Any], tmp_path: Path
) -> None:
    model, _ = fmr.zoo.load("facts")
    site = LAYER.at(positions=positions)
    run = fmr.run(model, keep=keep, **padded)
    same = fmr.run(model, edits={site: edits.Replace(run[site])}, **padded)
    assert (same.receipts[site].fired, same.receipts[site].changed) == (1, 0)
    run.save(tmp_path / "run.fmr")
    for one in (run.passes[0], fmr.load(tmp_path / "run.fmr")):
        assert torch.equal(one[site], run[site])


def test_a_gradient_is_read_in_the_same_place(padded: dict[str, Any]) -> None:
    model, _ = fmr.zoo.load("facts")
    site, met = LAYER.at(positions=1), []

    def look(value: torch.Tensor, context: edits.Context) -> torch.Tensor:
        met.append(value.clone())
        return value

    with fmr.track(model, keep=[LAYER], grad=True, edits={site: edits.OnGradient(look)}) as run:
        model(**padded).logits.square().sum().backward()
    assert torch.equal(run.grad[site], met[0])


def test_a_step_of_a_generation_holds_its_own_position_alone() -> None:
    model, _ = fmr.zoo.load("facts")
    with fmr.track(model, keep=[LAYER]) as run:
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(run.passes[1][LAYER.at(positions=3)], run.passes[1][LAYER][:, 0])
    assert torch.equal(run.passes[1][LAYER.at(positions=-1)], run.passes[1][LAYER][:, -1])
    with pytest.raises(IdError, match=r"hold the positions 4 to 4\. Expected .* or read another pass, run\.passes"):
        run[LAYER.at(positions=3)]


def test_examples_with_different_numbers_of_positions_are_no_one_tensor(padded: dict[str, Any]) -> None:
    model, _ = fmr.zoo.load("facts")
    run = fmr.run(model, **padded)
    with pytest.raises(IdError, match=r"hold the positions 0 to 2, 0 to 5\. Expected positions that each of them holds"):
        run[LAYER.at(positions=slice(1, None))]
    assert run[LAYER.at(positions=slice(1, None), examples=[1])].shape[1] == 5


class Outer(nn.Module):
    """A model that does not name its tokens, around one that does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, words: Tensor, real: Tensor) -> Any:
        return self.inner(input_ids=words, attention_mask=real)


@pytest.mark.parametrize("keep", ["all", ["inner.transformer.h.1"]])
def test_padding_that_calls_inside_tell_of_is_heard_by_those_who_read(keep: Any, padded: dict[str, Any]) -> None:
    model, site = Outer(fmr.zoo.load("facts").model), Site("inner.transformer.h.1", positions=1)
    run = fmr.run(model, padded["input_ids"], padded["attention_mask"], keep=keep)
    for edit in (edits.Replace(run[site]), edits.Interchange(run)):
        same = fmr.run(model, padded["input_ids"], padded["attention_mask"], keep=keep, edits={site: edit})
        assert (same.receipts[site].fired, same.receipts[site].changed) == (1, 0)
    assert torch.equal(same[site], run[site])
