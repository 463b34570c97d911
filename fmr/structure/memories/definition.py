"""What coefficients must be to be those of a memory: made of their own position alone, and of no other gate than is said."""

from collections.abc import Iterator
from itertools import combinations, islice
from math import ceil, comb, isfinite, prod

import torch
from torch import Tensor

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import summed_dim, window
from fmr.structure.normal.match import Projection, above, between, projection, settled, strip_views, unbroadcast, weights
from fmr.structure.normal.vocabulary import SAME
from fmr.structure.proof.certificate import largest
from fmr.structure.proof.evaluate import Values, evaluate, evaluate_each


def of_own_place(
    graph: Graph, source: TensorId, up: TensorId, post: TensorId, axis: int, value: Values
) -> tuple[float | None, Tensor | None]:
    """How far coefficients move, beyond a gain of each unit, where what is read elsewhere is turned round; and what comes of
    that where nothing is, if all of it was computed again.

    A gain may depend on all positions of an example, as where units compete. What convolutions of an image make is held, as
    their windows are known to reach further. No distance where coefficients do not move at all, and where which position is
    which cannot be told.
    """
    origin = strip_views(graph, source)
    first = next((one for node in between(graph, source, up) if (one := _reads(graph, node, origin))), None)
    if first is None:
        return None, None
    over = [one for one in windows(graph, up, post) if len(one.shape) > 3]
    held = {one.id: value(one.id) for one in over}
    read = recorded = value(source).detach()
    if not isfinite(largest(read)):
        read = read.nan_to_num(0.0, 0.0, 0.0)
    units = summed_dim(graph, first) % len(graph[first.data].shape) - len(graph[first.data].shape)
    rows, number = _rows(read, units), prod(graph[post].shape)
    if not rows.numel() or not number:
        return None, None
    if number // graph[post].shape[axis] % len(rows):
        return float("inf"), None
    examples = read.shape[0] if read.dim() > 2 else 1
    choices = [one.to(rows.device) for one in _choices(len(rows), examples)]
    others = [_turned(rows, one).reshape(read.movedim(units, -1).shape).movedim(-1, units) for one in choices]
    made, *moved_on = evaluate_each(graph, post, source, torch.stack([read, *others]), value, held)  # alike to the bit
    coefficients, offs = _rows(made, axis), list[float]()
    for chosen, moved in zip(choices, (_rows(one, axis) for one in moved_on), strict=True):
        if held and torch.equal(coefficients, moved):
            read_by = [one.parents[0].id for one in over]
            each = (of_own_place(graph, source, up, name, 1 - len(over[0].shape), value)[0] for name in read_by)
            offs += [max((off for off in each if off is not None), default=0.0)]
        elif not torch.equal(coefficients, moved) and isfinite(largest(coefficients - moved)):
            ways = _laid(chosen, made.movedim(axis, -1).shape[:-1])
            offs += [min((_off(coefficients, moved, where, examples) for where in ways), default=float("inf"))]
    off = max(offs, default=None)  # none where all of them are at a bound, or are no numbers
    return off, made if read is recorded and not held else None


_FEW = 8
"""Of so many rows there is a choice of each without each other; of more one that hears another one alone may be missed."""


def _choices(rows: int, examples: int) -> Iterator[Tensor]:
    """Some rows of each example, so that each is chosen once at least; of three or more that are not chosen, which no gain
    fits by chance, where there are as many."""
    length = rows // examples if rows % examples == 0 else rows
    length = rows if length < 4 else length
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(rows // length)]).flatten()
    if rows > _FEW:
        number = min(ceil(length / 2), max(length - 3, 1))
        yield from ((order >= start) & (order < start + number) for start in range(0, length, number))
    else:
        each = 1 if length < 6 else 2  # how many choices a row is in, which no other row is in
        number = next(n for n in range(1, length + 1) if comb(n, each) >= length)
        chosen = [[n in one for n in range(number)] for one in islice(combinations(range(number), each), length)]
        yield from torch.tensor(chosen)[order].T


def windows(graph: Graph, up: TensorId, post: TensorId) -> list[Node]:
    """The convolutions over several places between a first projection and the coefficients."""
    return [node for node in between(graph, up, post) if window(graph, node)]


def _reads(graph: Graph, node: Node, origin: TensorId) -> Projection | None:
    """The projection that a node is, where it reads a view of this value."""
    found = projection(graph, node)
    return found if found is not None and strip_views(graph, found.data) == origin else None


def _rows(value: Tensor, axis: int) -> Tensor:
    """A value as (everything else, units)."""
    return value.movedim(axis, -1).reshape(-1, value.shape[axis])


def _laid(chosen: Tensor, places: torch.Size) -> Iterator[Tensor]:
    """Which places the chosen rows are, for each way in which the places may be the rows, with more dimensions between."""
    several = [dim for dim, size in enumerate(places) if size != 1]
    for number in range(len(several) + 1):
        for dims in combinations(several, number):
            if prod(places[dim] for dim in dims) == len(chosen):
                wide = [places[dim] if dim in dims else 1 for dim in range(len(places))]
                yield chosen.reshape(wide).expand(places).reshape(-1)


def _turned(rows: Tensor, chosen: Tensor) -> Tensor:
    """Rows of which the chosen ones have their units in the other order; their largest number, mean and length stay."""
    other = -rows if rows.shape[-1] == 1 else rows.flip(-1)
    return torch.where(chosen[:, None], other, rows)


def _off(before: Tensor, after: Tensor, chosen: Tensor, examples: int) -> float:
    """How far the rows that were not chosen lie from their old ones times a gain, or, of one or two, which any gain fits,
    from these; infinite where others moved alone."""
    if torch.equal(before[~chosen], after[~chosen]):
        return 0.0
    if torch.equal(before[chosen], after[chosen]) and chosen.any() and bool(before.any()):
        return float("inf")
    kept = (~chosen)[:, None]
    shape = (examples if len(before) % examples == 0 else 1, -1, before.shape[-1])
    many = kept.expand_as(before).reshape(shape).sum(1, keepdim=True).clamp(min=1)
    straight = ((after - before) * kept).reshape(shape) * (many <= 2)
    if largest(straight) > 1e-4 * (most := max(largest(before), 1e-12)):
        return largest(straight) / most
    old, new = ((one * kept).reshape(shape) for one in (before, after))
    old, new = (one - one.sum(1, keepdim=True) / many for one in (old, new))
    old, new = ((one.reshape(before.shape) * kept).reshape(shape) for one in (old, new))
    gain = (old * new).sum(1, keepdim=True) / (old * old).sum(1, keepdim=True).clamp(min=1e-30)
    return largest(new - gain * old) / most


def is_gated(graph: Graph, source: TensorId, pre: TensorId, post: TensorId, value: Values) -> bool:
    """Whether coefficients depend on what is read by another way than through what enters the nonlinearity."""
    read, given = value(source).detach(), {pre: value(pre)}
    before, after = (evaluate(graph, post, {**given, source: one}, value) for one in (read, -0.5 * read))
    return not torch.allclose(before, after, equal_nan=True)


def gates(graph: Graph, source: TensorId, up: TensorId, post: TensorId, n: int) -> list[Projection]:
    """The projections, beside a first one, that make as many numbers of what it reads, on the way to coefficients."""
    origin, own = strip_views(graph, source), {node.id for node in between(graph, source, up)} | {up}
    others = (node for node in between(graph, source, post) if node.id not in own and node.shape[-1:] == (n,))
    return [found for node in others if (found := _reads(graph, node, origin)) is not None]


def first_projection(graph: Graph, up: TensorId) -> Projection | None:
    """The projection whose result, with its bias and as it is laid out, is this value; None where that is none's."""
    higher = (projection(graph, node) for node in above(graph, up, lambda node: projection(graph, node) is None))
    made = next((one for one in higher if one is not None), None)
    return made if made is not None and settled(graph, made.node).id == up else None


def matrices(graph: Graph, weight: TensorId) -> TensorId:
    """A weight before it was repeated for each example, or the matrices among which one was chosen for each position."""
    node = graph[strip_views(graph, weight, SAME)]
    return node.parents[0].id if node.op == "getitem" and len(node.parents) > 1 else unbroadcast(graph, weight)


def held(graph: Graph, weight: TensorId) -> TensorId:
    """The parameter that a weight was made of; the weight itself where it is made of several."""
    made = [node.id for node in above(graph, weight, lambda node: True) if node.op in ("param", "buffer")]
    return (weights(graph, weight) or (made if len(made) == 1 else [weight]))[0]
