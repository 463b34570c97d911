"""An error that leaves a block carries what was recorded, says where it was raised, and is otherwise the error it was."""

import gc
import traceback
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.models import build
from tests.small import Fn

KEEPS = ["all", "none", "*", ["up/linear#0", "down/linear#0"], ["up", "down"]]


class Refuses(Exception):
    """Takes no attributes."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "__traceback__":
            raise AttributeError(name)
        super().__setattr__(name, value)


class HasRun(Exception):
    """Has a run of its own."""

    run = "a marathon"


def failing(error: BaseException) -> tuple[nn.Module, Any]:
    model, args, _ = build("chain")

    def fail(*_: Any) -> None:
        raise error

    model.down.register_forward_pre_hook(fail)
    return model, args


def tracked(model: nn.Module, args: Any, keep: Any) -> None:
    with fmr.track(model, keep=keep):
        model(*args)


call = {"run": lambda model, args, keep: fmr.run(model, *args, keep=keep), "track": tracked}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("way", call)
def test_an_error_carries_the_run_and_the_call_that_raised(way: str, keep: Any) -> None:
    error = RuntimeError("shapes do not fit\nat all")
    model, args = failing(error)
    with pytest.raises(RuntimeError) as caught:
        call[way](model, args, keep)
    assert caught.value is error
    run = error.run  # type: ignore[attr-defined]
    after = "/softmax#0" if isinstance(keep, str) else ""
    assert run.failed == ("down", after, "RuntimeError: shapes do not fit")
    assert repr(run).endswith(f"raised in down{' after /softmax#0' if after else ''}: RuntimeError: shapes do not fit")
    if keep != "none":
        assert torch.equal(run["up" if keep == ["up", "down"] else "up/linear#0"], model.up(*args))
    if isinstance(keep, str):
        assert run.graph.module("down").output is None
        assert run.graph.module("up").output.id == "up/linear#0"


def test_the_traceback_and_the_notes_are_those_of_the_plain_model() -> None:
    error = RuntimeError("once")
    model, args = failing(error)
    with pytest.raises(RuntimeError):
        fmr.run(model, *args)
    assert not hasattr(error, "__notes__")
    assert error.__cause__ is None
    assert error.__context__ is None
    assert traceback.extract_tb(error.__traceback__)[-1].name == "fail"


@pytest.mark.parametrize("kind", [Refuses, HasRun, KeyboardInterrupt])
def test_errors_of_every_kind_stay_what_they_are(kind: type[BaseException]) -> None:
    error = kind("stop")
    model, args = failing(error)
    with pytest.raises(kind) as caught:
        fmr.run(model, *args)
    assert caught.value is error
    run: Any = error.run  # type: ignore[attr-defined]
    assert run == "a marathon" if kind is HasRun else run.failed.call == "down"


def test_an_error_in_the_model_itself_is_told_from_one_in_a_part_that_was_caught() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            self.part(x)
        except ValueError:
            x = x + 1
        raise KeyError("no key")

    def fail(self: Any, x: Tensor) -> Tensor:
        raise ValueError("caught")

    for keep in ("all", "*"):
        with pytest.raises(KeyError) as caught:
            fmr.run(Fn(forward, part=Fn(fail)), torch.ones(2), keep=keep)
        assert str(caught.value.run.failed) == "raised in the model itself after /add#0: KeyError: 'no key'"


def test_a_run_that_ended_well_did_not_fail_whatever_the_block_raises() -> None:
    model, args, _ = build("chain")
    with pytest.raises(ZeroDivisionError) as caught, fmr.track(model) as run:
        _ = model(*args).sum() / (1 / 0)
    assert caught.value.run is run  # type: ignore[attr-defined]
    assert run.failed is None
    assert "raised" not in repr(run)


def test_the_outermost_block_has_the_last_word() -> None:
    error = RuntimeError("once")
    model, args = failing(error)
    with pytest.raises(RuntimeError), fmr.track(model) as outer, fmr.track(model, keep="*"):
        model(*args)
    assert error.run is outer  # type: ignore[attr-defined]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_call_below_a_method_or_a_function_that_raised_is_named_though_a_plan_does_not_follow_it(keep: Any) -> None:
    def twice(self: Any, x: Tensor) -> Tensor:
        return self.down(self.up(self.up(x)))

    model = Fn(twice, up=nn.Linear(4, 4), down=Fn(lambda self, x: self.part(x), part=nn.Linear(3, 3)))
    few = ["up/linear#0"] if isinstance(keep, list) else keep
    for way in ({"method": "forward"}, {}):
        with pytest.raises(RuntimeError) as caught:
            fmr.run(model, torch.ones(2, 4), keep=few, **way)
        assert caught.value.run.failed.call == "down.part"


@pytest.mark.parametrize("keep", KEEPS)
def test_the_error_alone_keeps_the_run_alive(keep: Any) -> None:
    def end() -> tuple[weakref.ref[Any], BaseException]:
        model, args = failing(error)
        try:
            fmr.run(model, *args, keep=keep)
        except RuntimeError as met:
            met.__traceback__ = None
            return weakref.ref(met.run), met  # type: ignore[attr-defined]
        raise AssertionError

    gc.collect()
    gc.disable()
    try:
        error = RuntimeError("kept")
        ref, held = end()
        assert ref() is not None
        held.__traceback__ = None
        del held.run, held  # type: ignore[attr-defined]
        assert ref() is None
    finally:
        gc.enable()
