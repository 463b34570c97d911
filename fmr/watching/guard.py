"""Copy on write: a kept value is cloned just before an op overwrites the storage that it lives in."""

from collections.abc import Callable, Sequence
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor

from fmr.nests import leaves, outputs
from fmr.ops.names import Op
from fmr.watching.own import like, unseen
from fmr.watching.storage import _home, is_unshaped, overlap, touches, version_of, versions_of
from fmr.watching.tape import REPLACED, Slot, Tape, first_read

Cell = tuple[Tensor, Slot, int | None]
"""A kept tensor, its slot, and its version when it was kept."""

Reading = Callable[[Tensor], Slot | None]


class Guard:
    """Knows which values are kept, by storage; `saved` holds those that had to be cloned, by their slot.

    Tapes are indexed only when the first write comes, and then only their new events. What an op or a module read is
    kept under its reading when it is no kept value (any more): `reading` gives the slot for a tensor about to be read.
    `moving` is called before a tensor is given another shape, type or memory, while it can still be asked for its own.
    `listening` is told what an op that writes is about to read.
    """

    def __init__(self) -> None:
        self.saved: dict[Slot, Tensor] = {}
        self.lost: set[Slot] = set()
        self.history = False
        self.reading: Reading | None = None
        self.moving: Callable[[], None] | None = None
        self.listening: Callable[[Any], None] | None = None
        self._cells: dict[int, list[Cell]] = {}
        self._versions: dict[int, set[int | None]] = {}
        self._kept: dict[int, Tensor] = {}
        self._tapes: list[tuple[Tape, int]] = []
        self._unshaped: list[tuple[Tensor, Slot]] = []

    def add_tape(self, tape: Tape) -> None:
        """Keep every value of this tape, as far as its events go when a write comes; its number is part of their slots."""
        self._tapes.append((tape, -1))
        self.reading = self._reading

    def keep(self, tensor: Tensor, slot: Slot, version: int | None = None) -> None:
        """Keep one value; that of a lazy layer's parameter as soon as it has one.

        With the version of the tensor that holds it, writes that nobody saw are noticed.
        """
        if is_unshaped(tensor):
            self._unshaped.append((tensor, slot))
            return
        self._cells.setdefault(_home(tensor), []).append((tensor, slot, version))
        self._kept[id(tensor)] = tensor

    def close(self) -> None:
        """Forget what was kept, when no write is watched any more; `saved` and `lost` stay."""
        self.look()
        self.reading = self.moving = self.listening = None
        for known in (self._cells, self._kept, self._tapes, self._versions, self._unshaped):
            known.clear()

    def before_write(self, written: Sequence[Tensor], read: Any, moves: bool = False) -> None:
        """Clone each kept value that shares bytes with what is about to be written by an op with these arguments."""
        if not written:
            return
        with unseen(), torch._C._DisableFuncTorch():
            if self.moving is not None and (moves or any(target.numel() == 0 for target in written)):  # which `out` resizes
                self.moving()
            self._index()
            if self.listening is not None:
                self.listening(read)
            if self.reading is not None:
                self._save_read(self.reading, read, written)
            for target in written:
                cells = self._cells.get(_home(target))
                hit = [cell for cell in cells if cell[0] is target or overlap(cell[0], target)] if cells else []
                if cells and hit:
                    self._save(hit, cells)

    def before_swap(self, swapped: Sequence[Tensor]) -> None:
        """Clone each kept value whose tensor object is about to become another."""
        with torch._C._DisableFuncTorch():
            if self.moving is not None:
                self.moving()
            self._index()
            for tensor in swapped:
                cells = self._cells.get(_home(tensor), [])
                self._save([cell for cell in cells if cell[0] is tensor], cells)

    def after_write(self, written: Sequence[Tensor], counted_again: bool) -> None:
        """Take the versions that tensors have after a write that was seen, and the next where it is counted once more."""
        with torch._C.DisableTorchFunction():
            for tensor in written:
                version = version_of(tensor)
                seen = self._versions.setdefault(_home(tensor), set())
                seen.update((version, version + 1) if counted_again and version is not None else (version,))

    def look(self) -> None:
        """Find the kept values that were overwritten unseen, by the versions of their tensors: they are `lost`."""
        with unseen():
            if any(_is_later(tape, done) for tape, done in self._tapes):
                self._index()
            for cells in self._cells.values():
                self.lost.update(cell[1] for cell in cells if self._is_lost(cell))

    def _is_lost(self, cell: Cell) -> bool:
        tensor, _, kept = cell
        if kept is None or version_of(tensor) == kept:
            return False
        return version_of(tensor) not in self._versions.get(_home(tensor), ())

    def _save_read(self, reading: Reading, read: Any, written: Sequence[Tensor]) -> None:
        """Clone what the op reads and overwrites at once, where no value met before stands for it."""
        for _, tensor in leaves(read):
            slot = reading(tensor) if touches(tensor, written) else None
            if slot is not None:
                self.saved[slot] = self._copy(tensor)

    def _reading(self, tensor: Tensor) -> Slot | None:
        tape, event = self._tapes[-1]
        return None if id(tensor) in self._kept else first_read(tape.number, event, tensor)

    def _save(self, hit: list[Cell], cells: list[Cell]) -> None:
        for cell in hit:
            tensor, slot, _ = cell
            if self._is_lost(cell):
                self.lost.add(slot)
            else:
                self.saved[slot] = self._copy(tensor)
            self._kept.pop(id(tensor), None)
        gone = {id(cell) for cell in hit}
        cells[:] = [cell for cell in cells if id(cell) not in gone]

    def _copy(self, tensor: Tensor) -> Tensor:
        """The value; without history, nothing that autograd knows about the tensor is asked for or changed."""
        if self.history:
            return like(tensor.clone(), tensor)
        with torch.no_grad():
            return like(tensor.detach().clone(), tensor)

    def _index(self) -> None:
        """Take what the tapes have on them since the last write; a tape that is followed by another has ended."""
        if self._unshaped:
            unshaped, self._unshaped = self._unshaped, []
            for tensor, slot in unshaped:
                self.keep(tensor, slot)
        for tape, done in self._tapes:
            if done < 0:
                self._kept.clear()  # what an earlier pass met is met anew
                for name, tensor in tape.sources():
                    self.keep(tensor, Slot(tape.number, name=name), tape.begun[id(tensor)])
            for position in range(max(done, 0), len(tape.events)):
                self._keep_event(tape.events[position], (tape.number, position))
        self._tapes = [(tape, len(tape.events)) for tape, _ in self._tapes[-1:]]

    def _keep_event(self, event: Any, place: tuple[int, int]) -> None:
        if event[0] is REPLACED:
            _, new, old, apart, _ = event
            if apart:
                self.keep(new, first_read(*place, new), version_of(new))
            else:
                self._replace(new, old)
            return
        if not isinstance(event[0], Op):
            self._keep_read(event[1:], place)
            return
        self._keep_read(event[1:3], place, event[4])
        versions = iter(event[7]) if isinstance(event[7], tuple) else repeat(event[7])
        for index, tensor in outputs(event[3]):
            self.keep(tensor, Slot(*place, index), next(versions))

    def _replace(self, new: Tensor, old: Tensor) -> None:
        """Keep what stands for a value from now on, in the place of the value."""
        cells = self._cells.get(_home(old), [])
        slot = next((slot for tensor, slot, _ in reversed(cells) if tensor is old), None)
        if slot is not None:
            cells[:] = [cell for cell in cells if cell[1] != slot]
            self.keep(new, slot, version_of(new))

    def _keep_read(self, read: Any, place: tuple[int, int], written: Sequence[Tensor] | None = None) -> None:
        for _, tensor in leaves(read):
            if id(tensor) not in self._kept and not (written and touches(tensor, written)):
                self.keep(tensor, first_read(*place, tensor), None)


def _is_later(tape: Tape, done: int) -> bool:
    """Whether anything on a tape, from an event on, was overwritten since."""
    made = [e for e in islice(tape.events, max(done, 0), None) if e[0].__class__ is Op and e[3].__class__ is Tensor]
    if versions_of([event[3] for event in made]) != [event[7] for event in made]:
        return True
    sources = [tensor for _, tensor in tape.sources()] if done < 0 else []
    return versions_of(sources) != [tape.begun[id(tensor)] for tensor in sources]
