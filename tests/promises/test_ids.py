"""What an ID survives: another input, batch, length, dtype, device, process, mode; an op inserted elsewhere."""

import copy
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fmr
from fmr.ids import TensorId
from tests.models import build
from tests.small import OPS, Fn, random_tree, trees_in

few = settings(derandomize=True, deadline=None, max_examples=40)
FAMILIES = ["gpt2", "llama", "bert", "t5"]


def edges(graph: fmr.Graph) -> list[tuple[str, list[tuple[str, str]]]]:
    """All that a graph says about dataflow, with an example of what differs where two are compared."""
    return [(str(node.id), [(str(parent), parent.at) for parent in node.parents]) for node in graph.nodes]


def ids(graph: fmr.Graph) -> list[str]:
    return [str(node.id) for node in graph.nodes]


def graph_of(name: str, batch: int = 2, length: int = 6, dtype: Any = torch.float32) -> fmr.Graph:
    model, _, kwargs = build(name)
    shaped = {k: torch.ones(batch, length, dtype=v.dtype) for k, v in kwargs.items() if isinstance(v, Tensor)}
    return fmr.run(model.to(dtype), keep="none", **{**kwargs, **shaped}).graph


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_equal_across_batch_and_length(name: str) -> None:
    expected = edges(graph_of(name))
    assert len(expected) > 40
    assert edges(graph_of(name, batch=4, length=17)) == expected
    assert edges(graph_of(name, length=5)) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_inside_the_layers_are_equal_for_a_single_example(name: str) -> None:
    """transformers makes masks and positions of one example in another way; what the layers do is the same."""
    one, two = (
        [str(n.id) for n in graph_of(name, batch=batch, length=17).nodes if re.search(r"\.\d+\.", n.scope)]
        for batch in (1, 2)
    )
    assert len(one) > 30
    assert one == two


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_equal_in_half_precision_but_for_the_conversions_that_a_model_adds(name: str) -> None:
    single, half = ids(graph_of(name)), ids(graph_of(name, dtype=torch.bfloat16))
    assert {name for name in single if "/to#" not in name} == {name for name in half if "/to#" not in name}
    assert set(single) <= set(half)


def bare(name: str, device: str) -> fmr.Graph:
    """The graph of a model made on a device; a mask of four dimensions is one whose content nobody asks for."""
    with torch.device(device):
        model, _, kwargs = build(name)
        given = {k: torch.ones(2, 6, dtype=torch.long) for k in kwargs if k.endswith("input_ids")}
        given |= {"attention_mask": torch.zeros(2, 1, 6, 6)} if name != "t5" else {}
        return fmr.run(model, keep="none", use_cache=False, **given).graph


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_ids_are_equal_on_the_meta_device(name: str) -> None:
    expected = edges(bare(name, "cpu"))
    assert len(expected) > 40
    assert edges(bare(name, "meta")) == expected


def toys() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    """Hand-written models: convolution and norms, recurrence, a loop over cells, tied weights, in-place ops."""

    def unrolled(self: nn.Module, x: Tensor) -> Tensor:
        state = torch.zeros(x.size(0), 4, dtype=x.dtype, device=x.device)
        for step in x.unbind(1)[:3]:
            state = self.cell(step, state)
        return state

    def tied(self: nn.Module, x: Tensor) -> Tensor:
        hidden = self.down(x)
        hidden[..., 0] = 0
        return torch.nn.functional.linear(hidden.relu_(), self.down.weight.T)

    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten())
    return {
        "conv": (conv, (torch.randn(2, 1, 5, 5),)),
        "lstm": (nn.LSTM(4, 4, 2, batch_first=True), (torch.randn(2, 6, 4),)),
        "unrolled": (Fn(unrolled, cell=nn.GRUCell(4, 4)), (torch.randn(2, 6, 4),)),
        "tied": (Fn(tied, down=nn.Linear(4, 3)), (torch.randn(2, 6, 4),)),
        "attention": (nn.MultiheadAttention(4, 2, dropout=0.1), (torch.randn(6, 2, 4),) * 3),
    }


@pytest.mark.parametrize("name", ["conv", "lstm", "unrolled", "tied"])
def test_hand_written_models_keep_their_ids_across_batch_dtype_device_and_mode(name: str) -> None:
    model, args = toys()[name]
    expected = edges(fmr.run(model, *args, keep="none").graph)
    wide = [torch.cat([x, x]) for x in args]
    assert edges(fmr.run(model, *wide, keep="none").graph) == expected
    assert edges(fmr.run(copy.deepcopy(model).double(), *[x.double() for x in args], keep="none").graph) == expected
    assert edges(fmr.run(copy.deepcopy(model).to("meta"), *[x.to("meta") for x in args], keep="none").graph) == expected
    with torch.random.fork_rng([]):
        assert edges(fmr.run(model.eval(), *args, keep="none").graph) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_equal_in_train_and_eval_and_in_repeated_calls(name: str) -> None:
    model, args, kwargs = build(name)
    first = edges(fmr.run(model, *args, keep="none", **kwargs).graph)
    with torch.random.fork_rng([]):
        trained = edges(fmr.run(model.train(), *args, keep="none", **kwargs).graph)
    assert trained == first
    with fmr.track(model.eval(), keep="none") as run, torch.no_grad():
        for _ in range(3):
            model(*args, **kwargs)
    assert [edges(one.graph) for one in run.passes] == [first] * 3


HASH = """
import warnings; warnings.simplefilter("ignore")
import torch; torch.set_num_threads(1)
import fmr
from tests.models import build
for name in ("gpt2", "bert"):
    model, args, kwargs = build(name)
    print(fmr.run(model, *args, keep="none", **kwargs).graph.fingerprint)
"""


def test_ids_are_equal_in_another_process() -> None:
    here = []
    for name in ("gpt2", "bert"):
        model, args, kwargs = build(name)
        here.append(fmr.run(model, *args, keep="none", **kwargs).graph.fingerprint)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", HASH], capture_output=True, text=True, check=True, env=environment)
    assert there.stdout.split() == here


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_step_of_generation_without_a_cache_has_the_same_ids(name: str) -> None:
    model, _, kwargs = build(name)
    with fmr.track(model, keep="none") as run:
        model.generate(kwargs["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False, eos_token_id=None)
    assert len(run.passes) == 4
    assert len({one.graph.fingerprint for one in run.passes}) == 1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_step_of_generation_with_a_cache_has_the_same_ids_once_the_cache_is_filled(name: str) -> None:
    model, _, kwargs = build(name)
    with fmr.track(model, keep="none") as run:
        model.generate(kwargs["input_ids"], max_new_tokens=5, do_sample=False, use_cache=True, eos_token_id=None)
    steps = [ops(one.graph) for one in run.passes]
    assert len(steps) == 5
    assert steps[2:] == [steps[1]] * 3
    in_both = [name for name in steps[0] if name in set(steps[1])]
    assert len(in_both) > 0.9 * len(steps[0])


def ops(graph: fmr.Graph) -> list[str]:
    return [str(node.id) for node in graph.nodes if not node.id.is_source]


# ---- an op inserted elsewhere


def static(scope: str) -> str:
    return ".".join(part.partition("@")[0] for part in scope.split("."))


@few
@given(st.integers(0, 10**9))
def test_an_inserted_op_changes_no_id_outside_its_module_and_only_later_ones_of_its_name_inside(seed: int) -> None:
    rng = random.Random(seed)
    tree, x = random_tree(rng), torch.randn(3, 4)
    before = fmr.run(tree, x).graph
    path, where = rng.choice(trees_in(tree))
    op = rng.choice(list(OPS))
    where.steps.insert(rng.randint(0, len(where.steps)), op)
    after = fmr.run(tree, x).graph
    inside = {scope.path for scope in before.scopes if scope.module == path} | {
        scope.path for scope in before.scopes if tree.get_submodule(static(scope.path)) is where
    }
    assert outside(before, inside) == outside(after, inside)
    assert [scope.path for scope in before.scopes] == [scope.path for scope in after.scopes]
    for scope in inside:
        then, now = counts(before, scope), counts(after, scope)
        step = 2 if op == "transpose" else 1
        assert now == {**then, op: then.get(op, 0) + step}


def outside(graph: fmr.Graph, inside: set[str]) -> list[str]:
    return [str(node.id) for node in graph.nodes if node.scope not in inside or node.id.is_source]


def counts(graph: fmr.Graph, scope: str) -> dict[str, int]:
    """How many ops of each name a module call ran; their numbers must be 0, 1, 2, ... in order."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.scope == scope and not node.id.is_source:
            assert node.id.parts.k == found.get(node.op, 0)
            found[node.op] = node.id.parts.k + 1
    return found


# ---- which module call an op belongs to


def test_a_module_called_again_gets_its_repetition_in_the_path() -> None:
    cell = nn.Linear(4, 4)
    model = Fn(
        lambda self, x: self.block(self.cell(self.cell(self.cell(x)))), cell=cell, block=nn.Sequential(cell, nn.ReLU(), cell)
    )
    names = ops(fmr.run(model, torch.ones(1, 4)).graph)
    assert names == [
        "cell/linear#0", "cell@1/linear#0", "cell@2/linear#0",
        "block.0/linear#0", "block.1/relu#0", "block.0@1/linear#0",
    ]  # fmt: skip


def test_a_shared_block_repeats_as_a_whole() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = Fn(lambda self, x: self.block(self.block(x)), block=block)
    names = ops(fmr.run(model, torch.ones(1, 4)).graph)
    assert names == ["block.0/linear#0", "block.1/relu#0", "block@1.0/linear#0", "block@1.1/relu#0"]


def test_a_tied_parameter_has_the_name_under_which_it_is_registered_first() -> None:
    model = Fn(lambda self, x: self.head(self.embed(x)), embed=nn.Embedding(5, 4), head=nn.Linear(4, 5, bias=False))
    model.head.weight = model.embed.weight
    graph = fmr.run(model, torch.tensor([1, 2])).graph
    assert [str(node.id) for node in graph.sources if node.op == "param"] == ["param:embed.weight"]
    assert graph["head/linear#0"].parents == ("embed/embedding#0", "param:embed.weight")


def test_modules_in_a_plain_list_are_named_by_the_attribute_that_holds_them() -> None:
    model = Fn(lambda self, x: self.layers[1](self.layers[0](x)) + self.lone[0](x))
    model.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    model.lone = (nn.ReLU(),)
    names = [name for name in ops(fmr.run(model, torch.ones(1, 4)).graph) if "opaque" not in name]
    assert names == ["layers.0/linear#0", "layers.1/linear#0", "lone.0/relu#0", "/add#0"]


def test_a_module_called_by_another_parent_keeps_its_registered_path_below_that_call() -> None:
    shared = nn.Linear(4, 4)
    caller = Fn(lambda self, x: self.friend[0](x).relu())
    caller.friend = (shared,)
    model = Fn(lambda self, x: self.caller(self.shared(x)), shared=shared, caller=caller)
    assert ops(fmr.run(model, torch.ones(1, 4)).graph) == ["shared/linear#0", "caller.shared/linear#0", "caller/relu#0"]


def test_a_module_made_during_the_forward_is_named_by_its_class() -> None:
    model = Fn(lambda self, x: nn.ReLU()(nn.ReLU()(x)))
    assert ops(fmr.run(model, torch.ones(1, 4)).graph) == ["relu/relu#0", "relu@1/relu#0"]


# ---- an op that returns its own argument


@pytest.mark.parametrize(
    "same",
    [
        nn.Dropout(0.5),
        Fn(lambda self, x: x.to(x.dtype)),
        Fn(lambda self, x: x.contiguous()),
        Fn(lambda self, x: x.float()),
        Fn(lambda self, x: x.type_as(x)),
        Fn(lambda self, x: x.cpu()),
        Fn(lambda self, x: x.requires_grad_(False)),
        nn.Identity(),
    ],
    ids=["dropout", "to", "contiguous", "float", "type_as", "cpu", "requires_grad_", "identity"],
)
def test_an_op_that_returns_its_argument_makes_no_cycle_and_stands_between_its_neighbours(same: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), same, nn.Linear(4, 4)).eval()
    graph = fmr.run(model, torch.ones(2, 4)).graph
    graph.lint()
    inside = [node for node in graph.nodes if node.scope == "1"]
    between = inside[-1].id if inside else "0/linear#0"
    assert graph["2/linear#0"].parents[0] == between
    assert graph.module("1").output.id == between
    assert all(set(node.parents) == {"0/linear#0"} for node in inside)


def test_batch_statistics_add_their_counter_in_training_and_renumber_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    trained, evaluated = (ops(fmr.run(model.train(mode), torch.randn(3, 4)).graph) for mode in (True, False))
    assert [name for name in trained if name != "1/add#0"] == evaluated


def test_a_chain_with_dropout_has_the_same_edges_in_train_and_eval() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    with torch.random.fork_rng([]):
        trained = edges(fmr.run(model.train(), torch.ones(2, 4)).graph)
    assert edges(fmr.run(model.eval(), torch.ones(2, 4)).graph) == trained
    assert ("2/linear#0", [("1/dropout#0", "0"), ("param:2.weight", "1"), ("param:2.bias", "2")]) in trained


# ---- registered names of any kind

ODD = [
    "a/b",
    "a:0",
    "a@1",
    "[x]",
    "*",
    "?",
    "a#0",
    "a b",
    "",
    "%",
    "a%2Fb",
    "a.b",
    "param:x",
    "input:",
    "a\nb",
    'q"<&|\\{',
    "\u00e9",
    "root",
]


class Odd(nn.Module):
    """Calls a module that is registered under a name twice, and reads a buffer whose name it is too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.after = name, nn.Linear(4, 4)
        self._modules[name] = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.after._buffers[f"{name}_"] = torch.ones(4)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        part = self._modules[self.name]
        return self.after(part(x)) + part(x + more[self.name]) * self.after._buffers[f"{self.name}_"]


@pytest.mark.parametrize("name", ODD)
def test_values_of_modules_of_any_name_are_found_kept_edited_and_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Odd(name), (torch.randn(2, 4), {name: torch.randn(2, 4)})
    run = fmr.run(model, *inputs)
    run.graph.lint()
    for node in run.graph:
        assert [one.id for one in run.graph.find(node.id)] == [node.id]
        assert node.id.is_source or (node.id.scope, node.id.parts.op) == (node.scope, node.op)
        assert torch.equal(fmr.run(model, *inputs, keep=[node.id])[node.id], run[node.id])
        assert fmr.run(model, *inputs, keep=[], edits={node.id: fmr.edits.Zero()}).receipts[node.id].fired == 1
    calls = [scope.path for scope in run.graph.scopes if scope.path]
    for path in calls:
        assert TensorId(path).is_path
        assert torch.equal(fmr.run(model, *inputs, keep=[path])[path], run[path])
    assert [layer.path for layer in run.graph.table()] == ["", *calls]
    run.save(tmp_path / "run", params=True)
    loaded = fmr.load(tmp_path / "run")
    assert ids(loaded.graph) == ids(run.graph)
    assert all(torch.equal(loaded[node.id], run[node.id]) for node in run.graph)
    run.graph.save_dot(tmp_path / "graph.dot")
    run.graph.save_svg(tmp_path / "graph.svg")


def test_names_that_would_be_the_same_path_stay_apart() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules |= {"a": nn.ReLU(), "a@1": nn.Tanh(), "a:0": nn.Sigmoid()}

        def forward(self, x: Tensor) -> Tensor:
            return self._modules["a@1"](self.a(self.a(x))) + self._modules["a:0"](x)

    graph = fmr.run(Both(), torch.randn(2)).graph
    assert [scope.path for scope in graph.scopes] == ["", "a", "a@1", "a%401", "a:0"]
    assert [graph.module(path).output.op for path in ("a@1", "a%401", "a:0")] == ["relu", "tanh", "sigmoid"]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("a/b", "a%2Fb"),
        ("a/b@1", "a%2Fb@1"),
        ("a/b.0/linear#0", "a%2Fb.0/linear#0"),
        ("param:a/b.0.weight", "param:a%2Fb.0.weight"),
    ],
)
def test_a_name_as_it_is_registered_is_told_how_it_is_written(given: str, written: str) -> None:
    run = fmr.run(Odd("a/b"), torch.randn(2, 4), {"a/b": torch.randn(2, 4)})
    for ask in (run.__getitem__, run.graph.__getitem__):
        with pytest.raises(fmr.IdError, match=f"In IDs and paths it is written {written!r}"):
            ask(given)
    assert run[written].numel()


def test_an_id_with_a_module_of_a_slash_in_a_plan_is_told_how_it_is_written() -> None:
    with pytest.raises(fmr.IdError, match=r"'a/b.0/linear#0' is no ID: its part 'a/b\.0' is no op.* is written '%2F'"):
        fmr.run(Odd("a/b"), torch.randn(2, 4), {"a/b": torch.randn(2, 4)}, keep=["a/b.0/linear#0"])
