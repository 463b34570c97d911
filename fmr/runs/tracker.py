"""What fills the passes of a run: events of a recorder, or the values that a plan delivers."""

import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from fmr.edits.editor import Editor
from fmr.edits.frames import Frames
from fmr.edits.watcher import Editing, EditingSources
from fmr.errors import IdError, TrackError
from fmr.graph.build import Builder
from fmr.graph.expand import all_inside
from fmr.graph.paths import nothing_at
from fmr.ids import TensorId
from fmr.nests import Nest, ids_in, item_at, leaves, map_at, taken
from fmr.nodes import Node, scope_of, source_node
from fmr.ops.fused import is_fused
from fmr.ops.names import Op
from fmr.runs.editing import check_fired, plan_of
from fmr.runs.failures import carry, in_a_line
from fmr.runs.keep import Keep, check_place, nothing, parse, parse_with_edits
from fmr.runs.listener import Heard, Listener
from fmr.runs.noting import Reading, Recording
from fmr.runs.outputs import without_history
from fmr.runs.passes import Pass, graph_of
from fmr.runs.reached import nothing_ran, unmatched, unreached
from fmr.runs.run import Run
from fmr.watching.calls import watching
from fmr.watching.guard import Guard
from fmr.watching.inside import value_inside
from fmr.watching.mode import RootWatcher
from fmr.watching.own import like, unseen, without_grad
from fmr.watching.plan import Reader, Stop
from fmr.watching.recorder import Recorder
from fmr.watching.sites import where_of
from fmr.watching.storage import is_unshaped, storage_key, touches, version_of
from fmr.watching.tape import EXIT, RAISED, REPLACED, Event, Slot, Tape, first_read
from fmr.watching.versions import others_in

Emit = Callable[[Event], None]


class Tracker:
    """Fills the passes of a run from what a watcher sees."""

    def __init__(
        self,
        keep: Keep,
        model: nn.Module | None,
        to: Any,
        dtype: Any,
        grad: bool,
        stop: bool,
        editor: Editor | None,
        optional: bool,
        every: int = 1,
    ) -> None:
        check_place(to, dtype)
        for name, flag in (("grad", grad), ("stop", stop), ("optional", optional)):
            if not isinstance(flag, bool):
                raise TrackError(
                    f"{name} is {type(flag).__name__}, expected True or False. An argument of the model that has this name "
                    f"is bound before: fmr.run(functools.partial(model, {name}=...), ...)."
                )
        self.editor, self.optional, self.every = editor, optional, every
        self.keep = wanted = parse_with_edits(keep, model) if editor is not None else parse(keep, model)
        if stop and (wanted.plan is None or wanted.globs):
            raise TrackError(f"stop=True with keep={keep!r}: expected a set of IDs, after the last of which to stop.")
        self.run, self.to, self.dtype, self.grad = Run(), to, dtype, grad
        self.run.editors = [] if self.editor is None else [self.editor]
        self.ids, self.globs, self.wanted, self.plan = wanted.ids, wanted.globs, wanted.predicate, wanted.plan
        self.stop, self.guard = stop, Guard()
        self.lacking: dict[TensorId, str] = {}
        self.frames: Callable[[], Frames] = list
        self.listener: Listener | None = None

    def watcher(self, model: nn.Module | None) -> Recorder | Reader:
        watcher = self._watcher(model)
        watcher.note, watcher.every = self._note, self.every
        return watcher

    def _watcher(self, model: nn.Module | None) -> Recording | Reading | Editing:
        if self.plan is not None:
            hears = self._begin_plan, self._deliver, self._end_plan
            reader: Reading | Editing
            if self.editor is None:
                reader = Reading(model, self.plan, *hears, self.stop)
            else:
                ids = tuple(dict.fromkeys((*self.plan.ids, *self.editor.ids)))
                plan = plan_of(ids, self.plan.globs, self.plan.placed)
                reader = self._editing(self.editor)(model, plan, self.editor, hears, self.stop)
            reader.place = self._place
            return reader
        if self.wanted is None and self.to is None and self.dtype is None:
            return Recording(model, self._begin_tape, self._end, self.guard)
        return Recording(model, self._begin_stream, self._end, self.guard)

    @contextmanager
    def watch(
        self, model: nn.Module | None, watcher: Recorder | Reader, method: str | None
    ) -> Iterator[tuple[RootWatcher, ...]]:
        """Let a watcher, and one that edits below it, see what runs in the block, and that it is what was asked for."""
        below = None
        try:
            with watching(watcher, watcher if isinstance(watcher, Recorder) else None):
                below = self._editing_below(model, watcher)
                with nullcontext() if below is None else watching(below):
                    yield (watcher,) if below is None else (watcher, below)
        except Stop as stopped:
            if stopped.args[0] is not watcher:
                raise
            stopped.__traceback__ = None  # whose frames hold values
        except BaseException as error:
            if self.run.passes:
                carry(error, self.run)
            raise
        finally:
            if isinstance(watcher, Recorder):
                watcher.guard.close()
            for one in (watcher, below):
                if isinstance(one, Editing):
                    one.left.put_back()
        if not self.run.passes:
            raise TrackError(nothing_ran(model, watcher, method))
        self.check_reached(model, watcher)
        if self.editor is not None and not self.optional:
            check_fired(self.editor, lambda name: unreached(name, model, watcher, self.run))

    def _editing_below(self, model: nn.Module | None, watcher: Recorder | Reader) -> Editing | None:
        """What makes the edits below a recorder, which hears of each."""
        if self.editor is None or not isinstance(watcher, Recorder):
            return None
        ends = [name for name in self.editor.ids if name == "" or name.startswith(":")]
        if ends:
            raise TrackError(
                f"The edit of {str(ends[0])!r}, what the model itself returns, is made when its recording has ended. "
                f"Expected keep=() or a list of IDs beside it, or an edit of the value that is returned."
            )

        def told(new: Tensor, old: Tensor, apart: bool) -> None:
            if watcher.emit is not None:
                watcher.emit((REPLACED, new, old, apart, others_in((new, old), watcher.begun)))

        plan = plan_of(self.editor.ids, ())
        silent = (lambda: None), (lambda *_: None), (lambda *_: None)
        inside = self._inside_edited
        return self._editing(self.editor)(model, plan, self.editor, silent, told=told, told_inside=inside)

    def _inside_edited(self, scope: str, values: dict[TensorId, Tensor]) -> None:
        for name, value in values.items():
            self.run.passes[-1].inside[name] = self._cast(value)
        self.run.passes[-1].inside_scopes.add(scope)

    @staticmethod
    def _editing(editor: Editor) -> type[Editing]:
        return EditingSources if editor.of_sources else Editing

    def _note(self, frames: Callable[[], Frames]) -> None:
        self.frames = frames

    def _new_pass(self, here: Pass | None = None) -> Pass:
        here = here or Pass(self.grad)
        here.columns, here.number = self.frames, len(self.run.passes) * self.every
        self.run.passes.append(here)
        return here

    def _end(self, tape: Tape) -> None:
        self._output(tape.output)
        tape.output = None
        self.run.passes[-1].error = in_a_line(sys.exc_info()[1])
        self.run.passes[-1].follow(begun=True)  # to its end, where a builder refers to no tensor of the model any more

    # ---- every value as it is: the tape is the record, and the graph is made when it is asked for

    def _begin_tape(self, tape: Tape) -> Emit:
        here = self._new_pass(Pass.of_tape(tape, self.guard, self.grad))
        self.guard.add_tape(tape)
        self.guard.moving = self._before_move
        self.guard.history = self.grad
        if not self.grad:
            return tape.events.append
        listener = self._listen(tape, here)

        def emit(event: Event) -> None:
            tape.events.append(event)
            listener.take(event)

        return emit

    def _before_move(self) -> None:
        for one in self.run.passes:
            one.follow()

    def _listen(self, tape: Tape, here: Pass) -> Listener:
        listener = Listener(tape.number, here.heard)
        listener.sources(tape.sources())
        self.guard.listening = listener.before_write
        return listener

    # ---- some values, or all of them elsewhere: each event becomes nodes at once

    def _begin_stream(self, tape: Tape) -> Emit:
        with unseen():
            here, builder, done = self._new_pass(), Builder(tape, live=True), 0
            known: dict[str, Node] = {}
            here.heard = Heard(wanted=set())
            for name, tensor in tape.sources():
                if is_unshaped(tensor) or self.wanted is None or self.wanted(source_node(name, tensor)):
                    self.guard.keep(tensor, Slot(tape.number, name=name), version_of(tensor))

        def end() -> None:
            self.guard.reading = None
            here.end(graph_of(builder, tape.start.module), self.guard, builder.raised)

        def emit_alone(event: Event) -> None:
            with unseen():
                builder.feed(event)
                builder.values.clear()
            if not builder.calls:
                end()

        def keep_new() -> None:
            nonlocal done
            for place in range(done, len(builder.nodes)):
                node, value = builder.nodes[place], builder.values[place]
                slot = builder.slots[place]
                if value is not None and slot is not None and (self.wanted is None or self.wanted(node)):
                    self._keep(here, node.id, self.guard.saved.get(slot, value), slot)
                builder.values[place] = None
            done = len(builder.nodes)

        def emit(event: Event) -> None:
            with unseen():
                call = builder.calls[-1].path
                builder.feed(event)
                keep_new()
                if event[0] is REPLACED:
                    self._keep_replaced(here, builder, event[1])
                if event[0] is EXIT and event[1] is not RAISED and self.wanted is not None:
                    self._keep_returned(here, builder, call, event[1])
            if listener is not None:
                listener.take(event)
            looked = isinstance(event[0], Op) and self.wanted not in (None, nothing)
            if looked and is_fused(builder.nodes[-1]) and not _overwrites_what_it_reads(event):
                known.update((node.id, node) for node in builder.nodes[len(known) :])
                self._keep_inner(here, builder.nodes[-1], known, event)
            if not builder.calls:
                end()

        if self.wanted is nothing and self.editor is None and not self.grad:
            return emit_alone
        self.guard.reading, self.guard.history = builder.reading, self.grad
        listener = self._listen(tape, here) if self.grad else None
        return emit

    def _keep_replaced(self, here: Pass, builder: Builder, new: Tensor) -> None:
        """Keep what an edit put in place of a value, if that is wanted."""
        place = builder.place_of(new)
        if place is not None:
            node, slot = builder.nodes[place], builder.slots[place]
            builder.values[place] = None
            if slot is not None and (self.wanted is None or self.wanted(node)):
                self._keep(here, node.id, new, slot)

    def _keep(self, here: Pass, name: TensorId, value: Tensor, heard_at: Slot) -> None:
        own = self._own(value)
        kept = self._cast(own)
        slot = Slot(heard_at.number, name=name, cast=kept is not own)
        here.keep(name, kept, slot, heard_at)
        if kept is not own:
            here.cast = f"to={self.to!r}, dtype={self.dtype}"
        if here.heard.wanted is not None:
            here.heard.wanted.add(heard_at)
        if kept is own and not name.is_source:
            self.guard.keep(kept, slot, version_of(kept))

    def _own(self, value: Tensor) -> Tensor:
        """A value without its history, where none is wanted; torch is not asked what autograd knows of it."""
        if self.grad or not torch.is_grad_enabled() or isinstance(value, nn.Parameter) or is_unshaped(value):
            return value
        return like(without_grad(value.detach)(), value)

    def _keep_returned(self, here: Pass, builder: Builder, path: str, out: Any) -> None:
        """Keep what a module call returned, if that is wanted, under the IDs of its values."""
        wanted = self.keep.of_call(path)
        if wanted:
            names = next(scope.output for scope in reversed(builder.scopes) if scope.path == path)
            tensors = taken(out)
            for at in wanted:
                values = leaves(item_at(tensors, at))
                for name, (_, value) in zip(ids_in(item_at(names, at)), values, strict=True):
                    if name not in here.values:
                        place = next(n for n in reversed(range(len(builder.nodes))) if builder.nodes[n].id == name)
                        self._keep(here, name, value, builder.slots[place] or first_read(builder.number, -1, value))

    def _keep_inner(self, here: Pass, node: Node, known: dict[str, Node], event: Event) -> None:
        """Compute the wanted values inside a fused op while its arguments are at hand."""
        assert self.wanted is not None
        for inner in all_inside(node, ChainMap({}, known)):
            if self.wanted(inner):
                value = value_inside(inner.id, node.op, scope_of(node), event[1], event[2] or {})
                if value is not None:
                    with unseen():
                        here.keep(inner.id, self._cast(value))

    # ---- a few IDs: only what the plan delivers

    def _begin_plan(self) -> Listener | None:
        here = self._new_pass()
        self.listener = Listener(-1, here.heard) if self.grad else None
        return self.listener

    def _deliver(self, name: TensorId, value: Nest, shared: bool, at: str | None) -> None:
        """Take a planned value, or the tensors that a module call returned, each under the call's path and its position."""
        if at is None:
            self._take(name, value, shared)
        else:
            with unseen():
                self._returned(name, value, at)

    def _place(self, name: TensorId, code: CodeType | None, at: int) -> None:
        self.run.passes[-1].places[name] = where_of(code, at)

    def _returned(self, name: TensorId, value: Nest, at: str) -> None:
        if value.__class__ is Tensor and not at:
            self._take(name, value, True)
            return
        path = name.removesuffix(f":{at}") if at else str(name)
        part = item_at(taken(value), at)
        self.run.passes[-1].returned[name] = map_at(lambda place, tensor: self._part(path, at, place, tensor), part)
        if part is None:
            self.lacking[name] = nothing_at(path, at, taken(value))

    def _part(self, path: str, at: str, place: str, tensor: Tensor) -> TensorId:
        """Take one tensor that a module call returned."""
        within = ".".join(part for part in (at, place) if part)
        name = TensorId(f"{path}:{within}" if within else path)
        self._take(name, tensor, True)
        return name

    def _take(self, name: TensorId, value: Tensor, shared: bool) -> None:
        here = self.run.passes[-1]
        if self.listener is not None and shared:
            self._listen_to(self.listener, here, name, value)
        with unseen():
            kept = value if self.grad else value.detach()
            if self.to is not None or self.dtype is not None:
                kept = self._cast(kept)
            alone = not shared or storage_key(kept) != storage_key(value)
            here.keep(name, like(kept if alone else kept.clone(), value), Slot(-1, name=name))

    def _listen_to(self, listener: Listener, here: Pass, name: TensorId, value: Tensor) -> None:
        """Hear the gradient of a planned value; the tensor itself is on the path of autograd while nothing overwrites it."""
        with unseen():
            listener.made(value, Slot(-1, name=name))
            if value.requires_grad and self.to is None and self.dtype is None:
                here.live[name] = value, value._version

    def _end_plan(self, out: Any, raised: str | None) -> None:
        self._output(out)
        if raised is not None:
            self.run.passes[-1].raised, self.run.passes[-1].error = (raised, ""), in_a_line(sys.exc_info()[1])
        self.listener = None

    def _output(self, out: Any) -> None:
        self.run.passes[-1].output = out if self.grad else without_history(out)

    def _cast(self, value: Tensor) -> Tensor:
        if self.to is None and self.dtype is None:
            return value
        dtype = self.dtype if value.is_floating_point() else None
        return value.to(device=self.to, dtype=dtype)

    # ---- what was asked for and never came

    def check_reached(self, model: nn.Module | None, watcher: Recorder | Reader) -> None:
        """Raise if a kept ID or glob was met in no pass."""
        for name in self.ids:
            if not any(name in one.values or one.reached(name) for one in self.run.passes):
                raise IdError(self.lacking.get(name) or unreached(name, model, watcher, self.run))
        for pattern in self.globs:
            if not any(fnmatchcase(name, pattern) for one in self.run.passes for name in one.names()):
                raise IdError(unmatched(pattern, watcher, self.run))


def _overwrites_what_it_reads(event: Event) -> bool:
    """Whether an op wrote over the bytes of an argument: its inner values are read later, from what is kept."""
    _, args, kwargs, _, written, *_ = event
    read = args, {name: arg for name, arg in (kwargs or {}).items() if name != "out"}
    return bool(written) and any(touches(tensor, written) for _, tensor in leaves(read))
