"""Where the bytes of a tensor lie, and whether two tensors share them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

PLAIN = frozenset({Tensor, nn.Parameter})
"""The types of tensors that answer in C."""


def storage_key(tensor: Tensor) -> int | None:
    """The identity of the storage under a tensor while the tensor lives; None where it has none (sparse)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def version_of(tensor: Tensor) -> int | None:
    """How often torch knows a tensor to have been overwritten; of one made in inference mode it keeps no count."""
    return None if tensor.is_inference() else tensor._version


def versions_of(tensors: Sequence[Tensor]) -> list[int | None]:
    """The same for each of several, at once where none of them is of inference mode."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return [version_of(tensor) for tensor in tensors]


def storages(values: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The storages under tensors, each once."""
    found = {}
    for value in values:
        if value.layout == torch.strided and not value.is_nested:
            storage = value.untyped_storage()
            found[storage._cdata] = storage
    return list(found.values())


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory under a tensor was given back while the tensor lives: to read it would end the process."""
    ordinary = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided
    if not ordinary or tensor.is_nested or tensor.is_meta or tensor.numel() == 0:
        return False
    return tensor.untyped_storage().nbytes() < extent(tensor)[1]


def is_equal(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one kind hold the same numbers, a NaN like another; what has none to read counts as same."""
    ordinary = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided
    if not ordinary or tensor.is_nested or tensor.is_meta:
        return True
    if tensor.shape != other.shape:
        return False
    if tensor.dtype == other.dtype and torch.equal(tensor, other):
        return True
    unequal = tensor != tensor  # a NaN; where there is none, nothing else has to be asked
    return bool(unequal.any()) and bool(((tensor == other) | (unequal & (other != other))).all())


def is_unshaped(tensor: Tensor) -> bool:
    """Whether a tensor is the parameter or buffer of a lazy layer that was not called yet."""
    return isinstance(tensor, (UninitializedParameter, UninitializedBuffer))


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


def is_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one storage show the same bytes in the same form."""
    return (a.dtype, a.shape, a.stride(), a.storage_offset()) == (b.dtype, b.shape, b.stride(), b.storage_offset())


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one storage may share bytes (interleaved views count as sharing)."""
    (low_a, high_a), (low_b, high_b) = extent(a), extent(b)
    return low_a < high_b and low_b < high_a


def touches(tensor: Tensor, written: Sequence[Tensor]) -> bool:
    """Whether writing these tensors may change a tensor's bytes."""
    return any(_home(target) == _home(tensor) and overlap(tensor, target) for target in written)


def _home(tensor: Tensor) -> int:
    """Where a tensor's bytes are: its storage, or for a sparse one the tensor itself."""
    storage = storage_key(tensor)
    return -id(tensor) if storage is None else storage
