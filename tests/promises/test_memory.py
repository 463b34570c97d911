"""Values live as long as their run and not longer; tracking again and again takes no more memory."""

import gc
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import fmr
from tests.models import build

KEEPS = {
    "all": "all",
    "none": "none",
    "glob": "*softmax*",
    "ids": ["up/linear#0", "/softmax#0"],
    "predicate": lambda node: True,
}


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_set_aside() -> Iterator[None]:
    """Hide all that exists from the collector, so that looking at what is new is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def no_collector() -> Iterator[None]:
    """Without the cycle collector: what dies, dies by its last reference."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def living() -> int:
    """How many tensors were made since this module began, and exist."""
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def forget(make: Callable[[], Any]) -> int:
    """How many tensors are left when what `make` returned is dropped at once, after a first time that may warm caches."""
    make()
    with no_collector():
        before = living()
        made = make()
        assert living() >= before
        del made
        return living() - before


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_values_die_with_their_run(keep: str, grad: bool) -> None:
    model, args, _ = build("chain")
    made: list[weakref.ref[Tensor]] = []
    model.up.register_forward_hook(lambda module, args, out: made.append(weakref.ref(out)))
    fmr.run(model, *args, keep=KEEPS[keep], grad=grad)
    with no_collector():
        run = fmr.run(model, *args, keep=KEEPS[keep], grad=grad)
        assert (made[-1]() is not None) == (keep in ("all", "predicate") or grad)
        del run
        assert made[-1]() is None


def _read_all(name: str, **options: Any) -> Callable[[], fmr.Run]:
    model, args, kwargs = build(name)

    def make() -> fmr.Run:
        run = fmr.run(model, *args, **options, **kwargs)
        for node in run.graph:
            assert node not in run or run[node].shape is not None
            for inner in run.graph.inner(node) if options.get("keep") is None else ():
                assert run[inner] is not None
        return run

    return make


@pytest.mark.parametrize("name", ["gpt2", "encoder", "attention", "in_place", "vmapped", "func_grad"])
def test_nothing_is_left_of_a_run_that_was_read_in_full(name: str) -> None:
    assert forget(_read_all(name)) == 0
    assert forget(_read_all(name, keep="*#0*")) == 0
    assert forget(_read_all(name, keep="none")) == 0


def test_nothing_is_left_of_a_run_with_gradients() -> None:
    model, args, kwargs = build("transformer")

    def make() -> fmr.Run:
        with fmr.track(model, grad=True) as run:
            model(*args, **kwargs).square().mean().backward()
        assert run.grad["decoder.layers.0.linear1/linear#0"].shape == (2, 4, 24)
        model.zero_grad(set_to_none=True)
        return run

    assert forget(make) == 0


def test_nothing_is_left_of_a_block_that_raised() -> None:
    model, args, _ = build("chain")
    model.down.register_forward_pre_hook(lambda *_: 1 / 0)

    def make(keep: Any) -> None:
        with suppress(ZeroDivisionError):
            fmr.run(model, *args, keep=keep)

    for keep in KEEPS.values():
        assert forget(lambda keep=keep: make(keep)) == 0


def test_nothing_is_left_of_a_block_that_stopped_early() -> None:
    model, args, _ = build("chain")
    assert forget(lambda: fmr.run(model, *args, keep=["up/linear#0"], stop=True)) == 0


def test_nothing_is_left_of_many_passes() -> None:
    model, args, _ = build("chain")

    def make() -> fmr.Run:
        with torch.no_grad(), fmr.track(model) as run:
            for _ in range(5):
                model(*args)
        assert run.passes[3].graph.fingerprint == run.graph.fingerprint
        return run

    assert forget(make) == 0


def test_one_pass_of_a_run_keeps_no_other_alive() -> None:
    model, args, _ = build("chain")
    made: list[weakref.ref[Tensor]] = []
    model.up.register_forward_hook(lambda module, args, out: made.append(weakref.ref(out)))
    with no_collector():
        with torch.no_grad(), fmr.track(model) as run:
            model(*args)
            model(*args)
        last = run.passes[-1]
        del run
        assert [ref() is not None for ref in made] == [False, True]
        assert last["up/linear#0"].shape == (3, 8)


def test_the_model_dies_with_its_last_user() -> None:
    model, args, _ = build("chain")
    with no_collector():
        run = fmr.run(model, *args)
        assert len(run.graph) > 0
        ref = weakref.ref(model)
        del run, model
        assert ref() is None


def test_a_graph_that_was_located_dies_with_its_last_user() -> None:
    model, args, _ = build("chain")
    structure = fmr.locate(fmr.run(model, *args))
    ref = weakref.ref(structure.graph)
    del structure, model
    gc.collect()
    assert ref() is None


def _train(model: nn.Module, args: Any, keep: Any) -> None:
    with fmr.track(model, keep=keep, grad=True) as run:
        model(*args).sum().backward()
    assert len(run.passes) == 1
    if isinstance(keep, str):
        assert len(run.graph) > 5
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_run_leaves_no_work_to_the_cycle_collector(keep: str) -> None:
    model, args, _ = build("chain")
    _train(model, args, KEEPS[keep])
    with no_collector():
        for _ in range(5):
            _train(model, args, KEEPS[keep])
        assert gc.collect() == 0


@pytest.mark.parametrize("keep", ["all", "glob", "ids"])
def test_two_hundred_runs_more_take_no_more_memory(keep: str) -> None:
    model, args, _ = build("chain")

    def held_after_200_runs() -> int:
        for _ in range(200):
            _train(model, args, KEEPS[keep])
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        first, second = held_after_200_runs(), held_after_200_runs()
    finally:
        tracemalloc.stop()
    assert second - first < 40_000, "200 bytes a run: one node"


@pytest.mark.long
def test_two_hundred_runs_of_a_wide_model_fit_where_ten_fit() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    x = torch.randn(256, 256)
    process = psutil.Process()

    def runs(n: int) -> None:
        for _ in range(n):
            run = fmr.run(model, x)
            assert run["7/linear#0"].shape == (256, 256)

    with no_collector():
        runs(10)
        before = process.memory_info().rss
        runs(200)
        grown = process.memory_info().rss - before
    assert grown < 64 * 2**20, "all 200 runs hold 400 MB"


def test_the_memory_of_all_values_is_that_of_their_storages() -> None:
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return y.view(-1).unsqueeze(0).transpose(0, 1).expand(-1, 4)

    run = fmr.run(Views(), torch.randn(64, 64))
    (made,) = {run[node].untyped_storage().data_ptr() for node in run.graph if not node.id.is_source}
    assert made == run["/mul#0"].data_ptr()
    assert "0.0 MB" in repr(run.last)


def test_the_memory_that_a_run_tells_is_beside_that_of_the_model() -> None:
    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.weight.T[0]

    run = fmr.run(Wide(1024, 1024), torch.randn(256, 1024))
    assert repr(run).endswith("7 values kept, 3.0 MB")  # the input, the product and the sum; not 4 MB of weights
    assert repr(fmr.run(Wide(2, 2), torch.randn(1, 2), keep=[""])).endswith("1 ID read, no graph; 1 value kept, 0.0 MB")
