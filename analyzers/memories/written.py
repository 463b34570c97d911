"""The way of what memories make into the residual stream: as it is, or through the norm and the scale of a layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from analyzers.protocol import AnalyzerError
from fmr.graph.execute import execute
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.runs.run import Run
from fmr.structure.memories.memory import Memory
from fmr.structure.normal.match import between, depends_on, is_constant
from fmr.structure.normal.vocabulary import MOVES
from fmr.structure.parts import Structure, Write

_LEFT = MOVES | {"add", "sum"}
"""Ops after which what a memory makes is the same vector, beside what others add to it."""


@dataclass(frozen=True, eq=False)
class Passage:
    """The ops between what a layer's memories make, `start`, and what is added to the stream; none as a rule.

    weights: the constants that they read. changes: whether a number, or more, is multiplied with it on the way; numbers are
    taken as positive, as shares of experts and gates are.
    """

    graph: Graph = field(repr=False)
    start: TensorId
    nodes: tuple[Node, ...]
    weights: Mapping[TensorId, Tensor] = field(repr=False)
    changes: bool = False

    def through(self, vectors: Tensor) -> Tensor:
        """What is added to the stream where memories make these vectors, (rows, width), and nothing else is made."""
        if not self.nodes:
            return vectors
        lead = self.graph[self.start].shape[:-1]
        known = {self.start: vectors.reshape(len(vectors), *(1 for _ in lead[1:]), -1)}
        for node in self.nodes:
            if node.op in ("add", "sum", "mul") and (ours := next((p.id for p in node.parents if p.id in known), None)):
                others = [parent.id for parent in node.parents if parent.id not in known]
                if not all(name in self.weights for name in others):
                    known[node.id] = known[ours]
                    continue
            read = {p.id: known[p.id] if p.id in known else self.weights[p.id].detach() for p in node.parents}
            known[node.id] = execute(node, read).to(node.dtype)
        return known[self.nodes[-1].id].reshape(len(vectors), -1)


def write_of(structure: Structure, block: Memory) -> Write:
    """The write to a stream that what a layer's memories make is in.

    >>> write_of(structure, structure.mlps[2]).after
    """
    graph, start = block.graph, block.out.id
    writes = [write for stream in structure.streams for write in stream.writes]
    later = sorted(
        (one for one in writes if graph.place(one.after) > graph.place(start)), key=lambda one: graph.place(one.after)
    )
    found = next((one for one in later if one.added == start or depends_on(graph, one.added, start)), None)
    if found is None:
        raise AnalyzerError(
            f"What the memories at {block.scope!r} make is added to no residual stream of {structure.model}."
        )
    return found


def passage(structure: Structure, block: Memory, run: Run) -> Passage:
    """The way of what a layer's memories make into the stream, with the weights that a run holds.

    >>> passage(structure, structure.mlps[2], run).nodes
    ()
    """
    graph, start, write = block.graph, block.out.id, write_of(structure, block)
    way = [node for node in between(graph, start, write.added) if depends_on(graph, node.id, start)]
    inside = {start, *(node.id for node in way)}
    for node in (one for one in way if one.op not in _LEFT):
        fed = [p.id for p in node.parents if p.id not in inside and not is_constant(graph, p.id)]
        if any(node.op != "mul" or graph[name].shape[-1:] != (1,) for name in fed):
            raise AnalyzerError(
                f"What the memories at {block.scope!r} make meets {fed[0]} on its way into the stream, which is another "
                "vector for each token, so that values have no words of their own. Expected layers that add it as it is, or "
                "times one number: choose by scope."
            )
    scaled = [node for node in way if node.op not in _LEFT]
    if all(node.op == "mul" and _is_number(graph, node, inside) for node in scaled):
        return Passage(graph, start, (), {}, bool(scaled))
    constant = {parent.id for node in way for parent in node.parents if is_constant(graph, parent.id)}
    return Passage(graph, start, tuple(way), {name: run[name] for name in constant}, True)


def _is_number(graph: Graph, node: Node, inside: set[TensorId]) -> bool:
    """Whether a product is one with a number for each token, which leaves directions as they are."""
    others = [parent.id for parent in node.parents if parent.id not in inside]
    return all(graph[name].shape[-1:] == (1,) and not is_constant(graph, name) for name in others)
