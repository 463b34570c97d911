"""Copy on write: a kept value is cloned just before an op overwrites the storage that it lives in."""

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fmr.nodes import outputs
from fmr.ops import Op
from fmr.watch import unwatched

if TYPE_CHECKING:
    from fmr.recorder import Tape


def storage_key(tensor: Tensor) -> int | None:
    """The identity of the storage under a tensor while the tensor lives; None where it has none (sparse)."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first and the last-plus-one byte that a tensor can touch in its storage."""
    if tensor.is_nested or tensor.numel() == 0:
        return (0, 1 << 62) if tensor.is_nested else (0, 0)
    size = tensor.element_size()
    low = high = tensor.storage_offset()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        high += (length - 1) * stride
    return low * size, (high + 1) * size


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one storage may share bytes (interleaved views count as sharing)."""
    (low_a, high_a), (low_b, high_b) = extent(a), extent(b)
    return low_a < high_b and low_b < high_a


class Guard:
    """Knows which values are kept, by storage; `saved` holds those that had to be cloned, by their key.

    Tapes are indexed only when the first write comes, and then only their new events.
    """

    def __init__(self) -> None:
        self.saved: dict[Hashable, Tensor] = {}
        self._cells: dict[int, list[tuple[Tensor, Hashable]]] = {}
        self._tapes: list[tuple[Tape, int]] = []

    def add_tape(self, tape: "Tape") -> None:
        """Keep every value of this tape, as far as its events go when a write comes; its number is part of their keys."""
        self._tapes.append((tape, -1))

    def keep(self, tensor: Tensor, key: Hashable) -> None:
        """Keep one value."""
        storage = storage_key(tensor)
        if storage is not None:
            self._cells.setdefault(storage, []).append((tensor, key))

    def before_write(self, written: Iterable[Tensor]) -> None:
        """Clone each kept value that shares bytes with what is about to be written."""
        self._index()
        for target in written:
            cells = self._cells.get(storage_key(target) or 0)
            hit = [cell for cell in cells if overlap(cell[0], target)] if cells else []
            if cells and hit:
                with unwatched():
                    self._save(hit, cells)

    def _save(self, hit: list[tuple[Tensor, Hashable]], cells: list[tuple[Tensor, Hashable]]) -> None:
        for cell in hit:
            tensor, key = cell
            self.saved[key] = tensor.clone()
        keys = {id(cell) for cell in hit}
        cells[:] = [cell for cell in cells if id(cell) not in keys]

    def _index(self) -> None:
        for place, (tape, done) in enumerate(self._tapes):
            if done < 0:
                for name, tensor in tape.sources():
                    self.keep(tensor, (tape.number, name))
            for position in range(max(done, 0), len(tape.events)):
                self._keep_event(tape.events[position], (tape.number, position))
            self._tapes[place] = tape, len(tape.events)

    def _keep_event(self, event: Any, place: tuple[int, int]) -> None:
        if isinstance(event[0], Op):
            for index, tensor in outputs(event[3]):
                self.keep(tensor, (*place, index))

