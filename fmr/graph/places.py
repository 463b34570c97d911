"""Where the model makes a value: an op of the same name and number may be another one where a pass took another branch."""

from collections.abc import Mapping

from torch import nn

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId


def place_of(graph: Graph, name: TensorId) -> str | None:
    """The call site `file:line` of what makes a value, where it tells two values of one ID apart.

    It does not in a module of torch's own, whose ops count as called where the module is, in code that is made while the
    program runs, and for what no call made.
    """
    node = graph[name]
    call = graph.calls.get(node.module)
    told = node.where and not node.where.startswith("<") and call is not None and not hasattr(nn, call.kind)
    return node.where if told else None


def at_place(graph: Graph, site: Site) -> Site:
    """A site of this graph that is read only where its value is made in the same place."""
    return site.made_at(place_of(graph, site.id))


def check_place(site: Site, places: Mapping[TensorId, str], graph: Graph | None) -> None:
    """Raise where a pass makes the value of a site in another place than where the site was found.

    `places` are those noted of a pass without a graph.
    """
    if site.where is None:
        return
    here = places.get(site.id) or (graph[site.id].where if graph is not None and site.id in graph else "")
    moved = graph is not None and (bool(here) or site.id not in graph)
    site.check_made_at(here, _made_there(graph, site) if graph is not None and moved else "")


def _made_there(graph: Graph, site: Site) -> str:
    """The ID of the one value that the same op, called in the same place in the same module call, makes in this graph."""
    if site.where is None or site.id.is_source or site.id.is_path:
        return ""
    part, file = site.id.parts, site.where.rpartition("/")[2]
    calls = (node for node in graph if (node.scope, node.op) == (site.id.scope, part.op))
    found = [node.id for node in calls if node.where.rpartition("/")[2] == file and node.id.parts.output == part.output]
    return str(found[0]) if len(found) == 1 else ""
