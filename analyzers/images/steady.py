"""A model that keeps what it is: what passes change of its buffers is found, told and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from analyzers.protocol import AnalyzerError
from fmr.weights import fingerprint

Buffers = dict[str, tuple[Tensor, int, Tensor]]
"""Each buffer by its name, how often it had been written to, and its numbers."""


@contextmanager
def steady(model: nn.Module) -> Iterator[Callable[[], None]]:
    """A block of passes that refuses buffers which change from pass to pass, and puts them back as they were before it.

    The block calls what it is given after the first pass: what that one fills in is no change.
    """
    first = _buffers(model)
    settled: list[Buffers] = []
    try:
        yield lambda: settled.append(_buffers(model))
    finally:
        for filled in settled:
            _check(model, filled, first)


def _check(model: nn.Module, filled: Buffers, first: Buffers) -> None:
    """Raise for buffers that are not what they were after the first pass; they become what they were before it."""
    now = dict(model.named_buffers())
    changed = [name for name, held in filled.items() if name in now and _differs(held, now[name])]
    for name in changed:
        _put_back(model, name, first.get(name, filled[name]))
    if changed:
        raise AnalyzerError(
            f"{type(model).__name__}.{changed[0]} changes from pass to pass in eval mode too, so that what is made of an "
            "image depends on the passes before. Expected a model that leaves its buffers as they are; it is put back."
        )


def _buffers(model: nn.Module) -> Buffers:
    return {name: (one, one._version, one.detach().clone()) for name, one in model.named_buffers() if not one.is_inference()}


def _differs(held: tuple[Tensor, int, Tensor], now: Tensor) -> bool:
    buffer, version, numbers = held
    if (now is buffer and now._version == version) or now.shape != numbers.shape:
        return False  # another shape is what a longer input made, and not a count
    return not torch.equal(now.nan_to_num(), numbers.to(now).nan_to_num())


def _put_back(model: nn.Module, name: str, held: tuple[Tensor, int, Tensor]) -> None:
    buffer, _, numbers = held
    with torch.no_grad():
        buffer.copy_(numbers)
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, buffer)


def weights_of(model: nn.Module) -> str:
    """A name for the weights of a model and the statistics that it keeps beside them."""
    held = nn.Module()
    for n, one in enumerate((*model.parameters(), *model.buffers())):
        held.register_parameter(str(n), nn.Parameter(one.detach(), requires_grad=False))
    return fingerprint(held)
