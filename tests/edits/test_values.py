"""fmr.edits: each edit is a pure function; what does not fit is one clear error."""

from typing import Any

import numpy as np
import pytest
import torch

import fmr
from fmr import edits
from fmr.edits.editor import Editor
from fmr.edits.values import Context, Edit
from fmr.errors import EditError
from fmr.ids import Site, TensorId

VALUE = torch.arange(24.0).view(2, 3, 4)
SITE = Site("h.0/add#0")
CONTEXT = Context(TensorId("h.0/add#0"), SITE, 0, 0, axes=("examples", "positions", "units"))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (edits.Zero(), torch.zeros(2, 3, 4)),
        (edits.Mean(), VALUE.mean(0, keepdim=True)),
        (edits.Mean(VALUE, over=("examples", "positions")), VALUE.mean((0, 1), keepdim=True)),
        (edits.Add(2), VALUE + 2),
        (edits.Add(torch.ones(4)), VALUE + 1),
        (edits.Subtract(VALUE), torch.zeros(2, 3, 4)),
        (edits.Scale(0.5), VALUE / 2),
        (edits.Replace(7.0), torch.full((2, 3, 4), 7.0)),
        (edits.Clamp(3, 5), VALUE.clamp(3, 5)),
        (edits.Clamp(lo=3), VALUE.clamp(min=3)),
        (edits.Interchange(None), VALUE),
    ],
)
def test_an_edit_makes_what_it_says(edit: Edit, expected: torch.Tensor) -> None:
    before = VALUE.clone()
    assert torch.equal(edit(VALUE, CONTEXT).expand_as(VALUE), expected.expand_as(VALUE))
    assert torch.equal(before, VALUE)


HEADS = torch.arange(24.0).view(2, 2, 3, 2)


@pytest.mark.parametrize(
    ("chosen", "over", "part", "dims"),
    [
        ({}, ("examples", "positions"), (), (0, 2)),
        ({"heads": [1]}, ("examples", "positions"), (slice(None), slice(1, 2)), (0, 2)),
        ({"heads": 1}, ("examples", "positions"), (slice(None), 1), (0, 1)),
        ({"heads": 1, "positions": -1}, ("examples", "positions"), (slice(None), 1, 2), (0,)),
        ({"examples": [1]}, ("positions",), (slice(1, 2),), (2,)),
        ({"examples": np.int64(1), "heads": torch.tensor(0)}, ("positions",), (1, 0), (0,)),
        ({}, ("heads",), (), (1,)),
    ],
)
def test_a_mean_is_over_axes_by_name_whatever_a_selection_drops(chosen: Any, over: Any, part: Any, dims: Any) -> None:
    expected = HEADS.clone()
    expected[part] = HEADS[part].mean(dims, keepdim=True)
    site = SITE.at(**chosen)
    for edit in (edits.Mean(over=over), edits.Mean(site.of(HEADS), over)):
        assert torch.equal(Editor({site: edit}).apply(site.id, HEADS), expected)


@pytest.mark.parametrize(
    ("site", "made", "message"),
    [
        (SITE, lambda: edits.Mean(over=(0, 1)), r"over=\(0, 1\), expected names of axes: over=\('examples', 'positions'\)"),  # type: ignore[arg-type]
        (SITE, lambda: edits.Mean(over=()), r"over=\(\), expected names of axes"),
        (SITE, lambda: edits.Mean(over="units"), r"over='units', expected names of axes"),  # type: ignore[arg-type]
        (
            SITE,
            lambda: edits.Mean(fmr),
            r"Mean got module, expected a tensor, as the site holds it: edits.Mean\(run\[site\]\)",
        ),  # type: ignore[arg-type]
        (
            SITE,
            lambda: edits.Mean(over=("heads",)),
            r"axes are \('examples', 'positions', 'units'\), has none called 'heads'",
        ),
        (
            SITE.at(examples=1),
            edits.Mean,
            r"a single one of these, whose mean is the value itself. Expected a list, as examples=\[0\]",
        ),
        (
            SITE.at(positions=1),
            lambda: edits.Mean(VALUE),
            r"brings shape \(2, 3, 4\), expected values with the axes \('examples', 'units'\)",
        ),
        (SITE, lambda: edits.Clamp(2, 1), r"Clamp\(lo=2, hi=1\): lo lies above hi. Expected Clamp\(lo=1, hi=2\)"),
    ],
)
def test_a_mean_or_a_bound_that_says_nothing_is_refused(site: Site, made: Any, message: str) -> None:
    with pytest.raises(EditError, match=message):
        Editor({site: made()}).apply(site.id, VALUE)


def test_noise_is_the_same_for_the_same_seed_site_and_firing_and_else_another() -> None:
    noise = edits.Noise(std=2.0, seed=1)
    again = Context(CONTEXT.id, SITE, 0, 1)
    elsewhere = Context(TensorId("h.1/add#0"), SITE, 0, 0)
    assert torch.equal(noise(VALUE, CONTEXT), noise(VALUE, CONTEXT))
    for other in (again, elsewhere):
        assert not torch.equal(noise(VALUE, CONTEXT), noise(VALUE, other))
    assert not torch.equal(noise(VALUE, CONTEXT), edits.Noise(std=2.0, seed=2)(VALUE, CONTEXT))
    large = edits.Noise(std=2.0)(torch.zeros(100, 100), CONTEXT)
    assert abs(float(large.std()) - 2.0) < 0.05


def test_noise_draws_nothing_from_the_shared_generator() -> None:
    before = torch.get_rng_state()
    edits.Noise(1.0)(VALUE, CONTEXT)
    assert torch.equal(before, torch.get_rng_state())


def test_what_replaces_a_value_is_never_handed_over_itself() -> None:
    mine = torch.ones(2, 3, 4)
    made = Editor({SITE: edits.Replace(mine)}).apply(SITE.id, VALUE)
    made.add_(1)
    assert torch.equal(mine, torch.ones(2, 3, 4))
    own = Editor({SITE: lambda value, context: mine}).apply(SITE.id, VALUE)
    own.add_(1)
    assert torch.equal(mine, torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    "layout", [VALUE.transpose(1, 2).contiguous().transpose(1, 2), VALUE[:, ::2], VALUE.permute(2, 0, 1)]
)
def test_what_replaces_a_value_lies_in_memory_as_it_did(layout: torch.Tensor) -> None:
    made = Editor({SITE: edits.Scale(2)}).apply(SITE.id, layout)
    assert torch.equal(made, layout * 2)
    assert made.stride() == layout.stride()


def test_edits_of_one_site_follow_one_another_in_their_order() -> None:
    asked = {SITE: [edits.Add(1), edits.Scale(2)], SITE.at(positions=0): edits.Add(100)}
    made = Editor(asked).apply(SITE.id, VALUE)
    expected = (VALUE + 1) * 2
    expected[:, 0] += 100
    assert torch.equal(made, expected)


def test_an_edit_that_changes_nothing_hands_on_the_very_tensor() -> None:
    assert Editor({SITE: lambda value, context: value}).apply(SITE.id, VALUE) is VALUE


def test_subtract_after_add_is_nothing() -> None:
    whole = VALUE.round()
    made = Editor({SITE: [edits.Add(3.0), edits.Subtract(3.0)]}).apply(SITE.id, whole)
    assert torch.equal(made, whole)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edits.Add(torch.ones(5)), r"brings shape \(5,\), expected one that broadcasts to \(2, 3, 4\)"),
        (edits.Replace(torch.ones(2, 3, 4, dtype=torch.float64)), r"brings torch.float64, expected torch.float32"),
        (lambda value, context: value[0], r"returned torch.float32 \(3, 4\) on cpu, expected torch.float32 \(2, 3, 4\)"),
        (lambda value, context: None, r"returned NoneType, expected a tensor of shape \(2, 3, 4\)"),
        (lambda value, context: value.add_(1), r"wrote into the value that it was given. Expected a new tensor"),
        (edits.Skip(), r"expected the path of a module"),
        (edits.Interchange(VALUE), r"was called outside a run"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(edit: Edit, message: str) -> None:
    with pytest.raises(EditError, match=message):
        Editor({SITE: edit}).apply(SITE.id, VALUE.clone())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([edits.Zero()], "edits is list, expected a mapping from sites to edits"),
        ({"h.0/add#0": edits.Zero}, r"expected one of fmr.edits or f\(value, context\). Make one: Zero\(...\)"),
        ({"h.0/add#0": 3}, "is 3, expected one of fmr.edits"),
    ],
)
def test_what_is_no_edit_is_refused_at_once(asked: object, message: str) -> None:
    with pytest.raises(EditError, match=message):
        Editor(asked)  # type: ignore[arg-type]


# ---- receipts


def test_a_receipt_says_how_often_how_many_and_how_much() -> None:
    editor = Editor({SITE.at(positions=1): edits.Zero()})
    editor.apply(SITE.id, VALUE)
    editor.apply(SITE.id, VALUE)
    from fmr.edits.editor import Receipts

    receipt = Receipts.of([editor])[SITE.at(positions=1)]
    changed = VALUE[:, 1]
    assert (receipt.fired, receipt.changed) == (2, 2 * 8)
    assert receipt.norm == pytest.approx(float((2 * changed.square().sum()).sqrt()))
    assert repr(receipt).startswith("Receipt: fired 2 times, changed 16 elements by ")
    with pytest.raises(EditError, match=r"was not edited in this run\. Edited were: Site"):
        Receipts.of([editor])["h.1/add#0"]


@pytest.mark.parametrize("size", [8, 1 << 16])
def test_a_receipt_tells_of_numbers_as_they_were(size: int) -> None:
    from fmr.edits.editor import Receipts

    own = torch.empty(size)
    editor = Editor({SITE: lambda value, context: own.copy_(value + context.fired + 1)})
    value = torch.zeros(size)
    for _ in range(2):
        editor.apply(SITE.id, value)
    value.fill_(9)
    receipt = Receipts.of([editor])[SITE]
    assert (receipt.fired, receipt.changed) == (2, 2 * size)
    assert receipt.norm == pytest.approx((5 * size) ** 0.5)


def test_a_place_that_is_named_twice_counts_once() -> None:
    for positions in ([1, 1], [1, -2], [[1, 1], [0, 2]]):
        site = SITE.at(positions=positions)
        editor = Editor({site: edits.Zero()})
        after = editor.apply(site.id, VALUE + 1)
        receipt = editor.entries[0].tally.receipt
        assert receipt.changed == (after != VALUE + 1).sum()
        assert receipt.norm == pytest.approx(float((after - VALUE - 1).norm()))


def test_many_firings_are_summed_up() -> None:
    from fmr.edits.editor import Receipts

    editor = Editor({SITE: edits.Add(1.0)})
    for _ in range(200):
        editor.apply(SITE.id, VALUE)
    receipt = Receipts.of([editor])[SITE]
    assert (receipt.fired, receipt.changed) == (200, 200 * 24)
    assert receipt.norm == pytest.approx((200 * 24) ** 0.5)


def test_a_site_knows_its_passes() -> None:
    editor = Editor({SITE.at(passes=[0, 2]): edits.Zero()})
    seen = []
    for _ in range(4):
        editor.begin(list)
        seen.append(float(editor.apply(SITE.id, VALUE).abs().sum()) == 0)
    assert seen == [True, False, True, False]


def test_public_edits_are_named() -> None:
    assert "Interchange" in fmr.edits.__all__
