"""Which tokens the rows of a batch are of: their ids, and which of them are no padding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmr.edits.masks import of_keys
from fmr.errors import StoreError
from fmr.watching.scopes import argument_names

_IDS, _VECTORS = "input_ids", "inputs_embeds"
_REAL, _HIDDEN = "attention_mask", "key_padding_mask"

Shape = tuple[int, int]
"""Examples and positions."""


@dataclass(frozen=True)
class Tokens:
    """The arguments that tell tokens and padding, as they were asked for; None for those that are called so by convention.

    kinds: what stands before `input_ids` in the names that the model takes, as "" and "decoder_".
    """

    ids: str | None
    mask: str | None
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, ids: str | None, mask: str | None) -> Tokens:
        """Those of a model."""
        names = (name for name in argument_names(model) if name.endswith(_IDS))
        return cls(ids, mask, tuple(name.removesuffix(_IDS) for name in names))

    def read(self, tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Tensor | None, Tensor]:
        """The token ids of a batch, if it has any, and which are no padding, (examples, positions) both."""
        name = self._name(tensors, shape)
        ids = None if name is None or name.endswith(_VECTORS) else tensors[name].cpu()
        return ids, self._real(tensors, shape, name or "")

    def _name(self, tensors: Mapping[str, Tensor], shape: Shape) -> str | None:
        """The name of the argument whose tokens have so many positions; the empty one of a tensor that stands alone."""
        if self.ids is not None:
            held = tensors.get(self.ids)
            if held is None or held.shape != shape or held.is_floating_point():
                told = "nothing" if held is None else f"{str(held.dtype)[6:]} of shape {tuple(held.shape)}"
                raise StoreError(
                    f"tokens={self.ids!r}: the batch has {told} there, and the sites have {shape} examples and positions. "
                    f"Expected whole numbers of that shape; the batch has {', '.join(map(repr, tensors))}."
                )
            return self.ids
        fitting = [name for name, one in tensors.items() if _is_of(name, one) and one.shape[:2] == shape]
        untold = [kind for kind in self.kinds if not any(f"{kind}{end}" in tensors for end in (_IDS, _VECTORS))]
        if len(fitting) > 1 or (fitting and untold and len(self.kinds) > 1):
            others = [*fitting, *(f"{kind}{_IDS}" for kind in untold)]
            raise StoreError(
                f"The sites have {shape[1]} positions, and so may have {' and '.join(map(repr, others))}: nothing tells "
                f"whose tokens the rows are of. Expected tokens={fitting[0]!r}, or another name."
            )
        return fitting[0] if fitting else None

    def _real(self, tensors: Mapping[str, Tensor], shape: Shape, ids: str) -> Tensor:
        """Which tokens are no padding."""
        kind = next((ids.removesuffix(end) for end in (_IDS, _VECTORS) if ids.endswith(end)), "")
        names = (f"{kind}{_REAL}", f"{kind}{_HIDDEN}") if self.mask is None else (self.mask,)
        fitting = [name for name in names if name in tensors and tensors[name].shape == shape]
        if self.mask is not None and not fitting:
            told = tuple(tensors[self.mask].shape) if self.mask in tensors else "nothing"
            raise StoreError(
                f"mask={self.mask!r}: the batch has {told} there, and the sites have {shape} examples and positions. "
                "Expected a tensor of that shape, 1 for a token and 0 for padding."
            )
        if not fitting:
            _check_strange(tensors, shape)
            return torch.ones(shape, dtype=torch.bool)
        held, hides = tensors[fitting[0]], fitting[0].endswith(_HIDDEN)
        real = of_keys(held, hides) if hides or not bool((held < 0).any()) else None
        if real is None:
            raise StoreError(
                f"{fitting[0]!r} holds other numbers than 0 and 1. Expected 1 for a token and 0 for padding, or mask= with "
                "the name of what tells it."
            )
        return real.cpu()


def _is_of(name: str, one: Tensor) -> bool:
    """Whether an argument holds tokens, or vectors in their place."""
    ids = (name == "" or name.endswith(_IDS)) and one.dim() == 2 and not one.is_floating_point()
    return ids or name.endswith(_VECTORS)


def _check_strange(tensors: Mapping[str, Tensor], shape: Shape) -> None:
    """Raise for a mask of another name, which may tell padding by what is true or by what is not."""
    for name, one in tensors.items():
        known = name.endswith((_REAL, _HIDDEN)) or not name.endswith("mask") or one.shape != shape or one.is_floating_point()
        if not known and bool(one.any()) and not bool(one.all()):
            raise StoreError(
                f"Nothing tells whether {name!r} is 1 for a token or for padding. Expected mask={name!r} where it is for a "
                "token; padding has no row."
            )
