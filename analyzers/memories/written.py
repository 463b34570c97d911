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
from fmr.structure.normal.match import MOVES, between, depends_on, is_constant
from fmr.structure.parts import Structure, Write

_LEFT = MOVES | {"add"}
"""Ops after which what a memory makes is the same vector, beside what others add to it."""


@dataclass(frozen=True, eq=False)
class Passage:
    """The ops between what a layer's memories make, `start`, and what is added to the stream; none as a rule.

    weights: the constants that they read.
    """

    graph: Graph = field(repr=False)
    start: TensorId
    nodes: tuple[Node, ...]
    weights: Mapping[TensorId, Tensor] = field(repr=False)

    def through(self, vectors: Tensor) -> Tensor:
        """What is added to the stream where memories make these vectors, (rows, width), and nothing else is made."""
        if not self.nodes:
            return vectors
        lead = self.graph[self.start].shape[:-1]
        known = {self.start: vectors.reshape(len(vectors), *(1 for _ in lead[1:]), -1)}
        for node in self.nodes:
            if node.op == "add" and (ours := next((p.id for p in node.parents if p.id in known), None)):
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
    beside = {parent.id for node in way if node.op not in _LEFT for parent in node.parents}
    beside -= {start, *(node.id for node in way)}
    fed = next((name for name in sorted(beside) if not is_constant(graph, name)), None)
    if fed is not None:
        raise AnalyzerError(
            f"What the memories at {block.scope!r} make meets {fed} on its way into the stream, which is another number for "
            "each token, so that values have no words of their own. Expected layers that add it as it is: choose by scope."
        )
    if all(node.op in _LEFT for node in way):
        return Passage(graph, start, (), {})
    constant = {parent.id for node in way for parent in node.parents if is_constant(graph, parent.id)}
    return Passage(graph, start, tuple(way), {name: run[name] for name in constant})
