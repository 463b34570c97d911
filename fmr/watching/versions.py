"""The versions of tensors when they were read: by them a write that no mode saw is found, between two readers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fmr.nests import Nest, Opened, leaves
from fmr.watching.storage import PLAIN, version_of
from fmr.watching.tape import Event, Tape

Others = Mapping[int, int | None] | None
"""Versions by the identity of tensors: of those that have another than when the pass began, or than 0 if they came later."""

_MAPPINGS: frozenset[type[Any]] = frozenset((dict, Opened))
_SEQUENCES: frozenset[type[Any]] = frozenset((tuple, list))
_NUMBERS = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, slice})


def others_in(nest: Nest, begun: Mapping[int, int | None]) -> Others:
    """The versions of the tensors in a nest, asked unseen, as far as they are others than these."""
    found: dict[int, int | None] = {}
    with torch._C.DisableTorchFunction():
        _note(nest, begun, found)
    return found or None


def _note(nest: Any, begun: Mapping[int, int | None], found: dict[int, int | None]) -> None:
    kind = nest.__class__
    if kind in PLAIN or isinstance(nest, Tensor):
        version = version_of(nest)
        if kind not in PLAIN or version != begun.get(id(nest), 0):
            found[id(nest)] = version
    elif kind in _SEQUENCES or kind in _MAPPINGS:
        for item in nest if kind in _SEQUENCES else nest.values():
            if item.__class__ not in _NUMBERS:
                _note(item, begun, found)
    elif kind not in _NUMBERS:
        for _, tensor in leaves(nest):
            _note(tensor, begun, found)


class Versions:
    """The versions that tensors had at an event, as they were noted then; `vary`: some had others than at first."""

    def __init__(self, tape: Tape) -> None:
        self.vary = False
        self._begun = tape.begun
        self._others: Mapping[int, int | None] = {}

    def note(self, event: Event) -> None:
        """Go on to an event."""
        others = event[-1]
        self.vary = others is not None
        self._others = others or {}

    def of(self, tensor: Tensor) -> int | None:
        """The version, None where none is known."""
        key = id(tensor)
        return self._others[key] if key in self._others else self.at_first(tensor)

    def at_first(self, tensor: Tensor) -> int | None:
        """The version that a tensor had when the pass began or, if it came later, when it was made."""
        return self._begun.get(id(tensor), 0 if tensor.__class__ in PLAIN else None)
