"""What is kept of a value is what the model saw, whatever was written into its memory later."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fmr
from tests.small import Fn

few = settings(derandomize=True, deadline=None, max_examples=40)
seeds = st.integers(0, 10**9)
modes = st.sampled_from([torch.no_grad, torch.inference_mode, torch.enable_grad])

Function = Callable[..., Any]


def matrix(a: Tensor) -> Tensor:
    if a.dim() != 2:
        raise IndexError("not a matrix")
    return a


PURE: list[tuple[str, Function]] = [
    ("relu", torch.relu),
    ("relu", F.relu),
    ("mul", lambda a: a * 1.5),
    ("sub", lambda a: 2 - a),
    ("clone", Tensor.clone),
    ("tanh", torch.tanh),
    ("softmax", lambda a: a.softmax(-1)),
    ("gt", lambda a: a > 0.5),
    ("cumsum", lambda a: a.cumsum(0)),
    ("max", lambda a: a.max(0)),
]
PURE_OF_TWO: list[tuple[str, Function]] = [
    ("mul", lambda a, b: a * b),
    ("maximum", torch.maximum),
    ("cat", lambda a, b: torch.cat([a, b])),
    ("stack", lambda a, b: torch.stack([a, b], -1)),
]
VIEWS: list[tuple[str, Function]] = [
    ("getitem", lambda a: a[: max(1, a.size(0) // 2)]),
    ("getitem", lambda a: a[..., -1:]),
    ("getitem", lambda a: a[0]),
    ("getitem", lambda a: a[::2]),
    ("chunk", lambda a: a.chunk(2, -1)),
    ("split", lambda a: a.split(1)),
    ("unbind", lambda a: tuple(a)),
    ("narrow", lambda a: a.narrow(-1, 0, 1)),
    ("transpose", lambda a: a.transpose(0, -1)),
    ("T", lambda a: matrix(a).T),
    ("mT", lambda a: matrix(a).mT),
    ("flatten", lambda a: a.flatten()),
    ("view", lambda a: a.view(-1)),
    ("unsqueeze", lambda a: a.unsqueeze(0)),
    ("detach", lambda a: a.detach()),
    ("data", lambda a: a.data),
]
NO_OPS: list[tuple[str, Function]] = [
    ("contiguous", lambda a: a.contiguous()),
    ("to", lambda a: a.to(a.dtype)),
    ("to", lambda a: a.float()),
    ("dropout", lambda a: F.dropout(a, 0.5, training=False)),
]
WRITES: list[tuple[str, Function]] = [
    ("add", lambda a: a.add_(1.0)),
    ("add", lambda a: a.__iadd__(2.0)),
    ("mul", lambda a: a.mul_(0.5)),
    ("relu", lambda a: a.relu_()),
    ("relu", lambda a: F.relu(a, inplace=True)),
    ("relu", torch.relu_),
    ("dropout", lambda a: F.dropout(a, 1.0, True, inplace=True)),
    ("hardtanh", lambda a: F.hardtanh(a, inplace=True)),
    ("zero", lambda a: a.zero_()),
    ("fill", lambda a: a.fill_(0.25)),
    ("setitem", lambda a: a.__setitem__(0, 0.75)),
    ("setitem", lambda a: a.__setitem__((..., slice(0, 1)), -0.5)),
]
WRITES_FROM: list[tuple[str, Function]] = [
    ("copy", lambda a, b: a.copy_(b)),
    ("add", lambda a, b: a.add_(b)),
    ("setitem", lambda a, b: a.__setitem__(slice(None), b)),
    ("lerp", lambda a, b: a.lerp_(b, 0.5)),
    ("neg", lambda a, b: torch.neg(a, out=b)),
]
WRITES_BY_MASK: list[tuple[str, Function]] = [
    ("masked_fill", lambda a, mask: a.masked_fill_(mask, 0.125)),
    ("setitem", lambda a, mask: a.__setitem__(mask, 3.0)),
]

REFUSED = (RuntimeError, IndexError, TypeError)
"""What torch raises for an op that does not fit its arguments; the program goes on with the next one."""


def copy(tensor: Tensor) -> Tensor:
    """The value alone: a copy with history would disturb the versions that autograd counts."""
    with torch.no_grad():
        return tensor.data.clone()


class Record:
    """What an interpreter saw that clones around every op: the arguments and the results of each ID."""

    def __init__(self) -> None:
        self.results: dict[str, Tensor] = {}
        self.arguments: dict[str, list[Tensor]] = {}
        self.count: Counter[str] = Counter()

    def op(self, name: str, function: Function, *tensors: Tensor) -> Any:
        before = [copy(tensor) for tensor in tensors]
        out = function(*tensors)
        made = tensors[0] if out is None else out
        for index, tensor in enumerate(made if isinstance(made, tuple) else [made]):
            key = f"/{name}#{self.count[name]}" + (f":{index}" if isinstance(made, tuple) else "")
            self.results[key], self.arguments[key] = copy(tensor), before
        self.count[name] += 1
        return out


class Program(nn.Module):
    """A random program over a few buffers: pure ops, views, in-place ops, item assignments, in any order."""

    def __init__(self, seed: int, steps: int = 14) -> None:
        super().__init__()
        self.seed, self.steps = seed, steps
        self.record: Record | None = None
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        self.register_buffer("table", torch.linspace(0, 2, 12).view(3, 4))

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        rng = random.Random(self.seed)
        slots = [x, y, self.weight, self.table]
        for _ in range(self.steps):
            name, function, tensors = self._draw(rng, slots)
            try:
                out = self._apply(name, function, *tensors)
            except REFUSED:
                continue
            slots.extend(t for t in (out if isinstance(out, (tuple, list)) else [out]) if t is not None)
            while len(slots) > 9:
                slots.pop(rng.randrange(len(slots)))
        return slots

    def _apply(self, name: str, function: Function, *tensors: Tensor) -> Any:
        return function(*tensors) if self.record is None else self.record.op(name, function, *tensors)

    def _draw(self, rng: random.Random, slots: list[Tensor]) -> tuple[str, Function, list[Tensor]]:
        a = rng.choice(slots)
        alike = [t for t in slots if t.shape == a.shape]
        masks = [t for t in alike if t.dtype == torch.bool]
        kind = rng.choice([PURE, PURE_OF_TWO, VIEWS, VIEWS, NO_OPS, WRITES, WRITES, WRITES_FROM, WRITES_BY_MASK])
        name, function = rng.choice(kind)
        if kind is WRITES_BY_MASK:
            return name, function, [a, rng.choice(masks)] if masks else [a]
        return name, function, [a, rng.choice(alike)] if kind in (PURE_OF_TWO, WRITES_FROM) else [a]


def inputs() -> tuple[Tensor, Tensor]:
    """Two inputs that share memory."""
    x = torch.linspace(-2, 2, 12).view(3, 4)
    return x, x[:, 1:3]


def interpret(seed: int, mode: Any) -> tuple[Record, list[Tensor]]:
    program, record = Program(seed), Record()
    program.record = record
    with mode():
        out = program(*inputs())
    return record, [tensor.detach().clone() for tensor in out]


def tracked(seed: int, mode: Any, keep: Any, **options: Any) -> fmr.Run:
    model = Program(seed)
    with mode(), fmr.track(model, keep=keep, **options) as run:
        model(*inputs())
    return run


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=0, equal_nan=True)


def ops_of(graph: fmr.Graph) -> set[str]:
    return {str(node.id) for node in graph.nodes if not node.id.is_source and node.op != "alias"}


@pytest.mark.parametrize("keep", ["all", "*", lambda node: True], ids=["all", "glob", "predicate"])
@few
@given(seeds, modes)
def test_every_value_is_what_an_interpreter_that_clones_saw(keep: Any, seed: int, mode: Any) -> None:
    record, out = interpret(seed, mode)
    run = tracked(seed, mode, keep)
    run.graph.lint()
    assert ops_of(run.graph) == set(record.results)
    for name, value in record.results.items():
        same(run[name], value)
    for ours, theirs in zip(run.output, out, strict=True):
        same(ours, theirs)


@pytest.mark.parametrize("keep", ["all", "*"])
@few
@given(seeds, modes)
def test_parents_are_the_values_that_the_op_read(keep: Any, seed: int, mode: Any) -> None:
    record, _ = interpret(seed, mode)
    run = tracked(seed, mode, keep)
    for name, arguments in record.arguments.items():
        for parent, argument in zip(run.graph[name].parents, arguments, strict=True):
            same(run[parent.id], argument)


@few
@given(seeds, modes)
def test_the_graph_is_the_same_whatever_is_kept(seed: int, mode: Any) -> None:
    prints = {tracked(seed, mode, keep).graph.fingerprint for keep in ("all", "none", "*")}
    assert len(prints) == 1


@few
@given(seeds, modes, st.randoms(use_true_random=False))
def test_a_plan_delivers_the_same_values(seed: int, mode: Any, rng: random.Random) -> None:
    record, _ = interpret(seed, mode)
    names = rng.sample(sorted(record.results), min(4, len(record.results)))
    for stop in (False, True):
        for name in names:
            same(tracked(seed, mode, [name], stop=stop)[name], record.results[name])
        run = tracked(seed, mode, names, stop=stop) if names else None
        for name in names:
            assert run is not None
            same(run[name], record.results[name])


@few
@given(seeds, modes)
def test_sources_keep_the_values_they_had_when_the_pass_began(seed: int, mode: Any) -> None:
    run = tracked(seed, mode, "all")
    fresh, (x, y) = Program(seed), inputs()
    begin = {"input:x": x, "input:y": y, "param:weight": fresh.weight, "buffer:table": fresh.table}
    for node in run.graph.sources:
        same(run[node.id], begin[node.id])
        same(tracked(seed, mode, [node.id])[node.id], begin[node.id])


# ---- each way of writing by name: one op, its ID, and what the op before it returned


def filled(x: Tensor, write: Function) -> tuple[Tensor, Tensor]:
    """What `x * 2` returned before the write, and what it holds afterwards."""
    doubled = x * 2
    before = doubled.clone()
    write(doubled)
    return before, doubled


BY_NAME: list[tuple[str, Function]] = [
    ("add", lambda t: t.add_(1)),
    ("relu", lambda t: t.relu_()),
    ("relu", lambda t: F.relu(t, inplace=True)),
    ("relu6", lambda t: F.relu6(t, inplace=True)),
    ("leaky_relu", lambda t: F.leaky_relu(t, 0.1, True)),
    ("silu", lambda t: F.silu(t, inplace=True)),
    ("dropout", lambda t: F.dropout(t, 0.5, True, True)),
    ("alpha_dropout", lambda t: F.alpha_dropout(t, 0.5, True, inplace=True)),
    ("copy", lambda t: t.copy_(torch.zeros(3, 4))),
    ("setitem", lambda t: t.__setitem__((slice(None), 1), 7.0)),
    ("index_put", lambda t: t.index_put_((torch.tensor([0]),), torch.tensor(-1.0))),
    ("index_put", lambda t: torch.index_put_(t, (torch.tensor([0]),), torch.tensor(-1.0), accumulate=True)),
    ("index_copy", lambda t: t.index_copy_(0, torch.tensor([1]), torch.zeros(1, 4))),
    ("index_add", lambda t: t.index_add_(0, torch.tensor([1]), torch.ones(1, 4))),
    ("scatter", lambda t: t.scatter_(0, torch.zeros(1, 4, dtype=torch.long), 5.0)),
    ("masked_fill", lambda t: t.masked_fill_(t > 0, -3.0)),
    ("masked_scatter", lambda t: t.masked_scatter_(t > 0, torch.zeros(12))),
    ("clamp", lambda t: torch.clamp(t, 0, 1, out=t)),
    ("matmul", lambda t: torch.matmul(torch.ones(3, 3), torch.ones(3, 4), out=t)),
    ("resize", lambda t: t.resize_(2, 2)),
    ("swap", lambda t: t.data.zero_()),
    ("normal", lambda t: nn.init.normal_(t)),
    ("exponential", lambda t: t.exponential_()),
    ("foreach_add", lambda t: torch._foreach_add_([t], 1.0)),
    ("addmm", lambda t: t.addmm_(torch.ones(3, 2), torch.ones(2, 4))),
    ("iand", lambda t: t.__ipow__(2)),
    ("view", lambda t: t.view(-1)[3:5].fill_(9.0)),
    ("base", lambda t: t.T[0].zero_()),
    ("set_data", lambda t: setattr(t, "data", torch.zeros(2))),
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keep", ["all", "/mul#0"])
@pytest.mark.parametrize("write", [w for _, w in BY_NAME], ids=[f"{n}-{i}" for i, (n, _) in enumerate(BY_NAME)])
def test_a_value_survives_every_way_of_writing(write: Function, keep: str, mode: Any) -> None:
    model = Fn(lambda self, x: filled(x, write))
    with mode(), fmr.track(model, keep=keep) as run:
        before, after = model(torch.linspace(-1, 1, 12).view(3, 4))
    same(run["/mul#0"], before)
    assert after.shape != before.shape or not torch.equal(after, before), "the write of this test writes nothing"


@pytest.mark.parametrize("keep", ["all", "*"])
def test_running_statistics_are_kept_as_they_were_at_each_call(keep: str) -> None:
    norm = nn.BatchNorm1d(4)
    model = Fn(lambda self, x: self.norm(self.norm(self.norm(x) + 1) * 3), norm=norm).train()
    seen = []
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(copy(module.running_mean)))
    with torch.no_grad(), fmr.track(model, keep=keep) as run:
        model(torch.randn(5, 4))
    handle.remove()
    run.graph.lint()
    reads = [run.graph[f"norm{k}/batch_norm#0"].parent("running_mean", 1) for k in ("", "@1", "@2")]
    for read, value in zip(reads, seen, strict=True):
        assert read is not None
        same(run[read.id], value)
    assert reads[0] == "buffer:norm.running_mean"
    assert "norm/batch_norm#0" in {str(node.id) for node in run.graph.ancestors("norm@1/batch_norm#0")}


@pytest.mark.parametrize("keep", ["all", "*", ["param:line.weight", "line/linear#0", "input:args.0"]])
def test_an_optimizer_step_inside_the_block_changes_nothing_kept(keep: Any) -> None:
    torch.manual_seed(0)  # of one seed in a hundred every unit is dead and the step changes no weight
    model = Fn(lambda self, x: self.line(x).relu(), line=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    weight, inside = copy(model.line.weight), copy(model.line(x))
    step = torch.optim.Adam(model.parameters(), lr=0.1)
    with fmr.track(model, keep=keep, grad=True) as run:
        model(x).sum().backward()
        step.step()
        x.zero_()
    assert not torch.equal(model.line.weight, weight)
    same(run["param:line.weight"], weight)
    same(run["line/linear#0"], inside)
    same(run.grad["param:line.weight"], model.line.weight.grad)
    assert run["input:args.0"].abs().sum() > 0


@pytest.mark.parametrize("keep", ["all", "*"])
def test_what_is_written_after_the_pass_but_inside_the_block_changes_no_alias_and_no_opaque_value(keep: str) -> None:
    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        buffer = x * 1
        buffer[0] = 5.0
        part = buffer[1]
        buffer.add_(1.0)
        return part * 2, torch.func.vmap(torch.sin)(x)

    model = Fn(forward)
    with torch.no_grad(), fmr.track(model, keep=keep) as run:
        doubled, hidden = model(torch.ones(2, 3))
        expected = doubled / 2, copy(hidden)
        hidden.zero_()
    (alias,) = [node for node in run.graph.nodes if node.op == "alias"]
    (opaque,) = run.graph.opaque
    same(run[alias.id], expected[0])
    same(run[opaque.id], expected[1])


def test_several_outputs_written_by_out_are_values_of_their_own() -> None:
    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        best, at = torch.zeros(3), torch.zeros(3, dtype=torch.long)
        views = best[:2], at[:2]
        torch.max(x, 0, out=(best, at))
        return views[0] + 1, views[1] + 1

    run = fmr.run(Fn(forward), torch.eye(3) * 4)
    run.graph.lint()
    same(run["/max#0:0"], torch.full((3,), 4.0))
    same(run["/max#0:1"], torch.arange(3))
    parents = [[str(p) for p in node.parents] for node in run.graph.nodes if node.op == "alias"]
    assert parents == [["/getitem#0", "/max#0:0"], ["/getitem#1", "/max#0:1"]]


@pytest.mark.parametrize("keep", ["all", "*", "/to_sparse#0"])
def test_a_sparse_value_survives_a_write(keep: str) -> None:
    run = fmr.run(Fn(lambda self, x: x.to_sparse().mul_(2.0).to_dense()), torch.eye(3), keep=keep)
    same(run["/to_sparse#0"].to_dense(), torch.eye(3))
    assert run.output.sum() == 6


def test_a_strided_write_does_not_hide_the_write_before_it() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        part = x[:, 1]
        x.mul_(2.0)
        x[:, ::3].zero_()
        return part + 1

    run = fmr.run(Fn(forward), torch.ones(2, 4))
    assert "/mul#0" in {str(node.id) for node in run.graph.ancestors("/add#0")}
    same(run["/add#0"], torch.full((2,), 3.0))


def test_kept_copies_do_not_wake_autograd() -> None:
    """A view of a base that began to need gradients is refused by torch when written; a copy of it would heal it."""

    def forward(self: nn.Module, x: Tensor, weight: Tensor) -> str:
        base = x * 1
        view = base[0]
        base.copy_(weight)
        try:
            view.fill_(0.25)
        except RuntimeError:
            return "refused"
        return "written"

    x, weight = torch.zeros(2, 2), torch.ones(2, 2, requires_grad=True)
    plain = Fn(forward)(x, weight)
    for keep in ("all", "*", "/getitem#0"):
        model = Fn(forward)
        with fmr.track(model, keep=keep):
            assert model(x, weight) == plain
