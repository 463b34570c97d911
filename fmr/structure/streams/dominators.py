"""Through which values the data of a model must pass: the dominators of its dataflow.

A value dominates another if every path from the inputs to that one runs through it: what the later value knows of the
inputs, it knows from the earlier one alone. Such values form a tree (Lengauer and Tarjan 1979). In a graph without
cycles one pass makes it, as the place of a value in the tree is below the nearest value that dominates all its parents.
"""

from functools import cached_property

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.hidden import reads
from fmr.structure.normal.match import is_constant, looked_up
from fmr.structure.normal.walks import cached_per_graph


def _conditions(graph: Graph, name: TensorId, node: Node) -> bool:
    """Whether an operand shifts all positions alike, or scales them by one and something."""
    given = graph[name]
    scales = node.op == "mul" and given.op == "add" and len(given.parents) == 1
    return given.shape != node.shape and (node.op == "add" or scales)


class Flow:
    """The dominator tree of the values that carry data: floating point inputs, look-ups, and what is made of them.

    What is made of parameters, positions or masks alone carries none, so that no mask is a way past a layer. Without
    `conditions`, nor is what all positions are given alike: a class or a time that is added to each of them.
    """

    def __init__(self, graph: Graph, conditions: bool = True) -> None:
        self.higher: dict[TensorId, TensorId | None] = {}
        self._depth: dict[TensorId | None, int] = {None: 0}
        for node in graph.nodes:
            parents = [name for name in reads(graph, node) if name in self.higher and not is_constant(graph, node.id)]
            if not conditions:
                parents = [name for name in parents if not _conditions(graph, name, node)] or parents
            begins = node.op in ("input", "opaque") or looked_up(graph, node)
            if node.dtype.is_floating_point and (parents or (begins and not is_constant(graph, node.id))):
                nearest = self._meet(parents) if parents else None
                self.higher[node.id], self._depth[node.id] = nearest, self._depth[nearest] + 1

    def __contains__(self, name: TensorId) -> bool:
        """Whether a value carries data."""
        return name in self.higher

    def dominates(self, name: TensorId, other: TensorId) -> bool:
        """Whether all data of a value comes through another one, or is that one."""
        here: TensorId | None = other
        while here in self.higher and here != name:
            here = self.higher[here] if self._depth[here] > self._depth.get(name, 0) else None
        return here == name and name in self.higher

    def _meet(self, names: list[TensorId]) -> TensorId | None:
        """The nearest value that dominates all of these."""
        found: TensorId | None = names[0]
        for name in names[1:]:
            other: TensorId | None = name
            while found != other:
                if self._depth[found] < self._depth[other]:
                    found, other = other, found
                found = self.higher[found] if found is not None else None
        return found

    @cached_property
    def lower(self) -> dict[TensorId | None, list[TensorId]]:
        """The values of which each is the nearest dominator, in execution order."""
        found: dict[TensorId | None, list[TensorId]] = {}
        for name, nearest in self.higher.items():
            found.setdefault(nearest, []).append(name)
        return found


@cached_per_graph
def flow_of(graph: Graph) -> Flow:
    """The dominator tree of a graph's values, made once."""
    return Flow(graph)
