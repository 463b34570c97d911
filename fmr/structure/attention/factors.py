"""The weights of single heads, as the projections around an attention read them: what a head reads and what it writes.

Which row of a weight belongs to which head is read off the graph: the numbers of a projection's result are sent along its
way to q, k, v, and those of z along its way to the output. Nothing is multiplied out, and nothing is believed: the values of
a run are made again from the factors and compared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.structure.attention.maps import maps_of
from fmr.structure.normal.einsum import Subscripts, of_projection
from fmr.structure.normal.indices import iota, trace
from fmr.structure.normal.match import (
    Projection,
    above,
    between,
    come_of,
    is_constant,
    projection,
    settled,
    strip_views,
    weights,
)
from fmr.structure.normal.vocabulary import MOVES, NORMS, SAME, STATISTICS
from fmr.structure.proof.certificate import Certificate, error
from fmr.structure.proof.evaluate import Values, at_zero, evaluate, plain


class Factor(NamedTuple):
    """What heads read of one value, or write: `matrix` (heads, units, width), and a `bias`.

    `of` is the value that is read, whose last dimension the matrix sums over; of the output it is what is written. The bias
    is (heads, units), that of the output (width,) and of all heads together.
    """

    of: TensorId
    matrix: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """The weights of each head of a self-attention: it reads by `q`, `k` and `v`, and writes by `out`.

    Head h adds `pattern @ (x @ v.matrix[h].T + v.bias[h]) @ out.matrix[h]` to the output, and the query of a token meets its
    own key in `(q.matrix[h] @ x) @ (k.matrix[h] @ x)`, but for biases, and for lengths where the two are normalised. Queries
    and keys are those before a rotation by their positions, which leaves that product as it is; between tokens apart the
    rotation by that way stands between the two matrices. Heads that share keys and values have the same ones.
    """

    q: Factor
    k: Factor
    v: Factor
    out: Factor
    certified: Certificate


class Heads(NamedTuple):
    """How many heads an attention has, and how many keys and values."""

    queries: int
    keys: int


class Read(NamedTuple):
    """What heads read, and their vectors in a run as their weights make them: (examples, heads, positions, units)."""

    factor: Factor
    vectors: Tensor
    error: float


def read_by(graph: Graph, site: Site, heads: Heads, value: Values, shared: bool = False) -> Read:
    """The weights by which each head makes its queries, keys or values, before what rotates those by their position.

    shared: whether several heads may have the same ones, as keys and values.
    """
    found = _projection_above(graph, site.id)
    base = settled(graph, found.node)
    raw = _before_rotation(graph, base, graph[site.id])
    subscripts = of_projection(graph, found)
    tokens, matrix = _last(plain(value(found.data)).detach(), subscripts), matrix_of(graph, found, value)
    n = len(matrix)
    numbers = _numbers(graph, found, subscripts, n)
    rows = _rows(graph, raw, site, heads, shared)
    units = _vectors(_traced(graph, numbers, found.node, raw), rows)
    own = (units % n)[0, :, 0]
    if bool((units < 0).any()) or bool((units % n != own[None, :, None]).any()):
        raise StructureError(f"{raw.id} is made of more than what {found.node.id} makes of a token.")
    whole = at_zero(graph, base.id, found.data, value).flatten()
    bias = torch.zeros(tokens.shape[0] * n, dtype=torch.float64, device=whole.device)
    to_base = _traced(graph, numbers, found.node, base).flatten()
    bias[to_base] = whole
    gain = _vectors(_gain(graph, base, raw, to_base % n, value), rows)
    centred = _is_centred(graph, base, raw, value)
    made = ((tokens.double() @ matrix.double().mT).flatten() + bias)[units]
    made = gain * (made - made.mean(-1, keepdim=True) if centred else made)
    seen = _vectors(value(raw.id).double(), rows)
    if _is_normed(graph, base, raw):
        made = made * ((made * seen).sum(-1, keepdim=True) / (made * made).sum(-1, keepdim=True).clamp(min=1e-30))
    vectors, offset = matrix[own].double(), bias.reshape(-1, n)[0][own]
    if centred:
        vectors, offset = vectors - vectors.mean(1, keepdim=True), offset - offset.mean(1, keepdim=True)
    scale = gain[0, :, 0]
    kept = (_single(one, matrix) for one in (vectors * scale[..., None], offset * scale))
    factor = Factor(_read(graph, found, matrix.shape[1]), *kept)
    return Read(factor, seen, error(made, seen))


def written_by(
    graph: Graph, z: Site, way: tuple[TensorId, ...], out: Site, heads: Heads, value: Values
) -> tuple[Factor, float]:
    """The weights by which each head writes what it mixed to the output of their projection, and how exactly."""
    last = way[-1]
    found = next((one for node in graph.readers(last) if (one := projection(graph, node)) and one.data == last), None)
    if found is None:
        raise StructureError(f"no projection reads {last}, where its heads lie side by side.")
    subscripts = of_projection(graph, found)
    matrix = matrix_of(graph, found, value)
    places = _traced(graph, iota(*graph[z.id].shape), graph[z.id], graph[last])
    if bool((places < 0).any()) or prod(graph[last].shape) != prod(graph[z.id].shape):
        raise StructureError(f"{last}, which its projection reads, is more than the values of its heads.")
    by_head = _ordered(iota(*graph[z.id].shape), z, heads).long()
    size = by_head.shape[1] * by_head.shape[3]
    column = torch.arange(size).reshape(1, by_head.shape[1], 1, -1).expand(by_head.shape)
    column_of = torch.empty(by_head.numel(), dtype=torch.int64).scatter_(0, by_head.flatten(), column.flatten())
    columns = _last(column_of[places], subscripts)
    if len(columns[0].unique()) != size or bool((columns != columns[0]).any()):
        raise StructureError(f"{last} does not hold its heads side by side for each token.")
    mixed = value(z.id).double().flatten()[places.to(value(z.id).device).flatten()].reshape(graph[last].shape)
    numbers = _numbers(graph, found, subscripts, len(matrix))
    whole = at_zero(graph, out.id, last, value)
    order = _traced(graph, numbers, found.node, graph[out.id])
    if bool((order < 0).any()):
        raise StructureError(f"{out.id} is more than what {found.node.id} makes of its heads.")
    made = (_last(mixed, subscripts) @ matrix.double().mT).flatten()[order.to(whole.device)] + whole
    by_unit = torch.empty_like(matrix.mT)
    by_unit[columns[0].to(matrix.device)] = matrix.mT
    bias = whole.flatten()[(order.flatten() < len(matrix)).nonzero().flatten().to(whole.device)]
    by_unit = by_unit.reshape(by_head.shape[1], by_head.shape[3], -1)
    factor = Factor(out.id, _single(by_unit, matrix), _single(bias, matrix))
    return factor, error(made, value(out.id))


def in_order(value: Tensor, site: Site, heads: Heads, shared: bool = False) -> Tensor:
    """A value of the heads as (examples, heads, positions, units), shared keys repeated for the heads that share them.

    shared: whether these may be keys or values of several heads, which are never laid out as queries of one step are.
    """
    ordered = _ordered(value, site, heads, shared)
    return ordered.repeat_interleave(heads.queries // ordered.shape[1], 1)


def _ordered(value: Tensor, site: Site, heads: Heads, shared: bool = False) -> Tensor:
    layout = site.layout or ()
    if layout[-1:] != ("units",):
        raise StructureError(f"{site.id} does not end with the units of a head: {list(layout)}.")
    counts = (heads.keys, heads.queries) if shared else (heads.queries, heads.keys)
    for number in dict.fromkeys((*counts, 1)):
        try:
            return maps_of(value, site, number, heads.keys if number == heads.queries else number)
        except StructureError as refused:
            last = refused
    raise last


def _projection_above(graph: Graph, name: TensorId) -> Projection:
    """The one projection that a value is made by; what makes angles of places is none."""
    higher = above(graph, name, lambda node: projection(graph, node) is None)
    found = [one for node in higher if (one := projection(graph, node)) is not None and _is_of_data(graph, one)]
    if len(found) != 1:
        names = ", ".join(str(one.node.id) for one in found[:3]) or "none"
        raise StructureError(f"{name} is made by {len(found)} projections ({names}), expected one.")
    return found[0]


def _is_of_data(graph: Graph, found: Projection) -> bool:
    """Whether a projection reads vectors of tokens, and not their places."""
    read = graph[strip_views(graph, found.data, MOVES)]
    return read.dtype.is_floating_point and not is_constant(graph, read.id)


def last_alone(graph: Graph, base: Node, end: Node, is_foreign: Callable[[TensorId], bool]) -> Node:
    """The last value that everything goes through on a way before anything that is foreign flows in."""
    way, alone = list(come_of(graph, base.id, end.id)), base
    own = {base.id: -1} | {node.id: n for n, node in enumerate(way)}
    reach = [min((own[parent.id] for parent in node.parents if parent.id in own), default=-1) for node in way]
    for n, node in enumerate(way):
        if any(parent.id not in own and is_foreign(parent.id) for parent in node.parents):
            break
        if all(first >= n for first in reach[n + 1 :]):
            alone = node
    return alone


def _before_rotation(graph: Graph, base: Node, end: Node) -> Node:
    """The last value on a way before what rotates it, or masks it, by the place of its token."""

    def is_foreign(name: TensorId) -> bool:
        node = graph[name]
        number = node.dtype.is_floating_point or node.dtype.is_complex
        return number and prod(node.shape) > 1 and not weights(graph, name)

    return last_alone(graph, base, end, is_foreign)


def matrix_of(graph: Graph, found: Projection, value: Values) -> Tensor:
    """The weight of a projection as a matrix, (what it makes, what it sums over), whichever way round it lies."""
    subscripts = of_projection(graph, found)
    shape = dict(zip(subscripts.right, graph[found.weight].shape, strict=True))
    made, summed = _made(subscripts), subscripts.contracted
    rest = [letter for letter in subscripts.right if letter not in made + summed]
    if not summed or any(shape[letter] > 1 for letter in rest):
        raise StructureError(f"{found.node.id} has other weights for other places, expected one matrix.")
    order = [subscripts.right.index(letter) for letter in (*rest, *made, *summed)]
    weight = plain(value(found.weight)).detach().permute(order)
    return weight.reshape(prod(shape[letter] for letter in made), -1)


def _made(subscripts: Subscripts) -> str:
    """What a projection makes, in the order of its result."""
    return subscripts.free(subscripts.right)


def _last(data: Tensor, subscripts: Subscripts) -> Tensor:
    """What a projection reads as (tokens, what it sums over)."""
    dims = [subscripts.left.index(letter) for letter in subscripts.contracted]
    return data.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).flatten(0, -2)


def _numbers(graph: Graph, found: Projection, subscripts: Subscripts, n: int) -> Tensor:
    """A number for each place of a projection's result: those of one token follow one another."""
    shape, made = graph[found.node.id].shape, _made(subscripts)
    if len(shape) != len(subscripts.result):
        raise StructureError(f"{found.node.id} has another shape than its operands tell.")
    dims = [subscripts.result.index(letter) for letter in made]
    lead = [dim for dim in range(len(shape)) if dim not in dims]
    numbers = iota(*(shape[dim] for dim in (*lead, *dims)))
    return numbers.permute([(*lead, *dims).index(dim) for dim in range(len(shape))])


def _traced(graph: Graph, numbers: Tensor, start: Node, end: Node) -> Tensor:
    """Where the numbers of a value lie in another one that is made of it; -1 stands for what is not."""
    found = numbers if start is end else trace(graph, numbers, (start, end))
    if found is None:
        raise StructureError(f"which numbers of {start.id} lie where in {end.id} cannot be told.")
    return found.long()


def _rows(graph: Graph, raw: Node, site: Site, heads: Heads, shared: bool) -> Tensor:
    """Which vector of a value becomes the one of each example, head and position: (examples, heads, positions)."""
    numbers = iota(*raw.shape[:-1], 1).expand(raw.shape)
    found = in_order(_traced(graph, numbers, raw, graph[site.id]), site, heads, shared)
    most = found.amax(-1)
    if bool((most < 0).any()) or bool(((found != most[..., None]) & (found >= 0)).any()):
        raise StructureError(f"the heads of {site.id} mix several vectors of {raw.id}.")
    return most


def _vectors(value: Tensor, rows: Tensor) -> Tensor:
    """The vectors of a value by example, head and position."""
    return value.reshape(-1, value.shape[-1])[rows.to(value.device)]


def _gain(graph: Graph, base: Node, raw: Node, units: Tensor, value: Values) -> Tensor:
    """What each number of a projection is multiplied by on its way: of a normalisation its weight."""
    like = value(raw.id)
    if all(node.op in MOVES for node in between(graph, base.id, raw.id)):
        return torch.ones(like.shape, dtype=torch.float64, device=like.device)
    signs = (1.0 - 2.0 * (units % 2)).double().reshape(base.shape).to(like.device)
    zero = evaluate(graph, raw.id, {base.id: torch.zeros_like(signs)}, value)
    made = evaluate(graph, raw.id, {base.id: signs}, value) - zero
    sent = trace(graph, (signs.cpu() + 1) / 2, (base, raw))
    if sent is None:
        raise StructureError(f"which numbers of {base.id} lie where in {raw.id} cannot be told.")
    return made * (2 * sent - 1).to(like.device)


def _is_centred(graph: Graph, base: Node, raw: Node, value: Values) -> bool:
    """Whether a normalisation takes the mean of a vector away."""
    if not _is_normed(graph, base, raw):
        return False
    ones, zeros = (
        torch.full(base.shape, number, dtype=torch.float64, device=value(base.id).device) for number in (1.0, 0.0)
    )
    made = [evaluate(graph, raw.id, {base.id: one}, value) for one in (ones, zeros)]
    return bool((made[0] - made[1]).abs().max() < 1e-6)


def _is_normed(graph: Graph, base: Node, raw: Node) -> bool:
    return any(node.op in NORMS | STATISTICS for node in between(graph, base.id, raw.id))


def _read(graph: Graph, found: Projection, width: int) -> TensorId:
    """The value that a projection reads, before it was laid out for it."""
    name = strip_views(graph, found.data, SAME | {"view", "reshape", "flatten"})
    return name if graph[name].shape[-1:] == (width,) else found.data


def _single(tensor: Tensor, like: Tensor) -> Tensor:
    """In the precision of a weight, single at least."""
    return tensor.to(torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32)
