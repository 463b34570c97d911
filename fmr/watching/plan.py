"""Reading a few IDs in a later run: the watching mode is on only inside the module calls that hold one of them."""

import re
import sys
import weakref
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from types import CodeType, TracebackType
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch._C import _len_torch_function_stack

from fmr.ids import SOURCES, TensorId, outer_op
from fmr.nests import Nest, leaves, outputs, replaced
from fmr.ops.fused import DECOMPOSITIONS
from fmr.ops.names import PASS, READ, WRITE, Op, is_tensor_result, known_ops, op_of
from fmr.watching.inside import value_inside
from fmr.watching.mode import RootWatcher, fills_parameters, functorch_level, is_traced, made_by_writing, written_by
from fmr.watching.own import unseen
from fmr.watching.recorder import call_site
from fmr.watching.scopes import Call, Names, Paths, Start, name_inputs, walk
from fmr.watching.sites import outermost
from fmr.watching.stack import put_on, take_off
from fmr.watching.storage import is_unshaped, touches


class Stop(BaseException):
    """Ends a forward after the last planned ID; it never leaves the block of the reader that it carries."""


class Want(NamedTuple):
    """One planned ID: the output of an op, or a value inside it."""

    id: TensorId
    output: int | None
    inside: bool
    placed: bool = False


class Plan:
    """Which ops to wait for, by scope, op name and running number; `sources` are read when a pass begins.

    Where the op is called is told of the IDs in `placed`. `returned` are the module calls whose outputs are wanted, by path;
    where `globs` name more, every call is followed.
    """

    def __init__(self, ids: Iterable[TensorId], globs: Iterable[str] = (), placed: Collection[str] = ()) -> None:
        self.ids, self.globs, self.placed = tuple(ids), tuple(globs), tuple(placed)
        self.sources = [name for name in self.ids if name.is_source]
        self.returned: dict[str, tuple[tuple[TensorId, str], ...]] = {}
        self.ops: dict[str, dict[str, dict[int, list[Want]]]] = {}
        for name in self.ids:
            if name.is_path:
                for path, at in name.readings:
                    self.returned[path] = (*self.returned.get(path, ()), (name, at))
            elif not name.is_source:
                outer = outer_op(name)
                part = outer.parts
                by_op = self.ops.setdefault(outer.scope, {}).setdefault(part.op, {})
                by_op.setdefault(part.k, []).append(Want(name, part.output, outer is not name, name in placed))
        self.prefixes = {prefix for scope in (*self.ops, *self.returned) for prefix in _prefixes(scope)}
        self.registered = tuple({_bare(prefix) for prefix in self.prefixes})
        self.skip: dict[str, set[Callable[..., Any]]] = {scope: set() for scope in self.ops}
        self._returned: dict[str, tuple[tuple[TensorId, str], ...]] = {}
        self._paths: tuple[weakref.ref[nn.Module], Paths] | None = None

    def returned_by(self, path: str) -> tuple[tuple[TensorId, str], ...]:
        """The names under which the output of a module call is wanted, each with the position in it."""
        names = self._returned.get(path)
        if names is None:
            matched = ((TensorId(path), ""),) if any(fnmatchcase(path, glob) for glob in self.globs) else ()
            names = self._returned[path] = tuple(dict.fromkeys((*self.returned.get(path, ()), *matched)))
        return names

    def paths(self, root: nn.Module) -> Paths:
        """The modules of this root on the way to the planned IDs, remembered from the last run of the same model."""
        if self._paths is None or self._paths[0]() is not root or not self._paths[1].fit(root):
            self._paths = weakref.ref(root), Paths(root, self.registered)
        return self._paths[1]


_REPETITION = re.compile(r"@\d+(?=\.|$)")


def _bare(scope: str) -> str:
    """A dynamic path without its repetition marks."""
    return _REPETITION.sub("", scope)


def _prefixes(scope: str) -> list[str]:
    parts = scope.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]


class Listening(Protocol):
    """What is told of the ops around the planned values, where their gradients are wanted."""

    wide: bool

    def look(self, wake: bool = False) -> None:
        """Something is about to happen; `wake` where the tensors may be asked what autograd knows of them."""

    def after(self, written: list[Tensor], read: Any, made: Any) -> None:
        """An op ran that overwrote tensors, or read and made some."""


class Reader(RootWatcher):
    """Runs a plan: `deliver` gets each planned value once a pass, `begin` and `end` enclose a pass.

    It is given the ID, the value, whether others hold that too, and for a module call the position that is wanted in it.
    `begin` may answer with what listens to the pass.

    Only ops that run directly in a planned module call meet the mode; it is off in every call below and beside it.
    """

    def __init__(self, root: nn.Module | None, plan: Plan, begin: Any, deliver: Any, end: Any, stop: bool) -> None:
        super().__init__(root)
        self.plan, self.stop = plan, stop
        self.begin: Callable[[], Listening | None] = begin
        self.deliver: Callable[[TensorId, Nest, bool, str | None], None] = deliver
        self.end: Callable[[Any, str | None], None] = end
        self.place: Callable[[TensorId, CodeType | None, int], None] = lambda name, code, at: None
        self.ran: dict[str, list[Callable[..., Any]]] = {}
        self._trail: list[Callable[..., Any]] = []
        self._skip: set[Callable[..., Any]] = set()
        self._followed: dict[int, list[str]] | None = None
        self._names: Names | Paths | None = None
        self._here: Call | None = None
        self._wanted: dict[str, dict[int, list[Want]]] | None = None
        self._left = set(plan.ids)
        self._on, self._depth = False, _len_torch_function_stack()
        self._all = bool(plan.globs)
        self.listening: Listening | None = None

    def call(self, proceed: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module call; follow it if a planned ID lies below, with the mode on if its own ops are planned."""
        if self.asking and self._names is not None and self.asks(module, args, kwargs):
            self.asking = False  # for what this one calls
            try:
                return self.call(proceed, module, args, kwargs)
            finally:
                self.asking = True
        if self._here is None:
            start = self.begins_pass(module) if self._names is None else None
            return self.record(proceed, start, args, kwargs) if start is not None else proceed(*args, **kwargs)
        if functorch_level() is not None:
            return proceed(*args, **kwargs)
        if self._followed is not None and id(module) not in self._followed and self.listening is None and not self._on:
            outer, self._here = self._here, None  # and so it is for what that calls
            try:
                return proceed(*args, **kwargs)
            finally:
                self._here = outer
        if self.listening is not None:
            self.listening.look()
        before = self._here, self._wanted, self._trail, self._skip, self._on
        here = self._step(module)
        try:
            out = proceed(*args, **kwargs)
        finally:
            self._here, self._wanted, self._trail, self._skip, on = before
            if on is not self._on:
                self._switch(on)
        return out if here is None else self._returned(here, out, args, kwargs)

    asking = False
    """Whether calls inside a pass are asked for more than values."""

    def asks(self, module: nn.Module, args: Any, kwargs: Any) -> bool:
        """Ask a call; whether it told all there is, so that what it calls needs not be asked."""
        return False

    def _step(self, module: nn.Module) -> Call | None:
        """Go into a call below the one that runs; one that holds no planned ID is not followed, nor what it calls."""
        assert self._here is not None
        here = None
        if self._followed is None or id(module) in self._followed:
            assert self._names is not None
            here = self._here.enter(module, self._names)
        if here is not None and not self._all and here.path not in self.plan.prefixes:
            here = None
        self._go(here)
        return here

    def _go(self, here: Call | None) -> None:
        self._here, self._wanted = here, self.plan.ops.get(here.path) if here is not None else None
        if here is not None and self._wanted is not None:
            self._trail = self.ran[here.path] = []
            self._skip = self.plan.skip[here.path]
        on = self._wanted is not None or (self.listening is not None and self.listening.wide)
        if on is not self._on:
            self._switch(on)

    def _switch(self, on: bool) -> None:
        """Put this mode on, outside those that were put on since its block began, or take it off.

        It stays on while views are listened to, which any module may overwrite.
        """
        on = on or (self.listening is not None and self.listening.wide)
        if on and not self._on:
            put_on(self, self._depth)
        elif not on:
            take_off(self)
        self._on = on

    @property
    def in_pass(self) -> bool:
        """Whether a pass is under way."""
        return self._names is not None

    def record(self, proceed: Callable[..., Any], start: Start, args: Any, kwargs: Any) -> Any:
        """Run a call as a pass."""
        module, path, _ = start
        root = module if self.root is None else self.root
        if root._compiled_call_impl is not None or "_orig_mod" in root._modules:
            Names(root)  # which refuses it
        paths = self.plan.paths(root)
        few = paths.complete and not self._all
        self._names = paths if few else Names(root)
        self._followed = paths.paths if few else None
        self.listening = self.begin()
        out, raised = None, None
        try:
            if self.plan.sources:
                self._deliver_sources(root, start, args, kwargs)
            here = Call(module, path, path) if self._all or path in self.plan.prefixes else None
            self._go(here)
            out = outermost(proceed, args, kwargs)
            self._go(None)
            out = out if here is None else self._returned(here, out, args, kwargs)
            return out
        except BaseException as error:
            raised = None if isinstance(error, Stop) else _innermost(error.__traceback__, self, root, path)
            raise
        finally:
            listening, self.listening = self.listening, None
            self._go(None)
            self._names = None
            if listening is not None:
                listening.look(wake=True)
            self.end(out, raised)

    def _returned(self, here: Call, out: Nest, args: Any, kwargs: Any) -> Nest:
        """Deliver what a module call returned, if that is planned, and hand it on."""
        for name, at in self.plan.returned_by(here.path):
            self._found(name, out, True, at)
        if self.listening is not None and self.listening.wide:
            self._switch(True)
        return out

    def _deliver_sources(self, root: nn.Module, start: Start, args: Any, kwargs: Any) -> None:
        given = dict(name_inputs(start.called, args, kwargs))
        given.update(Names(root).tensors.values())
        for name in self.plan.sources:
            if name in given and not is_unshaped(given[name]):
                self._found(name, given[name], True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_traced():
            return func(*args, **kwargs) if kwargs else func(*args)
        if self.listening is not None and functorch_level() is None:
            return self._heard(self.listening, func, args, kwargs or {})
        if func in self._skip and not (kwargs and "out" in kwargs):
            out = func(*args, **kwargs) if kwargs else func(*args)
            self._trail.append(func)
            return out
        read, out = self._run(known_ops.get(func) or op_of(func), func, args, kwargs or {})
        return self._met(func, out, args, kwargs or {}, read)

    def _heard(self, listening: Listening, func: Any, args: Any, kwargs: Any) -> Any:
        """A function around which the planned values are looked at: their gradients are wanted."""
        listening.look()
        op = known_ops.get(func) or op_of(func)
        read, out = self._run(op, func, args, kwargs)
        if op.kind != PASS:
            written = written_by(op, args, kwargs) if op.kind == WRITE or "out" in kwargs else []
            listening.after(written, (args, kwargs), out)
        return self._met(func, out, args, kwargs, read)

    def _run(self, op: Op, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Call a function: what it read, copied where it overwrites that and a plain form will read it, and its result."""
        read = args, kwargs
        if (op.kind == WRITE or "out" in kwargs) and self._wanted and op.name in DECOMPOSITIONS and op.name in self._wanted:
            with unseen():
                written = written_by(op, args, kwargs)
                copies = {id(tensor): tensor.clone() for _, tensor in leaves(read) if touches(tensor, written)}
                read = replaced(read, Tensor, lambda tensor: copies.get(id(tensor), tensor))
        return read, func(*args, **kwargs)

    def _met(self, func: Any, out: Any, args: Any, kwargs: Any, read: Any) -> Any:
        """A function that may be one of those waited for; one that can not be is skipped from now on."""
        if self._wanted is None or self._here is None or fills_parameters(self._here.module):
            return out
        op = known_ops.get(func) or op_of(func)
        wanted = self._wanted.get(op.name)
        if op.kind == PASS or (op.kind == READ and wanted is None):
            self._skip.add(func)
        made = out if is_tensor_result(out) else made_by_writing(written_by(op, args, kwargs))
        if op.kind != PASS and made is not None and functorch_level() is None:
            self._trail.append(func)
            if wanted is not None:
                k = self._here.number(op.name)
                if k in wanted:
                    return self._made(op, f"{self._here.path}/{op.name}#{k}", wanted[k], made, out, args, kwargs, read)
        return out

    def _made(self, op: Op, name: str, wants: list[Want], made: Nest, out: Any, args: Any, kwargs: Any, read: Any) -> Any:
        """Deliver what is planned of the outputs of an op, and hand on what it returned."""
        for want in wants:
            if want.inside:
                value = value_inside(want.id, op.name, name, *read)
            else:
                value = next((tensor for index, tensor in outputs(made) if index == want.output), None)
            if value is not None:
                if want.placed:
                    self.place(want.id, *call_site(sys._getframe()))
                self._found(want.id, value, not want.inside)
        return out

    def _found(self, name: TensorId, value: Nest, shared: bool, at: str | None = None) -> None:
        self.deliver(name, value, shared, at)
        self._left.discard(name)
        if self.stop and not self._left:
            raise Stop(self)


def _innermost(trace: TracebackType | None, reader: Reader, root: nn.Module, path: str) -> str:
    """The path of the last call that an error came through, registered where it was not followed; else that of the pass."""
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code is Reader.call.__code__ and frame.f_locals["self"] is reader:
            here, module = frame.f_locals.get("here"), frame.f_locals["module"]
            path = here.path if here is not None else next((name for name, one in walk(root) if one is module), path)
        trace = trace.tb_next
    return path


def ops_of(trail: list[Callable[..., Any]]) -> list[str]:
    """The names of the ops among the functions that ran in a planned module call."""
    return [op.name for op in map(op_of, trail) if op.kind != PASS]


def is_plannable(name: str) -> bool:
    """Whether a plan can wait for an ID: one of a source, of an op that the mode sees, or of what a module returned."""
    return name.startswith(SOURCES) or not any(c in name for c in ("*", "?", "[", "/opaque#", "/alias#"))
