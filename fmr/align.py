"""Which node of one graph is which of another: two versions of a model, two attention kernels, with and without adapter."""

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from fmr.ids import TensorId
from fmr.nodes import Node

if TYPE_CHECKING:
    from fmr.graph import Graph


@dataclass(frozen=True)
class Alignment:
    """The nodes that two graphs share, and those that only one has.

    `matched` maps IDs of the first graph to IDs of the second; `removed` are in the first alone, `inserted` in the second.
    """

    matched: dict[TensorId, TensorId]
    inserted: tuple[TensorId, ...]
    removed: tuple[TensorId, ...]

    @property
    def score(self) -> float:
        """The share of nodes that are matched: 1 where the graphs are the same."""
        total = 2 * len(self.matched) + len(self.inserted) + len(self.removed)
        return 2 * len(self.matched) / total if total else 1.0

    @property
    def renamed(self) -> dict[TensorId, TensorId]:
        """The matched nodes that have another ID in the second graph."""
        return {a: b for a, b in self.matched.items() if a != b}

    def __repr__(self) -> str:
        counts = f"{len(self.matched)} matched ({len(self.renamed)} renamed)"
        return f"Alignment: {counts}, {len(self.inserted)} inserted, {len(self.removed)} removed, score {self.score:.3f}"


def align(first: "Graph", second: "Graph") -> Alignment:
    """Match the nodes of two graphs: first module call by module call, then along the data.

    Inside a module call that both graphs have, the sequences of ops are compared (longest common subsequences over the
    op, the arguments it reads tensors from and the names of its parameters). What is left is matched where the op is
    the same and what it reads is matched, so that a module which was wrapped or renamed is recognised.
    """
    matched: dict[TensorId, TensorId] = {}
    ours, theirs = _by_scope(first), _by_scope(second)
    for scope, nodes in ours.items():
        matched.update(_common(nodes, theirs.get(scope, [])))
    taken = set(matched.values())
    matched.update(_along_the_data(first, second, matched, taken))
    return Alignment(
        matched,
        tuple(node.id for node in second.nodes if node.id not in taken),
        tuple(node.id for node in first.nodes if node.id not in matched),
    )


def _by_scope(graph: "Graph") -> dict[str, list[Node]]:
    scopes: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        scopes["source:" if node.id.is_source else node.scope].append(node)
    return scopes


def _common(a: list[Node], b: list[Node]) -> Iterator[tuple[TensorId, TensorId]]:
    """The pairs of nodes in two sequences that correspond."""
    matcher = SequenceMatcher(None, [_signature(node) for node in a], [_signature(node) for node in b], autojunk=False)
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            yield a[block.a + offset].id, b[block.b + offset].id


def _signature(node: Node) -> Hashable:
    """What a node does, told without the IDs of what it reads: parameters by name, other parents by position and kind."""
    if node.id.is_source:
        return str(node.id)
    reads = tuple((p.at, str(p) if p.startswith(("param:", "buffer:")) else "") for p in node.parents)
    return node.op, node.id.parts.output, reads


def _along_the_data(
    first: "Graph", second: "Graph", matched: dict[TensorId, TensorId], taken: set[TensorId]
) -> dict[TensorId, TensorId]:
    """Match what is left where the op is the same and the activations that it reads are matched."""
    more: dict[TensorId, TensorId] = {}
    waiting: dict[Hashable, list[Node]] = defaultdict(list)
    for node in first.nodes:
        if node.id not in matched and not node.id.is_source:
            waiting[_reads(node, {})].append(node)
    back = {b: a for a, b in matched.items()}
    for node in second.nodes:
        if node.id in taken or node.id.is_source:
            continue
        found = waiting.get(_reads(node, back))
        if found:
            partner = found.pop(0)
            for a, b in [(partner.id, node.id), *_weights_of(partner, node)]:
                if a not in matched and a not in more and b not in taken:
                    more[a], back[b] = b, a
                    taken.add(b)
    return more


def _reads(node: Node, names: dict[TensorId, TensorId]) -> Hashable:
    """The op and the activations that a node reads, under their names in the first graph."""
    data = tuple((p.at, names.get(p.id, p.id)) for p in node.parents if not p.startswith(("param:", "buffer:")))
    return node.op, node.id.parts.output, data


def _weights_of(a: Node, b: Node) -> Iterator[tuple[TensorId, TensorId]]:
    """The parameters that two matched nodes read at the same position."""
    others = {p.at: p.id for p in b.parents if p.startswith(("param:", "buffer:"))}
    for parent in a.parents:
        if parent.at in others and parent.startswith(("param:", "buffer:")):
            yield parent.id, others[parent.at]
