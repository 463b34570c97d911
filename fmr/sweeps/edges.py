"""What one reader sees of one writer: the way between them along sums, views and products with parameters."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fmr.edits.editor import Editor
from fmr.errors import ReplayError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId
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

    >>> fmr.replay(run, edits={fmr.Edge(structure.mlps[0].out, "transformer.h.3.ln_1/layer_norm#0"): edits.Zero()})

    writer, reader: an ID, a node or a site each. What the reader's op reads of the writer comes along sums, views and
    products with parameters; all else that lies between keeps its value. A `ReplayError` says where there is no such way.
    """

    writer: Site
    reader: Site

    def __init__(self, writer: Key, reader: Key) -> None:
        object.__setattr__(self, "writer", writer if isinstance(writer, Site) else Site(id_of(writer)))
        object.__setattr__(self, "reader", reader if isinstance(reader, Site) else Site(id_of(reader)))


def carried(edge: Edge, editor: Editor, reader: Step, steps: Sequence[Step], read: Read, graph: Graph) -> Read:
    """How a step reads when it sees the writer of an edge edited."""
    writer = graph[edge.writer.id].id
    way = _way(writer, reader, steps)
    if not any(name in way for name in reader.reads):
        raise ReplayError(f"{reader.first.id} does not read {writer} along sums, views and products with parameters alone.")
    seen: dict[TensorId, Tensor] = {writer: editor.apply(writer, read(writer))}

    def find(name: TensorId) -> Tensor:
        return seen[name] if name in seen else read(name)

    for step in steps:
        if step is reader:
            break
        if any(node.id in way and node.id != writer for node in step.nodes):
            seen.update(run_step(step, find, graph.__getitem__))
    return find


def _way(writer: TensorId, reader: Step, steps: Sequence[Step]) -> set[TensorId]:
    """The writer and what carries it, up to the reader."""
    reached = {writer}
    for step in steps:
        if step is reader:
            break
        on = [name for name in step.reads if name in reached]
        if on and step.first.op in _CARRYING and _is_linear(step, reached):
            reached.update(node.id for node in step.nodes)
    return reached


def _is_linear(step: Step, reached: set[TensorId]) -> bool:
    """Whether a product is one of what is followed with a parameter."""
    if step.first.op not in ("linear", "addmm", "mm", "matmul", "bmm", "baddbmm"):
        return True
    return all(name in reached or name.is_source for name in step.reads)
