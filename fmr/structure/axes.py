"""What the dimensions of memories and streams count, where that is not what their number tells."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.structure.attention.attention import Attention
from fmr.structure.attention.layouts import Layout
from fmr.structure.memories.memory import Memory
from fmr.structure.normal.dims import Dim, Dims
from fmr.structure.normal.form import form_of

_COUNTED = ("positions", "examples")

_ROLES: dict[str, tuple[str, ...]] = {"additive": ("v", "z"), "deformable": ()}
"""The values of an attention whose layout is told by its products, where these are not all."""

ROWS = "rows"
"""A dimension that counts several things at once, as the tokens of all examples, the windows of each, or what was chosen; or
what another attention is over, as the rows of a table whose columns this one compares."""


class Axes:
    """What is known of the dimensions of a graph's values: what attentions say of them, and what projections do."""

    def __init__(self, graph: Graph, dims: Dims, attention: Sequence[Attention] = ()) -> None:
        self.graph, self.dims = graph, dims
        self.said: dict[Dim, set[str]] = defaultdict(set)
        for block in attention:
            for role in _ROLES.get(block.kind, ("q", "k", "v", "z")):
                site: Site = getattr(block, role)
                for one, name in zip(self._of(site.id), site.layout or (), strict=False):
                    self.said[one].update({name} & {*_COUNTED})

    def _of(self, name: TensorId) -> tuple[Dim, ...]:
        return self.dims.of(name, len(self.graph[name].shape))

    def site(self, site: Site, units: Dim | None = None) -> Site:
        """A site with its layout, where that is not the usual one; `units` is the class that is known to count them."""
        return site if site.layout is not None else replace(site, layout=self._layout(site.id, units))

    def are_positions(self, name: TensorId, dim: int) -> bool:
        """Whether attentions say that a dimension of a value counts positions."""
        return self._asks(self._of(name)[dim])

    def has(self, one: Dim, name: TensorId) -> bool:
        """Whether a dimension is one of those of a value."""
        return self._of(TensorId(one[0]))[one[1]] in self._of(name)

    def is_another(self, one: Dim, name: TensorId) -> bool:
        """Whether a dimension is one of those of a value, and not that of its units."""
        dims = self._of(name)
        return self.has(one, name) and self._of(TensorId(one[0]))[one[1]] != dims[self._units(dims, None)]

    def attention(self, block: Attention) -> Attention:
        """An attention in whose values no dimension that counts more than examples, or what another one is over, is said to
        count these."""
        sites: dict[str, Any] = {
            role: self._unmixed(getattr(block, role)) for role in ("q", "k", "v", "scores", "pattern", "z")
        }
        return replace(block, **sites, out=self.site(block.out) if block.out is not None else None)

    def memory(self, found: Memory) -> Memory:
        """A memory with the layouts of its coefficients and of its output."""
        coefficients = self._of(found.post.id)[found.axis]
        words = form_of(self.graph)[found.down].subscripts
        made = [words.result.index(one) - len(words.result) for one in words.free(words.right)[-1:]]
        return replace(
            found,
            pre=self.site(found.pre, coefficients),
            post=self.site(found.post, coefficients),
            out=self.site(found.out, *(self._of(found.down)[n] for n in made)),
        )

    def _unmixed(self, site: Site) -> Site:
        other = [self.dims.is_mixed(one) or self._told(one) for one in self._of(site.id)]
        pairs = zip(site.layout or (), other, strict=False)
        return replace(site, layout=tuple(ROWS if name == "examples" and rows else name for name, rows in pairs))

    def _layout(self, name: TensorId, known: Dim | None) -> Layout | None:
        """What the dimensions of a value count; None where that is what their number tells."""
        dims = self._of(name)
        if len(dims) < 2:
            return None
        units = self._units(dims, known)
        rest = [n for n in range(len(dims)) if n != units]
        positions = self._positions(dims, rest)
        others = [n for n in rest if n != positions]
        named = {n: f"axis {n}" for n in others} | {units: "units"}
        if positions is not None:
            named[positions] = "positions"
        told = positions is not None or len(rest) != 2  # of two that nothing tells apart, none is said to be either
        if others and told and not (len(rest) > 2 and self._asks(dims[others[0]])):
            named[others[0]] = ROWS if self.dims.is_mixed(dims[others[0]]) else "examples"
        layout = tuple(named[n] for n in range(len(dims)))
        return None if layout in (("examples", "units"), ("examples", "positions", "units")) else layout

    def _units(self, dims: Sequence[Dim], known: Dim | None) -> int:
        """The dimension of the units: the last, unless another alone is known to be."""
        last = len(dims) - 1
        found = [n for n, one in enumerate(dims) if (one == known if known is not None else self.dims.is_units(one))]
        return last if last in found or len(found) != 1 else found[0]

    def _positions(self, dims: Sequence[Dim], rest: Sequence[int]) -> int | None:
        """The dimension of the positions: what attentions say, else the one of two that ops go along."""
        asked = [n for n in rest if self._told(dims[n])]
        if len(rest) == 2:
            asked = asked or [n for n in rest if self.dims.goes_along(dims[n])]
            return asked[0] if len(asked) == 1 else None
        return asked[0] if len(asked) == 1 and (len(rest) > 1 or "examples" not in self.said[dims[asked[0]]]) else None

    def _asks(self, one: Dim) -> bool:
        """Whether attentions go along a class."""
        return "positions" in self.said[one]

    def _told(self, one: Dim) -> bool:
        """Whether a class is known to count no examples: attentions go along it, or what asks for its order does."""
        return self._asks(one) or self.dims.is_ordered(one)
