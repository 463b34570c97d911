"""Which dimension of a value counts channels, read off the ops that made it."""

from __future__ import annotations

from collections.abc import Sequence

from fmr.errors import IdError
from fmr.graph.graph import Graph
from fmr.ids import Site
from fmr.nodes import Key, Node, id_of
from fmr.structure.normal.match import ELEMENTWISE, SAME

LAST = frozenset("linear layer_norm rms_norm".split())
"""Ops after which the last dimension counts channels."""


def with_layout(graph: Graph, site: Key) -> Key:
    """A site that says that its last dimension counts channels, where it has four and its ops tell so; else itself.

    >>> with_layout(fmr.run(reader, images[:1]).graph, "conv1")
    'conv1'

    What works number by number is looked through to what it read.
    """
    if isinstance(site, Site) and (site.layout is not None or site.selection):
        return site
    try:
        node = graph[site]
    except IdError:  # which the run that reads it says in its own words
        return site
    if len(node.shape) < 4 or not _is_last(graph, node):
        return site
    return Site(id_of(site), layout=("examples", *(f"dim{n}" for n in range(1, len(node.shape) - 1)), "units"))


def _is_last(graph: Graph, node: Node) -> bool:
    """Whether all of the ops that the numbers of a value come from leave channels in the last dimension."""
    waiting, known, found = [node], {node.id}, []
    while waiting:
        here = waiting.pop()
        if here.op in ELEMENTWISE | SAME:
            more = [graph[parent] for parent in _alike(graph, here) if parent not in known]
            known.update(one.id for one in more)
            waiting += more
        else:
            found.append(here.op)
    return bool(found) and all(op in LAST for op in found)


def _alike(graph: Graph, node: Node) -> Sequence[Key]:
    """What a node read that has its shape and is no source."""
    return [parent.id for parent in node.parents if not parent.is_source and graph[parent].shape == node.shape]
