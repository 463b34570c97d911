"""A circuit as a picture: nodes by layer, edges as thick as they are strong; and what circuits of each size carry."""

import os
from itertools import groupby
from typing import TYPE_CHECKING, cast

import numpy as np

from analyzers.protocol import AnalyzerError
from fmr.disk.files import named, write_whole
from fmr.errors import number_of
from fmr.pictures.draw import BLUE, EDGE, GREY, INK, NODE, RED, SHEET

if TYPE_CHECKING:
    import graphviz
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analyzers.circuits.circuit import Circuit

FILLS = {"embedding": "#3D3D3D", "logits": "#3D3D3D", "head": "#DCEAF6", "mlp": "#FFF3D6"}
"""The fill of a node by the first word of its name."""

ROLES = {"q": "#0072B2", "k": "#C25400", "v": "#2B8A5E", "": "#5A5A5A"}
"""The colours of edges into queries, keys and values of heads, and elsewhere; told apart with any colour vision."""


def write_svg(drawing: "graphviz.Digraph", path: str | os.PathLike[str], besides: str) -> None:
    """Write a drawing as SVG. besides: what else there is where the path or the machine does not allow it, for the error."""
    name = named(path)
    if name.suffix.lower() != ".svg" and name.suffix[1:].isalpha():
        right = str(name.with_suffix(".svg"))
        raise AnalyzerError(f"{str(name)!r} ends in {name.suffix!r}, but SVG is written: expected {right!r}. {besides}")
    write_whole(path, svg(drawing, besides))


def svg(drawing: "graphviz.Digraph", besides: str) -> bytes:
    """A drawing as the bytes of an SVG file."""
    import graphviz

    try:
        return bytes(drawing.pipe(format="svg", quiet=True))
    except graphviz.ExecutableNotFound:
        raise AnalyzerError(
            "An SVG picture needs Graphviz's program 'dot', and there is none on the PATH. Get it with `apt-get install "
            f"graphviz` or `brew install graphviz`. {besides}"
        ) from None


def sheet(circuit: "Circuit", most: int) -> "graphviz.Digraph":
    """The strongest edges of a circuit as a drawing, layer under layer."""
    import graphviz

    graph = circuit.graph(most)
    drawn = graphviz.Digraph(graph_attr=SHEET, node_attr=NODE, edge_attr=EDGE)
    drawn.attr(label=_title(circuit, len({(w, r) for w, r, *_ in circuit.edges[:most]}), most))
    names = [name for name in (*circuit.writers, circuit.readers[-1]) if name in graph]
    for _, level in groupby(names, key=_level):
        with drawn.subgraph() as row:
            row.attr(rank="same")
            for name in level:
                kind = name.partition(" ")[0]
                ink = "#FFFFFF" if kind in ("embedding", "logits") else INK
                row.node(name, shape="box", style="rounded,filled", fillcolor=FILLS.get(kind, "#FFFFFF"), fontcolor=ink)
    largest = max((abs(score) for *_, score in graph.edges(data="score")), default=1.0) or 1.0
    for writer, reader, role, score in sorted(graph.edges(keys=True, data="score")):
        wide = 0.5 + 4.5 * (abs(score) / largest) ** 0.5
        drawn.edge(
            writer,
            reader,
            color=ROLES[role],
            penwidth=f"{wide:.2f}",
            style="solid" if score >= 0 else "dashed",
            tooltip=f"{writer} -> {reader} {role}: {score:.3f}",
        )
    return drawn


def _title(circuit: "Circuit", drawn: int, most: int) -> str:
    many = int(circuit.kept.sum())
    of = f"the {most} strongest of {number_of(many, 'edge')}" if many > most else number_of(many, "edge")
    return (
        f"{circuit.model}: {of}, faithfulness {circuit.faithfulness():.2f}   "
        "into queries blue, keys orange, values green; dashed: against the answer"
    )


def _level(name: str) -> str:
    """What stands side by side: the heads of a layer; everything else alone."""
    kind, _, place = name.partition(" ")
    return f"head {place.partition('.')[0]}" if kind == "head" else name


def draw(circuit: "Circuit", ax: "Axes | None" = None) -> "Figure":
    """The curve of a circuit over the number of edges."""
    import matplotlib.pyplot as plt

    table = circuit.curve()
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")[1]
    edges = np.maximum(table["edges"], 1)
    ax.axhline(0, color=GREY, linewidth=0.6)
    ax.axhline(1, color=GREY, linewidth=0.6)
    ax.plot(edges, table["faithfulness"], "o-", color=BLUE, label="the circuit alone")
    ax.fill_between(edges, table["low"], table["high"], color=BLUE, alpha=0.15, linewidth=0)
    ax.plot(edges, table["without"], "s-", color=RED, label="all but the circuit")
    if not table["random"].isna().all():
        ax.plot(edges, table["random"], "^--", color=GREY, label="random circuits")
    ax.axvline(circuit.kept.sum(), color=INK, linewidth=0.8, linestyle=":")
    ax.set_xscale("log")
    ax.set_xticks(edges, [str(n) for n in edges], fontsize=8)
    ax.minorticks_off()
    ax.set(xlabel=f"edges (of {len(circuit.ends)})", ylabel="share of the answer")
    ax.set_title(f"{circuit.model}, {circuit.method}, {number_of(len(circuit.clean), 'pair')}", fontsize=10)
    ax.legend(fontsize=8, frameon=False)
    return cast("Figure", ax.figure)
