"""What each dimension of a value counts, followed through the ops that made it: channels, places, or nothing known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from fmr.errors import FmrError
from fmr.graph.execute import execute
from fmr.graph.graph import Graph
from fmr.ids import RESULT, TensorId
from fmr.nodes import Node
from fmr.structure.normal.einsum import of_projection, subscripts_of
from fmr.structure.normal.match import contraction, data_inputs, projection
from fmr.structure.normal.vocabulary import CONVOLUTIONS, ELEMENTWISE, MOVES, NORMS, SAME
from fmr.structure.normal.walks import cached_per_graph

EXAMPLES, UNITS, PLACES, MIXED = "examples", "units", "places", "mixed"
"""What a dimension counts; what is mixed counts several of these, or what a projection made over places of channels."""

Counts = tuple[str | None, ...]

_BY_NUMBER = (ELEMENTWISE | SAME | {RESULT}) - {"glu", "amax", "amin"} | frozenset(
    """addcdiv addcmul atan2 bernoulli cumprod cumsum dropout1d dropout2d dropout3d feature_alpha_dropout float_power
    floor_divide fmod hypot isnan lerp local_response_norm log_softmax logaddexp logit remainder rsub softmax softmin
    true_divide""".split()
)
"""Ops after which dimensions of one size, counted from the right, are the same."""

_REDUCTIONS = frozenset(
    "all amax amin any argmax argmin logsumexp max mean median min nanmean norm prod std sum var vector_norm".split()
)
"""Ops that take dimensions together, with the dimension in their second argument or, of norms, in the third."""

_CELLS = frozenset("gru lstm rnn_relu rnn_tanh".split())

_IN_PLACE = ("pool", "interpolate", "upsample", "grid_sample", "shuffle")
"""Parts of the names of ops that change how many places there are, or channels, and keep the dimensions in their order."""


@cached_per_graph
def counts_of(graph: Graph) -> dict[TensorId, Counts]:
    """What the dimensions of all values of a graph count, as far as the ops tell, from images (examples, colours, height,
    width) on; where nothing is known of a value it is missing."""
    known: dict[TensorId, Counts] = {}
    moved: dict[object, Counts] = {}
    for node in graph.nodes:
        found = _made(graph, node, known, moved)
        if len(found) == len(node.shape) and any(found):
            known[node.id] = found
    return known


def _made(graph: Graph, node: Node, known: dict[TensorId, Counts], moved: dict[object, Counts]) -> Counts:
    """What the dimensions of one value count."""
    if node.id.is_source:
        return (EXAMPLES, UNITS, PLACES, PLACES) if node.op == "input" and len(node.shape) == 4 else ()
    if contraction(node) is not None:
        return _multiplied(graph, node, known)
    read = [graph[parent] for parent in node.parents if parent in known]
    if node.op in ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"):
        return _normed(node, read, known)
    if not read:
        return ()
    first = known[read[0].id]
    if node.op == "scaled_dot_product_attention":
        value = node.parent("value", 2)
        return (*first[:-1], known.get(value, (None,))[-1]) if value is not None else ()
    if node.op in _CELLS:
        return (*first[:-1], UNITS) if node.id.parts.output == 0 else ()
    if node.op == "multi_head_attention_forward":
        return first if read[0].shape == node.shape else ()
    if node.op in _REDUCTIONS and len(read) == 1:
        return _reduced(node, first)
    if node.op in _BY_NUMBER or node.op in ("max", "min"):
        return tuple(reduce(_joined, found, None) for found in _aligned(node, read, known))
    if node.op in NORMS or node.op == "glu" or any(name in node.op for name in _IN_PLACE):
        return first
    return _moved(graph, node, known, moved) if node.op in MOVES or node.op == "unfold" else ()


def _joined(one: str | None, other: str | None) -> str | None:
    """What a dimension counts that is told twice."""
    if one is None or other is None or one == other:
        return one or other
    if EXAMPLES in (one, other):
        return EXAMPLES
    left = {one, other} - {MIXED}
    return left.pop() if len(left) == 1 else MIXED


def _aligned(node: Node, read: Sequence[Node], known: dict[TensorId, Counts]) -> list[list[str | None]]:
    """For each dimension what those say that meet there in an op that works number by number."""
    found: list[list[str | None]] = [[] for _ in node.shape]
    for one in read:
        apart = len(node.shape) - len(one.shape)
        for n, (size, count) in enumerate(zip(one.shape, known[one.id], strict=True)):
            if apart + n >= 0 and size == node.shape[apart + n]:
                found[apart + n].append(count)
    return found


def _normed(node: Node, read: Sequence[Node], known: dict[TensorId, Counts]) -> Counts:
    """A norm of a layer's units says which they are where nothing else does."""
    found: list[str | None] = list(known[read[0].id]) if read else [None] * len(node.shape)
    if UNITS not in found and len(found) > 1:
        shape = node.argument("normalized_shape", 1, ())
        if node.op not in ("layer_norm", "rms_norm"):
            found[1] = UNITS
        elif len(shape) == 1 and found[-1] is None:
            found[-1] = UNITS
    return tuple(found)


def _reduced(node: Node, first: Counts) -> Counts:
    """What is left when dimensions are taken together."""
    if len(node.shape) == len(first):
        return first
    dim = node.argument("dim", 2 if node.op == "norm" else 1, node.argument("axis", 1))
    gone = {n % len(first) for n in (dim if isinstance(dim, (list, tuple)) else [dim])} if dim is not None else set()
    return tuple(count for n, count in enumerate(first) if n not in gone)


def _multiplied(graph: Graph, node: Node, known: dict[TensorId, Counts]) -> Counts:
    """A projection makes units; where those of what it reads stay, it may as well mix places; a window is of places."""
    found, used = contraction(node), projection(graph, node)
    assert found is not None
    windowed = node.op in CONVOLUTIONS or node.op == "linear"
    letters = of_projection(graph, used) if used is not None and not windowed else subscripts_of(graph, found)
    data = used.data if used is not None and not windowed else found.left
    counts = _by_letter(letters.left, known.get(data, ()))
    if node.op in CONVOLUTIONS:
        own = {letter: EXAMPLES if letter == "A" else PLACES for letter in letters.left if letter != "k"}
        over_places = counts.get("k") == PLACES  # of what has channels elsewhere
        counts |= {letter: (counts.get(letter) if over_places else None) or count for letter, count in own.items()}
    if used is None and not windowed:
        for letter, count in _by_letter(letters.right, known.get(found.right, ())).items():
            counts[letter] = _joined(counts.get(letter), count)
        return tuple(counts.get(letter) for letter in letters.result)
    sizes = dict(zip(letters.result, node.shape, strict=False))
    keeps = any(counts.get(letter) == UNITS and sizes[letter] > 1 for letter in letters.result)
    summed = [counts.get(letter) for letter in letters.contracted]
    made = MIXED if keeps and UNITS not in summed else UNITS
    return tuple(counts.get(letter) if letter in letters.left else made for letter in letters.result)


def _by_letter(letters: str, counts: Counts) -> dict[str, str | None]:
    return dict(zip(letters, counts, strict=True)) if len(letters) == len(counts) else {}


def _moved(graph: Graph, node: Node, known: dict[TensorId, Counts], moved: dict[object, Counts]) -> Counts:
    """What moves numbers is run again on numbers that change along one dimension alone, for each dimension."""
    shapes = tuple(graph[parent].shape for parent in node.parents)
    key = node.op, node.function, node.id.parts.output, str(node.args), shapes, tuple(map(known.get, node.parents))
    if key not in moved:
        told = [name for name in data_inputs(graph, node) if name in known]
        rank = max((len(graph[name].shape) for name in told), default=0)
        read = [name for name in told if len(graph[name].shape) == rank]
        counts = [reduce(_joined, (known[name][n] for name in read), None) for n in range(rank)]
        sizes = [max(graph[name].shape[n] for name in read) for n in range(rank)]
        try:
            along = [_changes(graph, node, read, n) if sizes[n] > 1 else () for n in range(rank)]
            moved[key] = _placed(node, along, counts, sizes)
        except (FmrError, RuntimeError, TypeError, KeyError, IndexError, ValueError, AttributeError):
            moved[key] = ()
    return moved[key]


def _placed(node: Node, along: Sequence[Sequence[bool]], counts: Sequence[str | None], sizes: Sequence[int]) -> Counts:
    """What the dimensions count that an op has moved, by which of its own change along which of those before."""
    found: list[str | None] = []
    for n in range(len(node.shape)):
        met = {counts[k] for k, changes in enumerate(along) if changes and changes[n]}
        found.append(met.pop() if len(met) == 1 else MIXED if met else None)
    single = [k for k, size in enumerate(sizes) if size == 1 and k]
    open_ = [n for n, size in enumerate(node.shape) if size == 1 and n]
    if len(single) == len(open_) and len({counts[k] for k in single}) == 1:
        for n in open_:
            found[n] = counts[single[0]]
    elif tuple(sizes) == node.shape:
        found = [counts[n] if size == 1 else count for n, (size, count) in enumerate(zip(sizes, found, strict=True))]
    if node.shape and node.shape[0] == 1:
        found[0] = EXAMPLES
    return tuple(found)


def _changes(graph: Graph, node: Node, read: Sequence[TensorId], dim: int) -> tuple[bool, ...]:
    """Along which dimensions of its result numbers change that do so along one dimension of what is read; 0 is from
    elsewhere."""
    tensors: dict[TensorId, Tensor] = {}
    for parent in node.parents:
        shape = graph[parent].shape
        tensors[parent.id] = torch.zeros(shape, dtype=graph[parent].dtype)
        if parent.id in read:
            line = torch.arange(1.0, shape[dim] + 1).view(*(-1 if n == dim else 1 for n in range(len(shape))))
            tensors[parent.id] = line.expand(shape).contiguous()
    with torch.no_grad():
        made = execute(node, tensors)
    if made.shape != node.shape:
        raise ValueError(f"{node.id} has another shape")
    made = made.float()
    least = made.masked_fill(made == 0, torch.inf)
    return tuple(bool((made.amax(n) > least.amin(n)).any()) for n in range(made.dim()))
