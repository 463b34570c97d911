"""Memory that was handed out of torch's sight: an array, a pointer or a storage may write what no mode sees."""

from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fmr.nests import Nest, leaves
from fmr.watching.storage import is_freed, storage_key


class Share(NamedTuple):
    """A storage whose memory was handed out, and all its bytes as they were seen last."""

    storage: StorageWeakRef
    bytes: Tensor


class Handed:
    """What was handed out in this pass, by storage; each tensor that is read is compared with what was seen last."""

    def __init__(self) -> None:
        self.shares: dict[int, Share] = {}

    def add(self, tensor: Tensor) -> Tensor | None:
        """Note a tensor whose memory is about to be handed out; the bytes that may be written, None where it has none."""
        whole = bytes_of(tensor)
        if whole is not None and not self.among(tensor):
            self._see(tensor, whole)
        return whole

    def among(self, nest: Nest) -> list[Tensor]:
        """The tensors of a nest that lie in memory which was handed out, one for each storage."""
        found = {storage_key(tensor): tensor for _, tensor in leaves(nest)}
        return [tensor for key, tensor in found.items() if key is not None and self._lives(key)]

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether the bytes under a tensor that was handed out are others than those seen last; these are seen now."""
        whole, key = bytes_of(tensor), storage_key(tensor)
        if whole is None or key is None or torch.equal(self.shares[key].bytes, whole):
            return False
        self._see(tensor, whole)
        return True

    def _see(self, tensor: Tensor, whole: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.shares[storage._cdata] = Share(StorageWeakRef(storage), whole.clone())

    def _lives(self, key: int) -> bool:
        share = self.shares.get(key)
        if share is not None and share.storage.expired():
            del self.shares[key]
        return key in self.shares


def bytes_of(tensor: Tensor) -> Tensor | None:
    """All bytes of the storage under a tensor; None where they cannot be read as such."""
    ordinary = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided
    if not ordinary or tensor.is_nested or tensor.is_meta or is_freed(tensor):
        return None
    storage = tensor.untyped_storage()
    with torch.no_grad():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage) if storage.nbytes() else None


ASKING_CODE = {torch.overrides.__file__, torch._tensor.__file__}
"""The files of what torch runs of its own to ask a mode."""

_REDUCE = Tensor._reduce_ex_internal.__code__


def is_taken_apart(frame: FrameType | None) -> bool:
    """Whether torch asks for the storage of a tensor to write it to a file, with its numbers."""
    while frame is not None and frame.f_code.co_filename in ASKING_CODE:
        if frame.f_code is _REDUCE:
            return True
        frame = frame.f_back
    return False
