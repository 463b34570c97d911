"""From the tape to the graph: each event in turn becomes nodes, edges and scopes."""

import sys
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

from torch import Tensor

from fmr.graph.arguments import sorted_arguments
from fmr.graph.owners import Overwrite, Owner
from fmr.ids import ALIAS, OPAQUE, Parent, TensorId, op_id
from fmr.nests import Nest, ids_in, leaves, map_ids, outputs, tree_map
from fmr.nodes import Node, Scope, shape_of, source_node
from fmr.ops.names import FILLS_NOTHING, Op
from fmr.watching.scopes import Call
from fmr.watching.sites import where_of
from fmr.watching.storage import extent, is_alike, is_dense, overlap, storage_key
from fmr.watching.swaps import Ref
from fmr.watching.tape import (
    ASKED,
    ENTER,
    EXIT,
    INSIDE,
    NAMED,
    RAISED,
    REPLACED,
    WRITTEN,
    Event,
    Slot,
    Tape,
    first_read,
)
from fmr.watching.versions import Versions

_name = lru_cache(maxsize=1 << 15)(op_id)
_made = tuple.__new__  # a NamedTuple's own is Python, which for three of them takes as long as all else of a node


class Builder:
    """Turns the events of one pass into nodes and scopes, one event at a time.

    An ID denotes a value. A tensor object is only looked up by identity while it lives, and a tensor whose storage
    was overwritten through another one since is a new value: an `alias` node, which reads the old view and the write.
    What was overwritten unseen is found by the version that was read with the event; the next reader reads an opaque node,
    whose value is to be had where the builder is fed while the model runs (`live`).
    """

    def __init__(self, tape: Tape, live: bool = False) -> None:
        self._live, self._versions = live, Versions(tape)
        self.names, self.number, self.kind = tape.names, tape.number, type(tape.root).__name__
        self.nodes: list[Node] = []
        self.values: list[Tensor | None] = []
        self.slots: list[Slot | None] = []
        self.scopes: list[Scope] = []  # in the order in which the calls began; a call's output comes when it ends
        self.calls = [Call(tape.start.module, tape.start.path, tape.start.path)]
        self._owners: dict[int, Owner] = {}
        self._writes: dict[int, list[Overwrite]] = {}
        self._places: dict[str, int] = {}
        self._transform: dict[TensorId, None] = {}
        self._was_inside = False
        self._time, self._event = 0, -1
        self.edited: dict[TensorId, None] = {}
        self.asked: dict[TensorId, str] = {}
        self._writing: Collection[int | None] = ()
        self.raised: tuple[str, str] | None = None  # the innermost call that raised, and the last op's value before
        self._raised_at = self._ended = -1
        self._open: list[tuple[int, Nest]] = []
        self._handed_on: list[list[tuple[int, Owner, int]]] = [[]]
        self._last: Nest = None  # what an op made lives until the next, whose reading may show what was made of it
        for name, tensor in tape.inputs:
            self._source(name, tensor)
        self._open_scope(self._given(tape.args, tape.kwargs))

    @property
    def seen(self) -> int:
        """How many events it was given."""
        return self._event + 1

    def feed(self, event: Event) -> None:
        """Take the next event."""
        self._time += 1
        self._event += 1
        head = event[0]
        self._versions.note(event)
        if head.__class__ is Op:
            self._op(*event)
        elif head is ENTER:
            self._enter(*event[1:-1])
        elif head is EXIT:
            self._exit(event[1])
        elif head is INSIDE:
            self._inside(*event[1:-1])
        elif head is NAMED:
            self._placed(*event[1:-1])
        elif head is WRITTEN:
            self._changed(event[1])
        elif head is ASKED:
            self._asked(*event[1:-1])
        elif head is REPLACED:
            self._replaced(*event[1:-1])
        else:
            self._exchange(*event[1:-1])
        self._was_inside = head is INSIDE

    def _inside(self, tensors: tuple[Tensor, ...], written: tuple[Tensor, ...]) -> None:
        """An op inside a functorch transform: what it read from outside, the transform read; what it overwrote, too."""
        if not self._was_inside:
            self._transform = {}
        for tensor in tensors:
            if self._owner(tensor) is not None or self._name(tensor) is not None:
                self._transform[self._id_of(tensor)] = None
        for tensor in written:
            if storage_key(tensor) in {storage_key(t) for t in (o.tensor() for o in self._owners.values()) if t is not None}:
                self._time += 1
                self._add_unseen(tensor, OPAQUE, self._transform)
                self._overwrite(tensor, len(self.nodes) - 1)

    def _changed(self, tensor: Tensor) -> None:
        """A tensor whose storage was written unseen: a new value, which reads the old one."""
        self._add_unseen(tensor, OPAQUE, [self._id_of(tensor)])
        self._overwrite(tensor, len(self.nodes) - 1, whole=True)

    def _asked(self, tensors: tuple[Tensor, ...], code: Any, lasti: int) -> None:
        """Python was told numbers of these tensors at this place."""
        for tensor in tensors:
            self.asked.setdefault(self._id_of(tensor), where_of(code, lasti))

    def _replaced(self, new: Tensor, old: Tensor, apart: bool) -> None:
        """An edit put a tensor in place of another: from now on it holds that one's value.

        Where a call handed on what it was given, that keeps its value `apart`, and the edited one is a value of its own; an
        op that did so left it what it was before.
        """
        owner = self._owner(old)
        if apart:
            before = self._id_of(old)
            self._add_unseen(new, OPAQUE, [before])
            self.edited[self.nodes[-1].id] = None
            scope = self.scopes[self._ended]
            output = map_ids(lambda one: self.nodes[-1].id if one == before else one, scope.output)
            self.scopes[self._ended] = scope._replace(output=output)
        elif owner is not None:
            self.edited[owner.name] = None
            since = owner.since if new is old else self._time
            self._owners[id(new)] = owner._replace(tensor=Ref(new), since=since, version=self._versions.of(new))
            self.values[owner.node] = new
            handed = next((one for key, one, node in self._handed_on[-1] if (key, node) == (id(old), owner.node)), None)
            if handed is not None and new is not old:
                self._owners[id(old)] = handed

    def place_of(self, tensor: Tensor) -> int | None:
        """The place of the node that a tensor stands for."""
        owner = self._owner(tensor)
        return None if owner is None else owner.node

    def _exchange(self, first: Tensor, second: Tensor) -> None:
        """Two tensor objects become each other: each stands for what the other stood for."""
        if any(self._owner(tensor) is not None or self._name(tensor) is not None for tensor in (first, second)):
            for tensor in (first, second):
                self._id_of(tensor)
            a, b = self._owners[id(first)], self._owners[id(second)]
            self._owners[id(first)], self._owners[id(second)] = b._replace(tensor=a.tensor), a._replace(tensor=b.tensor)

    def _enter(self, module: Any, args: Any, kwargs: Any) -> None:
        given = self._given(args, kwargs)
        self.calls.append(self.calls[-1].enter(module, self.names))
        self._handed_on.append([])
        self._open_scope(given)

    def _given(self, args: Nest, kwargs: Nest) -> Nest:
        """The arguments of a call by ID; of what an object holds, what has an ID already."""
        return tree_map(self._id_of, (args, kwargs), self._id_if_met)

    def _open_scope(self, inputs: Nest) -> None:
        self._open.append((len(self.scopes), inputs))
        self.scopes.append(self._scope(inputs, None))

    def _scope(self, inputs: Nest, output: Nest) -> Scope:
        call, above = self.calls[-1], self.calls[-2].path if len(self.calls) > 1 else None
        return Scope(call.path, call.static, type(call.module).__name__, above, inputs, output)

    def _exit(self, out: Any) -> None:
        place, given = self._open.pop()
        self._ended = place
        if out is not RAISED:
            output = self._id_of(out, given) if out.__class__ is Tensor else tree_map(lambda t: self._id_of(t, given), out)
            self.scopes[place] = self._scope(given, output)
        self._note_raised(out is RAISED)
        self.calls.pop()
        self._transform = {}
        self._give_back(out)
        if not self.calls:
            self._owners.clear()
            self._last = None

    def _note_raised(self, raised: bool) -> None:
        """An error passes the calls from within; one that the model catches is followed by other events."""
        if not raised:
            self.raised = None
        elif self.raised is None or self._raised_at != self._event - 1:
            last = next((node.id for node in reversed(self.nodes) if not node.id.is_source), "")
            self.raised = self.calls[-1].path, last
        self._raised_at = self._event if raised else -1

    def _give_back(self, out: Any) -> None:
        """After a call, let a tensor that an op in it handed on (`x.to(x.dtype)` is x) stand for what it was before.

        This is how Python binds names: `x` of the caller is not the `x` of the call, unless the call returns it.
        """
        handed_on = self._handed_on.pop()
        if not handed_on:
            return
        returned = {id(tensor) for _, tensor in leaves(out)} if out is not RAISED else set()
        for key, before, node in reversed(handed_on):
            if key not in returned and self._owners[key].node == node and before.tensor() is self._owners[key].tensor():
                self._owners[key] = before
        if self._handed_on:
            self._handed_on[-1] += [entry for entry in handed_on if entry[0] in returned]

    def _op(
        self, op: Op, args: Any, kwargs: Any, out: Any, written: Any, code: Any, lasti: int, version: Any, _: Any
    ) -> None:
        call = self.calls[-1]
        if written:
            self._writing = {storage_key(tensor) for tensor in written}
        parents, plain = sorted_arguments(args[::-1] if op.reflected else args, kwargs, self._id_of)
        k, where, place = call.number(op.name), where_of(code, lasti), len(self.nodes)
        if written:
            self._time += 1
        several = version.__class__ is tuple
        for index, tensor in ((None, out),) if out.__class__ is Tensor else outputs(out):
            name = _name(call.path, op.name, k, index)
            before = self._owners.get(id(tensor))
            if before is not None and not written and before.tensor() is tensor:
                self._handed_on[-1].append((id(tensor), before, len(self.nodes)))
            self.slots.append(_made(Slot, (self.number, self._event, index, 0, "", False)))
            now = version[len(self.nodes) - place] if several else version
            self._add(tensor, name, op.name, call.path, parents, plain, where, op.function, now)
        if written:
            for tensor in written:
                (self._move if op.moves else self._overwrite)(tensor, place)
            self._writing = ()
        self._last = out if self._live else None

    def _add(
        self,
        tensor: Tensor,
        name: TensorId,
        op: str,
        scope: str,
        parents: tuple[Parent, ...],
        plain: dict[str, Any],
        where: str,
        function: str,
        version: int | None,
    ) -> None:
        owner = (Ref(tensor), len(self.nodes), self._time, name, version)
        node = (name, op, scope, parents, shape_of(tensor), tensor.dtype, tensor.device, plain, where, function)
        self._owners[id(tensor)] = _made(Owner, owner)
        self.nodes.append(_made(Node, node))
        self.values.append(tensor)

    def _add_unseen(self, tensor: Tensor, op: str, reads: Iterable[str]) -> None:
        """A value that no op on the tape made."""
        parents = tuple(Parent(name, str(at)) for at, name in enumerate(dict.fromkeys(reads)))
        call, slot = self.calls[-1], first_read(self.number, self._event, tensor)
        name = op_id(call.path, op, call.number(op))
        self._add(tensor, name, op, call.path, parents, {}, "", "", self._versions.of(tensor))
        self.slots.append(slot)

    def _source(self, name: str, tensor: Tensor) -> None:
        """A value that was there before the pass began, whenever it is met."""
        node, self._places[name] = source_node(name, tensor), len(self.nodes)
        if self._owner(tensor) is None:  # one that was given under two names belongs to the first
            version = self._versions.at_first(tensor)
            self._owners[id(tensor)] = Owner(Ref(tensor), len(self.nodes), 0, node.id, version)
        self.nodes.append(node)
        self.values.append(tensor)
        self.slots.append(Slot(self.number, name=name))

    def _placed(self, name: str, tensor: Tensor, value: Tensor) -> None:
        """A tensor that stands for a parameter from now on: the parameter's value, if no other stood for it before."""
        place = self._places.get(name)
        if place is None:
            place = len(self.nodes)
            self._source(name, tensor)
            self.values[-1], self.slots[-1] = value, first_read(self.number, self._event, value)
        version = self._versions.of(tensor)
        self._owners[id(tensor)] = Owner(Ref(tensor), place, self._time, self.nodes[place].id, version)

    def _owner(self, tensor: Tensor) -> Owner | None:
        owner = self._owners.get(id(tensor))
        return owner if owner is not None and owner.tensor() is tensor else None

    def _name(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer."""
        known = self.names.tensors.get(id(tensor))
        return known[0] if known is not None and known[1] is tensor else None

    def _id_of(self, tensor: Tensor, given: Nest = None) -> TensorId:
        """The ID of the value that a tensor holds now; a tensor not met before becomes a source or an opaque node."""
        owner = self._owners.get(id(tensor))
        if owner is None or owner.tensor() is not tensor:
            name = self._name(tensor)
            if name is not None:
                self._source(name, tensor)
            else:
                self._unseen(tensor, given)
            owner = self._owners[id(tensor)]
        if self._versions.vary and self._is_changed(tensor, owner):
            self._unseen_write(tensor, owner)
        elif not self._writes:
            return owner.name
        if self._writes:
            self._refresh(tensor)
        return self._owners[id(tensor)].name

    def _is_changed(self, tensor: Tensor, owner: Owner) -> bool:
        """Whether a tensor was overwritten, and by no op that was seen, since it got its value."""
        now = self._versions.of(tensor) if owner.version is not None else None
        if now is None or now == owner.version:
            return False
        storage = storage_key(tensor)
        return storage not in self._writing and not any(w.time > owner.since for w in self._writes.get(storage or 0, ()))

    def _unseen_write(self, tensor: Tensor, owner: Owner) -> None:
        """Give it a new value, of which no copy is to be had later; an empty one may have got other memory."""
        empty = self.nodes[owner.node].op in FILLS_NOTHING
        self._add_unseen(tensor, OPAQUE, [owner.name, *(self._beneath(tensor, owner.node) if empty else ())])
        self._overwrite(tensor, len(self.nodes) - 1)
        if not self._live:
            self.values[-1] = self.slots[-1] = None

    def _id_if_met(self, tensor: Tensor) -> TensorId | None:
        return self._id_of(tensor) if self._owner(tensor) is not None or self._name(tensor) is not None else None

    def _unseen(self, tensor: Tensor, given: Nest) -> None:
        """A tensor whose producer the mode could not see: of a functorch transform, else of the module that returned it.

        One that lies in the memory of a known value, as `copy.copy` makes, reads that value.
        """
        self._add_unseen(tensor, OPAQUE, self._transform or [*self._beneath(tensor), *ids_in(given)])

    def _beneath(self, tensor: Tensor, end: int = sys.maxsize) -> list[TensorId]:
        """The last value before a place in whose memory a tensor lies; one of the same form goes before others."""
        storage, before = storage_key(tensor), [owner for owner in self._owners.values() if owner.node < end]
        living = [(owner, other) for owner in before if (other := owner.tensor()) is not None]
        beneath = [(owner, other) for owner, other in living if storage is not None and storage_key(other) == storage]
        alike = [(is_alike(other, tensor), owner.node, owner.name) for owner, other in beneath if overlap(other, tensor)]
        return [max(alike)[2]] if alike else []

    def reading(self, tensor: Tensor) -> Slot | None:
        """The slot of the value of a tensor that the next op reads; None where a node stands for that value already."""
        owner = self._owner(tensor)
        if owner is None and self._name(tensor) is None:
            return first_read(self.number, self._event + 1, tensor)
        stale = self._writes_since(tensor, owner)
        return first_read(self.number, self._event + 1, tensor) if stale else None

    def _overwrite(self, tensor: Tensor, node: int, whole: bool = False) -> None:
        """Note that the op that made `node` has just overwritten this tensor, or the whole storage under it."""
        storage = storage_key(tensor)
        if storage is None:
            return
        owner = self._owner(tensor)
        if owner is not None and owner.node >= node:
            node = owner.node
        low, high = (0, tensor.untyped_storage().nbytes()) if whole else extent(tensor)
        before = self._writes.get(storage, [])
        if whole or is_dense(tensor):
            before = [write for write in before if write.extent[0] < low or write.extent[1] > high]
        self._writes[storage] = [*before, Overwrite(self._time, node, (low, high))]

    def _move(self, tensor: Tensor, _: int) -> None:
        """A tensor was given another shape or memory, which torch counts as a write of all that share its bytes."""
        storage, after = storage_key(tensor), self._owners[id(tensor)].version or 0
        for key, owner in self._owners.items():
            if owner.version == after - 1 and (other := owner.tensor()) is not None and storage_key(other) == storage:
                self._owners[key] = owner._replace(version=after)

    def _refresh(self, tensor: Tensor) -> None:
        """Give a tensor a new value if its bytes were overwritten, through another tensor, since its last one."""
        owner = self._owners[id(tensor)]
        hit = self._writes_since(tensor, owner)
        if hit:
            self._add_unseen(tensor, ALIAS, [self.nodes[node].id for node in (owner.node, *hit)])

    def _writes_since(self, tensor: Tensor, owner: Owner | None) -> list[int]:
        """The nodes of the ops that overwrote a tensor's bytes since its last value; without one, since the pass began."""
        node, since = (owner.node, owner.since) if owner is not None else (-1, 0)
        writes = [w for w in self._writes.get(storage_key(tensor) or 0, ()) if w.time > since and w.node != node]
        low, high = extent(tensor) if writes else (0, 0)
        return [w.node for w in writes if w.extent[0] < high and low < w.extent[1]]
