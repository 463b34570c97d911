"""The state of torch that an op runs under and that stands in no argument: autocast, and the kernels of attention."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Casts = tuple[tuple[str, torch.dtype], ...]
"""The kinds of devices for which autocast is on, each with its type."""

_KINDS = ("cpu", "cuda")

BY_KERNEL = "scaled_dot_product_attention"
"""The op that takes another kernel by what is switched on."""


def casts_now() -> Casts:
    """Where autocast is on."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind))


@contextmanager
def casting(casts: Casts) -> Iterator[None]:
    """A block with autocast as it was there, and off elsewhere."""
    before = casts_now()
    if before == casts:
        yield
        return
    try:
        _set(casts)
        yield
    finally:
        _set(before)


def _set(casts: Casts) -> None:
    wanted = dict(casts)
    for kind in _KINDS:
        torch.set_autocast_enabled(kind, kind in wanted)
        if kind in wanted:
            torch.set_autocast_dtype(kind, wanted[kind])
    torch.clear_autocast_cache()


def kernels(op: str) -> tuple[AbstractContextManager[None], ...]:
    """The states under which an op may have run: as things are, and with the plain kernel alone."""
    return (nullcontext(), sdpa_kernel(SDPBackend.MATH)) if op == BY_KERNEL else (nullcontext(),)
