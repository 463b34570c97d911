"""What an edit did: how often it fired, how many elements it changed, and by how much."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fmr.errors import EditError, number_of


@dataclass(frozen=True)
class Receipt:
    """What an edit did in a run.

    >>> fmr.run(model, input_ids, edits={site: edits.Zero()}).receipts[site]
    Receipt: fired 1 time, changed 768 elements by ... (L2 norm)

    `fired` counts calls of the edit, `changed` the elements that differ after it, `norm` is the L2 norm of all changes.
    """

    fired: int
    changed: int
    norm: float

    def __repr__(self) -> str:
        fired, changed = number_of(self.fired, "time"), number_of(self.changed, "element")
        return f"Receipt: fired {fired}, changed {changed} by {self.norm:.3g} (L2 norm)"


class Tally:
    """Counts what an edit does while the model runs; nothing waits for the device before a receipt is asked for.

    Small values are copied, and compared when that is.
    """

    def __init__(self) -> None:
        self.fired = 0
        self._later: list[tuple[Tensor, Tensor]] = []
        self._changed: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, before: Tensor, after: Tensor) -> None:
        """One firing of the edit."""
        self.fired += 1
        if after is before:
            return
        with torch.no_grad():
            if before.numel() <= _SMALL:
                self._later.append((before.clone(), after.clone()))
            else:
                self._compare(before, after)
        if len(self._norms) + len(self._later) > _MOST:
            self._fold()

    def _compare(self, before: Tensor, after: Tensor) -> None:
        differ = torch.ne(before, after)
        if before.is_floating_point() or before.is_complex():
            differ &= ~(before.isnan() & after.isnan())
        before, after = (part if part.dtype in _WIDE else part.double() for part in (before, after))
        self._changed.append(differ.sum())
        self._norms.append(torch.linalg.vector_norm(torch.where(differ, after - before, 0)))

    def _fold(self) -> None:
        with torch.no_grad():
            for before, after in self._later:
                self._compare(before, after)
        self._later.clear()
        self._changed = [torch.stack(self._changed).sum()]
        self._norms = [torch.linalg.vector_norm(torch.stack([norm.double() for norm in self._norms]))]

    @property
    def receipt(self) -> Receipt:
        """What was done so far."""
        if not self._norms and not self._later:
            return Receipt(self.fired, 0, 0.0)
        if (self._norms or self._later[0])[0].is_meta:
            raise EditError(
                f"An edit fired {self.fired} times on the meta device, which tells no numbers. Expected a run on data to "
                f"read its receipt."
            )
        self._fold()
        return Receipt(self.fired, int(self._changed[0]), float(self._norms[0]))


_WIDE = frozenset({torch.float32, torch.float64, torch.complex64, torch.complex128})
"""The types in which differences are taken; others are widened before."""

_SMALL = 1 << 14
"""Up to how many elements a value is copied before it is compared, which then costs the run two steps instead of nine."""

_MOST = 64
"""How many firings are summed up at once."""
