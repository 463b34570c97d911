"""Memory that an edited value shares: an edit gives the value memory of its own, and later writes must not miss it."""

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from fmr.errors import EditError
from fmr.ids import TensorId
from fmr.nests import leaves
from fmr.watching.own import unseen
from fmr.watching.storage import is_equal, storage_key, version_of


class Held(NamedTuple):
    """A tensor as it was: its version, and its numbers where a version does not tell of a write to them."""

    tensor: Tensor
    version: int | None
    numbers: Tensor | None

    @classmethod
    def now(cls, tensor: Tensor, copied: bool) -> "Held":
        """At this moment."""
        return cls(tensor, version_of(tensor), tensor.detach().clone() if copied else None)

    @property
    def is_written(self) -> bool:
        """Whether the tensor was written since; in inference mode, which counts no writes, as far as its numbers tell."""
        if self.version is not None and self.version == version_of(self.tensor):
            return False
        return self.version is not None if self.numbers is None else not is_equal(self.tensor, self.numbers)


class Replaced(NamedTuple):
    """A tensor and what stands for it since an edit; `shared` where others hold the tensor or its memory."""

    name: TensorId
    old: Held
    new: Held
    shared: bool

    @classmethod
    def now(cls, name: TensorId, old: Tensor, new: Tensor, shared: bool) -> "Replaced":
        """At this moment; of shared memory other parts may be written, so that the numbers have to tell."""
        with unseen():
            return cls(name, Held.now(old, shared), Held.now(new, shared and new.is_inference()), shared)

    def check(self) -> None:
        """Raise where a write since went into one of the two alone, while in the model both are one memory."""
        with unseen():
            lost = self.old.is_written or (self.shared and self.new.is_written)
        if lost:
            raise EditError(
                f"{str(self.name)!r} shares its memory with other values, and the model wrote into that memory later. An "
                f"edited value has memory of its own, so that the write reached one of them alone. Edit what the write made."
            )


def shares(tensor: Tensor, read: Any) -> bool:
    """Whether a tensor lies in memory that was there before the call that made it, which read these."""
    with unseen():
        storage = storage_key(tensor)
        return tensor._is_view() or any(storage_key(other) == storage for _, other in leaves(read))


def is_unchanged(value: Tensor, old: Tensor) -> bool:
    """Whether an edit left the numbers as they were and made no history, so that the tensor may stay what it is."""
    with unseen():
        return value.requires_grad == old.requires_grad and value.grad_fn is old.grad_fn and is_equal(value, old)


def refuse_twice(name: TensorId, tensor: Tensor, among: Iterable[Tensor]) -> None:
    """Raise where one tensor stands in several places, of which an edit would mean one."""
    if sum(other is tensor for other in among) > 1:
        raise EditError(
            f"{str(name)!r} is one tensor in several places, which an edit would change in all of them. Edit the values "
            f"that read it, or give copies: tensor.clone()."
        )


_lock = threading.Lock()
_reserved: set[int] = set()
"""The parameters and buffers, by identity, that are edited at this time, and what stands in their places."""


class Reserved:
    """Parameters and buffers that one run alone edits at this time."""

    def __init__(self, name: TensorId, tensors: Iterable[Tensor]) -> None:
        self._own = set(map(id, tensors))
        with _lock:
            if not _reserved.isdisjoint(self._own):
                raise EditError(
                    f"{str(name)!r} is edited by another run of this model at this time. Expected one at a time that edits "
                    f"a parameter or a buffer; edits of what ops and modules make may run together."
                )
            _reserved.update(self._own)

    def add(self, tensor: Tensor) -> None:
        """Take one more."""
        self._own.add(id(tensor))
        _reserved.add(id(tensor))

    def release(self) -> None:
        """Leave them to others."""
        _reserved.difference_update(self._own)
