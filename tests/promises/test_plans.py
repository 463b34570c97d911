"""Reading a few IDs in a later run: the values of the full run, and nothing else is touched."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fmr
from tests.models import build
from tests.small import Fn, random_tree

few = settings(derandomize=True, deadline=None, max_examples=30)


class Everything(nn.Module):
    """Each kind of place that an ID can name: sources, inner ops, several outputs, in-place ops, repetitions, fused ops."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), self.cell)
        self.norm = nn.BatchNorm1d(4)
        self.recur = nn.LSTM(4, 4, batch_first=True)
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = self.block(self.cell(self.cell(x))) + self.shift
        left, right = x.split(2, -1)
        left.mul_(2.0)
        right[..., 0] = more["bias"]
        hidden, (state, _) = self.recur(self.block(x))
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        out, weights = self.heads(hidden, hidden, hidden)
        return 2 - out, weights + state.sum()


def everything() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Everything().eval(), torch.randn(3, 5, 4), {"more": {"bias": torch.randn(3, 5)}}


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def readable(run: fmr.Run) -> list[str]:
    return [str(node.id) for node in run.graph.find("*") if node.op != "alias"]


def test_each_id_alone_has_the_value_of_the_full_run() -> None:
    model, x, more = everything()
    full = fmr.run(model, x, **more)
    names = readable(full)
    kinds = {
        "param:cell.weight",
        "buffer:shift",
        "input:x",
        "input:more.bias",
        "cell@1/linear#0",
        "block@1.1/relu#0",
        "/split#0:1",
    }
    assert kinds <= set(names)
    for name in names:
        for stop in (False, True):
            run = fmr.run(model, x, keep=[name], stop=stop, **more)
            same(run[name], full[name])
            assert set(run.last.values) == {name}


@few
@given(st.integers(0, 10**9))
def test_any_set_of_ids_has_the_values_of_the_full_run(seed: int) -> None:
    rng = random.Random(seed)
    model, x, more = everything()
    full = fmr.run(model, x, **more)
    chosen = rng.sample(readable(full), rng.randint(1, 8))
    run = fmr.run(model, x, keep=chosen, stop=rng.random() < 0.5, **more)
    assert set(run.last.values) == set(chosen)
    for name in chosen:
        same(run[name], full[name])


@few
@given(st.integers(0, 10**9))
def test_plans_find_their_way_in_random_trees_of_modules(seed: int) -> None:
    rng = random.Random(seed)
    tree, x = random_tree(rng, depth=3), torch.randn(3, 4)
    full = fmr.run(tree, x)
    names = readable(full)
    chosen = rng.sample(names, min(5, len(names)))
    for keep in (chosen, chosen[:1]):
        for stop in (False, True):
            run = fmr.run(tree, x, keep=keep, stop=stop)
            for name in keep:
                same(run[name], full[name])


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5"])
def test_the_outputs_of_every_module_of_a_transformer(name: str) -> None:
    model, args, kwargs = build(name)
    full = fmr.run(model, *args, **kwargs)
    leaves = [
        scope for scope in full.graph.scopes if isinstance(scope.output, str) and not scope.output.startswith("input:")
    ]
    names = sorted({str(scope.output) for scope in leaves if "opaque" not in scope.output})
    assert len(names) > 15
    run = fmr.run(model, *args, keep=names, **kwargs)
    for key in names:
        same(run[key], full[key])
    for key in random.Random(0).sample(names, 5):
        same(fmr.run(model, *args, keep=key, stop=True, **kwargs)[key], full[key])


# ---- stopping


def stack(log: list[int]) -> nn.Module:
    class Step(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            log.append(1)
            return super().forward(x).relu()

    return nn.Sequential(*[Step(4, 4) for _ in range(6)])


@pytest.mark.parametrize("last", range(6))
def test_stopping_runs_no_module_after_the_last_kept_id(last: int) -> None:
    log: list[int] = []
    model, x = stack(log), torch.ones(2, 4)
    full = fmr.run(model, x)
    log.clear()
    run = fmr.run(model, x, keep=["0/linear#0", f"{last}/relu#0"], stop=True)
    assert len(log) == last + 1
    same(run[f"{last}/relu#0"], full[f"{last}/relu#0"])
    assert run.output is None
    log.clear()
    assert fmr.run(model, x, keep=["0/linear#0"]).output is not None
    assert len(log) == 6


def test_stopping_at_a_source_runs_no_module() -> None:
    log: list[int] = []
    run = fmr.run(stack(log), torch.ones(2, 4), keep=["input:input"], stop=True)
    assert log == []
    same(run["input:input"], torch.ones(2, 4))


def test_stopping_skips_the_rest_of_the_block_and_leaves_the_model_usable() -> None:
    log: list[int] = []
    model, x = stack(log), torch.ones(2, 4)
    expected = model(x)
    reached = False
    with fmr.track(model, keep="2/relu#0", stop=True) as run:
        model(x)
        reached = True
    assert not reached
    assert run["2/relu#0"].shape == (2, 4)
    same(model(x), expected)


def test_a_model_that_catches_exceptions_does_not_catch_the_stop() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        try:
            y = x.relu()
        except Exception:
            y = x
        return y.tanh()

    ran = []
    model = Fn(lambda self, x: (forward(self, x), ran.append(1))[0])
    fmr.run(model, torch.ones(2), keep="/relu#0", stop=True)
    assert ran == []


# ---- nothing else


def test_only_ops_directly_in_a_planned_module_call_meet_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    reader = fmr.watching.plan.Reader.__torch_function__

    def count(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(func.__name__)
        return reader(self, func, types, args, kwargs)

    monkeypatch.setattr(fmr.watching.plan.Reader, "__torch_function__", count)
    model, x = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]), torch.ones(2, 4)
    fmr.run(model, x, keep="1.1/tanh#0")
    assert seen == ["tanh"]


def test_a_plan_keeps_no_other_value_and_no_graph() -> None:
    model, x, more = everything()
    run = fmr.run(model, x, keep=["cell/linear#0"], **more)
    assert set(run.last.values) == {"cell/linear#0"}
    with pytest.raises(fmr.TrackError, match="recorded no graph"):
        run.graph  # noqa: B018
    with pytest.raises(fmr.IdError, match="did not keep '/add#0'"):
        run["/add#0"]


def test_a_kept_value_is_a_copy_that_later_writes_do_not_reach() -> None:
    model = Fn(lambda self, x: (x * 2).add_(1.0).mul_(3.0))
    run = fmr.run(model, torch.ones(2), keep=["/mul#0", "/add#0", "/mul#1"])
    assert [run[name].tolist() for name in ("/mul#0", "/add#0", "/mul#1")] == [[2, 2], [3, 3], [9, 9]]


# ---- other ways to say what to keep


def test_a_predicate_keeps_what_it_says() -> None:
    model, x, more = everything()
    full = fmr.run(model, x, **more)
    run = fmr.run(model, x, keep=lambda node: node.op == "linear", **more)
    expected = {str(node.id) for node in full.graph.nodes if node.op == "linear"}
    assert {str(name) for name in run.last.values if "/multi_head" not in name and "/native" not in name} == expected
    for name in expected:
        same(run[name], full[name])
    assert run.graph.fingerprint == full.graph.fingerprint


def test_a_site_keeps_its_tensor_and_reads_its_part() -> None:
    model, x, more = everything()
    site = fmr.Site("cell@1/linear#0", positions=[1, 3], units=slice(0, 2))
    full, run = fmr.run(model, x, **more), fmr.run(model, x, keep=site, **more)
    same(run[site], full["cell@1/linear#0"][:, [1, 3], :2])
    same(run[fmr.Site("cell@1/linear#0", examples=0)], full["cell@1/linear#0"][0])


def test_nodes_and_mixtures_of_ids_and_globs_are_accepted() -> None:
    model, x, more = everything()
    full = fmr.run(model, x, **more)
    run = fmr.run(model, x, keep=[full.graph["/add#0"], "cell*/linear#0", fmr.Site("input:x", examples=1)], **more)
    assert set(run.last.values) == {"/add#0", "cell/linear#0", "cell@1/linear#0", "input:x"}
    for name in run.last.values:
        same(run[name], full[name])


def test_each_pass_of_a_plan_has_its_own_values() -> None:
    model, x, more = everything()
    with fmr.track(model, keep=["cell/linear#0"]) as run, torch.no_grad():
        for scale in (1, 2, 3):
            model(x * scale, **more)
    assert len(run.passes) == 3
    for scale, one in zip((1, 2, 3), run.passes, strict=True):
        same(one["cell/linear#0"], fmr.run(model, x * scale, **more)["cell/linear#0"])


# ---- IDs that are not there


def test_an_id_that_the_run_does_not_reach_is_an_error_that_says_where_it_left_the_recorded_graph() -> None:
    model = Fn(lambda self, x: x.relu().tanh() if self.flag else x.relu().sigmoid().tanh())
    model.flag = True
    fmr.run(model, torch.ones(2)).graph.lint()
    model.flag = False
    with pytest.raises(fmr.IdError, match=r"No pass reached '/exp#0'.*after relu#0: recorded tanh#0, now sigmoid#0"):
        fmr.run(model, torch.ones(2), keep="/exp#0")


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("nowhere/relu#0", "module call 'nowhere' did not take place"),
        ("/relu#7", "Nearest that exist: .*/relu#0"),
        ("param:none.weight", "no such source"),
        ("relu", "No module of that path is registered and none was called.*or an ID such as"),
        ("/relu#0:x", "is not the ID of an op"),
        ([], "keep is empty"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_a_reason(keep: Any, message: str) -> None:
    model = Fn(lambda self, x: x.relu())
    fmr.run(model, torch.ones(2)).graph.lint()
    with pytest.raises(fmr.FmrError, match=message):
        fmr.run(model, torch.ones(2), keep=keep)


class Doubling(TorchFunctionMode):
    """A mode of the user's that changes what linear layers make."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.nn.functional.linear else out


@pytest.mark.parametrize("keep", ["all", ["0/linear#0", "0/mul#0"]])
def test_a_plan_sees_what_everything_sees_under_a_mode_that_was_put_on_in_the_block(keep: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4)
    with torch.no_grad():
        plain = model[0](x)
        with fmr.track(model, keep=keep) as run:
            with Doubling():
                model(x)
    assert torch.equal(run["0/linear#0"], plain)
    assert torch.equal(run["0/mul#0"], plain * 2)
