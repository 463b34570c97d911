"""Where the gradient of each value of a pass is heard: at the place of the autograd graph that the value's readers read."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmr.nests import leaves, outputs
from fmr.ops.names import Op
from fmr.watching.own import like, unseen
from fmr.watching.storage import extent, storage_key, version_of
from fmr.watching.swaps import Ref
from fmr.watching.tape import ASKED, ENTER, EXIT, INSIDE, NAMED, REPLACED, SWAPPED, WRITTEN, Event, Slot, first_read

_FURTHEST = 16
"""How many views of views are followed back from one that is written."""

_SCALARS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})


class Heard:
    """The gradients of one pass by slot: of values as backward reaches them, of leaves their own `.grad`.

    `wanted` are the slots that count, or None where all do; `untaken` says of a slot why no gradient can be heard for it.
    """

    def __init__(self, wanted: set[Slot] | None = None) -> None:
        self.wanted = wanted
        self.grads: dict[Slot, Tensor] = {}
        self.leaves, self.older = dict[Slot, Tensor](), set[Slot]()
        self.untaken: dict[Slot, str] = {}
        self.ran: set[bool] = set()

    def of(self, slot: Slot) -> Tensor | None:
        """The gradient under a slot, if there is one."""
        if slot in self.grads:
            return self.grads[slot]
        leaf = self.leaves.get(slot)
        return leaf.grad if leaf is not None and leaf.is_leaf else None

    @property
    def reached(self) -> bool:
        """Whether backward has come to any value of the pass; what a leaf held before tells nothing."""
        leaves = (leaf for slot, leaf in self.leaves.items() if slot not in self.older)
        return bool(self.ran) or any(leaf.is_leaf and leaf.grad is not None for leaf in leaves)


def _listen(heard: Heard, slots: Sequence[Slot]) -> Callable[[Tensor], None]:
    """A hook that adds each gradient to what these slots have."""
    grads, wanted, ran = heard.grads, heard.wanted, heard.ran

    def add(grad: Tensor) -> None:
        ran.add(True)
        for slot in slots:
            if wanted is None or slot in wanted:
                with unseen():
                    grads[slot] = like(grads[slot] + grad, grad) if slot in grads else grad

    return add


def _hook(tensor: Tensor, edge: Any, add: Callable[[Tensor], None]) -> None:
    """Hook a tensor at its place; where its own hooks may still be those of an earlier place, the place itself."""
    if tensor._backward_hooks is None:
        tensor.register_hook(add)
        return
    output = tensor.output_nr

    def hear(grads: Sequence[Tensor | None]) -> None:
        grad = grads[output]
        if grad is not None:
            add(grad)

    edge.register_prehook(hear)


class Region(NamedTuple):
    """Where a strided tensor lies in its storage, in elements."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, full: Tensor, base: "Region") -> Tensor:
        """This part of a tensor that lies as `base` does."""
        return full.as_strided(self.size, self.stride, self.offset - base.offset + full.storage_offset())


def _region(tensor: Tensor) -> Region:
    return Region(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


class Held:
    """A tensor object, and the slots of the values it stood for since its place in the autograd graph is this `edge`.

    Those from `current` on stand for what it holds now, those before `first` for what it held when it got the edge: an
    autograd.Function writes first (`wrote`) and gives the tensor an edge when it is done. `late` are slots of a stale view.
    """

    __slots__ = ("current", "edge", "first", "home", "late", "region", "slots", "tensor", "time", "version", "wrote")

    def __init__(self, tensor: Tensor, slots: list[Slot], edge: Any, version: int | None, time: int) -> None:
        self.tensor, self.slots, self.edge, self.version, self.time = Ref(tensor), slots, edge, version, time
        self.current, self.first, self.wrote = 0, len(slots), False
        self.late: list[Slot] = []
        self.region: Region | None = None
        self.home: int | None = None
        if edge is not None and edge is not REFUSED and tensor._is_view() and _is_strided(tensor):
            self.region, self.home = _region(tensor), storage_key(tensor)


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _edge(tensor: Tensor) -> Any:
    """The place of a tensor in the autograd graph; torch has none for a view that it refuses to go on with."""
    try:
        return tensor.grad_fn
    except RuntimeError:  # made without history, of a base that was overwritten with it
        return REFUSED


def _above(edge: Any) -> Iterator[Any]:
    """The places from which a view was taken, one after the other, and what lies above their base."""
    for _ in range(_FURTHEST):
        if edge is None or not edge.next_functions:
            return
        edge = edge.next_functions[0][0]
        yield edge


class Listener:
    """Follows the tensors of one pass through its events, and hooks each value where autograd will bring its gradient.

    That place is looked up when a value is made and again whenever it is read: an autograd.Function, a reentrant checkpoint
    or a write through another view give a tensor a new place that no op shows.
    """

    def __init__(self, number: int, heard: Heard) -> None:
        self.number, self.heard, self.position, self.time = number, heard, 0, 0
        self.wide, self.depth = False, 0
        self._held: dict[int, Held] = {}
        self._edges: dict[Any, Held] = {}
        self._writes: dict[int | None, list[tuple[int, tuple[int, int]]]] = {}

    # ---- what happens

    def sources(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """The named values that exist when the pass begins."""
        with unseen():
            for name, tensor in named:
                self.made(tensor, Slot(self.number, name=name))

    def before_write(self, read: Any) -> None:
        """An op with these arguments is about to overwrite some of them."""
        for _, tensor in leaves(read):
            self._read(tensor, wake=False)

    def take(self, event: Event) -> None:
        """The next event, after it took place."""
        head = event[0]
        with unseen():
            if head.__class__ is Op:
                self._op(event)
            elif head is NAMED:
                self.made(event[2], first_read(self.number, self.position, event[3]))
            elif head is WRITTEN:
                self.made(event[1], first_read(self.number, self.position, event[1]))
            elif head is ASKED:
                self._read_all(event[1])
            elif head is SWAPPED:
                self.exchange(*event[1:-1])
            elif head is REPLACED:
                if event[3]:
                    self.made(event[1], first_read(self.number, self.position, event[1]))
                else:
                    self.replaced(*event[1:3])
            elif head is INSIDE:
                for _, tensor in leaves(event[1:]):
                    if self._known(tensor) is not None:
                        self._read(tensor)
            elif head is ENTER:
                self.depth += 1
                self._read_all(event[2], wake=False)
                self._read_all(event[3], wake=False)
            elif head is EXIT:
                self.depth -= 1
                self._read_all(event[1], wake=self.depth < 0)
        self.position += 1

    def _op(self, event: Event) -> None:
        if event[4]:
            self.wrote(event[4])
        else:
            self._read_all(event[1])
            self._read_all(event[2])
        out = event[3]
        for index, tensor in ((None, out),) if out.__class__ is Tensor else outputs(out):
            self.made(tensor, Slot(self.number, self.position, index))

    def _read_all(self, nest: Any, wake: bool = True) -> None:
        for item in nest if nest.__class__ is tuple else nest.values() if nest.__class__ is dict else (nest,):
            if isinstance(item, Tensor):
                self._read(item, wake)
            elif item.__class__ not in _SCALARS:
                for _, tensor in leaves(item):
                    self._read(tensor, wake)

    def made(self, tensor: Tensor, slot: Slot) -> None:
        """A tensor that stands for a value from now on."""
        held = self._known(tensor)
        late = held is not None and held.wrote and not torch.is_grad_enabled()
        if held is not None and (late or (held.edge is _edge(tensor) and held.version == version_of(tensor))):
            held.slots.append(slot)
            if _edge(tensor) is None:
                self._note([slot], tensor)
        else:
            self._hold(tensor, [slot])

    def exchange(self, first: Tensor, second: Tensor) -> None:
        """Two tensor objects are about to become each other."""
        held = [(other, self._known(tensor)) for tensor, other in ((first, second), (second, first))]
        for tensor, _ in held:
            self._held.pop(id(tensor), None)
        for tensor, one in held:
            if one is not None:
                one.tensor, self._held[id(tensor)] = Ref(tensor), one

    def replaced(self, new: Tensor, old: Tensor) -> None:
        """An edit put a tensor in place of another, or wrote it once more: from now on it stands for that one's value."""
        held = self._known(old)
        if held is not None:
            last = max(held.current, len(held.slots) - 1)  # an op that handed on its argument left that one's slot before
            slots = held.slots[last:]
            del held.slots[last:]
            self._hold(new, slots)

    def wrote(self, written: Sequence[Tensor]) -> None:
        """An op has overwritten these tensors."""
        self.time += 1
        for tensor in written:
            self._writes.setdefault(storage_key(tensor), []).append((self.time, extent(tensor)))
            held = self._known(tensor)
            if held is None and not torch.is_grad_enabled():
                self._hold(tensor, [])
                self._held[id(tensor)].wrote = True
            if held is None:
                continue
            if not torch.is_grad_enabled() or held.edge is _edge(tensor):
                held.first = held.first if held.wrote else len(held.slots)
                held.current, held.version, held.time, held.wrote = len(held.slots), version_of(tensor), self.time, True
                continue
            stale = any(time < self.time for time in self._hits(tensor, held.time))
            self._hear_write(held, held.late if stale else held.slots + held.late, tensor)
            del self._held[id(tensor)]

    # ---- the same around a few values, where not every event is seen

    def look(self, wake: bool = False) -> None:
        """Look again at every tensor that is held; `wake` where torch may be asked about a stale view."""
        with unseen():
            for held in list(self._held.values()):
                tensor = held.tensor()
                if tensor is not None:
                    self._read(tensor, wake)

    def after(self, written: Sequence[Tensor], read: Any, made: Any) -> None:
        """An op has overwritten tensors, or has read these arguments and returned others."""
        with unseen():
            if written:
                self.wrote(written)
                return
            for _, tensor in leaves(read):
                if self._known(tensor) is not None:
                    self._read(tensor)
            for _, tensor in leaves(made) if self.wide else ():
                if tensor._is_view() and tensor.requires_grad and self._known(tensor) is None:
                    self._hold(tensor, [])  # a view of a planned one may be overwritten

    # ---- where a value's gradient comes

    def _known(self, tensor: Tensor) -> Held | None:
        held = self._held.get(id(tensor))
        return held if held is not None and held.tensor() is tensor else None

    def _hold(self, tensor: Tensor, slots: list[Slot]) -> None:
        edge = _edge(tensor)
        held = self._held[id(tensor)] = Held(tensor, slots, edge, version_of(tensor), self.time)
        if edge is REFUSED:
            self.heard.untaken.update(dict.fromkeys(slots, REFUSED))
            return
        if edge is not None:
            _hook(tensor, edge, _listen(self.heard, slots))
            if held.region is not None:
                self._edges[edge], self.wide = held, True
        elif slots:
            self._note(slots, tensor)

    def _note(self, slots: list[Slot], tensor: Tensor) -> None:
        """Of what has no edge: leaves have a `.grad`; of what requires no gradient, whether history was switched off."""
        heard, needed = self.heard, tensor.requires_grad
        for slot in slots:
            if needed or heard.wanted is None or slot in heard.wanted:
                heard.leaves[slot] = tensor
                heard.older.update([slot] if tensor.grad is not None else [])
            if not (needed or torch.is_grad_enabled()):
                heard.untaken[slot] = UNRECORDED

    def _read(self, tensor: Tensor, wake: bool = True) -> None:
        """A tensor that is read; one that holds another value, or has another place, than when it was met last."""
        held, version = self._held.get(id(tensor)), version_of(tensor)
        if held is None or held.tensor() is not tensor:
            self._hold(tensor, self._first_read(tensor))
        elif held.version == version and held.edge is _edge(tensor):
            return
        elif held.wrote and not torch.is_grad_enabled():
            return  # what an autograd.Function writes it gives a place when it is done
        elif held.version != version and not (wake and torch.is_grad_enabled()) and tensor._is_view():
            held.late += self._first_read(tensor)  # and torch may refuse a write to it
        elif held.edge is not _edge(tensor):
            self._moved(held, tensor)
        else:
            slots = self._first_read(tensor)
            held.slots += slots
            if held.edge is None:
                self._note(slots, tensor)
            held.version, held.time = version, self.time

    def _moved(self, held: Held, tensor: Tensor) -> None:
        """The tensor has got another place: its value goes with it, unless it was overwritten; another one may be new."""
        stay, slots = held.slots, self._first_read(tensor) + held.late
        version, others = version_of(tensor), any(time > held.time for time, _ in self._writes.get(storage_key(tensor), ()))
        if others:
            slots += [] if self._hits(tensor, held.time) else stay[held.current :]
        elif held.wrote or held.version == version:
            slots += stay[held.current :]
            first = min(held.first, held.current)
            for slot in stay[first:]:
                self.heard.leaves.pop(slot, None)
                self.heard.untaken.pop(slot, None)
            for slot in stay[first : held.current]:
                self.heard.untaken[slot] = UNRECORDED
            del stay[first:]
            self._hear_write(held, stay, tensor)
        self._hold(tensor, slots)

    def _first_read(self, tensor: Tensor) -> list[Slot]:
        """The slot of a value that is met now; a plan waits for none."""
        return [first_read(self.number, self.position, tensor)] if self.number >= 0 else []

    def _hits(self, tensor: Tensor, since: int) -> list[int]:
        """When ops overwrote bytes of a tensor, after a given time."""
        low, high = extent(tensor)
        writes = self._writes.get(storage_key(tensor), ())
        return [time for time, (first, last) in writes if time > since and first < high and low < last]

    def _hear_write(self, held: Held, slots: Sequence[Slot], tensor: Tensor) -> None:
        """After a write through a view, which autograd records on the base alone: hear what the view held from there.

        The views that it is a view of had the same bytes, and a gradient there.
        """
        base = tensor._base
        node = base.grad_fn if base is not None else None
        if base is None or node is None or held.region is None or type(node).__name__ != "CopySlices":
            return
        targets = [(held.region, tuple(slots))]
        for above in _above(held.edge):
            if above is node:
                return  # an earlier write
            other = self._edges.get(above)
            if other is not None and other.region is not None and other.home == held.home:
                targets.append((other.region, tuple(other.slots)))
        node.register_hook(_listen_beside(self.heard, _region(base), targets))


def _listen_beside(heard: Heard, base: Region, targets: Sequence[tuple[Region, tuple[Slot, ...]]]) -> Any:
    """A hook on the write to a part of a base: the first part's gradient, and what the others have of it."""

    def add(grads: Sequence[Tensor | None], _: Any) -> None:
        if grads[0] is None:
            return
        with unseen():
            whole = grads[0]
            if whole.stride() != base.stride:
                whole = whole.new_empty_strided(base.size, base.stride).copy_(whole)
            part = targets[0][0].of(whole, base)
            alone = torch.zeros_like(whole)
            targets[0][0].of(alone, base).copy_(part)
            for region, slots in targets:
                _listen(heard, slots)(region.of(alone, base).clone())

    return add


REFUSED = "torch refuses it: it is a view made without history, and its base was overwritten with history"
UNRECORDED = "it was computed while no history was recorded: under torch.no_grad, in an autograd.Function or in a checkpoint"
