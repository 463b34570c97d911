"""The tape: one event an op, begin and end of each module call, call sites, passes, and reading while it runs."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.ops.names import Op
from fmr.watching.calls import watching
from fmr.watching.recorder import Recorder
from fmr.watching.tape import ENTER, EXIT, INSIDE, RAISED, Event, Tape
from tests.models import bits, build


def record(model: nn.Module, *args: Any, root: nn.Module | None = None, **kwargs: Any) -> list[Tape]:
    """The tapes of everything that one call of a model begins."""
    tapes: list[Tape] = []

    def begin(tape: Tape) -> Callable[[Event], None]:
        tapes.append(tape)
        return tape.events.append

    recorder = Recorder(root, begin, lambda tape: None)
    with watching(recorder), recorder:
        with contextlib.suppress(ZeroDivisionError):
            model(*args, **kwargs)
    return tapes


def names(tape: Tape) -> list[str]:
    """The events in short: op names, module class names, and how calls ended."""
    short = {
        EXIT: lambda event: "raised" if event[1] is RAISED else "exit",
        ENTER: lambda event: f"enter {type(event[1]).__name__}",
    }
    return [
        event[0].name if isinstance(event[0], Op) else short.get(event[0], lambda event: event[0])(event)
        for event in tape.events
    ]


def test_the_tape_of_a_call() -> None:
    model, args, _ = build("chain")
    (tape,) = record(model, *args)
    assert names(tape) == [
        "enter Linear", "linear", "exit", "mul", "gelu", "softmax", "enter Linear", "linear", "exit", "add", "exit",
    ]  # fmt: skip
    assert tape.output is tape.events[-1][1]
    assert [name for name, _ in tape.inputs] == ["input:x"]


def test_getters_are_no_events_and_a_question_for_numbers_is_one() -> None:
    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape == x.size()
            assert x.dtype.is_floating_point
            assert x.is_floating_point()
            assert x.device.type == "cpu"
            assert len(x) == x.numel() == 3
            assert float(x.sum()) == 3.0
            return x.mT if x.dim() > 1 else x + x.shape[0]

    (tape,) = record(Asks(), torch.ones(3))
    assert names(tape) == ["sum", "asked", "add", "exit"]


@pytest.mark.parametrize("name", ["T", "mT", "H", "mH", "real", "data"])
def test_properties_that_are_tensors_are_events(name: str) -> None:
    class Get(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value: Tensor = getattr(x, name)
            return value * 1

    run = fmr.run(Get(), torch.ones(2, 3))
    assert run.graph["/mul#0"].parents == (f"/{name}#0",)
    assert run.graph[f"/{name}#0"].parents == ("input:x",)


def test_the_call_site_is_the_models_own_line() -> None:
    model, args, _ = build("chain")
    graph = fmr.run(model, *args).graph
    lines = {node.id: node.where for node in graph if not node.id.is_source}
    assert all(where.startswith("tests/models.py:") for where in lines.values()), lines
    numbers = [int(lines[name].partition(":")[2]) for name in ("up/linear#0", "/mul#0", "/gelu#0", "/add#0")]
    assert numbers == list(range(numbers[0], numbers[0] + 4))
    assert lines["/softmax#0"] == lines["/gelu#0"]


def test_each_outermost_call_of_the_root_is_a_tape_and_others_are_missed() -> None:
    model, args, _ = build("chain")
    assert [type(tape.root).__name__ for tape in record(model, *args, root=model)] == ["Chain"]
    assert [type(tape.root).__name__ for tape in record(model, *args, root=model.down)] == ["Linear"]
    assert record(model, *args, root=nn.Identity()) == []


def test_a_call_that_raises_ends_every_open_call() -> None:
    model, args, _ = build("chain")
    model.down.register_forward_pre_hook(lambda *_: 1 / 0)
    (tape,) = record(model, *args)
    assert names(tape)[-3:] == ["enter Linear", "raised", "raised"]
    assert tape.output is None


def test_a_list_that_the_model_changes_later_is_as_it_was_read() -> None:
    class Grows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            parts = [x, x + 1]
            first = torch.stack(parts)
            parts.append(x + 2)
            parts[0] = x + 3
            second = torch.cat(tensors=parts)
            parts.clear()
            return first.sum() + second.sum()

    run = fmr.run(Grows(), torch.ones(2))
    assert run.graph["/stack#0"].parents == ("input:x", "/add#0")
    assert run.graph["/cat#0"].parents == ("/add#2", "/add#0", "/add#1")


def test_ops_inside_a_transform_are_told_from_ops_beside_it() -> None:
    model, args, _ = build("vmapped")
    (tape,) = record(model, *args)
    assert names(tape) == ["mul", INSIDE, INSIDE, "sum", INSIDE, "mean", "add", "exit"]
    tensors = [tensor for event in tape.events if event[0] is INSIDE for tensor in event[1]]
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def test_modules_called_inside_a_transform_have_no_scope_and_no_value_is_a_wrapper() -> None:
    model, args, kwargs = build("func_grad")
    for keep in ("all", "*"):
        run = fmr.run(model, *args, keep=keep, **kwargs)
        assert [scope.path for scope in run.graph.scopes] == [""]
        slope = run.graph["/mul#0"].parents[0]
        assert run.graph[slope].op == "opaque"
        assert {"input:x", "param:net.0.weight", "param:net.2.weight"} <= set(run.graph[slope].parents)
        by_hand = torch.func.grad(lambda y: model.net(y).sum())(args[0])
        assert torch.equal(run[slope], by_hand)
    assert bits(fmr.run(model, *args, keep=["/mul#0"])["/mul#0"]) == bits(run["/mul#0"])


def test_both_results_of_one_transform_read_what_it_read() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = torch.vmap(lambda row: (row + 1, row * 2))(x.exp())
            return a.sin() + b.cos()

    graph = fmr.run(Two(), torch.randn(3, 2)).graph
    assert [node.parents for node in graph.opaque] == [("/exp#0",), ("/exp#0",)]


def test_a_mode_that_the_model_enters_itself_keeps_its_place() -> None:
    class Halves(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return out / 2 if func is torch.relu else out

    class Enters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            with Halves():
                y = self.inner(torch.relu(x + 1))
                z = torch.relu(y)
            with torch.device("meta"):
                other = self.inner[1](torch.ones(2))
            assert other.device.type == "meta"
            return torch.relu(z).exp()

    model, x = Enters(), torch.randn(2, 4)
    plain = bits(model(x))
    full = fmr.run(model, x, grad=True)
    assert bits(full.output) == plain
    ids = [node.id for node in full.graph if not node.id.is_source]
    for keep in (
        *([name] for name in ids),
        ids,
        ["/relu#1", "inner.0/linear#0"],
        ["inner/tanh#0"] if "inner/tanh#0" in ids else "all",
    ):
        with fmr.track(model, keep=keep, grad=True) as run:
            assert bits(model(x)) == plain
        for name in keep if isinstance(keep, list) else ids:
            if full[name].device.type != "meta":
                assert torch.equal(run[name], full[name])


def test_a_run_can_be_read_while_the_model_runs_and_is_whole_afterwards() -> None:
    model, args, _ = build("chain")
    seen: list[Any] = []
    with torch.no_grad(), fmr.track(model) as run:
        model.down.register_forward_pre_hook(
            lambda *_: seen.append((run["/softmax#0"], "down/linear#0" in run, len(run.graph)))
        )
        model(*args)
    ((value, before, size),) = seen
    assert torch.equal(value, run["/softmax#0"])
    assert not before
    assert "down/linear#0" in run
    assert len(run.graph) > size
    run.graph.lint()


def test_backward_inside_the_forward_is_part_of_the_pass() -> None:
    model, args, _ = build("inner_backward")
    run = fmr.run(model, *args)
    assert len(run.passes) == 1
    assert run.graph["/mul#0"].op == "mul"
    assert torch.equal(run["/mul#0"], model(*args))


def test_a_module_called_by_a_backward_hook_begins_no_pass() -> None:
    model, args, _ = build("chain")
    with fmr.track(model, grad=True) as run:
        out = model(*args)
        out.register_hook(lambda grad: model(*args).detach() * 0 + grad)
        out.sum().backward()
    assert len(run.passes) == 1
