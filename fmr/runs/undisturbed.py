"""Runs that leave no trace: the random state, the buffers and what modules hold by name are as they were before."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fmr.nests import leaves
from fmr.watching.mode import fills_parameters


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what the block draws of the random state, and what it changes of a model."""
    devices = {tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), restored(model):
        yield


def own(given: Any) -> Any:
    """An argument that a run may write into: a cache or another object with tensors is copied, a tensor stays itself."""
    held = [] if isinstance(given, (Tensor, nn.Module)) else [tensor for _, tensor in leaves(given)]
    return deepcopy(given, {id(tensor): tensor.detach().clone() for tensor in held}) if held else given


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put back what the block changes of a model's buffers, and of what its modules hold by name."""
    modules = [module for module in model.modules() if not fills_parameters(module)]
    held = [(at, dict(at)) for module in modules for at in (module._buffers, vars(module))]
    kept = {id(one): one for _, before in held for one in before.values() if isinstance(one, Tensor)}
    plain = [one for one in kept.values() if one.layout == torch.strided and not (one.is_meta or one.is_nested)]
    bytes_before = [(tensor, tensor.detach().clone()) for tensor in plain]
    try:
        yield
    finally:
        for at, before in held:
            if at.keys() != before.keys() or any(at[name] is not one for name, one in before.items()):
                at.clear()
                at.update(before)
        for tensor, value in bytes_before:
            if not torch.equal(tensor, value):  # kernels write running statistics without counting a version
                tensor.detach().copy_(value)
