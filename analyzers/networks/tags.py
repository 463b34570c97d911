"""Values in which each number is a unit's, 0 for none: what belongs to one unit along a dimension, and where two meet."""

import numpy as np
import torch
from torch import Tensor

from analyzers.networks.layout import narrow
from analyzers.networks.units import Units


def level(known: Units, units: Tensor, dims: tuple[int, ...], *, unite: bool = True) -> Tensor | None:
    """The unit that is the same all along these dimensions, kept with size one; None where it is not.

    unite: free numbers of an input become one unit.
    """
    if not dims:
        return units
    units = narrow(units, dims)
    for _ in range(2):
        most = units.amax(dims, keepdim=True)
        least = torch.where(units > 0, units, torch.inf).amin(dims, keepdim=True)
        if bool(((most == least) | (most == 0)).all()):
            return most
        units = torch.as_tensor(known.roots(units.long().numpy())).double()
    differ = ((units > 0) & (units != most)).any(dims, keepdim=True).expand(units.shape)
    if not unite or not is_free(known, units[differ]):
        return None
    ends = most.expand(units.shape)
    taken = units > 0
    known.unite(units[taken].long().numpy(), ends[taken].long().numpy())
    return torch.as_tensor(known.roots(most.long().numpy())).double()


def parallel(known: Units, units: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """One unit of those along these dimensions, kept with size one, where they have one place in several groups, as what
    experts write to the same channels has; None where they have not."""
    units = narrow(units, dims)
    taken = units > 0
    places = torch.as_tensor(known.place(units.long().numpy())).double()
    most = places.masked_fill(~taken, -1).amax(dims, keepdim=True)
    if not bool(((places == most) | ~taken).all()):
        return None
    ends = units.amax(dims, keepdim=True)
    known.unite(units[taken].long().numpy(), ends.expand(units.shape)[taken].long().numpy())
    return ends


def is_free(known: Units, units: Tensor) -> bool:
    """Whether all of these units are numbers of an input that nothing has told apart."""
    flat = narrow(units).long().numpy().ravel()
    return known.are_free(flat[flat > 0])


def united(known: Units, some: Tensor, others: Tensor) -> tuple[Tensor, bool]:
    """One unit of the two at each place, where there are two; and whether any were apart before."""
    slim, other = narrowed(some, others)
    one, two = (part.long().numpy().ravel() for part in (slim, other))
    both = (one > 0) & (two > 0)
    a, b = known.roots(one[both]), known.roots(two[both])
    apart = a != b
    if apart.any():
        pairs = np.unique(np.stack([a[apart], b[apart]]), axis=1)
        known.unite(pairs[0], pairs[1])
    return torch.where(slim > 0, slim, other).expand(some.shape), bool(apart.any())


def is_gate(known: Units, one: Tensor, other: Tensor) -> bool:
    """Whether a value is repeated along dimensions in which another has several units, as one gate of many is."""
    rank = max(one.dim(), other.dim())
    mine, theirs = ((1,) * (rank - part.dim()) + tuple(part.shape) for part in (one, other))
    dims = tuple(n for n in range(rank) if mine[n] == 1 and theirs[n] > 1)
    return bool(dims) and level(known, other.reshape(theirs), dims, unite=False) is None


def narrowed(some: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Two values of one shape without the repetition that both have."""
    strides = zip(some.shape, some.stride(), others.stride(), strict=True)
    taken = tuple(slice(0, 1) if size > 1 and a == b == 0 else slice(None) for size, a, b in strides)
    return some[taken], others[taken]
