"""What an attention must be by definition: each part of its heads is where the layouts of its values say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nodes import Node
from fmr.structure.attention.claim import Claim
from fmr.structure.attention.heads import told_by_units
from fmr.structure.attention.kind import of_one_stream, units_beside
from fmr.structure.attention.maps import GROUPS, JOIN, KEY_HEADS, counts_heads, named
from fmr.structure.attention.multiplied import compared, multiplied, products
from fmr.structure.attention.scores import BEFORE
from fmr.structure.attention.values import output_of
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import (
    above,
    all_inputs,
    between,
    come_of,
    is_constant,
    is_learned,
    product,
    projection,
    sources_of,
)
from fmr.structure.normal.vocabulary import NONLINEAR, NORMS
from fmr.structure.proof.certificate import error, unmade
from fmr.structure.proof.evaluate import Values, evaluate

Named = tuple[Tensor, tuple[str, ...]]
"""A value with a name for each of its dimensions."""

_QUERY = {"positions": "queries"}
_KEY = {"positions": "keys"}
_MAP = {"positions": "queries", "units": "keys"}
_HEADS = ("heads", KEY_HEADS, GROUPS)


MULTIPLY = ("self", "cross")
"""The kinds in which queries are compared with keys."""


def misread(graph: Graph, found: Claim) -> str:
    """Which of the parts of an attention does not follow where it should; empty where all do."""
    q, k, v, scores, pattern, z = (site.id for site in (found.q, found.k, found.v, found.scores, found.pattern, found.z))
    way = [(z, pattern)]
    way += [(pattern, found.softmax)] if pattern != found.softmax else []
    way += [(found.out.id, z)] if found.out is not None else []
    way += [(scores, q), (scores, k)] if found.kind != "deformable" else []
    sites = (found.q, found.k, found.v, found.scores, found.pattern, found.z)
    unknown = next((site for site in sites if not _is_told(site.layout or ())), None)
    if unknown is not None and found.kind in MULTIPLY:
        return f"what the dimensions of {unknown.id} count is not told"
    told = [any(map(counts_heads, site.layout or ())) for site in (found.pattern, found.z)]
    alike = graph[pattern].shape[:-2] == graph[z].shape[:-2]  # else what mixes may lay heads out in another way
    if told == [True, False] and alike and found.n_heads > 1 and found.kind in MULTIPLY:
        return f"heads are counted in {pattern}, and not in what it mixes, {z}"
    if wrong := unmade(graph, way):
        return wrong
    if form_of(graph)[found.softmax].operands[:1] != (scores,):
        return f"{scores} is not what enters {found.softmax}"
    if found.out is not None and (mixed := _mixes_again(graph, z, found.out.id)):
        return f"{mixed} mixes other values between {z} and {found.out.id}"
    if found.out is not None and found.kind in MULTIPLY and not _ends_well(graph, found.path, z, found.out.id):
        return f"the way of {z} does not end where a projection to {found.out.id} begins"
    if found.out is not None and found.kind in MULTIPLY and (other := _added_to(graph, found.path[-1], found.out.id)):
        return f"{other} is added to what comes of {z} before {found.out.id}"
    if found.out is None and found.kind in MULTIPLY and (output := output_of(graph, graph[z])) is not None:
        return f"{z} is projected to {output.id}, and no output is named"

    def hands_on(node: Node) -> bool:
        return node.id != pattern and node.dtype.is_floating_point  # and is no choice

    if not any(v in node.parents for node in filter(hands_on, between(graph, v, z, hands_on))):
        return f"{z} is computed from {v} by way of the pattern alone"
    met = bool(products(graph, found))
    nodes = between(graph, min(q, k, key=graph.place), scores)
    if found.kind in MULTIPLY and not met and any(multiplied(graph, node) for node in nodes):
        return f"{q} and {k} are not what is multiplied on the way to {scores}"
    return (
        f"queries and keys are multiplied, and {found.kind} says they are not" if met and found.kind not in MULTIPLY else ""
    )


def _ends_well(graph: Graph, path: Sequence[TensorId], start: TensorId, end: TensorId) -> bool:
    """Whether a way goes from a value to what is projected to another."""
    read = (found.data for node in between(graph, start, end) if (found := projection(graph, node)) is not None)
    return bool(path) and path[0] == start and path[-1] in read


def _is_told(layout: tuple[str, ...]) -> bool:
    """Whether each dimension has names that dimensions of an attention may have, and no other one has them."""
    known = ("examples", "positions", "rows", "units", *_HEADS)
    names = [part for name in layout for part in name.split(JOIN)]
    return bool(names) and len({*names}) == len(names) and all(one in known or one.startswith("axis ") for one in names)


def _added_to(graph: Graph, start: TensorId, end: TensorId) -> TensorId | None:
    """An activation that is added to what comes of a value on its way to another."""
    nodes = list(come_of(graph, start, end))
    own = {start, *(node.id for node in nodes)}
    added = (parent.id for node in nodes if node.op in ("add", "sub") for parent in node.parents)
    return next((name for name in added if name not in own and not is_constant(graph, name)), None)


def _mixes_again(graph: Graph, start: TensorId, end: TensorId) -> TensorId | None:
    """A product of two activations between a value and another that comes of it."""
    return next((node.id for node in come_of(graph, start, end) if product(graph, node) is not None), None)


def mixes(graph: Graph, found: Claim, pattern: Tensor, v: Tensor, mixed: Tensor, value: Values) -> float | None:
    """How far z lies from the sum of the pattern times the values, all as laid out; None where layouts do not tell.

    Where heads are weighed by one another on the way, it is what comes of that which weighs the values.
    """
    if _weighs(graph, found.pattern.id, found.z.id):
        weights = _weighing(graph, found)
        if weights is None:
            return None
        pattern = evaluate(graph, weights, {found.pattern.id: pattern}, value)
    p, values, z = (
        _named(value.double(), site, found, names)
        for value, site, names in ((pattern, found.pattern, _MAP), (v, found.v, _KEY), (mixed, found.z, _QUERY))
    )
    if p is None or values is None or z is None or not bool(torch.isfinite(values[0]).all()):
        return None
    values = _of_pairs(values, p, z)
    names = {*p[1], *values[1]}
    sizes = [dict(zip(names, value.shape, strict=True)) for value, names in (p, values, z)]
    parts = sum(product(graph, node) is not None for node in between(graph, found.pattern.id, found.z.id))
    if parts > 1 and sizes[1].get("keys", 1) < sizes[0].get("keys", 1):
        return None
    if names != {*z[1], "keys"}:
        wide = [{name for name, size in one.items() if size > 1} for one in sizes]
        other = (wide[0] | wide[1] | {"keys"}) ^ (wide[2] | {"keys"})
        return float("inf") if other and not any(name.startswith("axis") for name in names) else None
    if any(len({size[name] for size in sizes if size.get(name, 1) > 1}) > 1 for name in names):
        return float("inf")
    letters = {name: chr(97 + n) for n, name in enumerate(sorted(names))}
    words = ["".join(letters[name] for name in own) for _, own in (p, values, z)]
    made = torch.einsum(f"{words[0]},{words[1]}->{words[2]}", p[0].nan_to_num(0.0), values[0])
    fits = all(one in (1, size) for one, size in zip(made.shape, z[0].shape, strict=True))
    return error(made.expand_as(z[0]), z[0].nan_to_num(0.0)) if fits else float("inf")


def _weighs(graph: Graph, start: TensorId, end: TensorId) -> bool:
    """Whether a value is multiplied with weights on its way to another, by which heads may be weighed by one another."""
    return any(projection(graph, node) is not None for node in come_of(graph, start, end))


def _weighing(graph: Graph, found: Claim) -> TensorId | None:
    """What is made of a pattern and multiplied with values; None where that is laid out otherwise."""
    lower = {node.id: node for node in come_of(graph, found.pattern.id, found.z.id)}
    used = next((use for node in lower.values() if (use := product(graph, node)) is not None), None)
    made = next((name for name in (used.left, used.right) if name in lower), None) if used is not None else None
    return made if made is not None and graph[made].shape == graph[found.pattern.id].shape else None


def _of_pairs(values: Named, pattern: Named, z: Named) -> Named:
    """Values of which there is one for each query and key, where one dimension of them has no other meaning."""
    free = [name for name in values[1] if name not in {*pattern[1], *z[1]}]
    if len(free) == 1 and "queries" in pattern[1] and "queries" not in values[1]:
        return values[0], tuple("queries" if name == free[0] else name for name in values[1])
    return values


def _named(value: Tensor, site: Site, found: Claim, names: Mapping[str, str]) -> Named | None:
    """A value with the names of its dimensions, each of one thing; None where one is not known or two have the same."""
    try:
        made, layout = named(value, site, found.n_heads, found.n_kv_heads)
    except StructureError:
        return None
    told = tuple(names.get(name, name) for name in layout)
    return (made, told) if len({*told}) == len(told) else None


_FEW = 4
"""So many numbers are too few to tell heads apart."""

_SOME = 64
"""So many numbers are looked at first."""


_ALONG = NORMS | frozenset("topk sort kthvalue cumsum max amax mean sum logsumexp".split())
"""What holds scores against others, or tells of many at once."""


def own_rows(graph: Graph, found: Claim, value: Values) -> float | None:
    """How far scores move elsewhere where the query of one head and position is changed, or a key of one head; None where
    that cannot be told, as where one value is both.

    They are looked at where queries and keys are multiplied, wherever that is laid out as they are: what is masked, normed
    or chosen later tells less.
    """
    found = replace(found, scores=replace(found.scores, id=compared(graph, found)))
    given = {name: value(name).detach().contiguous() for name in (found.q.id, found.k.id)}  # so that rounding is the same
    lower = [node for name in given for node in come_of(graph, name, found.scores.id, given)]
    if len(given) < 2 or any(node.op in _ALONG or projection(graph, node) is not None for node in lower):
        return None
    base = evaluate(graph, found.scores.id, given, value)
    scores = _named(base, found.scores, found, _MAP)
    if scores is None:
        return None
    worst = [_strays(graph, found, value, base, scores, site, given) for site in (found.q, found.k)]
    known = [one for one in worst if one is not None]
    return max(known) if known else None


def _strays(
    graph: Graph,
    found: Claim,
    value: Values,
    base: Tensor,
    scores: Named,
    site: Site,
    given: Mapping[TensorId, Tensor],
) -> float | None:
    """How far scores move outside of the row of one query, or of the column of one key, that is changed; relative to how far
    they move at all, as a mask may be larger than any score. None where none moves, as where all that is tried is masked."""
    names = _QUERY if site is found.q else _KEY
    one = _named(given[site.id], site, found, names)
    if one is None:
        return None
    sizes = [dict(zip(names, value.shape, strict=True)) for value, names in (one, scores)]
    if any(size > 1 and name.startswith("axis") for name, size in sizes[0].items()):  # of windows, where places count anew
        return None
    kept = {name: size for name, size in sizes[0].items() if size > 1 and name != "units"}
    others = {name: sizes[1].get(name, 1) for name in kept}
    if any(size == 1 or (size != kept[name] and name != "keys") for name, size in others.items()):
        return float("inf")
    for last in (2, 1, 0):
        at = {name: n % sizes[0][name] for n, name in enumerate(sorted(kept), 2 - last)}
        at |= {name: (sizes[0][name] - 1) * last // 2 for name in _PLACES & kept.keys()}
        changed = given[site.id].clone(memory_format=torch.contiguous_format)
        part = named(changed, site, found.n_heads, found.n_kv_heads)[0][tuple(at.get(name, slice(None)) for name in one[1])]
        part.copy_(-0.5 * part - 0.1)
        moved = evaluate(graph, found.scores.id, {**given, site.id: changed}, value)
        told = _named((moved - base).abs().nan_to_num(0.0, 0.0, 0.0), found.scores, found, _MAP)
        if told is not None and bool(told[0].any()):
            return _outside(told, at)
    return None


_PLACES = {"queries", "keys"}


def _outside(moved: Named, at: Mapping[str, int]) -> float:
    """How far scores moved elsewhere than where they should; rows and columns may be in another order."""
    off, most = moved[0].clone(), moved[0].amax()
    for name in _PLACES & at.keys():
        at = {**at, name: int(off.movedim(moved[1].index(name), 0).flatten(1).amax(1).argmax())}
    off[tuple(at.get(name, slice(None)) for name in moved[1])] = 0.0
    return float(off.amax() / most)


def miscounted(graph: Graph, found: Claim, value: Values) -> str:
    """Which number of an attention is not that of its values; empty where all are."""
    if found.kind not in MULTIPLY:
        return ""
    if is_constant(graph, found.v.id) and not is_learned(graph, found.v.id):
        return f"it weighs constants, {found.v.id}: what comes of that is an expectation, and no data is read"
    if is_constant(graph, found.q.id) and not is_learned(graph, found.q.id):
        return f"its queries are constants, {found.q.id}: what comes of that weighs what it reads, and asks nothing of it"
    if found.n_kv_heads < 1 or found.n_heads % found.n_kv_heads:
        return f"{found.n_heads} heads cannot share those of {found.n_kv_heads}"
    apart = (found.k.layout[n] for n in told_by_units(graph, found.k.id)) if found.n_heads == 1 and found.k.layout else ()
    if (other := next((name for name in apart if name not in ("positions", "units")), None)) is not None:
        return f"{found.k.id} has other units of a projection for each of its {other}, as heads do, and one head is said"
    q, k, v = (value(site.id).detach() for site in (found.q, found.k, found.v))
    shared = _distinct(found, k, v)
    if shared is not None and shared != found.n_kv_heads:
        return f"its keys and values are those of {shared} heads, not of {found.n_kv_heads}"
    told = _named(q, found.q, found, _QUERY)
    sizes = dict(zip(told[1], told[0].shape, strict=True)) if told is not None else {}
    own = found.head_dim - units_beside(graph, found.scores.id, found.q.id, found.k.id)
    if sizes.get("units", own) != own:
        return f"its queries have {sizes['units'] + found.head_dim - own} units, not {found.head_dim}"
    seen = _named(k, found.k, found, _KEY)
    units = dict(zip(seen[1], seen[0].shape, strict=True)).get("units", own) if seen is not None else own
    if units != own:
        return f"its keys have {units} units, and its queries {own}"
    counts = [sizes[name] for name in _HEADS if name in sizes]
    if counts and math.prod(counts) != found.n_heads:
        return f"its queries have {math.prod(counts)} heads, not {found.n_heads}"
    for site in (found.q, found.k, found.v, found.scores, found.pattern, found.z):
        sizes_of = graph[site.id].shape
        pairs = zip(site.layout or (), sizes_of, strict=False)
        joined = [size for name, size in pairs if {"heads"} < {*name.split(JOIN)}]
        if any(size % found.n_heads for size in joined):
            return f"{site.id}, {list(sizes_of)}, has no {found.n_heads} heads where {list(site.layout or ())} says so"
    if found.n_heads > 1 and not any(counts_heads(name) for name in found.pattern.layout or ()):
        pattern = graph[found.pattern.id]
        return f"which dimension of {pattern.id}, {list(pattern.shape)}, counts its {found.n_heads} heads cannot be followed"
    return ""


def mistaken(graph: Graph, found: Claim, value: Values) -> str:
    """Why an attention is not of its kind; empty where it is, and where that cannot be told.

    Of self-attention, queries and keys are made of one value; where changing that at its first position moves the first
    query and the first key alone, by linear steps, it is no cross-attention, but where keys of others are among its own.
    """
    q, k = found.q.id, found.k.id
    sources = [sources_of(graph, name) for name in (q, k)]
    if found.kind not in MULTIPLY or any(graph[name].op == "opaque" for name in sources[0] | sources[1]):
        return ""
    if found.kind == "self":
        alone = all(sources) and sources[0].isdisjoint(sources[1])
        made = (product(graph, node) for node in above(graph, found.scores.id, BEFORE))
        keys = {k} | {name for one in made if one is not None for name in (one.left, one.right)} - {q}
        apart = alone or not any(of_one_stream(graph, q, name) for name in keys)
        return f"{q} and {k} are made of different values, which is not what self says" if apart else ""
    if of_one_stream(graph, q, k):
        return f"{q} and {k} are made of one stream, which is not what cross says"
    data = [{node.id for node in above(graph, name, lambda node: True, all_inputs)} for name in (q, k)]
    fed = (name for name in data[0] & data[1] if not is_constant(graph, name))
    last = max((name for name in fed if graph[name].dtype.is_floating_point), key=graph.place, default=None)
    if last is None or last in (q, k) or graph[last].shape[-2:-1] < (3,) or _bends(graph, last, q) or _bends(graph, last, k):
        return ""
    turned = value(last).detach().clone()
    turned.select(-2, 0).mul_(-0.5).sub_(0.1)
    first = [_first_alone(graph, found, site, last, turned, value) for site in (found.q, found.k)]
    return f"{q} and {k} are made of {last}, position by position, which is not what cross says" if all(first) else ""


def _bends(graph: Graph, start: TensorId, end: TensorId) -> bool:
    return any(node.op in NONLINEAR or product(graph, node) is not None for node in between(graph, start, end))


def _first_alone(graph: Graph, found: Claim, site: Site, start: TensorId, turned: Tensor, value: Values) -> bool:
    """Whether a value that is given anew at its first position moves queries, or keys, at theirs alone, of which there are
    no more than it has."""
    names = _QUERY if site is found.q else _KEY
    told = [_named(evaluate(graph, site.id, {start: one}, value), site, found, names) for one in (value(start), turned)]
    if told[0] is None or told[1] is None or names["positions"] not in told[0][1]:
        return False
    moved = (told[0][0] - told[1][0]).abs().movedim(told[0][1].index(names["positions"]), 0).flatten(1).amax(1) > 0
    return 2 < len(moved) <= graph[start].shape[-2] and int(moved.sum()) == 1


def _distinct(found: Claim, k: Tensor, v: Tensor) -> int | None:
    """How many heads of keys and values differ from one another; None where no dimension counts them, and where one has few
    numbers, as what is at a bound, or what an edit takes away."""
    rows: list[Tensor] = []
    for value, site in ((k, found.k), (v, found.v)):
        told = _named(value, site, found, _KEY)
        at = [told[1].index(name) for name in (KEY_HEADS, GROUPS, "heads") if name in told[1]] if told is not None else []
        if told is None or not at or not value.numel():
            return None
        rest = told[0].permute(*at, *(n for n in range(told[0].dim()) if n not in at))
        rows.append(rest.reshape(rest.shape[: len(at)].numel(), -1).float())
    if len(rows[0]) != len(rows[1]):
        return None
    every = torch.cat(rows, 1)
    known = every.sum(0, dtype=torch.float64).isfinite()
    every = every if bool(known.all()) else every[:, known]
    if _has_few(every[:, :_SOME]) and _has_few(every):
        return None
    weights = torch.linspace(1, 2, every.shape[1], dtype=torch.float64, device=every.device).cos()
    return len((every * weights).sum(1).unique())  # rows that differ have other sums


def _has_few(rows: Tensor) -> bool:
    """Whether a row has too few different numbers."""
    in_order = rows.sort(1).values
    return bool(((in_order[:, 1:] != in_order[:, :-1]).sum(1) < _FEW).any())
