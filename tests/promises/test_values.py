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
