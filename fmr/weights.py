"""Which model something was counted of: a name for all bits of its weights, and some numbers by which like ones show."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_FEW = 256
"""About how many numbers of a parameter go into a sample."""

_WORDS, _AT_ONCE = 1024, 128
"""How many words of 8 bytes make a row, and how many rows are in memory at once."""


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process holds a part, put together by all of them; any other as it is."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def fingerprint(model: nn.Module) -> str:
    """A short name for the weights of a model: of parameters and buffers the names, shapes, dtypes and every bit.

    >>> fingerprint(model) == fingerprint(model)
    True

    All bits are read where they lie, a second for 2 GB or so. Of weights without bits (meta, lazy) it is names and shapes.
    """
    told, first = hashlib.blake2b(digest_size=8), dict[int, str]()
    for name, value in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        tied = first.setdefault(id(value), name)
        told.update(f"{name} {tied} {value.dtype} ".encode() + (_bits(value) if tied == name else b""))
    return told.hexdigest()


def _bits(value: Tensor) -> bytes:
    """The shape of a tensor and a sum of each row of its words, every word times a number of its own, modulo 2**64."""
    if nn.parameter.is_lazy(value):
        return b"lazy"
    value = whole(value.detach())
    shape = str(tuple(value.shape)).encode()
    if hasattr(value, "__tensor_flatten__"):  # one that is made of others
        return shape + b"".join(_bits(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if value.is_meta:
        return shape
    value = value.dequantize() if value.is_quantized else value if value.layout is torch.strided else value.to_dense()
    flat = value.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    rest = len(flat) % (8 * _WORDS)
    padded = functional.pad(flat[len(flat) - rest :], (0, 8 * _WORDS - rest))
    start = flat[: len(flat) - rest]
    start = start if start.storage_offset() % 8 == 0 else start.clone()
    factors = _factors().to(flat.device)
    blocks = [*start.view(torch.int64).view(-1, _WORDS).split(_AT_ONCE), padded.view(torch.int64).view(1, _WORDS)]
    return shape + torch.cat([(block * factors).sum(1) for block in blocks]).cpu().numpy().tobytes()


def _factors() -> Tensor:
    """Odd numbers without a pattern, one for each word of a row."""
    mixed = torch.arange(1, _WORDS + 1) * -7046029254386353131
    return (mixed ^ (mixed >> 31)) * -7723592293110705685 | 1


def sample(model: nn.Module) -> dict[str, Tensor]:
    """Some of the numbers of each matrix of a model, by its name and shape; a name that all begin with is left out.

    >>> sample(model)["h.0.mlp.c_fc.weight 128 512"].shape
    torch.Size([256])
    """
    every = {name: (value, _some(value)) for name, value in model.named_parameters() if value.dim() > 1}
    paths = [name.split(".") for name in every]
    common = next((n for n, steps in enumerate(zip(*paths, strict=False)) if len({*steps}) > 1), 0)
    return {
        " ".join([".".join(path[common:]), *map(str, value.shape)]): some
        for path, (value, some) in zip(paths, every.values(), strict=True)
    }


def _some(value: Tensor) -> Tensor:
    flat = whole(value.detach()).flatten()
    return flat[:: max(1, len(flat) // _FEW)].float().cpu().contiguous()


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """How far two samples lie apart: |a - b| over the larger of |a| and |b|, 1 at most, the mean over matrices.

    >>> difference(sample(model), sample(model))
    0.0

    Rounding to half precision makes 0.002 of it, to 8 bits 0.01 to 0.03; matrices that have nothing to do with each other
    make 1, and so do those that only one of the two has.
    """
    apart = []
    for name in one.keys() | other.keys():
        if name not in one or name not in other:
            apart.append(1.0)
            continue
        a, b = one[name].double(), other[name].double()
        size = torch.maximum(a.norm(), b.norm())
        apart.append(float(((a - b).norm() / size).clamp(max=1)) if size else 0.0)
    return sum(apart) / len(apart) if apart else 0.0
