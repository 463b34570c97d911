"""Copy on write: what shares memory is found, and cloned only when it is about to be overwritten."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.watching.guard import Guard
from fmr.watching.storage import extent, is_dense, overlap, storage_key
from fmr.watching.tape import Slot
from tests.small import Fn

BASE = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (BASE, (0, 48)),
        (BASE[1], (16, 32)),
        (BASE[:, 1], (4, 40)),
        (BASE.T, (0, 48)),
        (BASE[1:1], (0, 0)),
        (BASE[2, 3], (44, 48)),
        (BASE[0].expand(5, 4), (0, 16)),
        (BASE.view(torch.int16), (0, 48)),
    ],
)
def test_an_extent_is_the_first_and_last_byte_that_a_view_can_touch(view: Tensor, expected: tuple[int, int]) -> None:
    assert extent(view) == expected


@pytest.mark.parametrize(
    ("view", "dense"), [(BASE, True), (BASE.T, True), (BASE[1:], True), (BASE[:, 1], False), (BASE[::2], False)]
)
def test_a_view_is_dense_when_it_fills_its_extent(view: Tensor, dense: bool) -> None:
    assert is_dense(view) is dense


def test_views_overlap_when_they_may_share_bytes() -> None:
    assert overlap(BASE[0], BASE)
    assert overlap(BASE[:, 0], BASE[1])
    assert not overlap(BASE[0], BASE[1])
    assert not overlap(BASE[1:1], BASE)


def test_views_have_the_key_of_their_storage() -> None:
    assert storage_key(BASE[0]) == storage_key(BASE.T) == storage_key(BASE.detach())
    assert storage_key(BASE) != storage_key(BASE.clone())
    assert storage_key(BASE.to_sparse()) is None


def test_only_what_is_overwritten_is_cloned_and_only_once() -> None:
    guard, base = Guard(), BASE.clone()
    kept = {"row 0": base[0], "row 1": base[1], "all": base, "other": torch.ones(3)}
    for name, value in kept.items():
        guard.keep(value, Slot(0, name=name))
    guard.before_write([base[0]], ())
    assert {slot.name for slot in guard.saved} == {"row 0", "all"}
    base[0] = -1.0
    guard.before_write([base], ())
    assert {slot.name for slot in guard.saved} == {"row 0", "row 1", "all"}
    assert torch.equal(guard.saved[Slot(0, name="all")], BASE)
    assert torch.equal(guard.saved[Slot(0, name="row 0")], BASE[0])


def test_a_closed_guard_keeps_what_it_saved_and_nothing_else() -> None:
    guard, base = Guard(), BASE.clone()
    guard.keep(base, Slot(0, name="all"))
    guard.before_write([base[0]], ())
    guard.close()
    guard.keep(base, Slot(0, name="later"))
    assert {slot.name for slot in guard.saved} == {"all"}


def saved(forward: Any, *args: Tensor, **options: Any) -> set[str]:
    """The IDs whose values a run had to clone."""
    run = fmr.run(Fn(forward), *args, **options)
    one = run.passes[0]
    return {str(node.id) for node in run.graph.nodes if one.slots.get(node.id) in one.saved}


def test_a_model_without_writes_costs_no_copy() -> None:
    assert saved(lambda self, x: ((x + 1).relu()[0] * 2).sum(), BASE) == set()


def test_a_chain_of_writes_costs_one_copy_each_and_the_last_value_none() -> None:
    assert saved(lambda self, x: (x + 1).mul_(2).relu_(), BASE) == {"/add#0", "/mul#0"}


def test_values_in_other_memory_are_not_copied() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        left, right = x * 2, x * 3
        left.zero_()
        return left + right

    assert saved(forward, BASE) == {"/mul#0"}


def test_nothing_is_copied_for_the_graph_alone_or_for_what_is_not_kept() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = x + 1
        z = x * 2
        y.zero_()
        z.zero_()
        return y + z

    assert saved(forward, BASE, keep="none") == set()
    assert saved(forward, BASE, keep="*/mul*") == {"/mul#0"}


def test_saved_values_carry_no_history_unless_it_is_asked_for() -> None:
    weight = torch.ones(4, requires_grad=True)
    model = Fn(lambda self, x: (x * weight).mul_(2).sum())
    with fmr.track(model) as run:
        model(BASE)
    assert not run["/mul#0"].requires_grad
    with fmr.track(model, grad=True) as run:
        model(BASE).backward()
    assert run["/mul#0"].requires_grad
    assert run.grad["/mul#0"].tolist() == [[2.0] * 4] * 3


def test_a_write_looks_at_the_events_since_the_last_one_however_many_passes_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forward(_: nn.Module, x: Tensor) -> Tensor:
        y = x * 2
        y.relu_()
        y[..., 0] += 1
        return y

    looked: list[Any] = []
    keep_event, model = Guard._keep_event, Fn(forward)
    monkeypatch.setattr(Guard, "_keep_event", lambda *args: (looked.append(args[2]), keep_event(*args)))
    with fmr.track(model) as run:
        for _ in range(20):
            model(BASE)
            tapes = len(run.passes)
    assert tapes == 20
    assert len(looked) == len(set(looked)) <= 20 * 6
