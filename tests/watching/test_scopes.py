"""Names of modules, tensors and inputs, and the dynamic path of each call."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fmr
from fmr.watching.scopes import Call, Names, Paths, name_inputs, walk
from tests.small import Fn


def paths(model: nn.Module, *args: Tensor) -> list[str]:
    return [scope.path for scope in fmr.run(model, *args).graph.scopes]


def test_a_tree_is_walked_in_order_of_registration_with_every_path() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Sequential(shared, nn.Linear(2, 2)), shared)
    assert [path for path, _ in walk(model)] == ["", "0", "0.0", "0.1", "1"]


def test_a_module_registered_inside_itself_is_not_entered_again() -> None:
    inner = nn.Module()
    inner.child = nn.ReLU()
    inner.child.back = inner
    assert [path for path, _ in walk(inner)] == ["", "child"]


def test_tensors_have_the_name_under_which_they_are_registered_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    names = [name for name, _ in Names(model).tensors.values()]
    assert names == [
        "param:0.weight", "param:0.bias", "param:1.weight", "param:1.bias", "buffer:1.running_mean", "buffer:1.running_var",
        "buffer:1.num_batches_tracked", "param:2.bias",
    ]  # fmt: skip


def test_a_module_registered_twice_keeps_both_paths_and_a_plan_over_it_knows_that_it_must_read_the_whole_tree() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert Names(model).paths[id(shared)] == ["0", "2"]
    assert Paths(model, ("", "1")).complete
    assert not Paths(model, ("", "0")).complete
    assert not Paths(model, ("", "nowhere")).complete


def test_a_call_numbers_its_ops_by_name() -> None:
    call = Call(nn.ReLU())
    assert [call.number(op) for op in ("add", "mul", "add", "add", "mul")] == [0, 0, 1, 2, 1]


def test_calls_are_numbered_within_one_call_of_their_parent() -> None:
    block = Fn(lambda self, x: self.cell(self.cell(x)), cell=nn.ReLU())
    model = Fn(lambda self, x: self.block(self.block(x)), block=block)
    assert paths(model, torch.ones(1)) == [
        "",
        "block",
        "block.cell",
        "block.cell@1",
        "block@1",
        "block@1.cell",
        "block@1.cell@1",
    ]


def test_a_root_that_calls_itself_is_a_call_of_its_own() -> None:
    model = Fn(lambda self, x: self(x - 1) if x.sum() > 0 else x.relu())
    assert paths(model, torch.ones(2)) == ["", "root"]


def test_a_new_pass_begins_to_count_anew() -> None:
    model = Fn(lambda self, x: self.cell(self.cell(x)), cell=nn.ReLU())
    with fmr.track(model) as run:
        model(torch.ones(1))
        model(torch.ones(1))
    assert [[scope.path for scope in one.graph.scopes] for one in run.passes] == [["", "cell", "cell@1"]] * 2


def test_each_scope_knows_its_class_its_registered_path_and_its_parent() -> None:
    model = Fn(lambda self, x: self.cell(self.cell(x)), cell=nn.ReLU())
    scopes = fmr.run(model, torch.ones(1)).graph.scopes
    assert [(s.path, s.module, s.kind, s.parent) for s in scopes] == [
        ("", "", "Fn", None), ("cell", "cell", "ReLU", ""), ("cell@1", "cell", "ReLU", ""),
    ]  # fmt: skip


# ---- inputs


class Signature(nn.Module):
    def forward(
        self, ids: Tensor, mask: Tensor | None = None, *rest: Tensor, cache: object = None, **more: Tensor
    ) -> Tensor:
        return ids


A, B, C, D = (torch.full((1,), float(n)) for n in range(4))


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((A, B), {}, ["input:ids", "input:mask"]),
        ((A,), {"mask": B}, ["input:ids", "input:mask"]),
        ((), {"ids": A, "extra": C}, ["input:ids", "input:extra"]),
        ((A, None, C, D), {}, ["input:ids", "input:args.0", "input:args.1"]),
        (({"a": A, "b": [B, (C,)]},), {}, ["input:ids.a", "input:ids.b.0", "input:ids.b.1.0"]),
        (
            (A,),
            {"cache": SimpleNamespace(keys=[B], values=C, size=3)},
            ["input:ids", "input:cache.keys.0", "input:cache.values"],
        ),
        (("text", 3), {"mask": None}, []),
    ],
)
def test_inputs_are_named_by_the_signature_of_the_forward(args: tuple, kwargs: dict, expected: list[str]) -> None:
    assert [name for name, _ in name_inputs(Signature(), args, kwargs)] == expected


def test_an_input_that_holds_itself_ends() -> None:
    loop: dict[str, object] = {"a": A}
    loop["again"] = loop
    assert [name for name, _ in name_inputs(Signature(), (loop,), {})] == ["input:ids.a"]


# ---- what cannot be seen


def test_compiled_modules_are_refused_with_a_remedy() -> None:
    inner = nn.Linear(2, 2)
    inner._compiled_call_impl = inner._call_impl  # what `Module.compile()` sets
    with pytest.raises(fmr.TrackError, match=r"cannot track Sequential: its module '0' is compiled \(Linear\)"):
        fmr.run(nn.Sequential(inner), torch.ones(1, 2))
    with pytest.raises(fmr.TrackError, match=r"`model\._orig_mod`"):
        fmr.run(torch.compile(nn.Linear(2, 2), backend="eager"), torch.ones(1, 2))
