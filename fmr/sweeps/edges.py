"""What one reader sees of one writer: the way between them along sums, views and products with parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fmr.edits.editor import Editor
from fmr.errors import ReplayError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId, within
from fmr.nodes import Key, id_of
from fmr.sweeps.steps import Read, Step, run_step

_CARRYING = frozenset(
    """add sub neg to clone contiguous dropout view reshape transpose permute expand flatten unflatten squeeze unsqueeze
    getitem select narrow chunk split split_with_sizes unbind movedim T mT t linear addmm mm matmul baddbmm bmm cat stack
    repeat type_as float half bfloat16 alias result""".split()
)
"""Ops whose result is linear in what is followed, the other operand being a parameter or another term of a sum."""


@dataclass(frozen=True, init=False)
class Edge:
    """What one reader sees of one writer: an edit there changes the writer's value for that reader alone.

    >>> fmr.replay(run, edits={fmr.Edge(structure.mlps[0].out, "transformer.h.3.ln_1"): edits.Zero()})

    writer: an ID, a node or a site. reader: the same of an op, or the path of a module call, for all that its ops read of
    what was made outside it: "transformer.ln_f" for the final norm, however it is spelled. What is read of the writer comes
    along sums, views and products with parameters; all else that lies between keeps its value. A `ReplayError` says where
    there is no such way.
    """

    writer: Site
    reader: Site
    no_key: ClassVar[str] = (
        "An Edge is no place in the model's own forward, which makes one value for all of its readers. Expected it in "
        "fmr.replay(run, {edge: edit}); its .writer as a site is the value for everybody."
    )

    def __init__(self, writer: Key, reader: Key) -> None:
        object.__setattr__(self, "writer", writer if isinstance(writer, Site) else Site(id_of(writer)))
        object.__setattr__(self, "reader", reader if isinstance(reader, Site) else Site(id_of(reader)))


class Carrying:
    """An edge in a replay: the way from its writer to what the reader reads, and the values on it with the writer edited."""

    def __init__(self, edge: Edge, editor: Editor, steps: Sequence[Step], graph: Graph) -> None:
        self.edge, self.editor, self.graph = edge, editor, graph
        self.writer, reader = graph[edge.writer.id].id, edge.reader.id
        path = graph.module(reader).scope.path if reader.is_path else None
        inside = [step for step in steps if _belongs(step, reader if path is None else path, path is not None)]
        ends = max((steps.index(step) for step in inside[-1:]), default=0)
        self.carriers, self.way = _way(self.writer, [step for step in steps[:ends] if step not in inside])
        self.readers = {step.first.id for step in inside if any(name in self.way for name in step.reads)}
        self._seen: dict[TensorId, Tensor] = {}
        if not self.readers:
            raise ReplayError(f"{reader} does not read {self.writer}: {self._why(inside, steps)}")

    def _why(self, inside: Sequence[Step], steps: Sequence[Step]) -> str:
        """Why the reader does not see the writer, and who does."""
        if not inside:
            return "no op runs there. Expected a module call with ops, or an op that is not the inside of a fused one."
        made = next(place for place, step in enumerate(steps) if any(node.id == self.writer for node in step.nodes))
        if steps.index(inside[-1]) <= made:
            return "it runs before. Expected a reader that runs after the writer."
        needed = {name for step in inside for name in step.reads}
        between: list[Step] = []
        for step in reversed(steps[made + 1 : steps.index(inside[-1])]):
            if step not in inside and any(node.id in needed for node in step.nodes):
                needed.update(step.reads)
                if step not in self.carriers and any(name in self.way for name in step.reads):
                    between.append(step)
        if not between:
            return "nothing leads from there to it. Expected a reader further down."
        first, path = between[0].first, self.edge.reader.id
        inner = first.module and not within(self.graph[self.writer].module, first.module)
        name = first.module if inner and not (path.is_path and within(path, first.module)) else str(first.id)
        return (
            f"what lies between is no sum, view or product with parameters alone, {first.id} the last. Expected what "
            f"reads it first: {name!r}. What a head tells the queries, keys or values of another is "
            f"analyzers.PathPatching with receivers=[...]."
        )

    def read(self, reader: Step, read: Read) -> Read:
        """How a step of the reader reads when it sees the writer edited."""
        if not self._seen:
            self._seen[self.writer] = self.editor.apply(self.edge.writer.id, read(self.writer))

        def find(name: TensorId) -> Tensor:
            return self._seen[name] if name in self._seen else read(name)

        needed = {name for name in reader.reads if name in self.way}
        for step in reversed(self.carriers):
            if any(node.id in needed for node in step.nodes):
                needed.update(name for name in step.reads if name in self.way)
        for step in self.carriers:
            if any(node.id in needed and node.id not in self._seen for node in step.nodes):
                self._seen.update(run_step(step, find, self.graph.__getitem__))
        return find


def _belongs(step: Step, reader: str, is_path: bool) -> bool:
    """Whether a step is the reader, or one of the ops of the module call that is."""
    if is_path:
        return not step.is_source and within(step.first.module, reader)
    return any(node.id == reader for node in step.nodes)


def _way(writer: TensorId, steps: Sequence[Step]) -> tuple[list[Step], set[TensorId]]:
    """What carries a writer, in order, and all values on the way, the writer among them."""
    reached, carriers = {writer}, []
    for step in steps:
        on = [name for name in step.reads if name in reached]
        if on and step.first.op in _CARRYING and _is_linear(step, reached):
            reached.update(node.id for node in step.nodes)
            carriers.append(step)
    return carriers, reached


def _is_linear(step: Step, reached: set[TensorId]) -> bool:
    """Whether a product is one of what is followed, which it reads once, with parameters."""
    if step.first.op not in ("linear", "addmm", "mm", "matmul", "bmm", "baddbmm"):
        return True
    on = [parent for parent in step.first.parents if parent.id in reached]
    return len(on) == 1 and all(name in reached or name.is_source for name in step.reads)
