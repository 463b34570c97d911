"""IDs take themselves apart, and sites select what they say."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

import fmr
from fmr.ids import Parent, Site, TensorId, op_id, spelled, unspelled


@pytest.mark.parametrize(
    ("text", "scope", "parts"),
    [
        ("h.3.attn/softmax#0", "h.3.attn", ("softmax", 0, None)),
        ("/add#12", "", ("add", 12, None)),
        ("cell@2/split#1:3", "cell@2", ("split", 1, 3)),
        ("a.0/scaled_dot_product_attention#0/softmax#0", "a.0/scaled_dot_product_attention#0", ("softmax", 0, None)),
        ("a/opaque#0", "a", ("opaque", 0, None)),
    ],
)
def test_an_id_of_an_op_has_its_parts(text: str, scope: str, parts: tuple[str, int, int | None]) -> None:
    name = TensorId(text)
    assert name.scope == scope
    assert tuple(name.parts) == parts
    assert not name.is_source
    assert op_id(scope, *parts) == text


@pytest.mark.parametrize("text", ["param:h.0.weight", "buffer:mask", "input:x.0"])
def test_a_source_has_no_scope_and_no_parts(text: str) -> None:
    name = TensorId(text)
    assert name.is_source
    assert name.scope == ""
    with pytest.raises(fmr.IdError, match="is not the ID of an op"):
        _ = name.parts


@pytest.mark.parametrize("text", ["add", "/add", "add#0", "a/add#", "a/add#x", "a/add#0:", "a/#0", ""])
def test_what_is_no_id_says_what_one_looks_like(text: str) -> None:
    with pytest.raises(fmr.IdError) as error:
        _ = TensorId(text).parts
    assert repr(text) in str(error.value)
    assert "h.0.attn/softmax#0" in str(error.value)
    assert "/add#0" in str(error.value)


def test_a_parent_is_its_id_and_knows_its_argument() -> None:
    parent = Parent("a/add#0", "mask.1")
    assert parent == "a/add#0"
    assert hash(parent) == hash("a/add#0")
    assert parent.at == "mask.1"
    assert type(parent.id) is TensorId
    again = pickle.loads(pickle.dumps(parent))
    assert (again, again.at) == (parent, "mask.1")


VALUE = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, VALUE),
        ({"heads": 1}, VALUE[:, 1]),
        ({"heads": [1]}, VALUE[:, [1]]),
        ({"positions": slice(1, 3)}, VALUE[:, :, 1:3]),
        ({"units": -1, "examples": 0}, VALUE[0, ..., -1]),
        ({"heads": [0, 2], "positions": torch.tensor([3, 0])}, VALUE[:, [0, 2]][:, :, [3, 0]]),
        ({"heads": 0, "positions": 0, "units": 0, "examples": 0}, VALUE[0, 0, 0, 0]),
    ],
)
def test_a_site_takes_each_axis_by_itself(chosen: dict[str, object], expected: torch.Tensor) -> None:
    assert torch.equal(fmr.Site("/add#0", **chosen).of(VALUE), expected)  # type: ignore[arg-type]


def test_a_site_reads_the_layout_of_the_number_of_dimensions_or_its_own() -> None:
    assert torch.equal(fmr.Site("/add#0", positions=1, units=2).of(VALUE[0]), VALUE[0, :, 1, 2])
    assert torch.equal(fmr.Site("/add#0", units=2).of(VALUE[0, 0]), VALUE[0, 0, :, 2])
    site = fmr.Site("/add#0", heads=1, layout=("examples", "positions", "heads", "units"))
    assert torch.equal(site.of(VALUE), VALUE[:, :, 1])


def test_a_site_that_does_not_fit_says_which_axes_there_are() -> None:
    with pytest.raises(fmr.IdError, match=r"selects heads, but '/add#0' has shape \(3, 4, 5\)") as error:
        fmr.Site("/add#0", heads=0).of(VALUE[0])
    assert "('examples', 'positions', 'units')" in str(error.value)
    assert "layout=" in str(error.value)


@pytest.mark.parametrize("index", [3, -4, [0, 3]])
def test_a_site_beyond_the_end_says_how_long_the_axis_is(index: object) -> None:
    with pytest.raises(fmr.IdError, match=r"has shape \(2, 3, 4, 5\): expected indices below 3 along heads") as error:
        fmr.Site("/add#0", heads=index, units=0).of(VALUE)  # type: ignore[arg-type]
    assert f"heads={index!r}" in str(error.value)


def test_a_site_prints_what_it_takes() -> None:
    assert repr(fmr.Site("h.3.attn/softmax#0", heads=5)) == "Site('h.3.attn/softmax#0', heads=5)"
    assert repr(fmr.Site("/add#0")) == "Site('/add#0')"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("c_attn", "c_attn"),
        ("en->de x", "en->de x"),
        ("a:b#0", "a:b#0"),
        ("me@home", "me@home"),
        ("a@1", "a%401"),
        ("input:x", "input%3Ax"),
        ("my_input:x", "my_input:x"),
        ("a/b", "a%2Fb"),
        ("50%", "50%25"),
        ("", "%"),
        ("%", "%25"),
    ],
)
def test_a_registered_name_stands_in_ids_so_that_nothing_in_it_has_a_meaning(name: str, part: str) -> None:
    assert spelled(name) == part
    assert unspelled(part) == name


@pytest.mark.parametrize("given", [np.int64(1), torch.tensor(1), 1])
def test_a_whole_number_of_any_kind_drops_its_axis_and_a_list_of_one_keeps_it(given: Any) -> None:
    value = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(Site("/mul#0", positions=given).of(value), value[:, 1])
    assert Site("/mul#0", positions=given) == Site("/mul#0", positions=1)
    assert Site("/mul#0", positions=torch.tensor([1])).of(value).shape == (2, 1, 2)
