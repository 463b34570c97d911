"""The strongest check of a recording: every op runs again on what it read, and must make the same bits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmr.errors import IdError, StructureError, number_of
from fmr.graph.execute import draws, execute, overwritten
from fmr.graph.graph import Graph
from fmr.graph.state import Casts, casting, kernels
from fmr.ids import ALIAS, OPAQUE, TensorId
from fmr.nodes import Node
from fmr.ops.names import FILLS_NOTHING
from fmr.watching.calls import unwatched
from fmr.watching.storage import is_equal

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
        lines = [f"Verdict: {number_of(self.same, 'value')} made again with the same bits, {len(self.differ)} differ"]
        lines += [f"  differs  {name}" for name in self.differ[:8]]
        reasons: dict[str, list[TensorId]] = {}
        for name, why in self.refused.items():
            reasons.setdefault(why.replace(str(name), "it"), []).append(name)
        lines += [f"  {len(names)} not made again, {names[0]} first: {why}" for why, names in reasons.items()]
        return "\n".join(lines)


def verify(graph: Graph, read: Callable[[TensorId], Tensor], casts: Casts = ()) -> Verdict:
    """Run every op of a graph again on the values that it read, under the autocast of its pass."""
    same, differ, refused = 0, [], {}
    with unwatched(), torch.no_grad():
        for node in _made(graph):
            if draws(node):
                refused[node.id] = f"{node.id} drew random numbers"
                continue
            try:
                alike = _same_bits(
                    graph, node, {parent.id: read(parent.id) for parent in node.parents}, read(node.id), casts
                )
            except (IdError, StructureError, RuntimeError) as error:
                refused[node.id] = str(error).partition("\n")[0]
                continue
            same += alike
            differ += [] if alike else [node.id]
    return Verdict(same, tuple(differ), refused)


def _same_bits(graph: Graph, node: Node, tensors: "Mapping[TensorId, Tensor]", was: Tensor, casts: Casts) -> bool:
    """Whether an op makes the same bits in one of the states of torch that its type and its kernel leave open."""
    state = torch.get_rng_state()
    for kernel, on in product(kernels(node.op), dict.fromkeys((casts, ()))):
        with kernel, casting(on):
            again = overwritten(graph.__getitem__, node, tensors) if node.op == ALIAS else execute(node, tensors)
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
            raise StructureError(f"{node.id} drew random numbers")
        if _alike(again, was):
            return True
    return False


def _made(graph: Graph) -> Iterator[Node]:
    """The nodes that an op made which can be called again."""
    return (node for node in graph.nodes if not node.id.is_source and node.op not in (OPAQUE, *FILLS_NOTHING))


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout != torch.strided or a.is_nested:
        return a.layout == b.layout
    return is_equal(a, b)
