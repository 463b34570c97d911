"""The versions of tensors when they were read: by them a write that no mode saw is found, between two readers."""

from typing import Any

import torch
from torch import Tensor

from fmr.nests import Nest, leaves
from fmr.watching.storage import PLAIN, version_of
from fmr.watching.tape import ENTER, EXIT, NAMED, REPLACED, Event, Tape

BITS = 32
"""Versions of several tensors are packed into one number, which costs less than a list; the last lies lowest."""

_MASK = (1 << BITS) - 1


def versions_read(nest: Nest) -> dict[int, int | None]:
    """The versions that the tensors in a nest have now, by identity, asked unseen."""
    with torch._C.DisableTorchFunction():
        return {id(tensor): version_of(tensor) for _, tensor in leaves(nest)}


class Versions:
    """The version of a tensor at an event: its own where events are taken as they come (`live`), else the one noted then.

    `vary` tells that some tensor may have another version than 0.
    """

    def __init__(self, tape: Tape, live: bool) -> None:
        self._live = self.vary = live
        self._noted = {id(tensor): version for (_, tensor), version in zip(tape.sources(), tape.versions, strict=True)}
        self._absent: int | None = None

    def note(self, event: Event) -> None:
        """Go on to an event."""
        if self._live:
            return
        read: Any = event[-1] if event[0] not in (NAMED, REPLACED) else {}
        self._absent = 0 if read.__class__ is int else None
        if read.__class__ is int:
            read = _by_identity(event, read) if read else {}
        self._noted, self.vary = read, bool(read)

    def of(self, tensor: Tensor) -> int | None:
        """The version, None where none is known."""
        if self._live:
            return version_of(tensor)
        return self._noted.get(id(tensor), self._absent if tensor.__class__ in PLAIN else None)


def _by_identity(event: Event, read: int) -> dict[int, int | None]:
    """Packed versions by the identity of the tensors that stand side by side in what was read."""
    args, kwargs = ((event[1],), None) if event[0] is EXIT else event[2:4] if event[0] is ENTER else event[1:3]
    plain = [id(arg) for arg in (*args, *(kwargs or {}).values()) if arg.__class__ in PLAIN]
    return {key: read >> BITS * place & _MASK for place, key in enumerate(reversed(plain))}
