"""A value as an affine function of others: every scale that a norm makes of them is held at what it is in a run.

A norm divides by how large its input is, so that what a part writes has no share of the result that is its own. With the
divisor held (Elhage et al. 2021, "A mathematical framework for transformer circuits": the layer norm folded into the
weights), the result is a sum over parts again. Which nodes are linear is read off their ops; what bends is a number a vector
that is held, or the way is refused.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import ALIAS, TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import between, contraction
from fmr.structure.normal.vocabulary import MOVES
from fmr.structure.proof.evaluate import Values, double, made_again, own_work

_SUMS = frozenset("add sub neg sum mean cumsum".split())
_CHOICES = frozenset("masked_fill where".split())

Known = dict[TensorId, Tensor]

Held = Callable[[], Known]
"""The scales that the next run of a way holds: none yet, or those that it held before."""


@dataclass(frozen=True, eq=False)
class Frozen:
    """A value in float64 that is affine in what is `given`; `rest` is what it is where all of that is zero.

    `made` is the value with its history.
    """

    given: Mapping[TensorId, Tensor] = field(repr=False)
    made: Tensor = field(repr=False)
    rest: Tensor = field(repr=False)

    @property
    def value(self) -> Tensor:
        """What it is with all that is given."""
        return self.made.detach()

    def back(self, weights: Tensor) -> dict[TensorId, Tensor]:
        """How much a weighed sum of the value grows with each number that is given: its gradient, which is constant.

        The sum is that of the gradients times the given numbers, and of the weighed `rest`. weights: of the shape of the
        value, or with one more dimension in front for several sums at once, which the gradients have then, too.
        """
        several = weights.dim() > self.made.dim()
        with own_work(), torch.inference_mode(False), torch.enable_grad():
            found = torch.autograd.grad(
                self.made,
                list(self.given.values()),
                weights.to(self.made),
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=several,
            )
        lead = weights.shape[:1] if several else ()
        pairs = zip(self.given.items(), found, strict=True)
        return {name: leaf.new_zeros(*lead, *leaf.shape) if grad is None else grad for (name, leaf), grad in pairs}


def frozen(graph: Graph, end: TensorId, given: Mapping[TensorId, Tensor], value: Values) -> Frozen:
    """A value of a run as an affine function of earlier ones, its scales held at what they are there.

    >>> out = frozen(graph.unfused, block.out.id, {block.z.id: run[block.z]}, run.__getitem__)
    >>> out.back(torch.ones_like(out.value))[block.z.id].shape
    torch.Size([1, 4, 6, 32])

    `StructureError` where it is none: where something bends on the way that is no scale of a norm.
    """
    first = min(given, key=graph.place)
    nodes = between(graph, first, end, lambda node: node.id not in given)
    live = affine(graph, nodes, given)
    if end not in live:
        bends = next((node for node in nodes if node.id not in live and set(node.parents) & live), None)
        raise StructureError(
            f"{end} is no sum over parts of {', '.join(given)}: {bends.id if bends else end} is not linear in them. "
            "Expected projections, scales and norms on the way."
        )

    def through(leaves: Mapping[TensorId, Tensor], held: Held) -> Tensor:
        return run_affine(graph, nodes, live, leaves, value, held())[end]

    return apart(through, given)


def apart(through: Callable[[Mapping[TensorId, Tensor], Held], Tensor], given: Mapping[TensorId, Tensor]) -> Frozen:
    """What a function makes of given values, with what it makes of zeros while its scales are held."""
    scales = list[Known]()

    def hold() -> Known:
        scales.append({})
        return scales[-1]

    with own_work(), torch.inference_mode(False), torch.enable_grad():
        leaves = {name: double(tensor).clone().requires_grad_() for name, tensor in given.items()}
        made = through(leaves, hold)
        rest = through({name: torch.zeros_like(leaf) for name, leaf in leaves.items()}, iter(scales).__next__)
    return Frozen(leaves, made, rest.detach())


def affine(graph: Graph, nodes: Sequence[Node], starts: Iterable[TensorId]) -> set[TensorId]:
    """Which of some nodes, in execution order, are affine in the starts when the scales that are made of these are held."""
    live, bent = set(starts), set[TensorId]()
    for node in nodes:
        read = {parent.id for parent in node.parents}
        if read & live and _is_affine(graph, node, live, bent):
            live.add(node.id)
        elif read & (live | bent):
            bent.add(node.id)
    return live


def _is_affine(graph: Graph, node: Node, live: set[TensorId], bent: set[TensorId]) -> bool:
    own = [parent.id in live for parent in node.parents]
    scales = [parent.id for parent in node.parents if parent.id in bent]
    if not node.dtype.is_floating_point or node.id in live:
        return False
    if node.op in ("mul", "div"):
        alone = sum(own) == 1 and (node.op == "mul" or own[0])
        return alone and all(graph[name].shape[-1:] in ((), (1,)) for name in scales)
    if scales:
        return False
    if node.op in MOVES | _SUMS | {ALIAS}:
        return True
    if node.op in _CHOICES:
        return all(graph[p.id].dtype != torch.bool for p, is_own in zip(node.parents, own, strict=True) if is_own)
    if node.op in _NORMED or (node.op == "batch_norm" and not node.argument("training", 5, False)):
        return own[0] and sum(own) == 1
    product = contraction(node)
    return product is not None and (product.left in live) != (product.right in live)


def run_affine(
    graph: Graph,
    nodes: Sequence[Node],
    live: set[TensorId],
    given: Mapping[TensorId, Tensor],
    value: Values,
    held: Known,
) -> Known:
    """The values of nodes in float64, where those that are no affine function of the given ones are held: computed once."""
    known: Known = dict(given)
    scales: Known = {}

    def read(name: TensorId) -> Tensor:
        found = known.get(name, scales.get(name))
        if found is None:
            found = double(value(name))
        return found.clone() if found.is_inference() else found

    for node in nodes:
        if node.id in given or not any(parent in known or parent in scales for parent in node.parents):
            continue
        if node.id in live:
            known[node.id] = _run(graph, node, {parent.id: read(parent.id) for parent in node.parents}, held)
        else:
            if node.id not in held:
                tensors = {parent.id: read(parent.id).detach() for parent in node.parents}
                held[node.id] = _run(graph, node, tensors, {})
            scales[node.id] = held[node.id]
    return known


def _run(graph: Graph, node: Node, tensors: Mapping[TensorId, Tensor], held: Known) -> Tensor:
    if node.op not in _NORMED:
        return made_again(graph, node, tensors)
    x = tensors[node.parents[0].id]
    shifted, size = _NORMED[node.op](node, x)
    if node.id not in held:
        held[node.id] = size(shifted.detach())
    return _weighed(node, shifted / held[node.id], tensors).view_as(x)


Size = Callable[[Tensor], Tensor]


def _layer_norm(node: Node, x: Tensor) -> tuple[Tensor, Size]:
    dims = tuple(range(-len(node.argument("normalized_shape", 1)), 0))
    eps = node.argument("eps", 4, 1e-5)
    return x - x.mean(dims, keepdim=True), lambda shifted: (shifted.pow(2).mean(dims, keepdim=True) + eps).sqrt()


def _rms_norm(node: Node, x: Tensor) -> tuple[Tensor, Size]:
    dims = tuple(range(-len(node.argument("normalized_shape", 1)), 0))
    eps = node.argument("eps", 3, None)
    eps = torch.finfo(node.dtype).eps if eps is None else eps
    return x, lambda shifted: (shifted.pow(2).mean(dims, keepdim=True) + eps).sqrt()


def _group_norm(node: Node, x: Tensor) -> tuple[Tensor, Size]:
    groups = x.reshape(len(x), node.argument("num_groups", 1), -1)
    eps = node.argument("eps", 4, 1e-5)
    return groups - groups.mean(-1, keepdim=True), lambda shifted: (shifted.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _normalize(node: Node, x: Tensor) -> tuple[Tensor, Size]:
    order, dim, eps = node.argument("p", 1, 2.0), node.argument("dim", 2, 1), node.argument("eps", 3, 1e-12)
    return x, lambda shifted: shifted.norm(order, dim, keepdim=True).clamp_min(eps)


_NORMED: dict[str, Callable[[Node, Tensor], tuple[Tensor, Size]]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "normalize": _normalize,
}
"""Norms that are one op: what they scale, and by what they divide it."""


def _weighed(node: Node, normed: Tensor, tensors: Mapping[TensorId, Tensor]) -> Tensor:
    """A normed value with the weight and the bias of its norm."""
    places = {"layer_norm": (2, 3), "rms_norm": (2,), "group_norm": (2, 3)}.get(node.op, ())
    weight, bias = (*(node.parent(name, at) for name, at in zip(("weight", "bias"), places, strict=False)), None, None)[:2]
    if node.op == "group_norm":
        x = tensors[node.parents[0].id]
        normed = normed.view_as(x).movedim(1, -1)
    if weight is not None:
        normed = normed * tensors[weight.id]
    if bias is not None:
        normed = normed + tensors[bias.id]
    return normed.movedim(-1, 1) if node.op == "group_norm" else normed
