"""Attention by dataflow: two contractions around a softmax, and what is shared by all that weigh values by a softmax."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from fmr.fused import EXPLAINED
from fmr.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.heads import Heads, Layout, Use, heads_in_rows, key_heads, layouts, read_dims, use_of
from fmr.structure.letters import carried, letters_of
from fmr.structure.match import (
    MASKING,
    NORM_PARTS,
    NORMS,
    SAME,
    SHAPE,
    Contraction,
    Projection,
    climb,
    contraction,
    depends,
    descend,
    is_constant,
    product,
    projection,
    settled,
    weighed_sum,
    weights,
)
from fmr.structure.softmax import Softmax

AFTER = SAME | SHAPE | frozenset("masked_fill mul where div tril triu".split())
"""What may lie between a softmax and the product with the values: casts, masks, a cut sink."""

BEFORE = SAME | SHAPE | MASKING
"""What may lie between the product of queries and keys and its softmax: scale, bias, mask, cap, sink."""

_LAID_OUT = frozenset("pad as_strided unfold chunk split cat stack diagonal new_zeros setitem".split())
"""Ops that lay a pattern out for a banded product; the pattern is what they are given."""


class Attention(NamedTuple):
    """The IDs of one attention and the shape of its heads, as read off the graph.

    `layouts` says of q, k, v, scores, pattern and z what each dimension counts: "heads" is not there where heads lie in the
    batch, and of scores and pattern "positions" are the queries and "units" the keys. `dim` is normalised by the softmax.
    """

    softmax: TensorId
    q: TensorId
    k: TensorId
    v: TensorId
    scores: TensorId
    pattern: TensorId
    z: TensorId
    out: TensorId | None
    n_heads: int
    n_kv_heads: int
    head_dim: int
    kind: str
    scope: str
    dim: int = -1
    layouts: tuple[Layout | None, ...] = (None,) * 6


@dataclass(frozen=True)
class Rejected:
    """A candidate that is not claimed, and why."""

    id: TensorId
    what: str
    reason: str

    def __repr__(self) -> str:
        return f"{self.id} is no {self.what}: {self.reason}"


def dot_product(graph: Graph, softmax: Softmax) -> Attention | str:
    """The attention around a softmax of products of queries with keys, or the reason why it is none."""
    scored = _scored(graph, softmax)
    if scored is None:
        return "no product of two activations lies above the softmax"
    above = _way(graph, scored.node, graph[softmax.scores])
    use = mix(graph, softmax, above)
    if use is None:
        return "nothing below the softmax multiplies values by it"
    q, k = scored.left, _untransposed(graph, scored.right)
    z = handed_on(graph, use.node)
    out, way, end = projected(graph, z, (use.v, softmax.node.id))
    heads = (heads_in_rows(graph, use, z, way, end) if end is not None else None) or _unprojected(graph, z, q)
    if heads is None:
        return "how many heads it has cannot be read off the way of its values into a projection"
    sizes = dict(zip(letters_of(graph, scored).left, graph[q].shape, strict=True))
    return Attention(
        softmax=softmax.node.id,
        q=q,
        k=k,
        v=use.v,
        scores=softmax.scores,
        pattern=acting(graph, use.way),
        z=z.id,
        out=out,
        n_heads=heads.number,
        n_kv_heads=key_heads(graph, use, heads, _repeated(graph, k)),
        head_dim=math.prod(sizes[letter] for letter in letters_of(graph, scored).summed),
        kind="self" if _roots(graph, q) & _roots(graph, k) else "cross",
        scope=softmax.node.scope.partition("/")[0],
        dim=softmax.dim,
        layouts=layouts(graph, scored, use, heads, above, k != scored.right),
    )


def _unprojected(graph: Graph, z: Node, q: TensorId) -> Heads | None:
    """The heads of values that no projection reads row by row: where the width of the queries was split into them."""
    size = graph[q].shape[-1]
    split = _split(graph, q, size)
    if split is None:
        return Heads(1, (), (), False) if len(z.shape) == 3 else None
    dims = [n for n in range(len(z.shape) - 2, 0, -1) if z.shape[n] == split]
    return Heads(split, (dims[-1],), (split,), False) if dims else Heads(split, (0,), (split,), True)


def _scored(graph: Graph, softmax: Softmax) -> Contraction | None:
    """The nearest product of two activations above a softmax; heads may have been mixed on the way."""
    for product_of in (product, weighed_sum):
        above = climb(graph, softmax.scores, lambda node: node.op in BEFORE and contraction(node) is None)
        found = next((found for node in above if (found := product_of(graph, node)) is not None), None)
        if found is not None:
            return found
    for node in climb(graph, softmax.scores, lambda node: node.op in BEFORE or projection(graph, node) is not None):
        found = product(graph, node)
        if found is not None and _way(graph, node, graph[softmax.scores]):
            return found
    return None


def _way(graph: Graph, start: Node, end: Node) -> tuple[Node, ...]:
    """The nodes from a product of queries and keys to its softmax; empty where more than heads is mixed between them."""
    before: tuple[Node, ...] = ()
    while True:
        for node, way in descend(graph, start, lambda node: node.op in BEFORE and contraction(node) is None):
            if node is end:
                return (*before, *way, node)
            if way and mixes_heads(graph, (*before, *way), node):
                before, start = (*before, *way), node
                break
        else:
            return ()


def mixes_heads(graph: Graph, way: tuple[Node, ...], node: Node) -> bool:
    """Whether a node is a projection that leaves queries and keys where they are; the way to it begins at their product."""
    found, scored = projection(graph, node), product(graph, way[0]) or weighed_sum(graph, way[0])
    if found is None or scored is None or found.data != way[-1].id or len(way[-1].shape) < 3:
        return False
    letters = letters_of(graph, scored)
    places = letters.alone(letters.left) + letters.alone(letters.right)
    shape = [size if letter in places else 1 for letter, size in zip(letters.result, way[0].shape, strict=True)]
    number = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape).expand(way[0].shape)
    value = carried(graph, number, way)
    if value is None or not value.numel():
        return False
    dims = read_dims(graph, found)
    rows = value.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
    return bool((rows == rows[..., :1]).all())


def mix(graph: Graph, softmax: Softmax, above: tuple[Node, ...] = ()) -> Use | None:
    """The product with the values below a softmax; `above` is the way of the scores to it, where they are a product."""
    before: tuple[Node, ...] = ()
    start = softmax.node
    while True:
        for node, way in descend(graph, start, _hands_on):
            if node is softmax.node or node is start:
                continue
            found = contraction(node) or weighed_sum(graph, node)
            if found is not None and not weights(graph, _values(found, way)):
                return use_of(graph, found, (*before, *way))
            if above and mixes_heads(graph, (*above, *before, *way), node):
                before, start = (*before, *way), node
                break
        else:
            return None


def _hands_on(node: Node) -> bool:
    """Whether what a node makes of a pattern is a pattern: masked, cast, divided by its sum."""
    return node.op in AFTER or (node.op == "add" and len(node.parents) == 1)


def _values(found: Contraction, way: tuple[Node, ...]) -> TensorId:
    """The operand of a product that is not on a way."""
    return found.right if found.left in {node.id for node in way} else found.left


def acting(graph: Graph, way: tuple[Node, ...]) -> TensorId:
    """The last node on the way to the product that changes the numbers; dropout and the layout of a band do not count."""
    last = way[0]
    for before, node in pairwise(way):
        if node.op in _LAID_OUT or contraction(node) is not None:
            break
        cut = node.op == "getitem" and len(node.shape) == len(before.shape) and node.shape[:-1] == before.shape[:-1]
        if cut or node.op == "to" or node.op not in SHAPE | SAME:
            last = node
    return last.id


def _untransposed(graph: Graph, k: TensorId) -> TensorId:
    """The keys as (..., positions, units), where the product reads them transposed."""
    node = graph[k]
    if node.op in ("transpose", "permute", "mT", "t", "T", "movedim") and len(node.parents) == 1:
        before = graph[node.parents[0].id]
        if before.shape == (*node.shape[:-2], node.shape[-1], node.shape[-2]):
            return before.id
    return k


def _split(graph: Graph, q: TensorId, size: int) -> int | None:
    """The number of heads in the view that split the width of a projection into heads of `size` units."""
    through = SHAPE | SAME | MASKING | NORMS | {"neg", "rsqrt", "pow", "mean", "sigmoid"}
    for node in climb(graph, q, lambda node: node.op in through and contraction(node) is None):
        if node.op in ("view", "reshape", "unflatten", "rearrange") and len(node.shape) >= 3 and node.parents:
            above = graph[node.parents[0].id].shape
            if above and node.shape[-1] % size == 0 and above[-1] > node.shape[-1] and above[-1] % node.shape[-1] == 0:
                if above[-2:] and math.prod(above[-2:]) == math.prod(node.shape[-2:]) != above[-1]:
                    return node.shape[-2]
                whole = above[-1] % (node.shape[-1] * node.shape[-2]) == 0
                return node.shape[-2] if whole and len(node.shape) > len(above) else above[-1] // node.shape[-1]
    return None


def _repeated(graph: Graph, k: TensorId) -> float:
    """How many query heads share one key head: how often the keys were repeated before the product."""
    ratio, node = 1.0, graph[k]
    while node.op in SHAPE | SAME and len(node.parents) == 1 and node.op not in ("split", "chunk", "unbind", "cat", "stack"):
        above = graph[node.parents[0].id]
        if node.op in ("expand", "repeat_interleave", "repeat", "expand_as"):
            ratio *= math.prod(node.shape) / max(1, math.prod(above.shape))
        node = above
    return ratio


def _roots(graph: Graph, name: TensorId) -> set[object]:
    """What queries or keys were projected from, and what that was made of by norms and further projections alone."""
    above = climb(graph, name, lambda node: contraction(node) is None and not node.id.is_source)
    data = [found.data for node in above if (found := projection(graph, node)) is not None]
    return set().union(*(_linear(graph, one) for one in (name, *data)))


def _linear(graph: Graph, name: TensorId) -> set[object]:
    """The activations that a value is a normalised linear function of, up to a sum; one that is computed twice is one."""
    found: set[object] = set()

    def through(node: Node) -> bool:
        if node.op == "add" and sum(not weights(graph, parent.id) for parent in node.parents) > 1:
            found.add((node.op, *sorted(node.parents)))
            return False
        return node.op in SAME | SHAPE | NORMS | NORM_PARTS or projection(graph, node) is not None

    found.update(node.id for node in climb(graph, name, through) if not is_constant(graph, node.id))
    return found


def handed_on(graph: Graph, node: Node) -> Node:
    """The output of the fused op that a node is the result of, else the node."""
    while True:
        outer = [r for r in graph.readers(node.id) if r.op in EXPLAINED and r.parents[0].id == node.id]
        if not outer:
            return node
        node = outer[0]


def projected(
    graph: Graph, z: Node, own: tuple[TensorId, ...] = ()
) -> tuple[TensorId | None, tuple[Node, ...], Projection | None]:
    """The output projection with what reshapes its result, the way of z into it, and the projection itself.

    It is the first contraction with a weight below the heads, and their sum where each head is projected alone; all None
    where z is used as it is. What is made of its `own` values or pattern in another way may be added to z.
    """

    def through(node: Node) -> bool:
        if node.op == "add":
            return bool(own) and all(any(depends(graph, parent.id, one) for one in own) for parent in node.parents)
        return node.op in SAME | SHAPE | NORMS | {"mul"}

    for node, way in descend(graph, z, through):
        found = projection(graph, node) if way else None
        if found is not None and found.data == way[-1].id:
            last = settled(graph, node)
            readers = graph.readers(last.id)
            alone = len(readers) == 1 and readers[0].op == "sum" and len(node.shape) > 3
            return (settled(graph, readers[0]) if alone else last).id, way, found
    return None, (), None


def output_projection(graph: Graph, z: Node) -> TensorId | None:
    """The output of the projection that reads z; None where it is used as it is."""
    return projected(graph, z)[0]
