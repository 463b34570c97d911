"""What an attack on edits has found: shared memory, two threads, swallowed errors, choices that mean nothing."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr import EditError, IdError, Site, TrackError, edits
from tests.small import Fn

X = torch.arange(1.0, 9.0).view(2, 4)


def clone(value: Tensor, _: edits.Context) -> Tensor:
    return value.clone()


def idle_dropout(self: Any, x: Tensor) -> Tensor:
    h = x * 2
    self.drop(h).mul_(3)
    return h


def view_of_a_written_base(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    view = y[:, :2]
    y.add_(1)
    return view * 1


def written_view(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    view = y[:, :2]
    view.add_(1)
    return y


def written_detached(_: Any, x: Tensor) -> Tensor:
    y = x * 2
    y.detach().add_(1)
    return y


SHARED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "idle dropout": (idle_dropout, "drop"),
    "a view of a written base": (view_of_a_written_base, "/getitem#0"),
    "a written view": (written_view, "/getitem#0"),
    "a written detached": (written_detached, "/detach#0"),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SHARED)
def test_memory_that_is_written_later_is_shared_or_the_edit_refused(name: str, mode: Any) -> None:
    forward, site = SHARED[name]
    model = Fn(forward, drop=nn.Dropout(0.1)).eval()
    with mode():
        expected = model(X)
        for edit in (clone, edits.Interchange(fmr.run(model, X))):
            assert fmr.run(model, X, edits={site: edit}, keep=()).output.equal(expected)
        with pytest.raises(EditError, match=r"shares its memory with other values.* Edit what the write made"):
            fmr.run(model, X, edits={site: edits.Scale(0.5)}, keep=())


def test_parameters_are_edited_by_one_run_at_a_time() -> None:
    model, begun, tried = (
        Fn(lambda self, x: self.hold() or self.l(x), l=nn.Linear(4, 4)),
        threading.Event(),
        threading.Event(),
    )
    weight = model.l.weight

    def hold() -> None:
        begun.set()
        tried.wait(5)

    model.hold = hold  # type: ignore[assignment]
    other = threading.Thread(target=lambda: fmr.run(model, X, keep=(), edits={"param:l.weight": edits.Zero()}))
    other.start()
    begun.wait(5)
    with pytest.raises(EditError, match=r"'param:l\.weight' is edited by another run of this model at this time"):
        fmr.run(model, X, keep=(), edits={"param:l.weight": edits.Add(0.0)})
    tried.set()
    other.join()
    assert model.l.weight is weight
    assert float(weight.detach().abs().sum()) > 0


def test_a_type_error_of_an_edit_is_no_question_of_an_operator() -> None:
    model = Fn(lambda self, x: x + self.p, p=nn.Parameter(torch.ones(4)))
    with pytest.raises(EditError, match=r"The edit of Site\('/add#0'\) raised a TypeError: .* Expected f\(value, context\)"):
        fmr.run(model, X, edits={"/add#0": lambda value: value * 10}, optional=True)  # type: ignore[dict-item, misc]


class Counts(nn.Module):
    """Updates a buffer in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.mean(0))
        return x + self.seen


def test_a_buffer_that_the_model_updates_is_updated_or_the_edit_refused() -> None:
    plain, model = Counts(), Counts()
    with torch.no_grad(), fmr.track(model, keep=(), edits={"buffer:seen": clone}):
        assert all(plain(X).equal(model(X)) for _ in range(3))
    assert model.seen.equal(plain.seen)
    with pytest.raises(EditError, match=r"The model wrote into what stands for 'buffer:seen' .* edit what reads it instead"):
        fmr.run(model, X, keep=(), edits={"buffer:seen": edits.Add(1.0)})
    assert model.seen.equal(plain.seen)


def test_what_the_model_returns_is_edited_without_a_recording() -> None:
    model = nn.Linear(4, 4)
    assert not fmr.run(model, X, keep=(), edits={"": edits.Zero()}).output.any()
    with pytest.raises(TrackError, match=r"is made when its recording has ended\. Expected keep=\(\) or a list of IDs"):
        fmr.run(model, X, edits={"": edits.Zero()})


def test_one_tensor_in_two_places_is_no_place() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    with pytest.raises(EditError, match=r"'input:a' is one tensor in several places"):
        fmr.run(Two(), X, X, keep=(), edits={"input:a": edits.Zero()})
    twice = Fn(lambda self, x: self.s(x)[0], s=Fn(lambda self, x: (y := x * 2, y)))
    with pytest.raises(EditError, match=r"'s:0' is one tensor in several places"):
        fmr.run(twice, X, keep=(), edits={"s:0": edits.Zero()})


def test_long_masks_are_told_apart() -> None:
    one, other = torch.zeros(2000, dtype=torch.bool), torch.zeros(2000, dtype=torch.bool)
    one[100] = other[500] = True
    run = fmr.run(
        Fn(lambda self, x: x * 1), torch.ones(1, 2000), edits={Site("/mul#0", units=m): edits.Zero() for m in (one, other)}
    )
    assert len(run.receipts) == 2
    assert float(run.output.sum()) == 1998


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("/mul#0", units=[True, False]), r"has a mask of 2 over 4 units: expected as many"),
        (Site("/mul#0", units=0, layout=("units",)), r"Expected a name for each dimension, each once"),
        (Site("/mul#0", units=0, layout=("units", "units")), r"Expected a name for each dimension, each once"),
        (Site("/mul#0", units=slice(100, 200)), r"never fired"),
        (Site("/mul#0", examples=[[0], [1]]), r"has rows of examples, expected one list of them"),
        (Site("/mul#0", passes="0"), r"chooses passes='0'\. Expected a whole number, a slice, or a list"),
        (Site("/mul#0", passes=True), r"chooses passes=True\. Expected a whole number"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(site: Site, message: str) -> None:
    with pytest.raises((EditError, IdError), match=message):
        fmr.run(Fn(lambda self, x: x * 1), X, edits={site: edits.Zero()})


@pytest.mark.parametrize("name", ["input:x", "param:l.weight"])
def test_an_edit_that_writes_leaves_what_was_given_as_it_was(name: str) -> None:
    model, x = Fn(lambda self, x: self.l(x), l=nn.Linear(4, 4)), X.clone()
    weight = model.l.weight.detach().clone()
    with torch.no_grad(), pytest.raises(EditError, match="wrote into the value"):
        fmr.run(model, x, keep=(), edits={name.replace("input:x", "input:args.0"): lambda v, c: v.mul_(2)})
    assert x.equal(X)
    assert model.l.weight.equal(weight)


@pytest.mark.parametrize("block", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fails", [False, True])
def test_an_edit_that_writes_into_a_view_of_a_weight_leaves_that_as_it_was(block: Any, fails: bool) -> None:
    def edit(value: Tensor, context: Any) -> Tensor:
        with torch.no_grad():
            value.mul_(2)
        if fails:
            raise ValueError("after it wrote")
        return value

    model = Fn(lambda self, x: x @ self.l.weight.t(), l=nn.Linear(4, 4))
    weight = model.l.weight.detach().clone()
    with block(), pytest.raises(ValueError if fails else EditError, match="wrote"):
        fmr.run(model, X, edits={"/t#0": edit})
    assert model.l.weight.equal(weight)


def test_a_receipt_counts_what_is_no_number_as_itself() -> None:
    x = torch.tensor([[float("nan"), float("inf"), 1.0]])
    model = Fn(lambda self, x: x * 1)
    assert repr(fmr.run(model, x, edits={"/mul#0": clone}).receipts["/mul#0"]) == (
        "Receipt: fired 1 time, changed 0 elements by 0 (L2 norm)"
    )
    large = fmr.run(model, torch.full((4,), 6e4, dtype=torch.half), edits={"/mul#0": edits.Zero()}).receipts["/mul#0"]
    assert large.norm == pytest.approx(119_936, rel=1e-3)


def test_a_number_is_rounded_with_the_result_and_not_before() -> None:
    model, half = Fn(lambda self, x: x * 1), torch.tensor([1e-3], dtype=torch.half)
    assert fmr.run(model, half, edits={"/mul#0": edits.Scale(1e5)}).output.equal(half * 1e5)


def test_the_mean_of_a_batch_stands_for_each_example() -> None:
    run = fmr.run(Fn(lambda self, x: x * 1), X, edits={"/mul#0": edits.Mean()})
    assert run.output.equal(X.mean(0).expand(2, 4))


def test_a_source_has_a_pass_for_each_or_one_for_all() -> None:
    model = Fn(lambda self, x: x * 1)
    with torch.no_grad(), fmr.track(model) as source:
        model(X)
        model(2 * X)
    asked = {"/mul#0": edits.Interchange(source)}
    with torch.no_grad(), fmr.track(model, edits=asked):
        model(X)
        model(X)
        with pytest.raises(EditError, match=r"has 2 passes, and this is pass 2"):
            model(X)


class Fold(nn.Module):
    """Heads in the batch."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (input_ids[..., None] * torch.ones(4)).unflatten(-1, (2, 2)).transpose(1, 2).flatten(0, 1) * 1


def test_positions_of_padded_examples_that_are_no_axis_are_refused() -> None:
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    site = Site("/mul#1", positions=0, layout=("rows", "positions", "units"))
    with pytest.raises(EditError, match=r"has no axis of examples in its layout, .* padded differently"):
        fmr.run(Fold(), ids, mask, edits={site: edits.Zero()})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.b = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.b(self.e(input_ids))


def test_skip_hands_on_what_stood_at_the_same_position() -> None:
    model, ids, mask = Block(), torch.tensor([[5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    found = fmr.run(model, ids, mask, keep=(), edits={Site("b", positions=0): edits.Skip()}).output
    with torch.no_grad():
        expected = model(ids).clone()
        expected[0, 2] = model.e(ids)[0, 2]
    assert found.equal(expected)
