"""Which node of one graph is which of another: two versions of a model, two attention kernels, with and without adapter."""

from __future__ import annotations

from dataclasses import dataclass, field

from fmr.errors import GraphError
from fmr.graph.joints import Unfused
from fmr.graph.matching import Matching
from fmr.ids import TensorId


@dataclass(frozen=True)
class Alignment:
    """The nodes that two graphs share, and those that only one has.

    `matched` maps IDs of the first graph to IDs of the second; `removed` are in the first alone, `inserted` in the second.
    `why` says of each value without a partner, those inside fused ops too, what stood against one.
    """

    matched: dict[TensorId, TensorId]
    inserted: tuple[TensorId, ...]
    removed: tuple[TensorId, ...]
    copies: dict[TensorId, TensorId] = field(default_factory=dict)
    why: dict[TensorId, str] = field(default_factory=dict, repr=False)

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


def align(first: Unfused, second: Unfused) -> Alignment:
    """Match the nodes of two graphs along the data, whatever modules are called and kernels hide.

    >>> eager.graph.align(fused.graph)
    Alignment: ...

    Values where data meets weights or other data, or is bent, are paired where they read the same weights, or ones of the
    same sizes in the only place that fits, and where what they read and what reads them is paired (`pairs`). Between two
    pairs the steps that only carry a value are matched by their ops, and what is computed in the same way of what is matched
    is the same. Of what is left, `why` says what stood against it. Names count, but for numbers in a list of modules that is
    longer in the other graph.
    """
    if not hasattr(second, "nodes"):
        hint = "its graph, other.graph" if hasattr(second, "graph") else "a graph, as run.graph"
        raise GraphError(f"A graph cannot be compared with {type(second).__name__}: expected {hint}.")
    return aligned(Matching(first, second), first, second)


def aligned(found: Matching, first: Unfused, second: Unfused) -> Alignment:
    """What was found of two graphs, as a value."""
    taken = set(found.matched.values())
    removed = [node.id for node in first.nodes if node.id not in found.matched]
    return Alignment(
        found.matched,
        tuple(node.id for node in second.nodes if node.id not in taken),
        tuple(removed),
        found.copies,
        {name: found.reason(name) for name in found.ours.nodes if name not in found.matched},
    )


def diff(first: Unfused, second: Unfused) -> GraphDiff:
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
