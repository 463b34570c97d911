"""DLPack capsules that torch's functions make of a tensor while any block tracks: no mode is asked about these.

A function of C has no code to exchange; another stands in its place, which tells of the tensor first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NAMES = ("_to_dlpack", "_to_dlpack_versioned", "to_dlpack")
_PLACES = [
    (home, name, vars(home)[name]) for home in (torch._C, torch, torch.utils.dlpack) for name in _NAMES if name in vars(home)
]
Tell = Callable[[Tensor], None]


def _telling(function: Callable[..., Any], tell: Tell) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            tell(args[0])
        return function(*args, **kwargs)

    return make


def settle(tell: Tell | None) -> None:
    """Have these functions tell of each tensor, or be torch's own again."""
    for home, name, function in _PLACES:
        if (vars(home)[name] is function) == (tell is not None):
            setattr(home, name, function if tell is None else _telling(function, tell))
