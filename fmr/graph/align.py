"""Which node of one graph is which of another: two versions of a model, two attention kernels, with and without adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from fmr.errors import GraphError
from fmr.ids import TensorId
from fmr.nodes import Node, Nodes

_TABLE = 1_000_000
"""The largest table of a longest common subsequence, in cells."""


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


@dataclass(frozen=True)
class GraphDiff:
    """How a second graph differs from a first: IDs only it has, IDs only the first has, and what computes otherwise.

    `changed` are IDs of the first graph whose partner reads something else; `renamed` maps those that have a new ID.
    """

    added: tuple[TensorId, ...]
    removed: tuple[TensorId, ...]
    changed: tuple[TensorId, ...]
    renamed: dict[TensorId, TensorId]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.renamed)

    def __repr__(self) -> str:
        counts = f"{len(self.added)} added, {len(self.removed)} removed, {len(self.changed)} changed"
        rows = [counts + (f", {len(self.renamed)} renamed" if self.renamed else "")]
        for mark, names in (("+", self.added), ("-", self.removed), ("~", self.changed)):
            rows += [f"  {mark} {name}" for name in names[:8]]
            rows += [f"  {mark} ... {len(names) - 8} more"] if len(names) > 8 else []
        return "\n".join(rows)


def align(first: Nodes, second: Nodes) -> Alignment:
    """Match the nodes of two graphs: first module call by module call, then along the data.

    >>> eager.graph.align(fused.graph)
    Alignment: 237 matched (12 renamed), 14 inserted, 52 removed, score 0.878

    Inside a module call that both graphs have, the sequences of ops are compared (longest common subsequences over the
    op, the arguments it reads tensors from and the names of its parameters). What is left is matched where the op is
    the same and what it reads is matched, so that a module which was wrapped or renamed is recognised.
    """
    if not hasattr(second, "nodes"):
        hint = "its graph, other.graph" if hasattr(second, "graph") else "a graph, as run.graph"
        raise GraphError(f"A graph cannot be compared with {type(second).__name__}: expected {hint}.")
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


def diff(first: Nodes, second: Nodes) -> GraphDiff:
    """What another graph has more, has less, calls otherwise and computes otherwise, its nodes aligned with these.

    >>> base.graph.diff(adapted.graph)
    5 added, 0 removed, 1 changed, 5 renamed
      + param:transformer.h.0.attn.c_proj.down.weight
      ...
    """
    found = align(first, second)
    changed = []
    for ours, theirs in found.matched.items():
        a, b = first[ours], second[theirs]
        before = [(found.matched.get(parent.id), parent.at) for parent in a.parents]
        if a.op != b.op or before != [(parent.id, parent.at) for parent in b.parents]:
            changed.append(ours)
    return GraphDiff(found.inserted, found.removed, tuple(changed), found.renamed)


def _by_scope(graph: Nodes) -> dict[str, list[Node]]:
    scopes: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        scopes["source:" if node.id.is_source else node.scope].append(node)
    return scopes


def _common(a: list[Node], b: list[Node]) -> Iterator[tuple[TensorId, TensorId]]:
    """The pairs of nodes in two sequences that correspond."""
    ours, theirs = [_signature(node) for node in a], [_signature(node) for node in b]
    low, high = 0, 0
    while low < min(len(a), len(b)) and ours[low] == theirs[low]:
        low += 1
    while high < min(len(a), len(b)) - low and ours[-1 - high] == theirs[-1 - high]:
        high += 1
    inner = subsequence(ours[low : len(a) - high], theirs[low : len(b) - high])
    ends = [(n, n) for n in range(low)] + [(len(a) - n, len(b) - n) for n in range(high, 0, -1)]
    for x, y in [*ends, *((low + x, low + y) for x, y in inner)]:
        yield a[x].id, b[y].id


def subsequence(a: list[Hashable], b: list[Hashable]) -> list[tuple[int, int]]:
    """The positions of a longest common subsequence; of very long ones, that of their longest common runs."""
    if len(a) * len(b) > _TABLE:
        blocks = SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
        return [(block.a + n, block.b + n) for block in blocks for n in range(block.size)]
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for x in range(len(a) - 1, -1, -1):
        row, below = table[x], table[x + 1]
        for y in range(len(b) - 1, -1, -1):
            row[y] = below[y + 1] + 1 if a[x] == b[y] else max(below[y], row[y + 1])
    found, x, y = [], 0, 0
    while x < len(a) and y < len(b):
        if a[x] == b[y]:
            found.append((x, y))
            x, y = x + 1, y + 1
        elif table[x + 1][y] >= table[x][y + 1]:
            x += 1
        else:
            y += 1
    return found


def _signature(node: Node) -> Hashable:
    """What a node does, told without the IDs of what it reads: parameters by name, other parents by position and kind."""
    if node.id.is_source:
        return str(node.id)
    reads = tuple((p.at, str(p) if p.startswith(("param:", "buffer:")) else "") for p in node.parents)
    return node.op, node.id.parts.output, reads


def _along_the_data(
    first: Nodes, second: Nodes, matched: dict[TensorId, TensorId], taken: set[TensorId]
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
