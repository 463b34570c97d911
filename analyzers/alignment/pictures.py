"""A causal model as a picture: inputs above, the output below, in each box what the variable may be."""

import html
from itertools import groupby
from typing import TYPE_CHECKING

from analyzers.protocol import AnalyzerError
from fmr.pictures.draw import EDGE, GREY, INK, LARGE, LOOKS, NODE, SHEET, SMALL

if TYPE_CHECKING:
    import graphviz

    from analyzers.alignment.causal_model import CausalModel

PALE_ON_DARK = "#D0D0D0"
"""The ink of what is small in a dark box."""


def sheet(model: "CausalModel") -> "graphviz.Digraph":
    """The variables as a drawing, children below their parents."""
    import graphviz

    drawn = graphviz.Digraph(graph_attr=SHEET, node_attr=NODE, edge_attr=EDGE)
    numbers = {name: f"n{number}" for number, name in enumerate(model.variables)}
    for kind, names in groupby(sorted(model.variables, key=lambda name: model.kind(name) != "input"), key=model.kind):
        with drawn.subgraph(graph_attr={"rank": "same"} if kind == "input" else {}) as row:
            for name in names:
                look = LOOKS["op" if kind == "inner" else kind]
                pale = GREY if look.ink == INK else PALE_ON_DARK
                words = f'<FONT POINT-SIZE="{LARGE}" COLOR="{look.ink}"><B>{html.escape(name)}</B></FONT>'
                words += f'<BR/><FONT POINT-SIZE="{SMALL}" COLOR="{pale}">{html.escape(model.variables[name].range)}</FONT>'
                box = {"shape": look.shape, "style": look.style, "fillcolor": look.fill, "color": look.line}
                row.node(numbers[name], f"<{words}>", **box)
    for name, one in model.variables.items():
        for parent in one.parents:
            drawn.edge(numbers[parent], numbers[name], tooltip=graphviz.escape(f"{parent} -> {name}"))
    return drawn


def drawn(model: "CausalModel") -> str | None:
    """The picture for a notebook; None where Graphviz is missing."""
    from analyzers.circuits.pictures import svg

    try:
        text = svg(sheet(model), "").decode()
    except AnalyzerError:
        return None
    return text[text.index("<svg") :]
