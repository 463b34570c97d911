"""One outermost call of a tracked model: its values by ID, its graph and its output."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import islice
from typing import Any, cast, overload
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fmr.edits.frames import Columns, Frames, Pasts
from fmr.edits.places import read
from fmr.errors import IdError, RandomError, TrackError, nearest, number_of
from fmr.graph.build import Builder
from fmr.graph.expand import inner_value
from fmr.graph.graph import Graph
from fmr.graph.paths import node_among, returned, the_one
from fmr.graph.places import check_place
from fmr.graph.state import casts_now
from fmr.ids import Site, TensorId, outer_scope
from fmr.nests import Nest, ids_in, map_ids
from fmr.nodes import Key, Node, id_of
from fmr.pictures.notebook import preformatted
from fmr.runs.failures import Failure
from fmr.runs.gradients import Gradients
from fmr.runs.listener import Heard
from fmr.runs.outputs import detached, exchanged
from fmr.watching.guard import Guard
from fmr.watching.inside import Met
from fmr.watching.own import alone, unseen
from fmr.watching.storage import is_equal, is_freed, storages
from fmr.watching.tape import ENTER, EXIT, Slot, Tape

last_graph: "WeakKeyDictionary[nn.Module, Graph]" = WeakKeyDictionary()
"""The graph recorded last of each living model: what a later run is compared with when it misses an ID."""


def graph_of(builder: Builder, module: nn.Module) -> Graph:
    """The graph of a pass that a builder has seen as a whole, or as far as it went; it was a call of this module."""
    graph = last_graph[module] = Graph(
        builder.nodes, builder.scopes, builder.kind, builder.names.same, builder.edited, builder.asked
    )
    return graph


class Pass:
    """One outermost call of the tracked model, or of a module of it: its values by ID, its graph and its output.

    A pass is made `of_tape`, `of_file`, or empty, and then takes values through `keep` while the model runs.
    """

    def __init__(self, history: bool, settle: "Callable[[Pass], None] | None" = None) -> None:
        self.output: Nest = None
        self.history = history
        self.heard = Heard()
        self.stored_grads: Mapping[TensorId, Tensor] = {}
        self.heard_at: dict[TensorId, Slot] = {}
        self.live: dict[TensorId, tuple[Tensor, int]] = {}
        self.unsaved: Mapping[TensorId, str] = {}
        self.places: dict[TensorId, str] = {}
        self.columns: Columns | Callable[[], Frames] | None = None
        self.edited: tuple[TensorId, ...] = ()
        self.inside: dict[TensorId, Tensor] = {}
        self.inside_scopes: set[str] = set()
        self.values: dict[TensorId, Tensor] = {}
        self.returned: dict[TensorId, Nest] = {}
        self.slots: dict[TensorId, Slot | None] = {}
        self.saved: Mapping[Slot, Tensor] = {}
        self.lost: Set[Slot] = frozenset()
        self.apart, self.error, self.number = False, "", 0
        self.cast, self.casts = "", casts_now()
        self.raised: tuple[str, str] | None = None
        self._graph: Graph | None = None
        self._tape: Tape | None = None
        self._builder: Builder | None = None
        self._pending = settle
        self._opened: tuple[str, Met] | None = None

    @classmethod
    def of_tape(cls, tape: Tape, guard: Guard, history: bool) -> "Pass":
        """A pass whose graph and values are read off its tape when they are first asked for."""
        here = cls(history, lambda here: here._from_tape(tape, guard))
        here._tape, here.lost = tape, guard.lost
        return here

    def follow(self, begun: bool = False) -> Builder | None:
        """Turn the events so far of its tape into nodes, with the shapes of now; with `begun`, only if this had begun."""
        if self._tape is None or (begun and self._builder is None):
            return None
        with unseen():
            builder = self._builder = self._builder or Builder(self._tape)
            for event in islice(self._tape.events, builder.seen, None):
                builder.feed(event)
        return builder

    def _from_tape(self, tape: Tape, guard: Guard) -> None:
        guard.look()
        builder = self.follow()
        assert builder is not None
        if isinstance(self.columns, Columns) and self.columns.is_open:
            _hear(self.columns, tape)
        self.slots = dict(zip((node.id for node in builder.nodes), builder.slots, strict=True))
        values = zip(builder.nodes, builder.values, strict=True)
        self.values = {node.id: value for node, value in values if value is not None}
        self.end(graph_of(builder, tape.start.module), guard, builder.raised)
        if builder.calls:  # read while the model runs: what follows is still to come
            self._pending = lambda here: here._from_tape(tape, guard)
        else:
            self._tape = self._builder = None

    @classmethod
    def of_file(
        cls,
        history: bool,
        values: Mapping[TensorId, Tensor],
        grads: Mapping[TensorId, Tensor],
        lost: Iterable[TensorId],
        unsaved: Mapping[TensorId, str],
        returned: Mapping[TensorId, Nest],
        graph: Callable[[], Graph] | None,
    ) -> "Pass":
        """A pass that was saved; `unsaved` says of an ID why its value was left out, `graph` is called on first use."""

        def settle(here: Pass) -> None:
            here._graph = graph() if graph is not None else None

        here = cls(history, settle)
        here.values, here.unsaved, here.returned = cast("dict[TensorId, Tensor]", values), unsaved, dict(returned)
        here.slots, here.stored_grads, here.apart, here.casts = dict.fromkeys(lost), grads, True, ()
        return here

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pass":
        """A pass with its own copies of the values, the gradients and the output, and with none of their history."""
        self._settle()
        return alone(lambda: self._copy(memo))

    def _copy(self, memo: dict[int, Any]) -> "Pass":
        graph, known = self._graph, Gradients(self).items() if self.history else ()
        values = deepcopy({name: self._value(name).detach() for name in self.values}, memo)
        grads = deepcopy({TensorId(name): grad.detach() for name, grad in known}, memo)
        lost = [name for name, slot in self.slots.items() if slot is None]
        made = Pass.of_file(self.history, values, grads, lost, self.unsaved, self.returned, None)
        made._graph, made._pending, made.places, made.columns = graph, None, dict(self.places), self.columns
        made.cast, made.casts, made.number = self.cast, self.casts, self.number
        made.output, made.error, made.raised = deepcopy(detached(self.output), memo), self.error, self.raised
        return made

    def replayed(self, changed: Mapping[TensorId, Tensor], stale: Iterable[TensorId], edited: Iterable[TensorId]) -> "Pass":
        """This pass with other values; those that were not computed again are gone."""
        here = type(self)(self.history)
        gone = dict.fromkeys(stale)
        here.values = {name: value for name, value in self.values.items() if name not in gone} | dict(changed)
        here.slots = {name: slot for name, slot in self.slots.items() if name not in changed and name not in gone}
        here.unsaved = {name: f"{name!r} was not computed in this replay. Name it: want=[{name!r}]." for name in gone}
        here._graph, here.saved, here.edited, here.columns = self._graph, self.saved, tuple(edited), self.columns
        here.casts, here.number = self.casts, self.number
        if (
            self.output is not None
            and self._graph is not None
            and not gone.keys() & set(ids_in(self._graph.scopes[0].output))
        ):
            here.output = exchanged(self.output, self._graph.scopes[0].output, changed.get)
        return here

    def frames(self) -> Frames:
        """What the pass tells about positions; one from a file of an earlier version, as far as it kept its inputs."""
        self._settle()
        if self.columns is not None:
            return self.columns()
        named = {name.partition(":")[2]: self.values[name] for name in self.values if name.startswith("input:")}
        return Pasts().frames_of(named)()

    # ---- filling, while the model runs

    def keep(self, name: TensorId, value: Tensor, slot: Slot | None = None, heard_at: Slot | None = None) -> None:
        """Take one value; the slot is where a copy will lie, and its gradient if that is not `heard_at` another one."""
        self.values[name] = value
        if slot is not None:
            self.slots[name] = slot
        if heard_at is not None:
            self.heard_at[name] = heard_at

    def end(self, graph: Graph, guard: Guard, raised: tuple[str, str] | None) -> None:
        """Take the graph of the whole pass, the copies of what was overwritten, what is lost, and which call raised."""
        self._graph, self.saved, self.lost, self.raised = graph, guard.saved, guard.lost, raised
        self.edited = graph.edited

    def _settle(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending(self)
        for name in [name for name, slot in self.slots.items() if slot in self.lost] if self.lost else ():
            self.slots[name] = None
            self.values.pop(name, None)

    # ---- reading

    @property
    def graph(self) -> Graph:
        """The graph of this pass, built when it is first asked for."""
        self._settle()
        if self._graph is None:
            raise TrackError(
                "This run read a few IDs and recorded no graph. Expected a run with keep='all', keep='none' or a glob over "
                "IDs; fmr.run(model, *inputs, keep='none').graph records the graph alone."
            )
        return self._graph

    @property
    def failed(self) -> Failure | None:
        """The module call that raised, after which value and what; None if the pass came to its end."""
        self._settle()
        return Failure(*self.raised, self.error) if self.raised is not None else None

    @property
    def kept(self) -> tuple[TensorId, ...]:
        """The IDs whose values this pass holds.

        They are a subclass of str, and `torch.load` takes plain ones alone: save `{str(id): run[id] for id in ...kept}`.
        """
        self._settle()
        return tuple(self.values)

    def __contains__(self, key: Key) -> bool:
        self._settle()
        if id_of(key) in self.values:
            return True
        try:
            return self[id_of(key)] is not None
        except IdError:
            return False

    @overload
    def __getitem__(self, key: TensorId | Node | Site) -> Tensor: ...

    @overload
    def __getitem__(self, key: Key) -> Any: ...

    def __getitem__(self, key: Key) -> Any:
        """The value of an ID, a node or a site; inner values of fused ops are computed here.

        For the path of a module it is what its call returned: a tensor, or the tensors of a tuple or a dict as they stood
        there, with "h.3.attn:0" for one of them.
        """
        self._settle()
        return alone(lambda: self._read(key))

    def _read(self, key: Key) -> Any:
        name = id_of(key)
        names = self.named(name)
        if isinstance(key, Site):
            check_place(key, self.places, self._graph)
            return self._at(key, self._value(the_one(name, names)))
        return map_ids(self._value, names)

    def _at(self, site: Site, value: Tensor) -> Tensor:
        """The part of a value, or of its gradient, that an edit of the site would be given."""
        return read(site, value, self.frames() if site.positions is not None else [])

    def named(self, name: TensorId) -> Nest:
        """The IDs under which what a key names is kept: the ID itself, or a nest of them for what a module call returned."""
        self._settle()
        if name in self.values or not name.is_path:
            return name
        if self.returned.get(name) is not None:
            return self.returned[name]
        if self._graph is not None:
            return returned(self._graph, name, self.names)
        raise IdError(f"This run did not keep {str(name)!r}.{nearest(name, self.names())}")

    def names(self) -> tuple[TensorId | str, ...]:
        """Everything that can be asked for by name: kept IDs, and the module calls whose output is kept."""
        self._settle()
        calls = self._graph.calls.items() if self._graph is not None else ()
        done = (path for path, call in calls if call.output is not None and self.values.keys() >= set(ids_in(call.output)))
        return (*self.values, *(name for name, nest in self.returned.items() if nest is not None), *done)

    def reached(self, name: TensorId) -> bool:
        """Whether what was asked for by this name was met."""
        if not name.is_path:
            return name in self.values
        with suppress(IdError):
            return self.named(name) is not None
        return False

    def as_read(self, name: TensorId) -> Tensor:
        """A value as the ops of the pass read it: with its history, since some kernels round by whether there is one."""
        self._settle()
        return self._kept(name)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Inside the block what a kernel makes on its way to a value is held until another kernel is asked for one."""
        self._settle()
        self._opened = "", {}
        try:
            yield
        finally:
            self._opened = None

    def _value(self, name: TensorId) -> Tensor:
        if name in self.live:
            tensor, version = self.live[name]
            if tensor._version == version and not is_freed(tensor) and is_equal(tensor, self.values[name]):
                return tensor
        value = self._kept(name)
        return value if self.history else value.detach()

    def _kept(self, name: TensorId) -> Tensor:
        if name in self.inside:
            return self.inside[name]
        slot = self.slots.get(name)
        value = self.saved[slot] if slot is not None and slot in self.saved else self.values.get(name)
        if value is None:
            return self._inner(name)
        if is_freed(value):
            raise IdError(
                f"The memory of {str(name)!r} was freed after fmr recorded it, as sharded weights are. Read it in a run of "
                f"its own, which copies it: fmr.run(model, *inputs, keep=[{str(name)!r}])."
            )
        return value

    def _inner(self, name: TensorId) -> Tensor:
        if name in self.unsaved:
            raise IdError(self.unsaved[name])
        if self._graph is None:
            raise IdError(f"This run did not keep {str(name)!r}.{nearest(name, self.values)}")
        node = node_among(self._graph, name, self.names)
        owner = self._graph.fused.get(outer_scope(name))
        if owner is None:
            raise IdError(self._why_missing(name))
        try:
            read = {parent: self._value(parent.id) for parent in owner.parents}
        except IdError:
            if any(parent in self.unsaved for parent in owner.parents):
                raise
            raise IdError(self._why_missing(name)) from None
        opened, met = self._opened or ("", {})
        met = met if opened == owner.id else {}
        value = met[name] if name in met else inner_value(name, owner, read, met=met)
        self._opened = (owner.id, met) if self._opened is not None else None
        if value is None:
            raise RandomError(
                f"{str(name)!r} depends on the random mask of {owner.id}, which the kernel does not give. "
                f"Expected a value before its dropout; or run the model in eval mode."
            )
        return value.to(node.dtype)

    def _heard_at(self, name: TensorId) -> Slot | None:
        return self.heard_at.get(name) or self.slots.get(name)

    def _why_missing(self, name: TensorId) -> str:
        if name in self.slots and self.slots[name] is None:
            return (
                f"{str(name)!r} was overwritten in place later in the pass and fmr could not see what made it, so its "
                f"value is gone. Read it in a run of its own: fmr.run(model, *inputs, keep=[{str(name)!r}])."
            )
        return f"This run did not keep {str(name)!r}. Ask for it when tracking: keep=[{str(name)!r}] or keep='all'."

    @property
    def grad(self) -> "Gradients":
        """The gradients of the kept values, by ID, after `backward()`; the run must be tracked with grad=True."""
        self._settle()
        return Gradients(self)

    def __repr__(self) -> str:
        self._settle()
        size = _nbytes(self.values)
        read = f"{number_of(len(self.values), 'ID')} read, no graph"
        head = repr(self._graph).partition("\n")[0] if self._graph is not None else read
        failed = f"\n  {self.failed}" if self.failed is not None else ""
        return f"{head}; {number_of(len(self.values), 'value')} kept, {size / 2**20:.1f} MB{failed}"

    _repr_html_ = preformatted


def _hear(columns: Columns, tape: Tape) -> None:
    """Let what calls inside a pass were given tell which columns are real, where its own arguments do not."""
    columns.is_open, inside = False, 0
    for head, *event in tape.events:
        if head is ENTER:
            module, args, kwargs, _ = event
            inside = inside + 1 if inside else int(columns.hear(module, args or (), kwargs or {}))
        elif head is EXIT and inside:
            inside -= 1


def _nbytes(values: Any) -> int:
    """The memory under the values beside the model's own, or their size in the file where they were not read from it."""
    stored: int | None = getattr(values, "nbytes", None)
    if stored is not None:
        return stored
    own = {one._cdata for one in storages(value for name, value in values.items() if name.startswith(("param:", "buffer:")))}
    return sum(storage.nbytes() for storage in storages(values.values()) if storage._cdata not in own)
