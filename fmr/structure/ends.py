"""The two ends of a model: what turns tokens into vectors, and what turns vectors into logits."""

from collections.abc import Iterable

from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
from fmr.nests import ids_in
from fmr.nodes import Node
from fmr.structure.normal.form import form_of
from fmr.structure.normal.match import above, between, depends_on, is_constant, looked_up, projection, weights
from fmr.structure.normal.value import Value
from fmr.structure.normal.vocabulary import MOVES, NORMS
from fmr.structure.streams.identity import POOLS
from fmr.structure.streams.stream import Stream

_OF_TABLES = (MOVES - {"cat"}) | NORMS | {"linear", "matmul", "add", "mul"}
"""What rows of a table become before a stream begins."""

_SCALED = frozenset("move join norm affine bend".split())
"""What may lie between the end of a stream and its projection to logits."""

_BENT = _SCALED | frozenset("gate sum".split())
"""The same between a projection and another one."""


def _embedding(graph: Graph, stream: Stream | None, sums: frozenset[TensorId]) -> Site | None:
    """The look-up of the input tokens that a stream begins with: the first, where their places are looked up and added.

    One above the sums of another stream is meant only where there is no other, one above a projection only where nothing
    else is projected there: a table with fewer units than the stream.
    """

    def given(nodes: Iterable[Node]) -> list[Node]:
        return [node for node in nodes if (rows := looked_up(graph, node)) and _is_given(graph, rows[1])]

    def higher(stops: frozenset[TensorId], start: TensorId) -> list[Node]:
        ends = above(graph, start, lambda node: not (looked_up(graph, node) or node.id in stops or projection(graph, node)))
        return given(ends)

    def narrow(start: TensorId) -> list[Node]:
        made = list(above(graph, start, lambda node: node.op in _OF_TABLES and node.id not in sums))
        others = (node for node in made if not looked_up(graph, node) and not is_constant(graph, node.id))
        only = all(node.op in _OF_TABLES and node.id not in sums for node in others)
        return given(made) if only else []

    start = stream.points[0] if stream is not None else None
    found = (higher(sums, start) or higher(frozenset(), start) or narrow(start)) if start is not None else []
    return Site(min(found, key=lambda one: (one.op != "embedding", graph.place(one.id))).id) if found else None


def _is_given(graph: Graph, index: TensorId) -> bool:
    """Whether what is looked up is an input of the model, in a table of its own or behind others."""
    return any(node.op == "input" for node in above(graph, index, MOVES | {"add"}))


def _unembedding(graph: Graph, stream: Stream | None, embedding: Site | None) -> Site | None:
    """The projection of a stream's end to logits: by the table of the embedding, to as many as it has rows, or to more
    than the stream has units."""
    if stream is None:
        return None
    form, end = form_of(graph), stream.final_norm or stream.writes[-1].after
    width, rows_of = graph[end].shape[-1], looked_up(graph, graph[embedding.id]) if embedding is not None else None
    table = rows_of[0] if rows_of is not None else None
    rows = graph[table].shape[0] if table is not None else None

    def pools(one: Value) -> bool:
        return (one.kind == "statistic" or one.node.op in POOLS) and one.node.shape[-1:] == (width,)

    for made in form[end].below(lambda one: one.kind in _SCALED or pools(one)):
        if made.kind == "projection":
            tied = table is not None and table in weights(graph, made.operands[1])
            if any(one.kind == "projection" for one in made.below(lambda one: one.kind in _BENT) if one is not made):
                return None  # what is projected again are no logits
            if tied or made.node.shape[-1] > width or made.node.shape[-1] == rows != width:
                return Site(made.id)
    return None


def class_head(graph: Graph, stream: Stream | None) -> Node | str | None:
    """The logits of classes that a model returns: what a projection makes of the end of its stream, of positions or of
    examples, to another number than the stream has units; or why one result cannot be told from others."""
    if stream is None or len(graph[end := stream.writes[-1].after].shape) not in (2, 3) or not graph.scopes:
        return None
    found = []
    for node in (graph[name] for name in dict.fromkeys(ids_in(graph.scopes[0].output)) if name in graph):
        if not node.dtype.is_floating_point or not depends_on(graph, node.id, end):
            continue
        projected = [one for one in between(graph, end, node.id) if projection(graph, one) is not None]
        if projected and projected[-1].shape[-1:] == node.shape[-1:] != graph[end].shape[-1:]:
            found.append(node)
    several = f"its end is projected to {len(found)} results of the model, which are not told apart"
    return several if len(found) > 1 else found[0] if found else None
