"""Copy on write: a kept value is cloned just before an op overwrites the storage that it lives in."""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmr.nodes import leaves, outputs
from fmr.ops import Op

if TYPE_CHECKING:
    from fmr.recorder import Tape


def storage_key(tensor: Tensor) -> int | None:
    """The identity of the storage under a tensor while the tensor lives; None where it has none (sparse)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory under a tensor was given back while the tensor lives: to read it would end the process."""
    ordinary = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided
    if not ordinary or tensor.is_nested or tensor.is_meta or tensor.numel() == 0:
        return False
    return tensor.untyped_storage().nbytes() < extent(tensor)[1]


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first and the last-plus-one byte that a tensor can touch in its storage."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return 0, 1 << 62
    if tensor.numel() == 0:
        return 0, 0
    size = tensor.element_size()
    low = high = tensor.storage_offset()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        high += (length - 1) * stride
    return int(low * size), int((high + 1) * size)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its extent without a gap."""
    low, high = extent(tensor)
    return not tensor.is_nested and tensor.numel() * tensor.element_size() == high - low


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one storage may share bytes (interleaved views count as sharing)."""
    (low_a, high_a), (low_b, high_b) = extent(a), extent(b)
    return low_a < high_b and low_b < high_a


def _touches(tensor: Tensor, written: Sequence[Tensor]) -> bool:
    """Whether writing these tensors may change a tensor's bytes."""
    return any(_home(target) == _home(tensor) and overlap(tensor, target) for target in written)


def _home(tensor: Tensor) -> int:
    """Where a tensor's bytes are: its storage, or for a sparse one the tensor itself."""
    storage = storage_key(tensor)
    return -id(tensor) if storage is None else storage


Reading = Callable[[Tensor], Hashable | None]


class Guard:
    """Knows which values are kept, by storage; `saved` holds those that had to be cloned, by their key.

    Tapes are indexed only when the first write comes, and then only their new events. What an op or a module read is
    kept under its reading when it is no kept value (any more): `reading` gives the key for a tensor about to be read.
    """

    def __init__(self) -> None:
        self.saved: dict[Hashable, Tensor] = {}
        self.history = False
        self.reading: Reading | None = None
        self._cells: dict[int, list[tuple[Tensor, Hashable]]] = {}
        self._kept: dict[int, Tensor] = {}
        self._tapes: list[tuple[Tape, int]] = []

    def add_tape(self, tape: "Tape") -> None:
        """Keep every value of this tape, as far as its events go when a write comes; its number is part of their keys."""
        self._tapes.append((tape, -1))
        self.reading = self._reading

    def keep(self, tensor: Tensor, key: Hashable) -> None:
        """Keep one value."""
        self._cells.setdefault(_home(tensor), []).append((tensor, key))
        self._kept[id(tensor)] = tensor

    def close(self) -> None:
        """Forget what was kept, when no write is watched any more; `saved` stays."""
        self.reading = None
        for known in (self._cells, self._kept, self._tapes):
            known.clear()

    def before_write(self, written: Sequence[Tensor], read: Any) -> None:
        """Clone each kept value that shares bytes with what is about to be written by an op with these arguments."""
        if not written:
            return
        with torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch():
            self._index()
            if self.reading is not None:
                self._save_read(self.reading, read, written)
            for target in written:
                cells = self._cells.get(_home(target))
                hit = [cell for cell in cells if overlap(cell[0], target)] if cells else []
                if cells and hit:
                    self._save(hit, cells)

    def _save_read(self, reading: Reading, read: Any, written: Sequence[Tensor]) -> None:
        """Clone what the op reads and overwrites at once, where no value met before stands for it."""
        for _, tensor in leaves(read):
            key = reading(tensor) if _touches(tensor, written) else None
            if key is not None:
                self.saved[key] = self._copy(tensor)

    def _reading(self, tensor: Tensor) -> Hashable | None:
        tape, event = self._tapes[-1]
        return None if id(tensor) in self._kept else read_key(tape.number, event, tensor)

    def _save(self, hit: list[tuple[Tensor, Hashable]], cells: list[tuple[Tensor, Hashable]]) -> None:
        for cell in hit:
            tensor, key = cell
            self.saved[key] = self._copy(tensor)
            self._kept.pop(id(tensor), None)
        keys = {id(cell) for cell in hit}
        cells[:] = [cell for cell in cells if id(cell) not in keys]

    def _copy(self, tensor: Tensor) -> Tensor:
        """The value; without history, nothing that autograd knows about the tensor is asked for or changed."""
        if self.history:
            return tensor.clone()
        with torch.no_grad():
            return tensor.detach().clone()

    def _index(self) -> None:
        for place, (tape, done) in enumerate(self._tapes):
            if done < 0:
                for name, tensor in tape.sources():
                    self.keep(tensor, (tape.number, name))
            for position in range(max(done, 0), len(tape.events)):
                self._keep_event(tape.events[position], (tape.number, position))
            self._tapes[place] = tape, len(tape.events)

    def _keep_event(self, event: Any, place: tuple[int, int]) -> None:
        if not isinstance(event[0], Op):
            self._keep_read(event[1:], place)
            return
        self._keep_read(event[1:3], place, event[4])
        for index, tensor in outputs(event[3]):
            self.keep(tensor, (*place, index))

    def _keep_read(self, read: Any, place: tuple[int, int], written: Sequence[Tensor] | None = None) -> None:
        for _, tensor in leaves(read):
            if id(tensor) not in self._kept and not (written and _touches(tensor, written)):
                self.keep(tensor, read_key(*place, tensor))


def read_key(number: int, event: int, tensor: Tensor) -> Hashable:
    """The key of a value that no visible op made, by the pass and the event that read it first."""
    return number, event, "read", id(tensor)
