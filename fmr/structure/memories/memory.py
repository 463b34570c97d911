"""One feed-forward memory: its sites, its key and value vectors, and the proof that it is one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmr.errors import StructureError, number_of, whole_number
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.structure.memories.definition import (
    first_projection,
    gates,
    held,
    is_gated,
    matrices,
    of_own_place,
    windows,
)
from fmr.structure.memories.up_projections import bends, read_as
from fmr.structure.normal.einsum import made_dim, summed_dim, window
from fmr.structure.normal.form import form_of
from fmr.structure.normal.indices import iota, trace
from fmr.structure.normal.match import between, depends_on, projection, settled, strip_views
from fmr.structure.normal.vocabulary import CONVOLUTIONS, MOVES, SAME
from fmr.structure.proof.certificate import Certificate, error, proof, tolerance_of, unmade
from fmr.structure.proof.evaluate import Doubles, Values, at_zero, check_places, evaluate, graph_of, own_work, why_unproving


@dataclass(frozen=True, eq=False)
class Memory:
    """One feed-forward memory (Geva et al. 2021): `post` are the coefficients, memory i a key and a value vector.

    >>> key, value = structure.mlps[2].memory(7)

    `pre` enters the nonlinearity, `post` is read by the second projection, `out` is its output, each (examples, positions,
    memories or units). `w_in`, `w_gate` (None where nothing gates) and `w_out` name the parameters, or the weight where one
    is the product of several; `n` counts the memories; `scope` is the module call that holds it.

    `keys` and `values` are `w_in` and `w_out` as the projections read them; `key_dim` and `value_dim` are the dimensions of
    them that count the memories, `axis` is that of the coefficients. `source` is what the first projection reads, `up` and
    `down` are the projections' results; with `fused_gate` one projection makes the gate and what it gates. `first` is where
    the memories begin in what `down` reads, `weights` are the tensors under `keys` and `values`.
    """

    graph: Graph = field(repr=False)
    pre: Site
    post: Site
    out: Site
    w_in: TensorId
    w_gate: TensorId | None
    w_out: TensorId
    source: TensorId
    up: TensorId
    down: TensorId
    keys: TensorId
    values: TensorId
    key_dim: int
    value_dim: int
    fused_gate: bool
    scope: str
    axis: int = -1
    first: int | None = None
    weights: Mapping[TensorId, Tensor] = field(repr=False, default_factory=dict)
    certified: Certificate | None = None

    @property
    def n(self) -> int:
        """How many memories it holds: the units of the coefficients, which are channels where a window reads them."""
        return self.graph[self.post.id].shape[self.axis]

    def own(self, values: Tensor, n: int) -> Tensor:
        """What the second projection holds for its `n` memories; it may read other units beside them."""
        return values if self.first is None else values.narrow(self.value_dim, self.first, n)

    def memory(self, index: int, expert: int | None = None) -> tuple[Tensor, Tensor]:
        """The key vector and the value vector of one memory, as slices of the parameters, each as wide as the stream.

        >>> key, value = structure.mlps[2].memory(7)

        expert: which one, where one parameter holds a matrix for each of several. A memory or an expert that is not there,
        and weights of which no row or column is that of one memory, are a `StructureError`.
        """
        number = whole_number(index)
        if number is None or not 0 <= number < self.n:
            raise StructureError(f"Memory {index!r} of {self.scope!r}: expected 0 to {self.n - 1}.")
        if not self.weights:
            raise StructureError(f"{self.scope!r} was found in a graph alone, which holds no weights. Use fmr.locate(run).")
        return _vectors(self, number, expert)

    def check(self, run: Run | Pass) -> Certificate:
        """Recompute coefficients and output in another run of the same code and report the errors."""
        with own_work():
            graph = graph_of(run, self.graph)
            check_places(run, (self.pre, self.post, self.out))
            return certify_memory(graph, self, run.__getitem__)

    @property
    def window(self) -> tuple[int, ...]:
        """Of how many places of an image a coefficient is made, in each dimension; empty where of its own alone."""
        sizes = [window(self.graph, node) for node in windows(self.graph, self.up, self.post.id)]
        return tuple(sum(size) - len(size) + 1 for size in zip(*sizes, strict=False))

    @property
    def size(self) -> str:
        """How many memories it holds, in words."""
        gated = "gated " if self.w_gate is not None or self.fused_gate else ""
        over = f" over {' x '.join(map(str, self.window))} places" if self.window else ""
        return number_of(self.n, f"{gated}memory", f"{gated}memories") + over

    def __repr__(self) -> str:
        return f"{self.scope or 'root'}  {self.size}  {proof(self.certified)}"


def _vectors(found: Memory, index: int, expert: int | None) -> tuple[Tensor, Tensor]:
    """The key and the value of one memory: slices of the weights as the projections read them."""
    n, weights = found.n, found.weights
    keys, values = _matrices(found, weights[found.keys], found.own(weights[found.values], n), index, expert)
    places = _places(found, keys) if keys.dim() > found.key_dim else ()
    if not places or values.shape[found.value_dim : found.value_dim + 1] != (n,):
        raise _untold(found, keys, values)
    return _vector(keys.select(found.key_dim, places[index])), _vector(values.select(found.value_dim, index))


def _untold(found: Memory, keys: Tensor, values: Tensor) -> StructureError:
    """Says that weights hold no vectors that are known."""
    return StructureError(
        f"{found.scope!r} holds its weights as {tuple(keys.shape)} and {tuple(values.shape)}: no row or column is known to "
        f"be that of one memory. Expected matrices with one of {found.n} each; block.w_in and block.w_out name them as they "
        "are."
    )


def _matrices(found: Memory, keys: Tensor, values: Tensor, index: int, expert: int | None) -> tuple[Tensor, Tensor]:
    """The matrices of the keys and of the values, those of one expert where there are several."""
    several = keys.dim() == values.dim() == 3 and found.graph[found.down].op not in CONVOLUTIONS
    if not several and expert is not None:
        raise StructureError(f"{found.scope!r} has one matrix for all: expected block.memory({index}) without expert=.")
    if not several:
        return keys, values
    if len(keys) != len(values):
        raise _untold(found, keys, values)
    if expert is None:
        raise StructureError(f"{found.scope!r} has {len(keys)} experts. Name one: block.memory({index}, expert=0).")
    number = whole_number(expert)
    if number is None or not 0 <= number < len(keys):
        raise StructureError(f"Expert {expert!r} of {found.scope!r}: expected 0 to {len(keys) - 1}.")
    return keys[number], values[number]


def _vector(weight: Tensor) -> Tensor:
    """The weights of one unit without the sizes of a window of one place."""
    return weight.flatten() if weight.numel() == len(weight) else weight


def _places(found: Memory, keys: Tensor) -> Sequence[int]:
    """Where in a matrix the key of each memory lies: of a projection that makes more, what is gated, where there is a gate;
    nowhere where that cannot be told."""
    graph, size, n = found.graph, keys.shape[found.key_dim], found.n
    if size == n and not found.fused_gate:
        return _moved(found, n)
    if size == n:
        return range(n)
    last = graph[strip_views(graph, found.post.id, SAME)]
    if found.fused_gate and last.op == "glu":
        return _units(found, last.parents[0].id, size)[:n]  # the second half gates the first
    up, gates = graph[found.up], _units(found, found.pre.id, size)
    if found.fused_gate:
        return _followed(found, sorted(set(range(size)) - set(gates)), size)
    higher = (node for node in reversed(between(graph, up.id, found.post.id)) if node.shape[-1:] == (n,))
    cuts = (_units(found, node.id, size) for node in higher if strip_views(graph, node.id, MOVES) == up.id)
    return _followed(found, next((one for one in cuts if one and one != gates), gates), size)


def _followed(found: Memory, units: Sequence[int], size: int) -> Sequence[int]:
    """Units of a first projection in the order of the coefficients that are made of them; none where that cannot be told.

    A coefficient that is followed up to its gate is that of the unit which is gated there.
    """
    gated: dict[int, int] = {}
    for node in between(found.graph, found.up, found.post.id):
        first, *others = [one for parent in node.parents if (one := _units(found, parent.id, size))] or [[]]
        for other in others:
            gated |= dict(zip(first, other, strict=False)) | dict(zip(other, first, strict=False))
    order = _units(found, found.post.id, size)
    order = [one if one in units else gated.get(one, -1) for one in order]
    return order if sorted(order) == sorted(units) and len(order) == found.n else ()


def _moved(found: Memory, n: int) -> Sequence[int]:
    """Which unit of a projection each coefficient is made of, as units may be put in another order on the way; none where
    numbers say which order, and their own where nothing else moves them."""
    up, post, axis = found.graph[found.up], found.graph[found.post.id], found.axis
    if up.shape != post.shape or up.shape[axis] != n:
        return range(n)
    units = iota(n).reshape(n, *[1] * (-1 - axis if axis < 0 else len(up.shape) - 1 - axis))
    value = trace(found.graph, units.expand(up.shape), (up, post))
    rows = value.movedim(axis, -1).reshape(-1, n) if value is not None else torch.zeros(0)
    order: list[int] = rows[0].long().tolist() if len(rows) and bool((rows == rows[0]).all()) else []
    if sorted(order) == list(range(n)):
        return order
    way = between(found.graph, up.id, post.id)
    chosen = [node for node in way if node.op in _BY_NUMBERS and len(node.parents) > 1 and node.shape == post.shape]
    return () if chosen else range(n)


_BY_NUMBERS = frozenset({"getitem", "index_select", "gather", "take_along_dim"})
"""The ops that take units in an order that numbers say."""


def _units(found: Memory, name: TensorId, size: int) -> list[int]:
    """Which of so many units of the first projection a value below it has; none where these differ by position."""
    up = found.graph[found.up]
    split = next(at for at in range(len(up.shape) + 1) if math.prod(up.shape[at:]) <= size)
    if math.prod(up.shape[split:]) != size:
        return []
    value = trace(found.graph, iota(size).reshape(up.shape[split:]).expand(up.shape), (up, found.graph[name]))
    rows = value.flatten(0, -2) if value is not None else torch.zeros(0)
    return rows[0].long().tolist() if len(rows) and bool((rows == rows[0]).all()) else []


def certify_memory(graph: Graph, found: Memory, value: Values) -> Certificate:
    """Recompute the coefficients from what the keys read, what the keys make of that as matrices, and the output as the sum
    of the values that the coefficients weigh; show that coefficients are made of their own position alone.

    A memory whose parts do not follow one another as they are named is a `StructureError`.
    """
    value = value if isinstance(value, Doubles) else Doubles(value)
    wrong = _misread(graph, found) or _mislaid(graph, found)
    wrong = wrong or why_unproving((found.source, found.post.id, found.out.id), value)
    if wrong := wrong or _misgated(graph, found, value):
        raise StructureError(wrong)
    source, post, out = value(found.source), value(found.post.id), value(found.out.id)
    places, made = of_own_place(graph, found.source, found.up, found.post.id, found.axis, value)
    made = evaluate(graph, found.post.id, {found.source: source}, value) if made is None else made
    errors = {"post": error(made, post)}
    if places is not None:
        errors["places"] = places
    keys, values = value.single(found.keys), found.own(value.single(found.values), post.shape[-1])
    of_keys = of_values = None
    if found.axis == -1:
        of_keys = _product(graph, found.source, found.up, keys, found.key_dim == 0, value)
        of_values = _product(graph, found.post.id, found.out.id, values, found.value_dim == 1, value, found.first is None)
    if of_keys is not None:
        errors["keys"] = error(of_keys, value(found.up))
    errors["out"] = error(
        evaluate(graph, found.out.id, {found.post.id: post}, value) if of_values is None else of_values, out
    )
    return Certificate(errors, tolerance_of(source, post, out))


def _misread(graph: Graph, found: Memory) -> str:
    """Which of the parts of a memory does not follow where it should; empty where all do."""
    pre, post = found.pre.id, found.post.id
    gate = [(post, found.w_gate), (pre, found.w_gate)] if found.w_gate is not None else []
    way = [(found.up, found.source), (post, found.up), (post, pre), (found.down, post), *gate]
    if wrong := unmade(graph, way):
        return wrong
    first = (found.up, found.w_gate)
    if pre != found.up and not any(depends_on(graph, pre, one) for one in first if one is not None):
        return f"{pre} is not computed from {' or '.join(one for one in first if one is not None)}"
    return "" if _is_bent_first(graph, pre, post) else f"{pre} does not enter what bends its coefficients"


def _is_bent_first(graph: Graph, pre: TensorId, post: TensorId) -> bool:
    """Whether a value enters what bends coefficients, or gates them where nothing bends, and was not bent before."""
    form = form_of(graph)
    most = max(bends(one, True) for one in form[post].above(lambda one: one.kind != "projection"))
    users = (one for one in form[pre].users if pre in read_as(graph, one) and bends(one, True) == most)
    before = form[pre].above(lambda one: one.kind != "projection")
    return any(depends_on(graph, post, one.id) for one in users) and not any(bends(one, False) for one in before)


def _mislaid(graph: Graph, found: Memory) -> str:
    """Which value, weight or dimension is not the one of its projections; empty where all are."""
    up, down = first_projection(graph, found.up), projection(graph, graph[found.down])
    if up is None or down is None or settled(graph, up.node).id != found.up:
        return f"{found.up} and {found.down} are not what two projections make"
    rank = len(graph[found.post.id].shape)
    said: dict[str, tuple[object, object]] = {
        "what it reads": (found.source, strip_views(graph, up.data)),
        "its output": (found.out.id, settled(graph, down.node).id),
        "the weight of its keys": (found.w_in, held(graph, up.weight)),
        "the weight of its values": (found.w_out, held(graph, down.weight)),
        "the tensor of its keys": (found.keys, matrices(graph, up.weight)),
        "the tensor of its values": (found.values, matrices(graph, down.weight)),
        "the dimension of its keys": (found.key_dim, made_dim(graph, up)),
        "the dimension of its values": (found.value_dim, 1 - made_dim(graph, down)),
        "the dimension of its coefficients": (found.axis % rank, summed_dim(graph, down) % rank),
    }
    return next((f"{what} is {true}, and not {claimed}" for what, (claimed, true) in said.items() if claimed != true), "")


def _misgated(graph: Graph, found: Memory, value: Values) -> str:
    """Why the gate that is named is not the one that there is; empty where it is, or where none is and none is named."""
    n, values, post = found.n, graph[found.values].shape, found.post.id
    if found.first is not None and (len(values) != 2 or found.first + n > values[found.value_dim]):
        return f"there are no {n} values from {found.first} on in {list(values)} of {found.values}"
    if found.w_gate is not None:
        own = {node.id for node in between(graph, found.source, found.up)} | {found.up}
        made = (projection(graph, node) for node in between(graph, found.w_gate, post) if node.id not in own)
        beside = any(one is not None and held(graph, one.weight) == found.w_gate for one in made)
        return "" if beside and not found.fused_gate else f"{found.w_gate} makes no gate beside {found.up}"
    up = first_projection(graph, found.up)
    wide = up is not None and up.node.shape[found.axis] == 2 * n
    halves = wide and any(node.op == "glu" for node in between(graph, found.up, post))
    others = [one.node.id for one in gates(graph, found.source, found.up, post, n)] + [found.up] * wide
    gated = halves or (bool(others) and is_gated(graph, found.source, found.pre.id, post, value))
    if found.fused_gate and not (gated and wide):
        return f"{found.up} is no gate and what it gates, for {n} memories"
    return f"{others[0]} gates its coefficients" if gated and not found.fused_gate else ""


def _product(
    graph: Graph, name: TensorId, result: TensorId, weight: Tensor, turned: bool, value: Doubles, alone: bool = True
) -> Tensor | None:
    """What a weight makes of a value as a matrix, turned or not, plus the bias; None where it is none that fits both.

    One beside which, though it makes the result `alone`, more is added than one bias for all positions makes nothing that
    is finite.
    """
    given, made = value.single(name).to(weight.dtype), value(result)
    if weight.dim() != 2:
        return None
    matrix = weight.mT if turned else weight
    positions = given.shape[:-1].numel()
    if (given.shape[-1], positions * matrix.shape[1]) != (len(matrix), made.numel()):
        return None
    bias = at_zero(graph, result, name, value)
    rows = bias.reshape(-1, matrix.shape[1])
    same = rows[:1].expand_as(rows)
    if alone and not (torch.equal(rows, same) or torch.allclose(rows, same)):
        return torch.full(made.shape, torch.inf, device=made.device)
    return (given @ matrix).reshape(made.shape) + bias
