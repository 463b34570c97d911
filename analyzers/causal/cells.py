"""What is patched one at a time: the state of the stream, what attention and memory write, and single heads, by role."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from analyzers.numbers.embed import Floats, Ints
from analyzers.prompts import Prompts
from analyzers.protocol import AnalyzerError
from fmr.graph.graph import Graph
from fmr.ids import Site
from fmr.nodes import Key, id_of
from fmr.pictures.changes import numbered
from fmr.structure.parts import Layer, Structure

BY_POSITION = ("resid_pre", "attention", "mixer", "mlp")
"""What is patched position by position; `z` is patched head by head, at all positions."""

OUTPUT = "layer"
"""What a layer hands on of which it is not known what it is made of."""


class Cell(NamedTuple):
    """One place of a map: what is patched there, in which layer, and at which position or in which head."""

    kind: str
    layer: int
    place: int
    site: Site


def cells_of(structure: Structure, base: Prompts, graph: Graph) -> list[Cell]:
    """The cells of all layers: `resid_pre`, `attention`, `mixer` and `mlp` by position, `z` by head.

    >>> cells_of(structure, analyzers.prompts.prompts(input_ids, model), run.graph)[0]
    Cell(kind='resid_pre', layer=0, place=0, site=Site(..., positions=0))

    Where no layers are told, `resid_pre` is the stream before each write and `layer` what that adds; of a plain stack,
    `layer` is what its layers hand on.
    """
    if base.length is None:
        raise AnalyzerError(
            f"The pairs have {min(base.lengths)} to {max(base.lengths)} tokens, so that positions do not correspond between "
            "pairs. Run those of one length, or pass sites=[...], such as block.z.at(positions=-1)."
        )
    found: list[Cell] = []
    rows = [list(_written(layer)) for layer in structure.layers] or list(_unlayered(structure, graph, base.length))
    for number, row in enumerate(rows):
        for kind, site in row:
            places = range(_positions(graph, site, base.length))
            found += [Cell(kind, number, place, site.at(positions=place)) for place in places]
    for number, layer in enumerate(structure.layers):
        if layer.attention is not None:
            z = layer.attention.z
            found += [Cell("z", number, head, z.at(heads=head)) for head in range(layer.attention.n_heads)]
    return sorted(found, key=lambda cell: ((*BY_POSITION, OUTPUT, "z").index(cell.kind), cell.layer, cell.place))


def given_cells(sites: Sequence[Key]) -> list[Cell]:
    """Cells of sites that a user chose: single heads, or positions, of values whose IDs differ in one number make a map by
    that number; others are one row."""
    if isinstance(sites, (str, Site)) or not isinstance(sites, Sequence) or not sites:
        raise AnalyzerError(f"sites={sites!r}: expected a list of sites, such as [layer.resid_pre.at(positions=-1)].")
    keys = [key if isinstance(key, Site) else Site(id_of(key)) for key in sites]
    known = numbered([str(key.id) for key in keys])
    for axis, other in (("heads", "positions"), ("positions", "heads")):
        places = [getattr(key, axis) for key in keys]
        alike = len({repr(getattr(key, other)) for key in keys}) == 1
        if known and alike and all(type(place) is int and place >= 0 for place in places):
            cells = [Cell("sites", *of) for of in zip(known[0], places, keys, strict=True)]
            if len({(cell.layer, cell.place) for cell in cells}) == len(cells):
                return cells
    return [Cell("sites", 0, place, site) for place, site in enumerate(keys)]


def as_maps(kinds: Sequence[str], layers: Ints, places: Ints, values: Floats) -> dict[str, Floats]:
    """The values of cells as one map a kind, (layers, positions) or (layers, heads); NaN where a layer has no such cell."""
    maps: dict[str, Floats] = {}
    for kind in dict.fromkeys(kinds):
        own = [n for n, one in enumerate(kinds) if one == kind]
        maps[kind] = np.full((1 + layers[own].max(), 1 + places[own].max()), np.nan)
        maps[kind][layers[own], places[own]] = values[own]
    return maps


def _positions(graph: Graph, site: Site, length: int) -> int:
    """How many positions a value has: those of a decoder are not its encoder's, and of a picture they are its patches."""
    shape = graph[site.id].shape
    layout = site.layout or ("examples", "positions", "units")
    return shape[layout.index("positions")] if len(shape) == len(layout) and "positions" in layout else length


def _unlayered(structure: Structure, graph: Graph, length: int) -> Iterator[list[tuple[str, Site]]]:
    """What a model without attention and memories hands on: its stream and what is added to it, or the states of a stack."""
    stream = structure.streams[-1] if structure.streams else None
    if stream is None or not all(graph[name].shape[1:-1] == (length,) for name in stream.points):
        raise AnalyzerError(
            f"fmr.locate found no layers in {structure.model}, and no stream or stack of (examples, positions, units) with "
            f"{length} positions, so there is nothing to patch by default. Pass sites=[...]: IDs of run.graph, each with "
            "what is to be patched of it."
        )
    if not stream.writes:
        yield from ([(OUTPUT, Site(name))] for name in stream.points[:-1])
    for write in stream.writes:
        yield [("resid_pre", Site(write.before)), (OUTPUT, Site(write.added))]


def _written(layer: Layer) -> Iterator[tuple[str, Site]]:
    yield "resid_pre", layer.resid_pre
    if layer.attention is not None and layer.attention.out is not None:
        yield "attention", layer.attention.out
    if layer.mixer is not None:
        yield "mixer", layer.mixer.output
    if layer.mlp is not None:
        yield "mlp", layer.mlp.out
