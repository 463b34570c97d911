"""Reading a few IDs in a later run: the watching mode is on only inside the module calls that hold one of them."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode, _push_mode

from fmr.ids import SOURCES, TensorId
from fmr.inner import value_inside
from fmr.nodes import outputs
from fmr.ops import PASS, is_tensor_result, op_of
from fmr.recorder import _functorch_level, made_by_writing, written_by
from fmr.scopes import Call, Names, name_inputs, refuse_compiled
from fmr.watch import WatcherMode


class Stop(BaseException):
    """Ends a forward after the last planned ID; it never leaves the tracked block."""


class Want(NamedTuple):
    """One planned ID: the output of an op, or a value inside it."""

    id: TensorId
    index: int | None
    inside: bool


class Plan:
    """Which ops to wait for, by scope, op name and running number; `sources` are read when a pass begins."""

    def __init__(self, ids: Iterable[TensorId]) -> None:
        self.ids = tuple(dict.fromkeys(ids))
        self.sources = [name for name in self.ids if name.is_source]
        self.ops: dict[str, dict[str, dict[int, list[Want]]]] = {}
        for name in self.ids:
            if not name.is_source:
                outer = outermost(name)
                part = outer.parts
                by_op = self.ops.setdefault(outer.scope, {}).setdefault(part.op, {})
                by_op.setdefault(part.k, []).append(Want(name, part.index, outer is not name))
        self.prefixes = {prefix for scope in self.ops for prefix in _prefixes(scope)}


def outermost(name: TensorId) -> TensorId:
    """The op of the model that an ID belongs to: itself, or the fused op whose scope it lies in."""
    while "/" in name.scope:
        head, _, tail = name.partition("/")
        name = TensorId(f"{head}/{tail.partition('/')[0]}")
    return name


def _prefixes(scope: str) -> list[str]:
    parts = scope.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


class Reader(WatcherMode):
    """Runs a plan: `deliver(id, tensor)` gets each planned value once a pass; `begin` and `end` enclose a pass.

    Only ops that run directly in a planned module call meet the mode; it is off in every call below and beside it.
    """

    def __init__(self, root: nn.Module | None, plan: Plan, begin: Any, deliver: Any, end: Any, stop: bool) -> None:
        super().__init__()
        self.root, self.plan, self.stop = root, plan, stop
        self.begin: Callable[[], None] = begin
        self.deliver: Callable[[TensorId, Tensor, bool], None] = deliver
        self.end: Callable[[Any], None] = end
        self.foreign: list[nn.Module] = []
        self.missed: list[nn.Module] = []
        self.ran: dict[str, list[str]] = {}
        self._names: Names | None = None
        self._here: Call | None = None
        self._wanted: dict[str, dict[int, list[Want]]] | None = None
        self._left = 0

    def call(self, proceed: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module call; follow it if a planned ID lies below."""
        above = self._here
        if above is None:
            if self._names is None and self._is_outermost(module):
                return self._pass(proceed, module, args, kwargs)
            return proceed(module, *args, **kwargs)
        assert self._names is not None
        here = above.enter(module, self._names)
        return self._run(here if here.path in self.plan.prefixes else None, proceed, module, args, kwargs)

    def _run(self, here: Call | None, proceed: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The call, with the mode on if its own ops are planned and off if they are not."""
        above, was = self._here, self._wanted
        wanted = self.plan.ops.get(here.path) if here is not None else None
        if was is not None:
            _pop_mode()
        self._here, self._wanted = here, wanted
        if wanted is not None:
            self.ran[here.path] = []  # type: ignore[union-attr]
            _push_mode(self)
        try:
            return proceed(module, *args, **kwargs)
        finally:
            if wanted is not None:
                _pop_mode()
            self._here, self._wanted = above, was
            if was is not None:
                _push_mode(self)

    def _is_outermost(self, module: nn.Module) -> bool:
        if torch._C._current_graph_task_id() != -1:
            return False
        if self.root is None or module is self.root:
            return True
        self.missed.append(module)
        return False

    def _pass(self, proceed: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        refuse_compiled(module)
        self._names, self._left, self.ran = Names(module), len(self.plan.ids), {}
        self.begin()
        out = None
        try:
            if self.plan.sources:
                self._deliver_sources(module, args, kwargs)
            out = self._run(Call(module), proceed, module, args, kwargs)
            return out
        finally:
            self._names = None
            self.end(out)

    def _deliver_sources(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert self._names is not None
        given = dict(name_inputs(module, args, kwargs))
        given.update(self._names.tensors.values())
        for name in self.plan.sources:
            if name in given:
                self._found(name, given[name], False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = op_of(func)
        out = func(*args, **kwargs) if kwargs else func(*args)
        if op.kind == PASS:
            return out
        made = out if is_tensor_result(out) else made_by_writing(written_by(op, args, kwargs or {}))
        if made is not None and _functorch_level() is None:
            self._made(op.name, made, args[::-1] if op.reflected else args, kwargs or {})
        return out

    def _made(self, op: str, made: Any, args: Any, kwargs: Any) -> None:
        assert self._here is not None and self._wanted is not None
        k = self._here.number(op)
        self.ran[self._here.path].append(f"{op}#{k}")
        for want in self._wanted.get(op, {}).get(k, ()):
            if want.inside:
                value = value_inside(want.id, op, f"{self._here.path}/{op}#{k}", args, kwargs, {})
            else:
                value = next((tensor for index, tensor in outputs(made) if index == want.index), None)
            if value is not None:
                self._found(want.id, value, not want.inside)

    def _found(self, name: TensorId, value: Tensor, shared: bool) -> None:
        self.deliver(name, value, shared)
        self._left -= 1
        if self.stop and self._left == 0:
            raise Stop


def is_plannable(name: str) -> bool:
    """Whether a plan can wait for an ID: one of a source, or of an op that the mode sees."""
    return name.startswith(SOURCES) or ("#" in name and not any(c in name for c in "*?[") and "/opaque#" not in name and "/alias#" not in name)
