"""What an edit did: how often it fired, how many elements it changed, and by how much."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fmr.errors import EditError, nearest
from fmr.ids import Site
from fmr.nodes import Key, id_of


@dataclass(frozen=True)
class Receipt:
    """What an edit did in a run.

    >>> run.receipts[site]
    Receipt: fired 1 time, changed 64 elements by 3.21 (L2 norm)

    `fired` counts calls of the edit, `changed` the elements that differ after it, `norm` is the L2 norm of all changes.
    """

    fired: int
    changed: int
    norm: float

    def __repr__(self) -> str:
        times = f"{self.fired} time{'s' * (self.fired != 1)}"
        return f"Receipt: fired {times}, changed {self.changed} elements by {self.norm:.3g} (L2 norm)"


class Tally:
    """Counts what an edit does while the model runs; nothing waits for the device before a receipt is asked for."""

    def __init__(self) -> None:
        self.fired = 0
        self._changed: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, before: Tensor, after: Tensor) -> None:
        """One firing of the edit."""
        self.fired += 1
        if after is before:
            return
        with torch.no_grad():
            exact = before.is_floating_point() or before.is_complex()
            self._changed.append(torch.ne(before, after).sum())
            self._norms.append(torch.dist(before, after) if exact else torch.dist(before.double(), after.double()))
        if len(self._norms) > _MOST:
            self._fold()

    def _fold(self) -> None:
        self._changed = [torch.stack(self._changed).sum()]
        self._norms = [torch.linalg.vector_norm(torch.stack([norm.double() for norm in self._norms]))]

    @property
    def receipt(self) -> Receipt:
        """What was done so far."""
        if not self._norms:
            return Receipt(self.fired, 0, 0.0)
        self._fold()
        return Receipt(self.fired, int(self._changed[0]), float(self._norms[0]))


_MOST = 64
"""How many firings are summed up at once."""


class Receipts(Mapping[Site, Receipt]):
    """The receipts of a run by site, or by the ID of a site that was edited as a whole."""

    def __init__(self, tallies: Mapping[Site, list[Tally]]) -> None:
        self._tallies = tallies

    def __getitem__(self, key: Key) -> Receipt:
        site = key if isinstance(key, Site) else Site(id_of(key))
        if site not in self._tallies:
            edited = [str(one.id) for one in self._tallies]
            raise EditError(
                f"{site!r} was not edited in this run. Edited were: {', '.join(map(repr, self._tallies)) or 'none'}."
                f"{nearest(str(site.id), edited)}"
            )
        told = [tally.receipt for tally in self._tallies[site]]
        norm = sum(one.norm**2 for one in told) ** 0.5
        return Receipt(max(one.fired for one in told), sum(one.changed for one in told), norm)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._tallies)

    def __len__(self) -> int:
        return len(self._tallies)

    def __repr__(self) -> str:
        return "\n".join(f"{site!r}: {self[site]!r}" for site in self) or "Receipts: nothing was edited"
