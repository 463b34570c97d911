"""Which dimension of a site counts channels: proven from the ops that made it, or said by whoever names the site."""

from __future__ import annotations

from dataclasses import replace

from analyzers.images.counts import MIXED, PLACES, UNITS, counts_of
from fmr.errors import IdError
from fmr.graph.graph import Graph
from fmr.graph.paths import returned
from fmr.ids import Site, TensorId
from fmr.nests import Nest, ids_in
from fmr.nodes import Key, Node, id_of

_NARROWED = {3: ("examples", "positions", "units"), 4: ("examples", "heads", "positions", "units")}
"""How a site that is narrowed is laid out where it does not say so."""


def with_layout(graph: Graph, site: Key, images: int = 0) -> Key:
    """A site that says which of its dimensions counts channels, as the ops of a graph tell; none is called units where they
    do not.

    >>> with_layout(fmr.run(reader, images[:1]).graph, "conv1").layout
    ('examples', 'units', 'dim2', 'dim3')

    images: the dimension that counts these. A site with a layout stays as it is; so does one that holds several tensors, or
    that is nowhere.
    """
    if isinstance(site, Site) and site.layout is not None:
        return site
    try:
        name, node = _held(graph, id_of(site))
    except IdError:  # which the run that reads it says in its own words
        return site
    if node is None or not node.shape:
        return site
    layout = _layout(graph, node, images)
    if not isinstance(site, Site):
        return Site(name, layout=layout)
    if not site.selection:
        return replace(site, id=name, layout=layout)
    narrowed = _NARROWED.get(len(layout))
    told = narrowed if layout[-1] == "units" and not images else None
    return site if told is None else replace(site, layout=told)


def _layout(graph: Graph, node: Node, images: int) -> tuple[str, ...]:
    """The names of a value's dimensions: units is the one that counts channels, where one alone does."""
    rank = len(node.shape)
    names = [f"dim{n}" for n in range(rank)]
    names[images] = "examples"
    told = counts_of(graph).get(node.id, (None,) * rank)
    counts = {n: told[n] for n in range(rank) if n != images}
    units = [n for n, count in counts.items() if count == UNITS]
    mixed = any(count == MIXED and node.shape[n] > 1 for n, count in counts.items())
    if len(counts) == 1 and PLACES not in counts.values():
        names[next(iter(counts))] = "units"
    elif len(units) == 1 and not mixed:
        names[units[0]] = "units"
    return tuple(names)


def _held(graph: Graph, name: TensorId) -> tuple[TensorId, Node | None]:
    """The one tensor that a name stands for, and a name for it alone; of several, the logits."""
    if not name.is_path:
        return name, graph[name]
    found = dict(_leaves(returned(graph, name)))
    if len(found) > 1 and "logits" in found:
        found = {"logits": found["logits"]}
    if len(found) != 1:
        return name, None
    ((at, held),) = found.items()
    return TensorId(f"{name}:{at}" if at else name), graph[held]


def _leaves(nest: Nest, at: str = "") -> list[tuple[str, TensorId]]:
    """Every ID in a nest, with its position."""
    if nest is None or isinstance(nest, str):
        return [(at, one) for one in ids_in(nest)]
    items = nest.items() if isinstance(nest, dict) else enumerate(nest)
    return [pair for key, item in items for pair in _leaves(item, f"{at}.{key}" if at else str(key))]
