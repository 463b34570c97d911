"""Which numbers of values belong to one unit: sets that are united as a graph is followed."""

import numpy as np
from numpy.typing import NDArray

from analyzers.numbers.embed import Ints


class Units:
    """Units by number, from 1; those that were united have one root, the earliest of them.

    Units of one group were made at once, as the channels of a convolution; a free unit is one number of an input, of which
    no layer has told yet what it belongs to.
    """

    def __init__(self) -> None:
        self.groups: list[str] = []
        self._root: Ints = np.zeros(1, np.int64)
        self._group: Ints = np.zeros(1, np.int64)
        self._place: Ints = np.zeros(1, np.int64)
        self._free: NDArray[np.bool_] = np.zeros(1, bool)

    def new(self, count: int, group: str, *, free: bool = False) -> Ints:
        """The numbers of so many new units of a new group."""
        made = np.arange(len(self._root), len(self._root) + count)
        self._root = np.concatenate([self._root, made])
        self._group = np.concatenate([self._group, np.full(count, len(self.groups))])
        self._place = np.concatenate([self._place, np.arange(count)])
        self._free = np.concatenate([self._free, np.full(count, free)])
        self.groups.append(group)
        return made

    def roots(self, units: Ints) -> Ints:
        """The root of each unit; 0 for 0, which is none."""
        found: Ints = self._root[units]
        while True:
            higher = self._root[found]
            if np.array_equal(higher, found):
                self._root[units] = found
                return found
            found = higher

    def unite(self, some: Ints, others: Ints) -> None:
        """Make one unit of each pair."""
        while True:
            one, other = self.roots(some), self.roots(others)
            apart = one != other
            if not apart.any():
                return
            low, high = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
            np.minimum.at(self._root, high, low)

    def settle(self, units: Ints) -> None:
        """Some units of an input are units of the graph from now on."""
        self._free[self.roots(units)] = False

    def are_free(self, units: Ints) -> bool:
        """Whether all of these, of which there are some, are numbers of an input that nothing has told apart."""
        return len(units) > 0 and bool(self._free[self.roots(units)].all())

    def group(self, units: Ints) -> Ints:
        """The number of the group that each was made in."""
        found: Ints = self._group[units]
        return found

    def place(self, units: Ints) -> Ints:
        """The place of each in its group."""
        found: Ints = self._place[units]
        return found
