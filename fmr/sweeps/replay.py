"""A recorded pass run again from its graph: what an edit reaches and what is wanted, without the model's Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fmr.edits.editor import Editor
from fmr.edits.inside import kept_bits
from fmr.edits.values import Edit, Replace
from fmr.errors import EditError, ReplayError
from fmr.graph.state import BY_KERNEL, casting, kernels
from fmr.ids import Site, TensorId, outer_op, outer_scope, within
from fmr.nests import ids_in
from fmr.nodes import Key, Node, id_of, keys_of, scope_of
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.runs.sources import read_source
from fmr.sweeps.edges import Carrying, Edge
from fmr.sweeps.questions import reached_by, sized_by_values
from fmr.sweeps.steps import Read, Step, refuse_resized, refuse_unknown, run_step, steps_of
from fmr.watching.calls import unwatched
from fmr.watching.storage import is_equal


def replay(
    run: Run | Pass,
    edits: Mapping[Key | Edge, Edit | Sequence[Edit]] | None = None,
    *,
    freeze: Key | Iterable[Key] = (),
    want: Key | Iterable[Key] | None = None,
) -> Run:
    """Run the part of a recorded pass again that edits reach, with the same bits as the model under the same edits.

    >>> patched = fmr.replay(run, edits={block.z.at(heads=1): edits.Zero()}, freeze=[b.z for b in structure.attention[4:]])
    >>> patched.output.logits - run.output.logits

    run: one with every value (keep="all"), or a pass of it. edits: by site, or by `Edge` for what one reader sees. freeze:
    sites that keep what they are without edits, but for edits of themselves. want: what to compute, by default the output
    of the model; what changed on the way can be read from the result too.

    What cannot be run again is a `ReplayError` that names it: values whose producer was not seen, active dropout, a value
    that an op handed on, a size that an edit changes, a number that an edit changes and the model's Python asked for
    (`if x.max() > 1`). A run in which `want` leaves the model's output out has the output None.
    """
    if not isinstance(run, (Run, Pass)):
        raise ReplayError(
            f"run is {type(run).__name__}, expected a recorded run: fmr.replay(fmr.run(model, *inputs), edits), or "
            f"fmr.replay(fmr.load(path), edits)."
        )
    if edits is not None and not isinstance(edits, Mapping):
        raise EditError(
            f"edits is {type(edits).__name__}, expected a mapping from sites or edges to edits: {{site: edits.Zero()}}."
        )
    return Replay(run.last if isinstance(run, Run) else run, edits or {}, freeze, want).run()


@dataclass(frozen=True)
class Outside:
    """The edited output of a module call, for whoever reads it outside that call."""

    path: str
    value: Tensor


class Replay:
    """One replay under way: the values that changed so far, over those of the recording."""

    def __init__(self, base: Pass, asked: Mapping[Any, Any], freeze: Any, want: Any) -> None:
        self.base, self.graph = base, base.graph
        if base.edited:
            raise ReplayError(
                "This run was recorded with edits. Expected one without: edits are given to the replay itself."
            )
        if base.cast:
            raise ReplayError(
                f"This run was kept with {base.cast}, and its ops read other values than these. Expected one with values "
                f"as the model made them: record it without to= and dtype=."
            )
        self.steps = steps_of(self.graph)
        self.frozen: set[TensorId] = set()
        self.changed: dict[TensorId, Tensor] = {}
        self.needed: set[TensorId] = set()
        self.outside: dict[TensorId, Outside] = {}
        self.editor = self._editor(self._held(freeze, {key: edit for key, edit in asked.items() if type(key) is not Edge}))
        edges = [(edge, self._editor({edge.writer: edit})) for edge, edit in asked.items() if type(edge) is Edge]
        self.edges = [Carrying(edge, editor, self.steps, self.graph) for edge, editor in edges]
        self.returned = {self._returned(name): name for name in self.editor.ids if name.is_path}
        self.wanted = self._wanted(want)
        end = self._end(want)
        self.asked = {name: where for name, where in self.graph.asked.items() if self.graph.place(name) < end}
        self.sized = self._sized(end)
        self.opened = {outer_scope(name) for name in (*self.editor.ids, *self.frozen, *self.wanted)} - {""}

    # ---- what is asked for

    def _editor(self, asked: Mapping[Any, Any]) -> Editor:
        editor = Editor(asked, read_source)
        editor.number = self.base.number - 1
        editor.begin(lambda: self.base.frames())
        return editor

    def _held(self, freeze: Any, asked: Mapping[Key, Any]) -> dict[Key, Any]:
        """What is frozen in part, as edits that come before those asked for; what is frozen as a whole is noted."""
        found: dict[Key, Any] = {}
        for key in keys_of(freeze):
            if isinstance(key, Site) and key.selection:
                found[key] = Replace(self.base[key])
            else:
                self.frozen.update(self._ids(id_of(key)))
        for key, edit in asked.items():
            own = list(edit) if isinstance(edit, (list, tuple)) else [edit]
            found[key] = [found[key], *own] if key in found else own
        return found

    def _ids(self, name: TensorId) -> list[TensorId]:
        """The ID of a value, or those of what a module call returned."""
        return list(ids_in(self.graph.module(name).scope.output)) if name.is_path else [self.graph[name].id]

    def _wanted(self, want: Any) -> set[TensorId]:
        if want is None:
            return set(ids_in(self.graph.scopes[0].output))
        return {name for key in keys_of(want) for name in self._ids(id_of(key))}

    def _returned(self, path: TensorId) -> TensorId:
        """The one value that a module call returned and that it made itself, so that nobody else has it."""
        names = self._ids(path)
        if len(names) != 1:
            raise EditError(f"{str(path)!r} returned {len(names)} values: {', '.join(names)}. Edit one of these.")
        made = self.graph[names[0]]
        while within(made.module, path) and (given := self._handed(made)) is not None:
            made = given
        if not within(made.module, path):
            raise ReplayError(_HANDED.format(repr(str(path)), made.id))
        return names[0]

    def _handed(self, node: Node) -> Node | None:
        """The value whose very tensor an op returned, as `x.to(x.dtype)` does."""
        value = self.base.values.get(node.id)
        if value is None or node.id.is_source:
            return None
        return next((self.graph[parent] for parent in node.parents if self.base.values.get(parent.id) is value), None)

    def _read_once(self, given: Node, node: Node) -> bool:
        """Whether a tensor that was handed on is read in one place alone, and before by nobody else, so by its new name."""
        places = [one for reader in self.graph.readers(node.id) for one in reader.parents if one == node.id]
        returned = {given.id, node.id} & set(ids_in(self.graph.scopes[0].output))
        return len(places) == 1 and self.graph.readers(given.id) == (node,) and not returned

    def _end(self, want: Any) -> int:
        """How many values were made when all that is wanted was."""
        nodes, keys = self.graph.nodes, [] if want is None else keys_of(want)
        ends = [0 if want is not None else len(nodes), *(self.graph.place(outer_op(name)) for name in self.wanted)]
        paths = [self.graph.module(id_of(key)).scope.path for key in keys if id_of(key).is_path]
        ends += [place + 1 for place, node in enumerate(nodes) if any(within(node.module, path) for path in paths)]
        return max(ends)

    def _sized(self, end: int) -> set[TensorId]:
        """What is made before and has as many elements as edits may say, by which the model's Python may go."""
        sized = [(node, by) for node, by in sized_by_values(self.graph) if self.graph.place(node.id) < end]
        if not sized:
            return set()
        readers = [name for edge in self.edges for name in edge.readers]
        made = [node.id for step in self.steps if step.first.id in readers for node in step.nodes]
        reached = reached_by(self.graph, [*self._edited, *made], self.frozen)
        names = {node.id for node, by in sized if not by.isdisjoint(reached) or node.id in readers}
        return names - self.frozen

    # ---- running

    def run(self) -> Run:
        """Walk the steps that matter, and hand out a run with what changed."""
        needed = self.needed = self._needed()
        with unwatched(), torch.set_grad_enabled(self.base.history), casting(self.base.casts), no_draws():
            for step in self.steps:
                if any(node.id in needed for node in step.nodes):
                    self._take(step)
            return self._result()

    @property
    def _edited(self) -> set[TensorId]:
        return {name for name in self.editor.ids if not name.is_path} | set(self.returned)

    def _needed(self) -> set[TensorId]:
        """What is wanted or edited, and all that it depends on, up to what is frozen."""
        needed = {outer_op(name) for name in self.wanted | self._edited | self.asked.keys()} | self.sized
        needed.update(name for edge in self.edges for name in edge.readers)
        for step in reversed(self.steps):
            if any(node.id in needed and node.id not in self.frozen for node in step.nodes):
                needed.update(step.reads)
        return needed

    def _take(self, step: Step) -> None:
        """Run a step if something that it reads has changed, and edit what it made."""
        refuse_unknown(step, bool(self.changed or self.outside))
        edges = [edge for edge in self.edges if step.first.id in edge.readers]
        opened = bool(self.opened) and not step.is_source and scope_of(step.first) in self.opened
        if edges or opened or any(name in self.changed or name in self.outside for name in step.reads):
            read = self._reader(step)
            for edge in edges:
                read = edge.read(step, read)
            with self._kernel(step):
                made = self._inside(step, read) if opened else run_step(step, read, self.graph.__getitem__)
            made = {name: value for name, value in made.items() if name not in self.frozen}
            for name, value in made.items():
                refuse_resized(name, value, self.graph[name].shape)
            self.changed.update(made)
        for node in step.nodes:
            if node.id in self.editor.by_id:
                self._edit(node)
            if node.id in self.returned:
                path = self.returned[node.id]
                value = self.editor.apply(path, self.value(node.id))
                self.outside[node.id] = Outside(path, value)
            if node.id in self.asked:
                self._refuse_answered(node.id)

    def _refuse_answered(self, name: TensorId) -> None:
        """Raise where the model's Python would be told other numbers than it was."""
        was, outside = self.base.as_read(name), self.outside.get(name)
        if not all(is_equal(value, was) for value in (self.value(name), *((outside.value,) if outside else ()))):
            raise ReplayError(
                f"{name} changes under these edits, and the model's Python asked for its numbers"
                f"{self.asked[name] and f' at {self.asked[name]}'}, so that it may do something else than was recorded. Run "
                f"the model with this edit: fmr.run(model, *inputs, edits=...), or give its value: freeze=[{str(name)!r}]."
            )

    def _kernel(self, step: Step) -> AbstractContextManager[None]:
        """The state in which a step made the recorded bits, where kernels differ."""
        if step.first.op != BY_KERNEL:
            return nullcontext()
        known = _kernels.setdefault(self.base, {})
        if step.first.id not in known:
            was = self.base.as_read(step.first.id)
            for number, kernel in enumerate(kernels(step.first.op)):
                with kernel:
                    if torch.equal(run_step(step, self.base.as_read, self.graph.__getitem__)[step.first.id], was):
                        known[step.first.id] = number
                        break
            else:
                raise ReplayError(f"{step.first.id} was made by another kernel than any that runs here, with other bits.")
        return kernels(step.first.op)[known[step.first.id]]

    def value(self, name: TensorId) -> Tensor:
        """A value as it is now."""
        found = self.changed.get(name)
        return self.base.as_read(name) if found is None else found

    def _reader(self, step: Step) -> Read:
        """How a step reads: the edited output of a module call only from outside that call."""
        if not any(name in self.outside for name in step.reads):
            return self.value
        module = step.first.module

        def read(name: TensorId) -> Tensor:
            found = self.outside.get(name)
            return self.value(name) if found is None or within(module, found.path) else found.value

        return read

    def _edit(self, node: Node) -> None:
        given = self._handed(node)
        if given is not None and not self._read_once(given, node):
            raise ReplayError(_HANDED.format(repr(str(node.id)), given.id))
        value = self.value(node.id)
        new = self.editor.apply(node.id, value)
        if new is not value:
            same = node.id.is_source and value.requires_grad and not new.requires_grad  # by which some kernels round
            self.changed[node.id] = new.detach().requires_grad_() if same else new
        if node.op in ("param", "buffer"):
            self._refuse_hidden_readers(node)

    def _refuse_hidden_readers(self, node: Node) -> None:
        """Code that was not seen may read a parameter without a word."""
        hidden = [one for one in self.graph.opaque if one.id in self.needed]
        if hidden:
            raise ReplayError(
                f"{hidden[0].id} was made by code that could not be seen, which may read {node.id}. Run the model with this "
                f"edit: fmr.run(model, *inputs, edits=...)."
            )

    def _inside(self, step: Step, read: Read) -> dict[TensorId, Tensor]:
        """A fused op with edits inside: its plain form twice, and the kernel's bits wherever the edits changed nothing."""
        kernel = run_step(step, read, self.graph.__getitem__)
        inner = [one for one in steps_of(self.graph.unfused) if within(one.first.scope, scope_of(step.first))]
        ends = [one for one in steps_of(self.graph.unfused) if one.nodes[0].id in kernel]
        plain, edited = (self._plain([*inner, *ends], read, with_edits) for with_edits in (False, True))
        self.changed.update((name, value) for name, value in edited.items() if outer_scope(name))
        return {name: kept_bits(value, plain[name], edited[name]) for name, value in kernel.items()}

    def _plain(self, steps: Sequence[Step], read: Read, with_edits: bool) -> dict[TensorId, Tensor]:
        made: dict[TensorId, Tensor] = {}

        def find(name: TensorId) -> Tensor:
            return made[name] if name in made else read(name)

        for step in steps:
            for name, value in run_step(step, find, self.graph.unfused.__getitem__).items():
                if name in self.frozen:
                    made[name] = self.base[name]
                else:
                    made[name] = self.editor.apply(name, value) if with_edits and name in self.editor.by_id else value
        return made

    # ---- what comes out

    def _result(self) -> Run:
        for entry in (*self.editor.entries, *(entry for edge in self.edges for entry in edge.editor.entries)):
            if not entry.tally.fired:
                raise EditError(f"The edit of {entry.site!r} never fired in this replay: no step of it lies there.")
        found = Run()
        outer = {name: one.value for name, one in self.outside.items()}
        stale = self._stale()
        edited = [entry.site.id for entry in self.editor.entries]
        found.passes.append(self.base.replayed({**self.changed, **outer}, stale, edited))
        found.editors = [self.editor, *(edge.editor for edge in self.edges)]
        return found

    def _stale(self) -> Iterator[TensorId]:
        """What depends on something that changed and was not computed again."""
        reached = {*self.changed, *self.outside}
        for step in self.steps:
            if any(name in reached for name in step.reads):
                for node in step.nodes:
                    if node.id not in reached and node.id not in self.frozen:
                        reached.add(node.id)
                        yield node.id


@contextmanager
def no_draws() -> Iterator[None]:
    """A block that leaves the random state as it was, and may not use it."""
    before = torch.get_rng_state()
    try:
        yield
        drawn = not torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_rng_state(before)
    if drawn:
        raise ReplayError(
            "An op drew random numbers in this replay. Record the model in eval mode, or run it with this edit."
        )


_kernels: WeakKeyDictionary[Pass, dict[TensorId, int]] = WeakKeyDictionary()

_HANDED = (
    "{0} is the very tensor that an op was given, {1}, and a recording does not tell who reads it under which name. Edit "
    "{1} instead, or run the model with this edit: fmr.run(model, *inputs, edits=...)."
)
