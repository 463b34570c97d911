"""Networks to compare with: the same weights in each layer without their order, and the same strengths of units.

A strength is the sum of a unit's edges. Shuffling the weights of a layer makes strengths alike, too; a graph that is
divided better than that may owe it to strong units alone, which is why there is a second kind.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analyzers.networks.net import Block, Net, Sparse, pruned
from analyzers.numbers.embed import Floats, Ints

Random = np.random.Generator
Bools = NDArray[np.bool_]

CLOSE = 1e-9
"""How far strengths may be off, as a share of the largest of a layer, when no more edges are added for them."""

TRADES, TURNS = 5, 100
"""For each row, how many trades rewire it; how often rows and columns are scaled at most."""


def shuffled(net: Net, random: Random) -> Net:
    """The same network with the weights of each layer dealt anew to the places of that layer."""
    blocks = list(net.blocks)
    for layer in dict.fromkeys(block.layer for block in blocks):
        mine = [n for n, block in enumerate(blocks) if block.layer == layer]
        places = [blocks[n].places for n in mine]
        dealt = random.permutation(np.concatenate([blocks[n].weights[at] for n, at in zip(mine, places, strict=True)]))
        ends = np.cumsum([int(at.sum()) for at in places])[:-1]
        for n, at, values in zip(mine, places, np.split(dealt, ends), strict=True):
            weights = np.zeros(at.shape)
            weights[at] = values
            blocks[n] = replace(blocks[n], weights=weights)
    return replace(net, blocks=tuple(blocks))


def strengths_kept(net: Net, random: Random) -> Net:
    """The same network with the edges of each layer dealt anew, where each unit keeps the sum of its edges in the layer.

    The edges are rewired so that each unit keeps their number, too (curveball trades), the sizes are dealt to them anew, and
    rows and columns are scaled in turn until their sums are what they were (Sinkhorn). Where the new places cannot carry
    these sums, what is left of them is put on a few more edges, so that strengths are kept exactly all the same.

    Source: R. Sinkhorn, P. Knopp, "Concerning nonnegative matrices and doubly stochastic matrices", 1967; G. Strona et al.,
    "A fast and unbiased procedure to randomize ecological binary matrices with fixed row and column totals", 2014.
    """
    return replace(net, blocks=tuple(_strengths_kept(block, random) for block in net.blocks))


class Null(NamedTuple):
    """A kind of networks to compare with. given: what is dealt anew, of a network and of its pruned graph; draw: the graph
    of one that was dealt, pruned to the same share of edges."""

    given: Callable[[Net, Sparse], Net]
    draw: Callable[[Net, float, Random], Sparse]


NULLS = {
    "shuffled": Null(lambda net, graph: net, lambda net, share, random: pruned(shuffled(net, random).adjacency(), share)),
    "strengths kept": Null(Net.with_edges, lambda net, share, random: strengths_kept(net, random).adjacency()),
}
"""By name: the weights of each layer shuffled, then pruned as the network was; the graph that was divided, pruned or not,
with the strength of each unit kept towards each other group of units."""


def _strengths_kept(block: Block, random: Random) -> Block:
    old, places = block.weights, block.places
    wide = len(old) <= len(old.T)
    filled = _traded(old > 0, places, random) if wide else _traded((old > 0).T, places.T, random).T
    new = np.zeros(old.shape)
    new[filled] = random.permutation(old[old > 0])
    return replace(block, weights=_balanced(new, old.sum(1), old.sum(0), random))


def _traded(filled: Bools, places: Bools, random: Random) -> Bools:
    """Other filled places, as many in each row and each column: two rows trade what only one of them has."""
    if len(filled) < 2 or bool((filled == places).all()):
        return filled
    filled = filled.copy()
    for _ in range(TRADES * len(filled)):
        one, other = random.choice(len(filled), 2, replace=False)
        swap = np.flatnonzero((filled[one] != filled[other]) & places[one] & places[other])
        dealt = np.zeros(len(swap), bool)
        dealt[random.permutation(len(swap))[: int(filled[one, swap].sum())]] = True
        filled[one, swap], filled[other, swap] = dealt, ~dealt
    return filled


def _balanced(weights: Floats, rows: Floats, columns: Floats, random: Random) -> Floats:
    """The weights scaled by row and by column to these sums, and what is left of the sums on edges that are added."""
    (across, down), new = np.nonzero(weights), np.zeros(weights.shape)
    sizes, scale = weights[across, down], float(rows.max(initial=0)) or 1.0
    for _ in range(TURNS):
        sizes = sizes * _over(rows, _sums(across, sizes))[across]
        sizes = sizes * _over(columns, _sums(down, sizes))[down]
        if np.abs(_sums(across, sizes, len(rows)) - rows).max(initial=0) < CLOSE * scale:
            break
    sizes = sizes * np.minimum(1, _over(rows, _sums(across, sizes)))[across]
    new[across, down] = sizes * np.minimum(1, _over(columns, _sums(down, sizes)))[down]
    left = rows - new.sum(1), columns - new.sum(0)
    return new if max(part.max(initial=0) for part in left) < 10 * CLOSE * scale else new + _carried(*left, random)


def _sums(at: Ints, sizes: Floats, count: int = 0) -> Floats:
    """The sum of the sizes at each place, at least so many places."""
    return np.bincount(at, sizes, count).astype(np.float64)


def _over(wanted: Floats, sums: Floats) -> Floats:
    """What to scale sums by, so that they are those that are wanted; 0 for nothing."""
    found: Floats = np.divide(wanted[: len(sums)], sums, out=np.zeros(len(sums)), where=sums > 0)
    return found


def _carried(rows: Floats, columns: Floats, random: Random) -> Floats:
    """Edges with these sums, as few as may be: rows and columns in random order, each filled up in turn."""
    found = np.zeros((len(rows), len(columns)))
    down, along = random.permutation(len(rows)), random.permutation(len(columns))
    left, room = np.maximum(rows, 0).copy(), np.maximum(columns, 0).copy()
    i = j = 0
    while i < len(down) and j < len(along):
        row, column = down[i], along[j]
        carried = min(left[row], room[column])
        found[row, column] += carried
        left[row] -= carried
        room[column] -= carried
        if left[row] <= room[column]:
            i += 1
        else:
            j += 1
    return found
