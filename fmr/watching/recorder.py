"""The watcher: a `TorchFunctionMode` that writes one small tuple per tensor operation and module call on a tape."""

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _get_function_stack_at

from fmr.nests import Nest, leaves, outputs, taken, taken_arguments
from fmr.ops.names import PASS, STORAGES, WRITE, Op, is_tensor_result, known_ops, op_of
from fmr.watching.guard import Guard
from fmr.watching.handed import ASKING_CODE, Handed, bytes_of, is_taken_apart
from fmr.watching.mode import RootWatcher, fills_parameters, functorch_level, is_traced, made_by_writing, written_by
from fmr.watching.own import unseen
from fmr.watching.scopes import Start, walk
from fmr.watching.sites import outermost
from fmr.watching.storage import PLAIN, is_unshaped, version_of
from fmr.watching.swaps import Ref
from fmr.watching.tape import ASKED, ENTER, EXIT, INSIDE, NAMED, RAISED, REPLACED, SWAPPED, WRITTEN, Event, Tape
from fmr.watching.versions import others_in

_is_internal: dict[str, bool] = {}
_HERE = __file__.removesuffix("watching/recorder.py")
_TORCH = torch.__file__.rpartition("/")[0] + "/"


def call_site(frame: FrameType | None) -> tuple[CodeType | None, int]:
    """The innermost frame outside torch and fmr, as a code object and an instruction offset."""
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        internal = _is_internal.get(name)
        if internal is None:
            internal = _is_internal_code(code)
        if not internal:
            return code, frame.f_lasti
        frame = frame.f_back
    return None, -1


def _is_internal_code(code: CodeType) -> bool:
    """Whether code is torch's or fmr's."""
    internal = _is_internal[code.co_filename] = code.co_filename.startswith((_TORCH, _HERE))
    return internal


def is_in_function(frame: FrameType | None) -> bool:
    """Whether an op runs in the forward of an autograd function, which counts once more what it says it wrote."""
    while frame is not None and frame.f_code not in _CALLS:
        if frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_CALLS = {nn.Module._call_impl.__code__}

Begin = Callable[[Tape], Callable[[Event], None]]
End = Callable[[Tape], None]


class Recorder(RootWatcher):
    """Sees every op and module call of each outermost call of `root`, or of any module where none is given.

    At the start of a pass `begin` is given its tape and answers with the function that takes each event; `end` is
    called when the pass is over, also when it raised. `guard` saves what is overwritten.
    """

    def __init__(self, root: nn.Module | None, begin: Begin, end: End, guard: Guard | None = None) -> None:
        super().__init__(root)
        self.begin, self.end = begin, end
        self.guard, self.passes = guard or Guard(), 0
        self.emit: Callable[[Event], None] | None = None
        self.handed = Handed()
        self.shares = self.handed.shares
        self.own: dict[int, tuple[str, Tensor]] = {}
        self.counts = False
        self.begun: dict[int, int | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_traced():  # by torch.compile, of a function that the model calls: what runs later never comes here
            return func(*args, **(kwargs or {}))
        op = known_ops.get(func) or op_of(func)
        if op.kind == PASS:
            if op.tells:
                return self._tell(op, func, args, kwargs or {})
            return func(*args, **kwargs) if kwargs else func(*args)
        if self.shares and self.emit is not None:
            self._compare((args, kwargs))
        if op.kind == WRITE or (kwargs and "out" in kwargs):
            written = written_by(op, args, kwargs or {})
            if written:
                return self._write(op, func, args, kwargs or {}, written)
        out = func(*args, **kwargs) if kwargs else func(*args)
        emit = self.emit
        if emit is not None and (out.__class__ is Tensor or is_tensor_result(out)):
            if functorch_level() is not None:
                inside = _unwrapped((args, kwargs))
                emit((INSIDE, inside, (), others_in(inside, self.begun)))
                return out
            nested, as_begun, begun = False, self.counts, self.begun
            try:
                for arg in args:
                    kind = arg.__class__
                    if kind in PLAIN:
                        as_begun = as_begun and arg._version == begun.get(id(arg), 0)
                    elif kind in _NESTS and not (kind is tuple and _HOLDING.isdisjoint(map(type, arg))):
                        nested = True
                        break
                if kwargs:
                    for arg in kwargs.values():
                        if arg.__class__ in PLAIN:
                            as_begun = as_begun and arg._version == begun.get(id(arg), 0)
                        elif arg.__class__ in _NESTS:
                            nested = True
                version = out._version if self.counts and out.__class__ is Tensor else _versions(out)
            except RuntimeError:  # one of inference mode, which was entered inside the pass
                version, nested = None, True
            if nested:
                args, kwargs = _frozen(args[: op.reads]), _frozen_kwargs(kwargs or {})
            read = None if as_begun and not nested else others_in((args, kwargs), begun)
            code, lasti = call_site(sys._getframe(1))
            emit((op, args, kwargs, tuple(out) if out.__class__ is list else out, None, code, lasti, version, read))
            if self.shares:
                self._secure(out)
        elif op.asks:
            self._ask(args, kwargs, sys._getframe(1))
        return out

    def _tell(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        """A function that hands out the memory of a tensor, or its numbers."""
        frame = sys._getframe(2)
        if op.hands_out and args and isinstance(args[0], Tensor) and not self._frees(op, args[0], frame):
            self.hand_out(args[0])
        asks = op.asks or (op.name in STORAGES and is_taken_apart(frame))
        if asks and self.shares and self.emit is not None:
            self._compare((args, kwargs))
        out = func(*args, **kwargs)
        if asks:
            self._ask(args, kwargs, frame)
        return out

    def _ask(self, args: Any, kwargs: Any, frame: FrameType) -> None:
        """Python was told numbers of tensors; what it does with those of a transform is part of the transform."""
        if self.emit is not None and functorch_level() is None:
            tensors = tuple(tensor for _, tensor in leaves((args, kwargs)))
            self.emit((ASKED, tensors, *call_site(frame), others_in(tensors, self.begun)))

    def _frees(self, op: Op, tensor: Tensor, frame: FrameType) -> bool:
        """Whether a storage is asked for by torch itself, or is that of a weight, which sharded models free and fill."""
        if op.name not in STORAGES:
            return False
        while frame.f_back is not None and frame.f_code.co_filename in ASKING_CODE:
            frame = frame.f_back
        own = self.own.get(id(tensor))
        return _is_internal_code(frame.f_code) or isinstance(tensor, nn.Parameter) or (own is not None and own[1] is tensor)

    def hand_out(self, tensor: Tensor) -> None:
        """The memory of a tensor is about to be handed out: what is kept of it is saved, since it may be written unseen."""
        if functorch_level() is None:
            with unseen():
                whole = self.handed.add(tensor) if self.emit is not None else bytes_of(tensor)
                if whole is not None:
                    self.guard.before_write([whole], ())

    def _compare(self, read: Any) -> None:
        """Say of tensors about to be read, whose memory was handed out, that their bytes are others now."""
        with unseen():
            changed = [tensor for tensor in self.handed.among(read) if self.handed.is_changed(tensor)]
        for tensor in changed:
            assert self.emit is not None
            self.emit((WRITTEN, tensor, others_in(tensor, self.begun)))
            self._secure(tensor)

    def _secure(self, made: Any) -> None:
        """Save a new value that lies in memory which was handed out."""
        with unseen():
            for tensor in self.handed.among(made):
                self.guard.before_write([whole for whole in [bytes_of(tensor)] if whole is not None], ())

    def _write(self, op: Op, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """An op that overwrites tensors: what is kept of them is saved before it runs."""
        if isinstance(self.emit, Filling) and self.emit.goes_on:
            return func(*args, **kwargs)
        if functorch_level() is not None:
            return self._write_inside(func, args, kwargs, _unwrapped(written))
        self.guard.before_write(written, (args, kwargs), op.moves)
        out = func(*args, **kwargs)
        in_function = is_in_function(sys._getframe(2))
        self.guard.after_write(written, in_function)
        made = out if is_tensor_result(out) else made_by_writing(written)
        if self.emit is not None and made is not None:
            code, lasti = call_site(sys._getframe(1))
            self.emit(
                (
                    op,
                    _frozen(args),
                    _frozen_kwargs(kwargs),
                    tuple(made) if made.__class__ is list else made,
                    written,
                    code,
                    lasti,
                    None if in_function else _versions(made),
                    others_in((args, kwargs), self.begun),
                )
            )
        if self.shares:
            with unseen():
                for tensor in self.handed.among(written):
                    self.handed.is_changed(tensor)
            self._secure(made)
        return out

    def _write_inside(self, func: Any, args: Any, kwargs: Any, written: tuple[Tensor, ...]) -> Any:
        """The same inside a functorch transform, which may write through its wrappers to a tensor outside it."""
        self.guard.before_write(written, ())
        out = func(*args, **kwargs)
        self.guard.after_write(written, False)
        if self.emit is not None:
            inside = _unwrapped((args, kwargs))
            self.emit((INSIDE, inside, written, others_in((inside, written), self.begun)))
        return out

    def call(self, proceed: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module call, with its beginning and its end on the tape; an outermost one is a pass.

        A call inside a functorch transform is part of the transform and has no scope.
        """
        if self.emit is None:
            start = self.begins_pass(module)
            return self.record(proceed, start, args, kwargs) if start is not None else proceed(*args, **kwargs)
        if functorch_level() is not None:
            return proceed(*args, **kwargs)
        emit = self.emit
        if self.shares:
            self._compare((args, kwargs))
        given = taken_arguments(args, kwargs)
        emit((ENTER, module, *given, others_in(given, self.begun)))
        if fills_parameters(module):
            self.emit = Filling(module, emit)
        out = RAISED
        try:
            out = proceed(*args, **kwargs)
            return out
        finally:
            if self.shares:
                self._compare(out)
            left = out if out is RAISED or type(out) is Tensor else taken(out)
            emit((EXIT, left, others_in(left, self.begun)))
            self.emit = emit

    def swap(self, first: Tensor, second: Tensor) -> None:
        """Two tensor objects are about to become each other: what is kept of them is saved."""
        with unseen():
            if self.emit is not None:
                self.emit((SWAPPED, first, second, others_in((first, second), self.begun)))
            self.guard.before_swap((first, second))

    @property
    def in_pass(self) -> bool:
        """Whether a pass is under way."""
        return self.emit is not None

    def record(self, proceed: Callable[..., Any], start: Start, args: Any, kwargs: Any) -> Any:
        """Run a call as a pass."""
        module = start.module
        tape = Tape(module if self.root is None else self.root, args, kwargs, self.passes, start)
        self.counts = _get_function_stack_at(0) is self and not torch.is_inference_mode_enabled()
        self.passes, self.own, self.begun = self.passes + 1, tape.tensors, tape.begun
        emit = self.begin(tape)
        self.emit = emit = WeightSwaps(tape, emit) if _lie_elsewhere(tape) else emit
        if fills_parameters(module):
            self.emit = Filling(module, emit)
        out = RAISED
        try:
            out = tape.output = outermost(proceed, args, kwargs)
            return out
        finally:
            if self.shares:
                self._compare(out)
                self.shares.clear()
            self.emit = None
            left = out if out is RAISED else taken(out)
            emit((EXIT, left, others_in(left, tape.begun)))
            self.end(tape)


def _versions(out: Nest) -> int | tuple[int | None, ...] | None:
    """The version of what an op made, or of each of several, asked unseen."""
    with torch._C.DisableTorchFunction():
        return version_of(out) if isinstance(out, Tensor) else tuple(version_of(tensor) for _, tensor in outputs(out))


def _lie_elsewhere(tape: Tape) -> bool:
    """Whether parameters only hold the places of some that are offloaded or sharded, until their modules run."""
    with torch._C.DisableTorchFunction():
        tensors = (tensor for _, tensor in tape.tensors.values() if not is_unshaped(tensor))
        return any(tensor.is_meta or tensor.__class__ not in (Tensor, nn.Parameter) for tensor in tensors)


class Filling:
    """Passes events on as soon as a lazy layer has filled its parameters, so that its first call is like all others."""

    def __init__(self, module: nn.Module, emit: Callable[[Event], None]) -> None:
        self.module, self.emit = module, emit

    @property
    def goes_on(self) -> bool:
        """Whether the layer is not done with it yet."""
        return fills_parameters(self.module)

    def __call__(self, event: Event) -> None:
        """Take the next event."""
        if not self.goes_on:
            self.emit(event)


class WeightSwaps:
    """Passes events on and, before an op that reads a tensor which was put in a parameter's place since, that one's name.

    A sharded weight is copied: its memory is freed when its module has run.
    """

    def __init__(self, tape: Tape, emit: Callable[[Event], None]) -> None:
        self.emit, self.known, self.begun = emit, tape.tensors, tape.begun
        self.calls: list[nn.Module] = [tape.start.module]
        self.met: dict[int, Callable[[], Tensor | None]] = {}
        self.places = {(id(module), key): own for _, module in tape.names.modules for key, own in _own(module)}

    def __call__(self, event: Event) -> None:
        """Take the next event."""
        if event[0] is ENTER:
            self.calls.append(event[1])
        elif event[0] is EXIT:
            self.calls.pop()
        elif event[0] not in (INSIDE, REPLACED):
            for _, tensor in leaves(event[1:3]):
                if id(tensor) not in self.known and self.met.get(id(tensor), _gone)() is not tensor:
                    self._meet(tensor)
        self.emit(event)

    def _meet(self, tensor: Tensor) -> None:
        """Say the name of a tensor that stands in a place of the module that runs, or of one below it."""
        below = walk(self.calls[-1]) if isinstance(tensor, nn.Parameter) else [("", self.calls[-1])]
        places = ((id(module), key) for _, module in below for key, own in _own(module) if own is tensor)
        place = next((self.places[place] for place in places if place in self.places), None)
        if place is not None:
            with torch._C.DisableTorchFunction():
                self.met[id(tensor)] = Ref(tensor)
                value = tensor if place.is_meta else tensor.detach().clone()
                self.emit((NAMED, self.known[id(place)][0], tensor, value, others_in(tensor, self.begun)))


def _gone() -> None:
    """A reference to nothing."""


def _own(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers that a module itself holds now."""
    return [(key, own) for key, own in (*module._parameters.items(), *module._buffers.items()) if own is not None]


_NESTS = frozenset({list, tuple, dict, np.ndarray})
_HOLDING = _NESTS | PLAIN


def _frozen(value: Any) -> Any:
    """An argument as it is now: lists, dicts and arrays copied, at any depth, since the model may change its own later."""
    kind = value.__class__
    if kind is list:
        return [_frozen(item) if item.__class__ in _NESTS else item for item in value]
    if kind is tuple:
        return value if _NESTS.isdisjoint(map(type, value)) else tuple([_frozen(item) for item in value])
    if kind is dict:
        return {key: _frozen(item) for key, item in value.items()}
    return value.copy() if kind is np.ndarray else value


def _frozen_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same for arguments by name."""
    for arg in kwargs.values():
        if arg.__class__ in _NESTS:
            return {name: _frozen(item) for name, item in kwargs.items()}
    return kwargs


def _unwrapped(nest: Nest) -> tuple[Tensor, ...]:
    """The plain tensors under the wrappers that functorch gave to its function."""
    found = []
    for _, tensor in leaves(nest):
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        found.append(tensor)
    return tuple(found)
