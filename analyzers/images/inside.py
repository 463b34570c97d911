"""Sites inside fused kernels, which autograd passes as a whole: computed again from what they are given, with a slope."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import fmr
from analyzers.protocol import AnalyzerError
from fmr.graph.expand import inner_value
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId, outer_scope
from fmr.nests import Nest
from fmr.nodes import Key, Node, id_of


@dataclass(frozen=True)
class Inside(Site):
    """A site that lies inside a fused kernel, with the node of the kernel."""

    kernel: Node | None = field(default=None, repr=False, compare=False)

    @property
    def read(self) -> tuple[TensorId, ...]:
        """The values that the kernel was given."""
        return tuple(dict.fromkeys(parent.id for parent in self.kernel.parents)) if self.kernel is not None else ()


def placed(graph: Graph, site: Key) -> Key:
    """A site as it is, or, where it lies inside a fused kernel of this graph, as one that knows the kernel."""
    name = id_of(site)
    kernel = None if name.is_path or name.is_source else graph.fused.get(outer_scope(name))
    if kernel is None:
        return site
    whole = site if isinstance(site, Site) else Site(name)
    return Inside(**{one.name: getattr(whole, one.name) for one in fields(Site)}, kernel=kernel)


def read_for(site: Key, grad: bool) -> tuple[Key, ...]:
    """What a pass keeps for a site: itself, or what its kernel is given where a gradient is wanted."""
    return site.read if grad and isinstance(site, Inside) else (site,)


def held_at(site: Key, run: fmr.Run, grad: bool) -> Nest:
    """What a site holds in a pass; inside a kernel with its history, where a gradient is wanted."""
    if not grad or not isinstance(site, Inside) or site.kernel is None:
        held: Nest = run[site]
        return held
    given = {parent: run[parent.id] for parent in site.kernel.parents}
    value = inner_value(site.id, site.kernel, given, history=True)
    if value is None:
        raise AnalyzerError(
            f"{str(site.id)!r} lies behind the random mask of {site.kernel.id}. Expected a model in eval mode."
        )
    return site.of(value)
