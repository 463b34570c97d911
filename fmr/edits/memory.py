"""Memory that an edited value shares: an edit gives the value memory of its own, and later writes must not miss it."""

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
