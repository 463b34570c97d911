"""A grid draws what each edit changes, as a map where its sites make one."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import edits
from fmr.errors import DrawError
from fmr.pictures.changes import numbered
from tests.models import ZOO


@pytest.fixture(scope="module")
def given() -> tuple[nn.Module, Tensor]:
    model, _, _ = ZOO["gpt2"]()
    return model.eval(), torch.tensor([[5, 9, 3, 7]])


def test_sites_of_one_position_make_a_map_of_values_and_tokens(given: tuple[nn.Module, Tensor]) -> None:
    model, ids = given
    points = [layer.resid_post for layer in fmr.locate(fmr.run(model, ids)).layers]
    sites = [point.at(positions=place) for place in range(3) for point in points]
    grid = fmr.sweep(model, ids, sites, edits.Zero(), lambda output: output.logits[:, -1, 3], progress=False)
    axes = grid.plot(tokens=["a", "$b", "c", "d"]).axes[0]
    drawn = axes.images[0].get_array()
    expected = (grid.values.mean(1) - grid.base.mean()).view(3, len(points)).T
    np.testing.assert_allclose(np.asarray(drawn), expected, rtol=1e-5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", r"\$b", "c"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    with pytest.raises(
        DrawError, match=r"tokens holds 2 labels, and the map has 3 positions. Expected one for each position"
    ):
        grid.plot(tokens=["a", "b"])


def test_rows_of_heads_are_named_by_the_number_of_their_layer_and_theirs(given: tuple[nn.Module, Tensor]) -> None:
    model, ids = given
    blocks = fmr.locate(fmr.run(model, ids)).attention
    metric = lambda output: output.logits[0, -1, 3]  # noqa: E731
    heads = [block.z.at(heads=head, positions=place) for block in blocks for head in range(2) for place in (1, 2)]
    axes = fmr.sweep(model, ids, heads, edits.Zero(), metric, progress=False).plot().axes[0]
    numbers, common = numbered([str(block.z.id) for block in blocks]) or ([], "")
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{n}.{head}" for n in numbers for head in range(2)]
    assert (axes.get_title(), axes.get_xlabel()) == (f"8 edited runs\nrows: *.head of {common}", "position")
    alone = fmr.sweep(model, ids, heads[:1], edits.Zero(), metric, progress=False)
    assert "Grid of 1 edited run by" in repr(alone)
    assert alone.plot().axes[0].get_title() == "1 edited run"


def test_names_that_differ_in_one_number_are_that_number() -> None:
    assert numbered(["h.0.a/mul#1", "h.12.a/mul#1", "h.0.a/mul#1"]) == ([0, 12, 0], "h.*.a/mul#1")
    for names in (["a.0"], ["a.0", "b.1"], ["a.0/mul#0", "a.1/mul#1"], ["a", "a.0"]):
        assert numbered(names) is None


def test_any_other_runs_stand_side_by_side(given: tuple[nn.Module, Tensor]) -> None:
    model, ids = given
    blocks = fmr.locate(fmr.run(model, ids)).attention
    heads = [block.z.at(heads=head) for block in blocks for head in range(2)]
    metric = lambda output: output.logits[0, -1, 3]  # noqa: E731
    grid = fmr.sweep(model, ids, heads, edits.Zero(), metric, progress=False)
    assert grid.plot().axes[0].images[0].get_array().shape == (len(blocks), 2)
    grid = fmr.sweep(model, ids, [tuple(heads[:2]), heads[0], heads[0]], edits.Zero(), metric, progress=False)
    axes = grid.plot().axes[0]
    assert axes.images[0].get_array().shape == (1, 3)
    assert axes.get_xlabel() == "run"
    np.testing.assert_allclose(
        np.asarray(axes.images[0].get_array())[0], grid.values.double() - grid.base.double(), rtol=1e-5
    )
    with pytest.raises(DrawError, match=r"the map has 3 runs"):
        grid.plot(tokens=["a", "b", "c"])
    assert torch.isfinite(grid.values).all()
