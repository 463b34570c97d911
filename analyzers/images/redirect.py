"""Gradients past dead zones: where none comes through a nonlinearity, a share of what arrived at it goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from fmr.edits import Context, Edit, OnGradient
from fmr.edits.editor import Asked
from fmr.graph.graph import Graph
from fmr.graph.paths import returned
from fmr.ids import ALIAS, OPAQUE, TensorId, outer_op
from fmr.nests import ids_in
from fmr.nodes import Key, Node, id_of

DEAD_ZONES = frozenset("relu relu6 hardtanh hardsigmoid hardswish threshold hardshrink softshrink clamp clamp_min".split())
"""Nonlinearities that are flat somewhere, so that no gradient passes."""


def redirected(graph: Graph, sites: Iterable[Key], share: float = 0.1) -> Asked:
    """Edits of gradients at every nonlinearity with a dead zone that some sites are computed through.

    >>> sorted(map(str, redirected(fmr.run(reader, images[:1]).graph, ["conv2/conv2d#0"])))
    ['/relu#0', 'conv1/conv2d#0']

    Where no gradient at all comes to what a nonlinearity read, `share` of that which came to what it made goes on.
    """
    found: dict[Key, list[Edit]] = defaultdict(list)
    for node in _made_of(graph, sites):
        before = graph[node.parents[0]] if node.op in DEAD_ZONES and node.parents else None
        if before is not None and not before.id.is_source and before.op not in (ALIAS, OPAQUE):
            arrived: list[Tensor] = []
            found[before.id].insert(0, OnGradient(_handed_on(arrived, share)))
            found[node.id].append(OnGradient(_noted(arrived)))
    return dict(found)


def _made_of(graph: Graph, sites: Iterable[Key]) -> list[Node]:
    """The values at some sites and all that they are computed from."""
    nodes: dict[TensorId, Node] = {}
    for site in sites:
        name = id_of(site)
        for one in ids_in(returned(graph, name)) if name.is_path else [outer_op(name)]:
            nodes |= {node.id: node for node in (*graph.ancestors(one), graph[one])}
    return list(nodes.values())


def _noted(arrived: list[Tensor]) -> Edit:
    def note(gradient: Tensor, context: Context) -> Tensor:
        arrived[:] = [gradient]
        return gradient

    return note


def _handed_on(arrived: list[Tensor], share: float) -> Edit:
    def hand_on(gradient: Tensor, context: Context) -> Tensor:
        if not arrived or arrived[0].shape != gradient.shape:
            return gradient
        return torch.where(gradient == 0, share * arrived.pop(), gradient)

    return hand_on
