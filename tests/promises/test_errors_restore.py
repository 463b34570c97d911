"""An error at any op, in a hook or from the keyboard leaves the block unchanged, and torch and the model as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.models import bits, build
from tests.residue import model_state, torch_state


class Break(torch.overrides.TorchFunctionMode):
    """Raises instead of running the k-th torch function."""

    def __init__(self, k: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = k, error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return func(*args, **(kwargs or {}))


class Panic(BaseException):
    """No `Exception`."""


KEEPS = {"all": "all", "none": "none", "glob": "*linear*", "ids": ["up/linear#0", "/softmax#0"]}
ERRORS = [
    ValueError("at an op"),
    KeyboardInterrupt(),
    Panic(3),
    StopIteration(1),
    GeneratorExit(),
    fmr.IdError("the model's own"),
]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check that the block leaves torch and the model as they were."""
    before = torch_state(), model_state(model)
    yield
    assert (torch_state(), model_state(model)) == before


def caught(error: BaseException, act: Any) -> None:
    """Run something that raises this error, and check that it comes out as it went in, but for the run that it carries."""
    before = error.args, {**vars(error), "run": None}
    with pytest.raises(type(error)) as found:
        act()
    assert found.value is error
    assert (error.args, {**vars(error), "run": None}) == before
    assert error.__context__ is None
    assert error.__cause__ is None
    error.__traceback__ = None


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_at_every_op_leaves_unchanged(keep: str, error: BaseException) -> None:
    model, args, _ = build("chain")
    plain = bits(model(*args))
    with Break(1000, error) as counter:
        model(*args)
    ops = 1000 - counter.left
    assert ops >= 6

    def act(k: int) -> None:
        with Break(k, error), fmr.track(model, keep=KEEPS[keep]):
            model(*args)

    for k in range(ops):
        with unchanged(model):
            caught(error, partial(act, k))
    act(ops)
    with fmr.track(model, keep=KEEPS[keep]):
        assert bits(model(*args)) == plain


@pytest.mark.parametrize("keep", KEEPS)
def test_an_error_from_a_mode_inside_the_block_leaves_unchanged(keep: str) -> None:
    model, args, _ = build("chain")
    error = ValueError("from above")

    def act(k: int) -> None:
        with fmr.track(model, keep=KEEPS[keep]), Break(k, error):
            model(*args)

    for k in range(5):
        with unchanged(model):
            caught(error, partial(act, k))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("place", ["before", "after"])
def test_an_error_in_a_hook_leaves_unchanged(keep: str, place: str) -> None:
    model, args, _ = build("chain")
    error = ValueError(place)
    seen: list[str] = []

    def fail(*_: Any) -> None:
        raise error

    register = model.down.register_forward_pre_hook if place == "before" else model.down.register_forward_hook
    register(fail)
    model.register_forward_hook(lambda module, args, out: seen.append("always"), always_call=True)

    def act() -> None:
        with fmr.track(model, keep=KEEPS[keep]):
            model(*args)

    with unchanged(model):
        caught(error, act)
    assert seen == ["always"]


@pytest.mark.parametrize("keep", KEEPS)
def test_an_error_in_the_users_own_code_leaves_unchanged(keep: str) -> None:
    model, args, _ = build("chain")
    error = ValueError("after the call")

    def act() -> None:
        with fmr.track(model, keep=KEEPS[keep]):
            model(*args)
            raise error

    def act_early() -> None:
        with fmr.track(model, keep=KEEPS[keep]):
            raise error

    with unchanged(model):
        caught(error, act)
        caught(error, act_early)


def test_what_ran_before_the_error_can_be_read() -> None:
    model, args, _ = build("chain")
    model.down.register_forward_pre_hook(lambda *_: 1 / 0)
    for keep in ("all", "*"):
        with pytest.raises(ZeroDivisionError), fmr.track(model, keep=keep) as run:
            model(*args)
        run.graph.lint()
        assert torch.equal(run["up/linear#0"], model.up(*args))
        assert run.graph.module("down").output is None
        assert run.output is None
        with pytest.raises(fmr.IdError, match=r"Chain has no value 'down/linear#0' in this graph"):
            run["down/linear#0"]


def test_ids_that_the_error_cut_off_are_missing_and_those_before_are_there() -> None:
    model, args, _ = build("chain")
    model.down.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), fmr.track(model, keep=["up/linear#0", "down/linear#0"]) as run:
        model(*args)
    assert torch.equal(run["up/linear#0"], model.up(*args))
    with pytest.raises(fmr.IdError, match=r"This run did not keep 'down/linear#0'\. Nearest that exist: up/linear#0"):
        run["down/linear#0"]


def test_a_run_in_which_nothing_ran_says_so() -> None:
    model, _, _ = build("chain")
    with pytest.raises(ZeroDivisionError), fmr.track(model) as run:
        _ = 1 / 0
    for read in (lambda: run["/add#0"], lambda: run.graph, lambda: run.output, lambda: run.grad["/add#0"]):
        with pytest.raises(fmr.TrackError, match="Nothing has run yet: call the model inside the block"):
            read()


class Recovers(nn.Module):
    """Falls back to its second layer when the first one fails."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 4))
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.first(x)
        except RuntimeError:
            return self.second(x).relu()


@pytest.mark.parametrize("keep", ["all", "none", "*", ["second/linear#0", "/relu#0"]])
def test_a_model_that_catches_its_own_error_goes_on(keep: Any) -> None:
    model, x = Recovers(), torch.randn(2, 4)
    with unchanged(model), fmr.track(model, keep=keep) as run:
        out = model(x)
    assert torch.equal(out, model(x))
    if keep != "none":
        assert torch.equal(run["/relu#0"], out)
    if isinstance(keep, str):
        run.graph.lint()
        assert run.graph.module("first").output is None
        assert run.graph.module("first.0").output.id == "first.0/linear#0"
        assert run.graph["/relu#0"].parents == ("second/linear#0",)


def test_an_error_in_a_predicate_leaves_unchanged() -> None:
    model, args, _ = build("chain")
    error = ValueError("in the predicate")

    def fail(node: Any) -> bool:
        raise error

    def act() -> None:
        with fmr.track(model, keep=fail):
            model(*args)

    with unchanged(model):
        caught(error, act)


def test_an_error_in_backward_leaves_unchanged() -> None:
    model, args, _ = build("chain")
    error = ValueError("in backward")

    def fail(grad: Tensor) -> None:
        raise error

    def act() -> None:
        with fmr.track(model, grad=True):
            out = model(*args)
            out.register_hook(fail)
            out.sum().backward()

    with unchanged(model):
        caught(error, act)


def test_stop_leaves_everything_as_it_was() -> None:
    model, args, _ = build("chain")
    after: list[str] = []
    model.down.register_forward_pre_hook(lambda *_: after.append("down"))
    with unchanged(model):
        run = fmr.run(model, *args, keep=["up/linear#0"], stop=True)
    assert after == []
    assert torch.equal(run["up/linear#0"], model.up(*args))


def test_a_stop_ends_its_own_block_and_no_inner_one() -> None:
    model, args, _ = build("chain")
    reached: list[str] = []
    with fmr.track(model, keep=["up/linear#0"], stop=True) as outer:
        with fmr.track(model) as inner:
            model(*args)
            reached.append("inside")
        reached.append("after the inner block")
    assert reached == []
    assert torch.equal(outer["up/linear#0"], model.up(*args))
    assert "/softmax#0" not in inner
