"""The watcher that edits: a reader of a plan that also replaces what was made there, before the model goes on with it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from fmr.edits.editor import Editor
from fmr.edits.frames import Frames, Pasts
from fmr.edits.hearing import Hearing
from fmr.edits.inside import edited_inside
from fmr.edits.left import Left
from fmr.edits.memory import Replaced, Reserved, is_unchanged, refuse_twice, shares
from fmr.errors import EditError
from fmr.ids import TensorId
from fmr.nests import Nest, item_at, leaves, mapped, outputs, taken
from fmr.ops.names import WRITE, Op
from fmr.watching.mode import written_by
from fmr.watching.own import alone
from fmr.watching.plan import Plan, Want
from fmr.watching.recorder import call_site
from fmr.watching.scopes import Call, Names, Start, name_inputs, named_arguments, walk
from fmr.watching.sites import where_of
from fmr.watching.storage import is_equal

Told = Callable[[Tensor, Tensor, bool], None]
"""Is told of a tensor that stands for another from now on; of the same one twice where it was edited in place.

The last says that the other was handed on by a call, whose caller still has it.
"""


class Editing(Hearing):
    """Runs a plan and the edits of an `editor`: what is read is what the model goes on with.

    `told` hears of each edit, `told_inside` of a fused op that was edited inside, and of its inner values as they are then.
    """

    def __init__(
        self,
        root: nn.Module | None,
        plan: Plan,
        editor: Editor,
        hears: tuple[Any, Any, Any],
        stop: bool = False,
        told: Told | None = None,
        told_inside: Callable[[str, dict[TensorId, Tensor]], None] | None = None,
    ) -> None:
        super().__init__(root, plan, *hears, stop)
        self.editor, self.told, self.told_inside = editor, told, told_inside
        self.replaced: list[Replaced] = []
        self.pasts, self.left = Pasts(), Left()
        self.grads, self.swaps = False, ""
        self.note: Callable[[Callable[[], Frames]], None] = lambda frames: None

    # ---- a pass

    def record(self, proceed: Callable[..., Any], start: Start, args: Any, kwargs: Any) -> Any:
        """Run a call as a pass, with edited inputs, parameters and buffers."""
        root = start.module if self.root is None else self.root
        given = dict(name_inputs(start.called, args, kwargs)) if self.editor.of_sources else {}
        frames = self.pasts.frames_of(named_arguments(start.called, args, kwargs))
        self.note(frames)
        self.editor.begin(frames)
        self.hear(frames, start.called, self.editor.of_positions)
        args, kwargs = self._inputs(given, args, kwargs)
        self.replaced.clear()
        self.grads = torch.is_grad_enabled()
        with self.left.noting(root), self._swapped(root, on_meta=all(tensor.is_meta for tensor in given.values())):
            out = super().record(proceed, start, args, kwargs)
        for one in self.replaced:
            one.check()
        self.replaced.clear()
        return out

    def _inputs(self, given: dict[str, Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with edited tensors in them; what was passed in stays as it is."""
        wanted = [name for name in self.editor.ids if name.startswith("input:") and name in given]
        if not wanted:
            return args, kwargs
        new = {id(given[name]): self._edited(name, given[name]) for name in wanted}
        for name in wanted:
            refuse_twice(name, given[name], given.values())
        made: tuple[Any, Any] = _exchanged((args, kwargs), new, str(wanted[0]))
        return made

    @contextmanager
    def _swapped(self, root: nn.Module, on_meta: bool) -> Iterator[None]:
        """Edited parameters and buffers in the places of the model's own, for the pass alone."""
        wanted = [name for name in self.editor.ids if name.startswith(("param:", "buffer:"))]
        if not wanted:
            yield
            return
        own = dict(Names(root).tensors.values())
        places: list[tuple[Any, Any, Tensor, Tensor, Tensor]] = []
        reserved = Reserved(wanted[0], (own[name] for name in wanted if name in own))
        try:
            for name in wanted:
                if name in own:
                    if own[name].is_meta and not on_meta:
                        raise EditError(
                            f"{str(name)!r} is offloaded: it is loaded when its module runs, over any edit. Edit the output "
                            f"of the module, or the model before it is offloaded."
                        )
                    new = self._edited(name, own[name])
                    if name.startswith("buffer:") and is_unchanged(new, own[name]):
                        continue  # what the model writes into it is its own
                    if own[name].requires_grad and not new.requires_grad:  # by which some kernels round
                        new = new.detach().requires_grad_()
                    for held, key in _places(root, own[name]) if new is not own[name] else ():
                        before = new.detach().clone() if name.startswith("buffer:") else new
                        places.append((held, key, own[name], new, before))
                        reserved.add(new)  # which another run takes for the model's own
                        held[key] = new
            self.swaps = str(wanted[0]) if places else ""
            yield
            if any(held[key] is not new or not is_equal(new, before) for held, key, _, new, before in places):
                raise EditError(
                    f"The model wrote into what stands for {', '.join(map(repr, map(str, wanted)))} in this pass. An edit "
                    f"lasts for the pass alone, so that the write would be lost: edit what reads it instead."
                )
        finally:
            self.swaps = ""
            for held, key, tensor, *_ in reversed(places):
                held[key] = tensor
            reserved.release()

    # ---- values

    def _edited(self, name: TensorId, value: Tensor, given: Tensor | None = None) -> Tensor:
        grad = torch.is_grad_enabled()

        def work() -> Tensor:
            with torch.set_grad_enabled(grad):
                return self.editor.apply(name, value, given)

        new = alone(work)
        if new is not value and self.grads and self.editor.edits_value(name):
            self.check_computed_once(str(name))
        return new

    def check_computed_once(self, name: str) -> None:
        """Raise where what runs now is computed again when gradients come back, without any edit."""
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not Editing.record.__code__:
            if frame.f_code.co_filename == checkpoint.__file__:
                raise EditError(
                    f"{name!r} is read inside torch.utils.checkpoint, which computes it again without the edit when "
                    f"gradients come back: they would be wrong. Expected a run without gradients, or no checkpoints."
                )
            frame = frame.f_back  # type: ignore[assignment]

    def _run(self, op: Op, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Call a function; of an edited one that writes in place, autograd saves copies, since the edit writes once more."""
        number = self._here.ops.get(op.name, 0) if self._here is not None else 0
        wants = self._wanted.get(op.name, {}).get(number, ()) if op.kind == WRITE and self._wanted is not None else ()
        if not (wants and torch.is_grad_enabled() and any(want.id in self.editor.by_id for want in wants)):
            return super()._run(op, func, args, kwargs)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved):
            return super()._run(op, func, args, kwargs)

    def _made(self, op: Op, name: str, wants: list[Want], made: Nest, out: Any, args: Any, kwargs: Any, read: Any) -> Any:
        """Edit what an op made, then read what is planned."""
        self._check_places(wants)
        written = {id(tensor) for tensor in written_by(op, args, kwargs)}
        own = dict(outputs(made))
        now = {index: self._apart(tensor) if id(tensor) in written else tensor for index, tensor in own.items()}
        before = dict(now)
        inner = [want.id for want in wants if want.inside and want.id in self.editor.by_id]
        if inner:
            changed, values = edited_inside(op.name, name, read[0], read[1], now, inner, self._edited)
            now.update(changed)
            if self.told_inside is not None:
                self.told_inside(name, values)
            for want in wants:
                if want.inside and want.id in values:
                    self._found(want.id, values[want.id], False)
            wants = [want for want in wants if not (want.inside and want.id in values)]
        for want in wants:
            if not want.inside and want.id in self.editor.by_id and want.output in now:
                now[want.output] = self._edited(want.id, now[want.output])
        new: dict[int, Tensor] = {}
        for index, value in now.items():
            if value is not before[index]:
                shared = shares(own[index], (args, kwargs))
                if shared and id(own[index]) not in written and is_unchanged(value, own[index]):
                    continue
                self._replace(
                    TensorId(name if index is None else f"{name}:{index}"), own[index], value, new, written, shared
                )
        if new:
            made, out = (mapped(nest, lambda tensor: new.get(id(tensor), tensor)) for nest in (made, out))
        return super()._made(op, name, wants, made, out, args, kwargs, read)

    @staticmethod
    def _apart(written: Tensor) -> Tensor:
        """What an op has written, as an edit is given it: a copy where the history of the edit will hold it."""
        return alone(written.clone) if torch.is_grad_enabled() else written

    def _check_places(self, wants: list[Want]) -> None:
        """Raise where the op that made values to edit is not called where their sites were found."""
        entries = (entry for want in wants for entry in self.editor.by_id.get(want.id, ()))
        for entry in entries:
            if entry.site.where is not None and entry.meets(self.editor.number):
                entry.site.check_made_at(where_of(*call_site(sys._getframe())))

    def _replace(
        self, name: TensorId, old: Tensor, value: Tensor, new: dict[int, Tensor], written: set[int], shared: bool
    ) -> None:
        """Note what stands for a tensor from now on; one that was written in place is written once more."""
        if id(old) in written:
            alone(lambda: old.copy_(value))
            self._tell(old, old)
            return
        new[id(old)] = value
        self._tell(value, old)
        self.replaced.append(Replaced.now(name, old, value, shared))

    def _tell(self, new: Tensor, old: Tensor, apart: bool = False) -> None:
        if self.told is not None:
            self.told(new, old, apart)

    def _returned(self, here: Call, out: Nest, args: Any, kwargs: Any) -> Nest:
        """Edit what a module call returned, then read it."""
        for name, at in self.plan.returned_by(here.path):
            if name in self.editor.by_id:
                given = next((tensor for _, tensor in leaves((args, kwargs))), None)
                out = self._edited_output(name, at, here, out, given, (args, kwargs))
        return super()._returned(here, out, args, kwargs)

    def _edited_output(self, name: TensorId, at: str, here: Call, out: Nest, given: Tensor | None, read: Any) -> Any:
        """What a module call returned with the one tensor that is meant edited."""
        whole = out.__class__ is Tensor and not at
        tensors = [out] if whole else [tensor for _, tensor in leaves(item_at(taken(out), at))]
        if len(tensors) != 1:
            places = ", ".join(repr(f"{here.path}:{place}") for place, _ in leaves(taken(out)))
            raise EditError(f"{str(name)!r} returned {len(tensors)} tensors, expected one. Name one of them: {places}.")
        old = tensors[0]
        value = self._edited(name, old, given)
        if value is old:
            return out
        shared = shares(old, read)
        if shared and is_unchanged(value, old):
            return out
        if not whole:
            refuse_twice(name, old, [tensor for _, tensor in leaves(taken(out))])
        self._tell(value, old, isinstance(old, nn.Parameter) or any(tensor is old for _, tensor in leaves(read)))
        self.replaced.append(Replaced.now(name, old, value, shared))
        return value if whole else _exchanged(out, {id(old): value}, str(name))


class EditingSources(Editing):
    """The same where inputs, parameters or buffers are edited, which any module call may read."""

    def call(self, proceed: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Run a module call."""
        if self.swaps and self.grads:
            self.check_computed_once(self.swaps)
        return super().call(proceed, module, args, kwargs)


def _exchanged(nest: Nest, new: dict[int, Tensor], name: str) -> Any:
    """A nest with other tensors in it, each of which must have a place there that can be exchanged."""
    met = set()

    def change(tensor: Tensor) -> Tensor:
        met.add(id(tensor))
        return new.get(id(tensor), tensor)

    made = mapped(nest, change)
    if not new.keys() <= met:
        raise EditError(f"{name!r} lies inside an object, which is not taken apart. Edit the value that is put in or read.")
    return made


def _places(root: nn.Module, own: Tensor) -> list[tuple[Any, Any]]:
    """Where the modules of a tree hold a tensor: tied ones in several places, recurrent layers in a list as well."""
    found: list[tuple[Any, Any]] = []
    for _, module in walk(root):
        for held in (module._parameters, module._buffers):
            found += [(held, key) for key, tensor in held.items() if tensor is own]
        for listed in vars(module).values():
            if type(listed) is list:
                found += [(listed, place) for place, item in enumerate(listed) if item is own]
    return found
