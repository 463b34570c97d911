"""Which model something was counted of: a few of the numbers of its weights, by which these are known again."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

_MANY, _FEW = 1024, 256
"""About how many numbers of a parameter go into a digest, and how many into a sample."""


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process holds a part, put together by all of them; any other as it is."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def _numbers(model: nn.Module, many: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each parameter with its name and some of its numbers."""
    for name, value in model.named_parameters():
        flat = whole(value.detach()).flatten()
        yield name, value, flat[:: max(1, len(flat) // many)].float().cpu().contiguous()


def fingerprint(model: nn.Module) -> str:
    """A short name for the weights of a model: its parameters' names and shapes, and some of the numbers of each.

    >>> fingerprint(model) == fingerprint(model)
    True
    """
    told = hashlib.blake2b(digest_size=8)
    for name, value, some in _numbers(model, _MANY):
        told.update(f"{name} {tuple(value.shape)} ".encode() + some.numpy().tobytes())
    return told.hexdigest()


def sample(model: nn.Module) -> dict[str, Tensor]:
    """Some of the numbers of each matrix of a model, by its name and shape; a name that all begin with is left out.

    >>> sample(model)["h.0.mlp.c_fc.weight 128 512"].shape
    torch.Size([256])
    """
    every = {name: (value, some) for name, value, some in _numbers(model, _FEW) if value.dim() > 1}
    paths = [name.split(".") for name in every]
    common = next((n for n, steps in enumerate(zip(*paths, strict=False)) if len({*steps}) > 1), 0)
    return {
        " ".join([".".join(path[common:]), *map(str, value.shape)]): some
        for path, (value, some) in zip(paths, every.values(), strict=True)
    }


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
