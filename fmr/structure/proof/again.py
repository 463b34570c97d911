"""A part of a graph computed over and over with some of its values changed: each time only what changes is computed."""

from collections import ChainMap
from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor

from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.nodes import Node
from fmr.structure.normal.match import between
from fmr.structure.proof.evaluate import Doubles, Values, is_choice, made_again


class Again:
    """What is made of some values of a run, in double precision, as they are and with some of them changed.

    As in `evaluate`, what does not depend on the `given` values is taken as it was recorded, and so are choices. What comes
    out with the same numbers as before changes nothing further down.
    """

    def __init__(self, graph: Graph, given: Iterable[TensorId], value: Values) -> None:
        self.graph, self.value = graph, value if isinstance(value, Doubles) else Doubles(value)
        self._made = {name: self.value.double(name) for name in given}
        self._given, self._first = frozenset(self._made), min(self._made, key=graph.place)
        self._ways: dict[TensorId, list[Node]] = {}

    def plain(self, name: TensorId) -> Tensor:
        """A value where nothing is changed."""
        for node in self._way(name):
            if node.id not in self._made and _reads(node, self._made):
                self._made[node.id] = self._run(node, {})
        return self._made[name] if name in self._made else self.value.double(name)

    def changed(self, target: TensorId, given: Mapping[TensorId, Tensor], held: Container[TensorId] = ()) -> Tensor:
        """A value where others are given anew and some are held as they are."""
        plain, new = self.plain(target), dict(given)
        for node in self._way(target):
            if node.id not in new and node.id not in held and _reads(node, new):
                made = self._run(node, new)
                if node.id not in self._made or not torch.equal(made, self._made[node.id]):
                    new[node.id] = made
        return new.get(target, plain)

    def _way(self, target: TensorId) -> list[Node]:
        """What may change on the way to a value."""
        if target not in self._ways:
            nodes = between(self.graph, self._first, target, lambda node: node.id not in self._given)
            self._ways[target] = [node for node in nodes if node.id not in self._given and not is_choice(self.graph, node)]
        return self._ways[target]

    def _run(self, node: Node, new: dict[TensorId, Tensor]) -> Tensor:
        """The op of a node on what is changed and, for the rest, on what is not."""
        known = ChainMap(new, self._made)
        read = {one.id: known[one.id] if one.id in known else self.value.double(one.id) for one in node.parents}
        return made_again(self.graph, node, read)


def _reads(node: Node, known: Container[TensorId]) -> bool:
    return any(parent.id in known for parent in node.parents)
