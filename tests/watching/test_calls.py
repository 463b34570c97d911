"""Who sees a module call, in which order, on which thread; and that nothing of it is left."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fmr
from fmr.ops import fused
from fmr.watching.calls import Noted, WatcherMode, unwatched, watching
from tests.models import build
from tests.residue import torch_state


class Listener:
    """A watcher that notes each call, before and after, under its own name."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        self.foreign, self.ended = Noted(), False

    def call(self, proceed: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.log.append(f"{self.name} enters {type(module).__name__}")
        out = proceed(*args, **kwargs)
        self.log.append(f"{self.name} leaves {type(module).__name__}")
        return out

    def end_before(self, others: tuple[Any, ...]) -> None:
        pass


class Quiet(WatcherMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Loud(TorchFunctionMode):
    """A mode of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_watcher_sees_each_call_and_only_inside_the_block() -> None:
    log: list[str] = []
    model = nn.Sequential(nn.ReLU())
    before = torch_state()
    with watching(Listener("a", log)):
        model(torch.ones(2))
    model(torch.ones(2))
    assert log == ["a enters Sequential", "a enters ReLU", "a leaves ReLU", "a leaves Sequential"]
    assert torch_state() == before


def test_the_innermost_watcher_is_asked_first() -> None:
    log: list[str] = []
    with watching(Listener("outer", log)), watching(Listener("middle", log)), watching(Listener("inner", log)):
        nn.ReLU()(torch.ones(2))
    assert log == [f"{name} enters ReLU" for name in ("inner", "middle", "outer")] + [
        f"{name} leaves ReLU" for name in ("outer", "middle", "inner")
    ]


def test_watchers_may_leave_in_any_order() -> None:
    log: list[str] = []
    before = torch_state()
    first, second = watching(Listener("first", log)), watching(Listener("second", log))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    nn.ReLU()(torch.ones(2))
    second.__exit__(None, None, None)
    nn.ReLU()(torch.ones(2))
    assert log == ["second enters ReLU", "second leaves ReLU"]
    assert torch_state() == before


def test_arguments_of_every_kind_arrive() -> None:
    class Takes(nn.Module):
        def forward(self, *args: Any, self_: Any = None, module: Any = None, args_: Any = None, **kwargs: Any) -> Any:
            return args, self_, module, args_, kwargs

    with watching(Listener("a", [])):
        out = Takes()(1, 2, self_=3, module=4, args_=5, proceed=6)
    assert out == ((1, 2), 3, 4, 5, {"proceed": 6})


def test_a_call_on_another_thread_is_noted_as_foreign() -> None:
    listener, log = Listener("a", []), []
    module = nn.ReLU()
    with watching(listener):
        thread = threading.Thread(target=lambda: log.append(module(torch.ones(2))))
        thread.start()
        thread.join(30)
    assert listener.log == []
    assert (listener.foreign.count, listener.foreign.first) == (1, "ReLU")
    assert len(log) == 1


def test_each_thread_has_its_own_watchers() -> None:
    meet = threading.Barrier(2, timeout=30)
    logs: dict[str, list[str]] = {"a": [], "b": []}
    kinds = {"a": nn.ReLU(), "b": nn.Tanh()}
    before = torch_state()

    def work(name: str) -> None:
        meet.wait()
        with watching(Listener(name, logs[name])):
            meet.wait()
            kinds[name](torch.ones(2))
            meet.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert logs == {"a": ["a enters ReLU", "a leaves ReLU"], "b": ["b enters Tanh", "b leaves Tanh"]}
    assert torch_state() == before


def test_a_thread_that_calls_while_another_opens_and_closes_blocks_never_fails() -> None:
    module, stop = nn.ReLU(), threading.Event()
    done: list[int] = []
    problems: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                module(torch.ones(2))
                done.append(1)
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(300):
        with watching(Listener("a", [])):
            module(torch.ones(2))
    stop.set()
    thread.join(30)
    assert problems == []
    assert done


# ---- "is any of these overridden?"


def test_modes_of_fmr_do_not_count_as_overrides_but_those_of_the_user_do() -> None:
    x = (torch.ones(2),)
    ask = torch.overrides.has_torch_function
    with Quiet():
        assert ask(x)
        with watching(Listener("a", [])):
            assert not torch.overrides.has_torch_function(x)
            with Loud():
                assert torch.overrides.has_torch_function(x)
            assert not torch.overrides.has_torch_function(x)
    assert torch.overrides.has_torch_function is ask


def test_tensors_of_an_overriding_class_still_count() -> None:
    class Special(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs)

    with Quiet(), watching(Listener("a", [])):
        assert torch.overrides.has_torch_function((torch.ones(2).as_subclass(Special),))


def test_asking_leaves_the_stack_of_modes_in_order() -> None:
    outer, inner = Loud(), Loud()
    with outer, Quiet(), inner, Quiet(), watching(Listener("a", [])):
        stack = torch.overrides._get_current_function_mode_stack()
        torch.overrides.has_torch_function((torch.ones(2),))
        assert torch.overrides._get_current_function_mode_stack() == stack
    torch.ones(1)
    assert (outer.seen.count("ones"), inner.seen.count("ones")) == (1, 1)


# ---- fmr's own work


def test_unwatched_work_is_seen_by_nobody() -> None:
    log: list[str] = []
    loud, listener = Loud(), Listener("a", log)
    with loud, watching(listener), unwatched():
        nn.ReLU()(torch.ones(2))
    assert log == []
    assert loud.seen == []


def test_unwatched_work_that_raises_puts_everything_back() -> None:
    log: list[str] = []
    loud = Loud()
    with loud, watching(Listener("a", log)):
        stack = torch.overrides._get_current_function_mode_stack()
        with pytest.raises(ZeroDivisionError), unwatched():
            _ = 1 / 0
        assert torch.overrides._get_current_function_mode_stack() == stack
        nn.ReLU()(torch.ones(2))
    assert log == ["a enters ReLU", "a leaves ReLU"]
    assert loud.seen == ["ones", "relu"]


def test_looking_inside_a_fused_op_fires_no_global_hook() -> None:
    model, args, _ = build("attention")
    model.train()
    with torch.no_grad(), fmr.track(model) as run:
        model(*args)
    fired: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: fired.append("hook"))
    try:
        assert run["/multi_head_attention_forward#0/linear#0"].shape == (5, 2, 48)
        assert len(run.graph.inner("/multi_head_attention_forward#0:0")) > 5
    finally:
        handle.remove()
    assert fired == []


def test_looking_inside_a_fused_op_does_not_open_it_for_another_thread() -> None:
    model, (x, *_), _ = build("attention")
    model.train()
    seen: list[list[str]] = []

    class Meddles:
        """Is asked for its truth in the midst of the explained function, and tracks the model on another thread."""

        def __bool__(self) -> bool:
            def work() -> None:
                run = fmr.run(model, x, x, x, keep="none")
                seen.append([node.op for node in run.graph if not node.id.is_source])

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(30)
            return False

    plain = [node.op for node in fmr.run(model, x, x, x, keep="none").graph if not node.id.is_source]
    given = {"training": False, "need_weights": Meddles()}
    weights = (model.in_proj_weight, model.in_proj_bias, None, None, False, 0.0, model.out_proj.weight, model.out_proj.bias)
    fused.multi_head_attention_forward(x, x, x, 16, 2, *weights, **given)
    assert seen
    assert seen[0] == plain
    assert "multi_head_attention_forward" in plain
