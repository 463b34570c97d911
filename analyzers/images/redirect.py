"""Gradients past dead zones: where none comes through a nonlinearity, a share of what arrived at it goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from analyzers.images.inside import Inside
from fmr.edits import Context, Edit, OnGradient
from fmr.edits.editor import Asked
from fmr.graph.graph import Graph
from fmr.graph.paths import returned
from fmr.ids import ALIAS, OPAQUE, TensorId, outer_op
from fmr.nests import ids_in
from fmr.nodes import Key, Node, id_of
from fmr.structure.normal.match import is_constant, strip_views
from fmr.structure.normal.vocabulary import SAME

DEAD_ZONES = frozenset(
    "relu relu6 hardtanh hardsigmoid hardswish threshold hardshrink softshrink clamp clamp_min clamp_max clip".split()
)
"""Nonlinearities that are flat somewhere, so that no gradient passes."""

CHOICES = frozenset("maximum minimum max min fmax fmin where".split())
"""Ops that hand on one of two numbers; where the other one is fixed, they are flat there."""

Spread = Callable[[Tensor, torch.Size], Tensor | None]
"""What arrived at a value as it is handed on to what that was made of, which has this shape; None where it cannot be."""


def redirected(graph: Graph, sites: Iterable[Key], share: float = 0.1, every: bool = False) -> Asked:
    """Edits of gradients at every nonlinearity with a dead zone that some sites are computed through.

    >>> sorted(map(str, redirected(fmr.run(reader, images[:1]).graph, ["conv2/conv2d#0"])))
    ['/relu#0', 'conv1/conv2d#0']

    Where no gradient at all comes to what a nonlinearity read, `share` of that which came to what it made goes on. With
    `every`, it also goes to what was not chosen: the smaller one of two numbers, and all places of a window.
    """
    found: dict[Key, list[Edit]] = defaultdict(list)
    for node in way_to(graph, sites):
        for before in led_to(graph, node, every):
            arrived: list[Tensor] = []
            found[before].insert(0, OnGradient(_handed_on(arrived, share, _spread(node))))
            found[node.id].append(OnGradient(_noted(arrived)))
    return dict(found)


def led_to(graph: Graph, node: Node, every: bool = False) -> list[TensorId]:
    """What an op read that a gradient is to come to past its dead zone, or with `every` past what it chose."""
    if not node.dtype.is_floating_point:  # the places of what was chosen
        return []
    if node.op in DEAD_ZONES or (every and is_window(node)):
        read = [parent.id for parent in node.parents[:1]]
    else:
        read = list(_gated(graph, node, every))
    nodes = [graph[name] for name in dict.fromkeys(read)]
    return [one.id for one in nodes if not one.id.is_source and one.op not in (ALIAS, OPAQUE)]


def is_window(node: Node) -> bool:
    """Whether an op hands on the largest number of a window, or of all along some dimensions."""
    alone = node.op in ("max", "amax", "min", "amin") and len(node.parents) == 1
    return "max_pool" in node.op or alone


def _gated(graph: Graph, node: Node, every: bool) -> Iterator[TensorId]:
    """What passes an op only where a comparison, or another number, lets it."""
    numbers = [parent for parent in node.parents if graph[parent].dtype.is_floating_point]
    moving = [parent.id for parent in numbers if not _is_fixed(graph, parent)]
    match node.op:
        case op if op in CHOICES and (len(node.parents) > 1 or len(node.args) > 0) and not is_window(node):
            gate = node.parents[0] if op == "where" else None
            if (every or len(moving) == 1) and (gate is None or not is_constant(graph, gate)):
                yield from (name for name in moving if graph[name].shape == node.shape)
        case "masked_fill":
            mask = node.parent("mask", 1)
            if mask is not None and not is_constant(graph, mask):
                yield from moving[:1]
        case "mul":
            gates = [parent.id for parent in node.parents if _is_gate(graph, parent)]
            yield from (name for name in moving if len(gates) == 1 and name not in gates)


_FILLED = frozenset("zeros_like ones_like full_like new_zeros new_ones new_full".split())
"""Ops that read a value for its shape alone."""


def _is_fixed(graph: Graph, name: TensorId) -> bool:
    """Whether a value is the same whatever the model is given."""
    return is_constant(graph, name) or graph[strip_views(graph, name)].op in _FILLED


def _is_gate(graph: Graph, name: TensorId) -> bool:
    """Whether a value says yes or no, and by what the model was given."""
    return graph[strip_views(graph, name, SAME | {"float", "type"})].dtype == torch.bool and not is_constant(graph, name)


def way_to(graph: Graph, sites: Iterable[Key]) -> list[Node]:
    """The values at some sites and all that they are computed from."""
    nodes: dict[TensorId, Node] = {}
    for site in sites:
        for one in _ends(graph, site):
            nodes |= {node.id: node for node in (*graph.ancestors(one), graph[one])}
    return list(nodes.values())


def _ends(graph: Graph, site: Key) -> list[TensorId]:
    """The values of a graph that a site holds, or inside a kernel is computed from."""
    if isinstance(site, Inside):
        return list(site.read)
    name = id_of(site)
    return list(ids_in(returned(graph, name))) if name.is_path else [outer_op(name)]


def _noted(arrived: list[Tensor]) -> Edit:
    def note(gradient: Tensor, context: Context) -> Tensor:
        arrived[:] = [gradient]
        return gradient

    return note


def _handed_on(arrived: list[Tensor], share: float, spread: Spread) -> Edit:
    def hand_on(gradient: Tensor, context: Context) -> Tensor:
        wide = spread(arrived.pop(), gradient.shape) if arrived else None
        return gradient if wide is None else torch.where(gradient == 0, share * wide, gradient)

    return hand_on


def _spread(node: Node) -> Spread:
    """How what arrives at an op goes on to what it read: number by number, or to all that it chose among."""
    if not is_window(node):
        return lambda gradient, shape: gradient if gradient.shape == shape else None
    if "pool" in node.op:
        return lambda gradient, shape: _windows(node, gradient.abs(), shape)
    return lambda gradient, shape: _repeated(gradient.abs(), shape, node.argument("dim", 1))


def _repeated(gradient: Tensor, shape: torch.Size, dim: Any) -> Tensor | None:
    """A gradient again at all places that were taken together."""
    if dim is not None and gradient.dim() < len(shape):
        dims = dim if isinstance(dim, (list, tuple)) else [dim]
        for n in sorted(int(one) % len(shape) for one in dims):
            gradient = gradient.unsqueeze(n)
    return gradient.expand(shape)


def _windows(node: Node, gradient: Tensor, shape: torch.Size) -> Tensor | None:
    """A gradient at all places of the windows that a pooling went over, as the pooling's own on ones."""
    space = len(shape) - 2
    if node.op.startswith("adaptive"):
        pool: Any = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[space - 1]
        with torch.enable_grad():
            given = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
            return torch.autograd.grad(pool(given, gradient.shape[2:]), given, gradient)[0]
    size, step, pad, wide = (_each(node.argument(name, n), space) for n, name in enumerate(_WINDOW, 1))
    if size is None:
        return None
    step, pad, wide = step or size, pad or [0] * space, wide or [1] * space
    ones = torch.ones(1, 1, *size, dtype=gradient.dtype, device=gradient.device)
    flat = gradient.flatten(0, 1)[:, None]
    found = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[space - 1](flat, ones, stride=step, dilation=wide)
    for n in range(space):
        length, more = shape[2 + n], pad[n]
        found = F.pad(found, [0, 0] * (space - 1 - n) + [0, max(0, more + length - found.shape[2 + n])])
        found = found.narrow(2 + n, more, length)
    return found.reshape(shape)


_WINDOW = ("kernel_size", "stride", "padding", "dilation")


def _each(given: object, space: int) -> list[int] | None:
    """A setting of a window for each dimension."""
    if isinstance(given, (list, tuple)):
        return [int(one) for one in given] or None
    return [int(given)] * space if isinstance(given, int) else None
