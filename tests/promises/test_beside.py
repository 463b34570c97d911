"""What runs beside a tracked block notices nothing: compiled models, other threads, other tasks; and each sees its own."""

import asyncio
import contextvars
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fmr
from fmr.watching import calls
from tests.residue import torch_state

KEEPS: list[Any] = ["all", "none", ["1/relu#0"], "*relu*"]
by_keep = pytest.mark.parametrize("keep", KEEPS, ids=["all", "none", "plan", "glob"])


def student() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU()).requires_grad_(False)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


class Hooked(Nested):
    """dynamo goes through the whole call of a module that has hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner.register_forward_hook(lambda module, args, out: out * 2)


class Attends(nn.Module):
    """Asks whether its tensors are overridden."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[None])[0]


class Compiled:
    """A compiled model with its right answer, and how often its graphs were compiled."""

    def __init__(self, kind: type[nn.Module], inner_backend: str) -> None:
        torch._dynamo.reset()
        self.compiled = 0
        self.x = torch.randn(2, 6)
        model = kind().eval().requires_grad_(False)
        self.right = model(self.x)
        backend = torch._dynamo.lookup_backend(inner_backend)

        def count(graph: Any, inputs: Any) -> Any:
            self.compiled += 1
            return backend(graph, inputs)

        self.model = torch.compile(model, backend=count, fullgraph=True)

    def check(self) -> None:
        torch.testing.assert_close(self.model(self.x), self.right)


def on_a_thread(work: Callable[[], None]) -> None:
    """Run on another thread, and raise here what it raised."""
    problems: list[BaseException] = []

    def noted() -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=noted)
    thread.start()
    thread.join(60)
    for problem in problems:
        raise problem


@by_keep
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("kind", [Nested, Hooked])
def test_a_compiled_model_on_another_thread_is_right_and_compiled_once(kind: Any, warm: bool, keep: Any) -> None:
    served, model = Compiled(kind, "eager"), student()
    if warm:
        on_a_thread(served.check)
    for _ in range(3):
        with fmr.track(model, keep=keep) as run:
            model(torch.randn(1, 6))
            on_a_thread(served.check)
            on_a_thread(served.check)
        on_a_thread(served.check)
        assert len(run.passes) == 1
    assert served.compiled == 1


def test_a_compiled_model_that_asks_for_overrides_is_right_on_another_thread() -> None:
    served, model = Compiled(Attends, "eager"), student()
    for _ in range(3):
        with fmr.track(model):
            model(torch.randn(1, 6))
            on_a_thread(served.check)
        served.check()
    assert served.compiled <= 2


@by_keep
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [Nested, Hooked, Attends])
def test_a_compiled_teacher_is_right_inside_a_block(kind: Any, backend: str, keep: Any) -> None:
    teacher, model = Compiled(kind, backend), student()
    for _ in range(3):
        with fmr.track(model, keep=keep) as run:
            model(torch.randn(1, 6))
            teacher.check()
            model(torch.randn(1, 6))
        teacher.check()
        assert len(run.passes) == 2
        assert all("1/relu#0" in one.graph.ids() for one in run.passes if keep != ["1/relu#0"])
    assert teacher.compiled <= 2  # under a mode, and under none


# ---- blocks that do not end in the order in which they began


def shapes(run: fmr.Run) -> list[int]:
    """How many examples each pass had."""
    return [len(one.output) for one in run.passes]


@by_keep
def test_each_task_sees_its_own_passes_whole(keep: Any) -> None:
    model, before = student(), torch_state()

    async def request(examples: int, turns: int) -> fmr.Run:
        with fmr.track(model, keep=keep) as run:
            for _ in range(turns):
                model(torch.randn(examples, 6))
                await asyncio.sleep(0)
        return run

    async def serve() -> list[fmr.Run]:
        return await asyncio.gather(request(1, 2), request(2, 4), request(3, 3))

    runs = asyncio.run(serve())
    assert [shapes(run) for run in runs] == [[1] * 2, [2] * 4, [3] * 3]
    assert all(one["1/relu#0"].shape == one.output.shape for run in runs for one in run.passes if keep != "none")
    assert not [node for run in runs for one in run.passes if keep in ("all", "none") for node in one.graph.opaque]
    assert torch_state() == before


def test_a_block_sees_the_tasks_that_began_inside_it_and_none_of_another_thread() -> None:
    model = student()

    async def work(examples: int) -> None:
        model(torch.randn(examples, 6))

    async def serve() -> fmr.Run:
        with fmr.track(model) as run:
            await asyncio.gather(*(asyncio.create_task(work(n)) for n in (1, 2)))
            await asyncio.to_thread(model, torch.randn(3, 6))
        return run

    assert shapes(asyncio.run(serve())) == [1, 2]


def test_a_block_that_ends_in_another_task_than_it_began_in_is_over_everywhere() -> None:
    model, before = student(), torch_state()

    @asynccontextmanager
    async def tracked() -> AsyncIterator[fmr.Run]:
        with fmr.track(model) as run:
            yield run

    async def serve() -> fmr.Run:
        block = tracked()
        run = await block.__aenter__()
        model(torch.randn(1, 6))
        await asyncio.create_task(block.__aexit__(None, None, None))  # type: ignore[arg-type]
        with fmr.track(model):
            model(torch.randn(2, 6))
        return run

    assert shapes(asyncio.run(serve())) == [1]
    assert torch_state() == before


@by_keep
@pytest.mark.parametrize("same", [True, False])
def test_blocks_left_in_another_order_each_record_until_their_end(same: bool, keep: Any) -> None:
    first, before = student(), torch_state()
    second = first if same else student()
    one, two = ExitStack(), ExitStack()
    a = one.enter_context(fmr.track(first, keep=keep))
    b = two.enter_context(fmr.track(second, keep=keep))
    first(torch.randn(1, 6))
    second(torch.randn(2, 6))
    one.close()
    first(torch.randn(3, 6))
    second(torch.randn(4, 6))
    two.close()
    assert shapes(a) == ([1, 2] if same else [1])
    assert shapes(b) == ([1, 2, 3, 4] if same else [2, 4])
    if keep != ["1/relu#0"]:
        assert all(not one.graph.opaque and "1/relu#0" in one.graph.ids() for one in (*a.passes, *b.passes))
    assert torch_state() == before


def stream(model: nn.Module, examples: int) -> Iterator[fmr.Run]:
    with fmr.track(model) as run:
        for _ in range(2):
            model(torch.randn(examples, 6))
            yield run


def test_generators_in_contexts_of_their_own_each_see_their_own_passes() -> None:
    model, before = student(), torch_state()
    a, b = contextvars.copy_context(), contextvars.copy_context()
    first, second = stream(model, 1), stream(model, 2)
    runs = [a.run(next, first), b.run(next, second), a.run(next, first)]
    a.run(first.close)  # type: ignore[attr-defined]
    runs.append(b.run(next, second))
    b.run(second.close)  # type: ignore[attr-defined]
    assert [shapes(run) for run in runs] == [[1, 1], [2, 2], [1, 1], [2, 2]]
    assert torch_state() == before


def test_generators_that_track_one_model_in_turns_are_an_error_with_the_remedy() -> None:
    model, before = student(), torch_state()
    first, second = stream(model, 1), stream(model, 2)
    next(first)
    run = next(second)
    with pytest.raises(
        fmr.TrackError, match=r"Two generators that track the same model ran in turns: .* context\.run\(next"
    ):
        first.close()  # type: ignore[attr-defined]
    next(second)
    second.close()  # type: ignore[attr-defined]
    assert shapes(run) == [2, 2]
    assert not [node for one in run.passes for node in one.graph.opaque]
    assert torch_state() == before


def test_generators_that_track_two_models_in_turns_are_no_error() -> None:
    first, second = stream(student(), 1), stream(student(), 2)
    a, b = next(first), next(second)
    next(first)
    first.close()  # type: ignore[attr-defined]
    next(second)
    second.close()  # type: ignore[attr-defined]
    assert (shapes(a), shapes(b)) == ([1, 1], [2, 2])


def test_context_managers_made_of_generators_may_end_in_any_order() -> None:
    @contextmanager
    def tracked() -> Iterator[fmr.Run]:
        with fmr.track(model) as run:
            yield run

    model, one, two = student(), ExitStack(), ExitStack()
    a, b = one.enter_context(tracked()), two.enter_context(tracked())
    model(torch.randn(1, 6))
    one.close()
    model(torch.randn(2, 6))
    two.close()
    assert (shapes(a), shapes(b)) == ([1], [1, 2])


def test_a_mode_that_leaves_inside_the_block_in_place_of_fmrs_is_an_error() -> None:
    class Quiet(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model, mode, before = student(), Quiet(), torch_state()

    def out_of_order() -> None:
        mode.__enter__()
        with fmr.track(model):
            mode.__exit__(None, None, None)
            model(torch.randn(1, 6))

    with pytest.raises(fmr.TrackError, match="was entered before the block was left inside it, and took fmr's mode off"):
        out_of_order()
    assert torch_state() == before


# ---- what is noted of others, how deep calls may nest, and Ctrl-C


@by_keep
def test_calls_of_others_are_counted_and_not_held(keep: Any) -> None:
    model, others, seen = student(), nn.Tanh(), []
    with fmr.track(model, keep=keep):
        model(torch.randn(1, 6))
        for _ in range(100):
            others(torch.ones(1))
        on_a_thread(lambda: [others(torch.ones(1)) for _ in range(50)] and None)
        (watcher,) = calls._everywhere
        seen = [(noted.count, noted.first) for noted in (watcher.missed, watcher.foreign)]  # type: ignore[attr-defined]
        held = sys.getrefcount(others)
    assert seen == [(100, "Tanh"), (50, "Tanh")]
    assert held == sys.getrefcount(others)


class Falls(nn.Module):
    def forward(self, x: Tensor, levels: int) -> Tensor:
        return self(x, levels - 1) if levels else x.relu()


@pytest.mark.parametrize("keep", ["all", "none", ["input:x"], "*"], ids=["all", "none", "plan", "glob"])
def test_calls_nest_about_as_deep_as_under_a_hook(keep: Any) -> None:
    model, x = Falls(), torch.ones(1)

    def deepest(block: Callable[[], Any]) -> int:
        low, high = 20, 1000
        while low < high - 1:
            middle = (low + high) // 2
            try:
                with block():
                    model(x, middle)
                low = middle
            except RecursionError:
                high = middle
        return low

    watched = deepest(lambda: fmr.track(model, keep=keep))
    handle = model.register_forward_hook(lambda *_: None)
    hooked = deepest(nullcontext)
    handle.remove()
    assert watched >= hooked * 0.95


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).relu_()
        y[..., 0] += 1
        return self.attention(y, y, y)[0]


FMR, CONTEXTLIB = fmr.__file__.removesuffix("__init__.py"), ExitStack.__init__.__code__.co_filename


def is_ours(frame: Any) -> bool:
    """Whether a frame is one of fmr, or of contextlib on behalf of fmr; a generator that is dropped swallows a Ctrl-C."""
    code, caller = frame.f_code, frame.f_back.f_code.co_filename
    own = code.co_filename.startswith(FMR) and not code.co_flags & inspect.CO_GENERATOR
    return own or (code.co_filename == CONTEXTLIB and caller.startswith(FMR))


def interrupt_at(call: int, work: Callable[[], Any]) -> bool:
    """Run with Ctrl-C at the entry of one function of fmr or of contextlib, which is where Python raises it."""
    left, before = call, sys.gettrace()

    def trace(frame: Any, event: str, arg: Any) -> None:
        nonlocal left
        if event == "call" and is_ours(frame):
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

    try:
        sys.settrace(trace)
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


@pytest.mark.parametrize(
    "keep", ["all", "none", ["/relu#0", "linear/linear#0"], "*softmax*"], ids=["all", "none", "plan", "glob"]
)
def test_an_interrupt_at_any_call_leaves_nothing_behind(keep: Any) -> None:
    model, x = Writes().train(), torch.randn(1, 2, 6)
    fmr.run(model, x, keep=keep)
    before, call = torch_state(), 1
    while interrupt_at(call, lambda: fmr.run(model, x, keep=keep)):
        assert torch_state() == before, call
        assert (calls._everywhere, calls._seats.get()) == ({}, None), call
        call += 1 + call // 40  # each of the first, then fewer: what comes later repeats itself
    assert call > 50
