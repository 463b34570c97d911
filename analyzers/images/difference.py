"""How far what a model makes of an image lies from what it made of another one: content, and with Gram matrices style."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from analyzers.images.given import check_choice, name_of
from analyzers.images.objectives import AtSite
from analyzers.images.seen import Seen, as_held, images_first
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of
from fmr.nodes import Key, id_of


def same(value: Tensor) -> Tensor:
    """A value as it is."""
    return value


@dataclass(frozen=True, eq=False, repr=False)
class Difference(AtSite):
    """How far a site lies from given values: mean |f(value) - f(values)|^p over mean |f(values)|^p; a penalty.

    >>> -analyzers.images.Difference("conv1", reader_run["conv1"], of=analyzers.images.gram)
    -Difference('conv1', of=gram)

    values: (1 or images, ...), as a run holds them. of: what is compared of both, a function of values (images, channels,
    ...); `gram` compares style (Gatys et al. 2016). power: p, 2 or 1.
    """

    values: Tensor
    of: Callable[[Tensor], Tensor] = same
    power: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("power", self.power, 1, 2)
        if not callable(self.of):
            raise AnalyzerError(f"of={self.of!r}: expected a function of values, as analyzers.images.gram.")
        if (
            not isinstance(self.values, Tensor)
            or not self.values.is_floating_point()
            or not bool(self.values.isfinite().all())
        ):
            what = "numbers that are not finite" if isinstance(self.values, Tensor) else f"a {type(self.values).__name__}"
            raise AnalyzerError(
                f"Difference at {str(id_of(self.site))!r} got {what}, expected the values that a run holds there."
            )

    def __call__(self, seen: Seen) -> Tensor:
        value = seen.read(self.site)
        with torch.no_grad():
            wanted = self._compared(seen, images_first(self.values.to(value), seen.sites.get(self.site, self.site)))
        found = self._compared(seen, value)
        if found.shape[1:] != wanted.shape[1:] or len(wanted) not in (1, len(found)):
            raise AnalyzerError(
                f"Difference at {str(id_of(self.site))!r} compares shape {tuple(found.shape)} with {tuple(wanted.shape)}. "
                "Expected values of an image of the same size, one or as many as there are images."
            )
        apart = (found - wanted).abs().pow(self.power).flatten(1).mean(1)
        size = wanted.abs().pow(self.power).flatten(1).mean(1)
        if not bool((size > 0).all()):
            raise AnalyzerError(
                f"Difference at {str(id_of(self.site))!r} got values that are all 0, which nothing can be measured by. "
                "Expected values at which the site is alive."
            )
        return apart / size

    def _compared(self, seen: Seen, value: Tensor) -> Tensor:
        if self.of is same:
            return value
        found = self.of(seen.channels(self.site, value))
        if not isinstance(found, Tensor) or found.shape[:1] != value.shape[:1]:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise AnalyzerError(
                f"{self!r} compares {what} that {self._name} makes of {number_of(len(value), 'image')}, expected a row for "
                "each: a function of values (images, channels, ...), as analyzers.images.gram."
            )
        return found

    @property
    def _name(self) -> str:
        return getattr(self.of, "__name__", "") or name_of(self.of)

    def __repr__(self) -> str:
        return self._told(
            *([] if self.of is same else [f"of={self._name}"]), *([f"power={self.power}"] if self.power != 2 else [])
        )


def differences(sites: tuple[Key, ...], seen: Seen, of: Callable[[Tensor], Tensor]) -> list[Difference]:
    """A difference at each site from what was seen there of one image."""
    return [Difference(one, as_held(seen.read(one).detach(), seen.sites.get(one, one)), of) for one in sites]
