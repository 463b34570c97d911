"""The strongest check of a recording: every op runs again on what it read, and must make the same bits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmr.errors import IdError, StructureError
from fmr.graph.execute import draws, execute, overwritten
from fmr.graph.graph import Graph
from fmr.ids import ALIAS, OPAQUE, TensorId
from fmr.nodes import Node
from fmr.ops.names import FILLS_NOTHING
from fmr.watching.calls import unwatched

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Verdict:
    """What came of running every op of a pass again.

    `same` counts values with equal bits, `differ` names those that came out otherwise, `refused` says of the others why
    they could not be made again.
    """

    same: int
    differ: tuple[TensorId, ...]
    refused: "Mapping[TensorId, str]"

    def __bool__(self) -> bool:
        return not self.differ

    def __repr__(self) -> str:
        lines = [f"Verdict: {self.same} values made again with the same bits, {len(self.differ)} differ"]
        lines += [f"  differs  {name}" for name in self.differ[:8]]
        reasons: dict[str, list[TensorId]] = {}
        for name, why in self.refused.items():
            reasons.setdefault(why.replace(str(name), "it"), []).append(name)
        lines += [f"  {len(names)} not made again, {names[0]} first: {why}" for why, names in reasons.items()]
        return "\n".join(lines)


def verify(graph: Graph, read: Callable[[TensorId], Tensor]) -> Verdict:
    """Run every op of a graph again on the values that it read."""
    same, differ, refused = 0, [], {}
    with unwatched(), torch.no_grad():
        for node in _made(graph):
            if draws(node):
                refused[node.id] = f"{node.id} drew random numbers"
                continue
            try:
                tensors = {parent.id: read(parent.id) for parent in node.parents}
                again = overwritten(graph.__getitem__, node, tensors) if node.op == ALIAS else execute(node, tensors)
                alike = _alike(again, read(node.id))
            except (IdError, StructureError, RuntimeError) as error:
                refused[node.id] = str(error).partition("\n")[0]
                continue
            same += alike
            differ += [] if alike else [node.id]
    return Verdict(same, tuple(differ), refused)


def _made(graph: Graph) -> Iterator[Node]:
    """The nodes that an op made which can be called again."""
    return (node for node in graph.nodes if not node.id.is_source and node.op not in (OPAQUE, *FILLS_NOTHING))


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout != torch.strided or a.is_nested:
        return a.layout == b.layout
    return bool(torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num()))
