"""The receptive field of a place in a layer: the pixels that a gradient from there arrives at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analyzers.images.redirect import is_window, led_to, redirected, way_to
from analyzers.images.seen import by_channel
from analyzers.images.viewing import View
from fmr.graph.graph import Graph
from fmr.ids import OPAQUE, TensorId
from fmr.nodes import Key, Node
from fmr.structure.normal.match import is_constant
from fmr.structure.normal.vocabulary import SAME
from fmr.sweeps.bars import bar

Box = tuple[int, int, int, int]
"""Top, left, bottom and right of a part of an image; the latter two are the first row and column outside."""

Place = tuple[int, ...]

DRAWS, ROWS = 4, 16
"""On how many random images a place is looked at, and how many of them are run at once."""


def receptive_fields(view: View, site: Key, places: Sequence[Place], progress: bool | None = False) -> dict[Place, Box]:
    """The box of pixels that what stands at each of some places is computed from, from gradients on random images.

    The gradient is that of all channels there, with random signs, led past dead zones: what is zero is not read.
    """
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        edits = redirected(view.graph(), [site], share=1.0, every=True)
    touched: dict[Place, Tensor] = {}
    rows = [place for place in dict.fromkeys(places) for _ in range(DRAWS)]
    for start in bar(range(0, len(rows), ROWS), "receptive fields", progress):
        here = rows[start : start + ROWS]
        noise = torch.rand(len(here), view.channels, *view.size, generator=draw).to(view.like.device)
        noise.requires_grad_()
        values = by_channel(view.values(view.inputs(noise), [site], grad=True, edits=edits)[site], site)
        signs = torch.randn(values.shape[1], generator=draw).to(values)
        parts = [(values[n][..., None].flatten(1)[:, _flat(place, values)] * signs).sum() for n, place in enumerate(here)]
        total = torch.stack(parts).sum()
        (slope,) = torch.autograd.grad(total, noise, allow_unused=True) if total.requires_grad else (None,)
        slope = torch.ones_like(noise) if slope is None else slope  # which is told as what no gradient passes
        for place, one in zip(here, (slope != 0).any(1).cpu(), strict=True):
            touched[place] = one | touched.get(place, torch.zeros_like(one))
    return {place: _box(one) for place, one in touched.items()}


def untold(graph: Graph, site: Key) -> list[str]:
    """The ops that a site is computed through and that hide from a gradient what they read: comparisons, choices, steps."""
    return [str(node.id) for node in way_to(graph, [site]) if _hides(graph, node)]


_STEPS = frozenset("argsort bucketize detach data floor heaviside kthvalue median mode round sign sort topk trunc".split())
"""Ops that pass no gradient of what they compute, or that of one number among several."""


def _hides(graph: Graph, node: Node) -> bool:
    """Whether a gradient tells less than all of what an op reads."""
    if node.id.is_source or is_constant(graph, node.id):
        return False
    if node.op == OPAQUE or node.op in _STEPS or (is_window(node) and not led_to(graph, node, every=True)):
        return True
    numbers = [parent for parent in node.parents if graph[parent].dtype.is_floating_point]
    if not numbers or node.dtype.is_floating_point:
        return False
    return not all(_gates_itself(graph, node, parent) for parent in numbers if not is_constant(graph, parent))


def _gates_itself(graph: Graph, node: Node, name: TensorId) -> bool:
    """Whether all that a comparison is for is to let pass, or not, the very value that it was made of."""
    for one in graph.readers(node.id):
        if one.op in SAME | {"float", "type"} and one.id != node.id:
            if not _gates_itself(graph, one, name):
                return False
        elif name not in led_to(graph, one, every=True):
            return False
    return True


def _flat(place: Place, values: Tensor) -> int:
    """The number of a place, all places of (images, channels, ...) in a row."""
    number = 0
    for n, size in zip(place, values.shape[2:], strict=True):
        number = number * size + n
    return number


def _box(touched: Tensor) -> Box:
    """The smallest box around what is true; all of the image where nothing is."""
    rows, columns = touched.any(1).nonzero()[:, 0].tolist(), touched.any(0).nonzero()[:, 0].tolist()
    if not rows:
        return 0, 0, touched.shape[0], touched.shape[1]
    return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def with_noise_outside(inputs: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Inputs whose pixels outside of their boxes are those of random places of the same input."""
    draw = torch.Generator().manual_seed(0)
    mixed = inputs.flatten(2)[..., torch.randperm(inputs[0, 0].numel(), generator=draw).to(inputs.device)].view_as(inputs)
    changed = mixed.clone()
    for n, (top, left, bottom, right) in enumerate(boxes):
        changed[n, :, top:bottom, left:right] = inputs[n, :, top:bottom, left:right]
    return changed
