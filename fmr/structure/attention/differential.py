"""Differential attention: two softmaxes, of which one is taken from the other, as weights or as what they mix."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.structure.attention.attention import Attention
from fmr.structure.attention.dot_product import weighed
from fmr.structure.attention.halves import ORDER, Half
from fmr.structure.attention.layouts import laid_out
from fmr.structure.attention.scores import find_scores
from fmr.structure.attention.values import ValueProduct, output_of, value_product
from fmr.structure.normal.form import form_of
from fmr.structure.normal.indices import dim_map, iota, trace
from fmr.structure.normal.match import Path, data_inputs, strip_views
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import MOVES, SAME
from fmr.structure.proof.certificate import Rejected

_SCALED = ("move", "affine", "join", "gate")
"""What may lie between what attentions mix and the difference of that."""


class _Side(NamedTuple):
    """One of two values of which the second is taken from the first: what it was made of, its way, and its share."""

    made: Value
    way: Path
    share: TensorId | float = 1.0


def differential(graph: Graph, plain: Sequence[Attention]) -> Iterator[Attention]:
    """The attentions whose maps are differences; `plain` are those of single softmaxes, which may be halves of such."""
    mixed = {form_of(graph)[one.z.id]: one for one in plain if one.minus is None}
    for node in graph.nodes:
        if node.op != "sub" or len(node.parents) != 2 or not node.dtype.is_floating_point:
            continue
        first, second = (_side(graph, parent.id) for parent in node.parents)
        if first is None or second is None or first.share != 1.0:
            continue
        alpha = node.argument("alpha", 2, 1.0)
        second = second._replace(share=alpha) if second.share == 1.0 else second
        if first.made.kind == second.made.kind == "softmax":
            found = _of_patterns(graph, node, first, second)
        else:
            found = _of_mixed(graph, node, mixed.get(first.made), mixed.get(second.made), first, second)
        if found is not None:
            yield found


def subtracted(graph: Graph, found: Sequence[Attention]) -> Iterator[Rejected]:
    """Each difference of what attentions mix, which are claimed by themselves."""
    form = form_of(graph)
    mixed = {form[one.z.id]: one for one in found}
    for value in form.of_kind("sum") if mixed else ():
        ways = [one.above(lambda higher: higher.kind in _SCALED and higher not in mixed) for one in value.inputs]
        sides = [{one.softmax: one for higher in way if (one := mixed.get(higher)) is not None} for way in ways]
        if value.node.op == "sub" and value not in mixed and len(sides) == 2 and all(sides):
            names = " and ".join(sides[0] | sides[1])
            reason = f"it is a difference of what {names} weigh, claimed by themselves, as in differential attention"
            yield Rejected(value.id, "attention", reason)


def _side(graph: Graph, name: TensorId) -> _Side | None:
    """What an operand of a difference was made of: a softmax or a product, scaled or not."""
    way, form = [graph[name]], form_of(graph)
    scale: TensorId | float = 1.0
    while (value := form[way[-1].id]).kind not in ("softmax", "product") or value.node is not way[-1]:
        node = way[-1]
        scaled = _scaled(graph, node) if scale == 1.0 and all(one.op in SAME for one in way[:-1]) else None
        if scaled is not None:
            higher, scale = scaled
        elif node.op in MOVES and len(read := data_inputs(graph, node)) == 1:
            (higher,) = read
        else:
            return None
        way.append(graph[higher])
    return _Side(value, tuple(reversed(way)), scale)


def _scaled(graph: Graph, node: Node) -> tuple[TensorId, TensorId | float] | None:
    """What a node multiplies, and by what; None where it does not scale one value that weighs or was weighed."""
    if node.op != "mul":
        return None
    told = [parent.id for parent in node.parents if form_of(graph)[parent.id].kind in ("softmax", "product", "move")]
    told = [name for name in told if graph[name].shape == node.shape] if len(told) > 1 else told
    others = [parent.id for parent in node.parents if parent.id not in told]
    number = others[0] if others else node.argument("other", 1)
    return (told[0], number) if len(told) == 1 and isinstance(number, (TensorId, int, float)) else None


def _of_patterns(graph: Graph, node: Node, first: _Side, second: _Side) -> Attention | None:
    """The attention in which a difference of two patterns weighs the values."""
    use = value_product(graph, form_of(graph)[node.id])
    if use is None:
        return None
    one, other = _half(graph, first, use), _half(graph, second, use)
    if one is None or other is None:
        return None
    return _joined(graph, one, other, second.share, _layout(graph, node, use, one.z))


def _layout(graph: Graph, node: Node, use: ValueProduct, z: Site) -> tuple[str, ...]:
    """What the dimensions of the weights count, read off the product with the values."""
    words, named = use.subscripts, dict(zip(use.subscripts.result, z.layout or (), strict=False))
    at_product = tuple(named.get(letter, "units") for letter in words.left)
    places = dim_map(graph, use.way)
    found = {place: name for place, name in zip(places, at_product, strict=True) if place is not None}
    layout = tuple(found.get(n, "") for n in range(len(node.shape)))
    one = [n for n, name in enumerate(layout) if name.startswith("axis") and node.shape[n] == 1 and "heads" not in layout]
    return tuple("heads" if n in one[:1] else name for n, name in enumerate(layout))  # a single head


def _half(graph: Graph, side: _Side, use: ValueProduct) -> Attention | None:
    """One of the two patterns as an attention of its own."""
    way = (*side.way, *use.way)
    for scores in find_scores(graph, side.made):
        found = weighed(graph, side.made, scores, use._replace(way=way))
        if isinstance(found, Attention):
            found = replace(found, pattern=laid_out(graph, side.made.id, found.scores.layout))
            return _chosen(graph, found, side.way)
    return None


def _chosen(graph: Graph, found: Attention, way: Path) -> Attention | None:
    """A half whose heads are some of those of a softmax, with the sites saying which; itself where they are all."""
    shape = way[0].shape
    for axis, size in enumerate(shape):
        if size == found.n_heads or size % max(1, found.n_heads) or size < 2:
            continue
        along = iota(*(size if n == axis else 1 for n in range(len(shape)))).expand(shape)
        value = trace(graph, along, way)
        kept = value.unique().long().tolist() if value is not None and value.numel() else []
        if len(kept) == found.n_heads < size and kept[0] >= 0:
            break
    else:
        return found
    sites: dict[str, Any] = {}
    for role in ("q", "k", "scores", "pattern"):
        site: Site = getattr(found, role)
        own = graph[site.id].shape
        if len(own) != len(shape) or own[axis] != size:
            return None
        layout = list(site.layout or ())
        layout[axis] = "heads"
        sites[role] = replace(site, layout=tuple(layout), n_heads=size, heads=kept)
    return replace(found, **sites)


def _of_mixed(
    graph: Graph, node: Node, one: Attention | None, other: Attention | None, first: _Side, second: _Side
) -> Attention | None:
    """The attention in which what a second pattern mixes of the same values is taken from what the first does."""
    if one is None or other is None or one is other or (one.n_heads, one.n_kv_heads) != (other.n_heads, other.n_kv_heads):
        return None
    if len({strip_views(graph, block.v.id, MOVES) for block in (one, other)}) > 1 or one.z.layout is None:
        return None
    names = [step.id for step in first.way]
    way = first.way[names.index(one.z.id) :] if one.z.id in names else first.way
    layout = tuple(one.z.layout[place] if place is not None else "" for place in dim_map(graph, (*way, node)))
    output = output_of(graph, node)
    whole = replace(
        one,
        z=laid_out(graph, node.id, layout),
        out=Site(output.id) if output is not None else None,
        path=tuple(step.id for step in output.way) if output is not None else (),
    )
    return _joined(graph, whole, other, second.share, layout)


def _joined(
    graph: Graph, one: Attention, other: Attention, share: TensorId | float, layout: tuple[str, ...]
) -> Attention | None:
    """A half less a share of another, whose dimensions are laid out so; None where that does not name each."""
    if len({*layout}) < len(layout) or not {*layout} <= {*ORDER}:
        return None
    told: Site | float = float(share) if not isinstance(share, str) else 0.0
    if isinstance(share, str):
        rank = len(graph[TensorId(share)].shape)
        told = Site(TensorId(share), layout=layout[len(layout) - rank :])
    return replace(
        one,
        minus=Half(other.softmax, other.q, other.k, other.scores, other.pattern, other.dim, told),
    )
