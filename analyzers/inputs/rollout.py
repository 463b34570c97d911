"""Attention rollout: how much of each input token reaches the position that is read, through all attentions in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import fmr
from analyzers.inputs.question import Question
from analyzers.protocol import AnalyzerError
from fmr.graph.graph import Graph
from fmr.nodes import Node
from fmr.runs.run import Run
from fmr.structure.parts import Structure

EXTRA = 8
"""How many tokens beside those of patches a vision transformer may have, at most."""


def rollout(maps: Sequence[Tensor]) -> Tensor:
    """How much of each token reaches each position: the product over layers of half the mean pattern and half the stream.

    >>> rollout([torch.eye(3)[None, None], torch.eye(3)[None, None]])[0, 2]
    tensor([0., 0., 1.])

    maps: of each layer, (examples, heads, positions, positions), from the first on. The result has rows that sum to 1.

    Source: S. Abnar, W. Zuidema, "Quantifying attention flow in transformers", 2020.
    """
    through = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device).expand(len(maps[0]), -1, -1)
    for one in maps:
        mixed = (one.mean(1) + torch.eye(one.shape[-1], dtype=one.dtype, device=one.device)) / 2
        through = mixed / mixed.sum(-1, keepdim=True) @ through
    return through


def at_least_float(value: Tensor) -> Tensor:
    """A value in single precision at least."""
    return value if value.dtype == torch.float64 else value.float()


ONE_STREAM = "their patterns do not multiply. A rollout needs one stream of positions; take another method"
"""What follows where attentions are over different positions."""


def patterns(structure: Structure, run: Run, follows: str = ONE_STREAM) -> list[Tensor]:
    """The patterns of the self-attentions of one stream, by layer; `follows` from there being several, in words."""
    found = [(block.scope, at_least_float(block.maps(run))) for block in structure.attention if block.kind != "cross"]
    if not found:
        raise AnalyzerError(
            f"fmr.locate found no self-attention in {structure.model}, whose patterns a rollout multiplies. Take another "
            "method."
        )
    sizes = {tuple(one.shape[-2:]) for _, one in found}
    if len(sizes) > 1 or len({*next(iter(sizes))}) > 1:
        told = ", ".join(f"{scope} {list(one.shape[-2:])}" for scope, one in found[:4])
        raise AnalyzerError(f"The attentions of {structure.model} are over different positions ({told}), so that {follows}.")
    return [one for _, one in found]


def reading(question: Question) -> Tensor:
    """How much each position of the last state is read by the target: equal parts of those that its gradient reaches."""
    reached = question.check_gradient()[0].abs().sum(-1) > 0
    if not bool(reached.any()):
        raise AnalyzerError(f"The gradient of {question.target.words} is zero at {question.place!r}: nothing reads it.")
    return reached.double() / reached.sum()


def grid_of(graph: Graph, many: int) -> tuple[int, int, int] | None:
    """At which of so many positions the patches of a picture begin, and their rows and columns; None where there are none.

    Patches are what a convolution of the picture made; where other tokens are put beside them, it is read off how they are
    joined.
    """
    for node in graph.nodes:
        if node.op != "conv2d" or len(node.shape) != 4 or not 0 <= many - node.shape[2] * node.shape[3] <= EXTRA:
            continue
        down, across = node.shape[2:]
        start = _start(graph, node, many)
        if start is not None:
            return start, down, across
    return None


def _start(graph: Graph, convolution: Node, many: int) -> int | None:
    """At which position the patches that a convolution made begin among all tokens."""
    patches = convolution.shape[2] * convolution.shape[3]
    if many == patches:
        return 0
    made = {node.id for node in graph.descendants(convolution.id)}
    for node in graph.nodes:
        if node.op == "cat" and len(node.shape) == 3 and node.shape[1] == many:
            lengths = [graph[parent.id].shape[1] for parent in node.parents]
            for n, parent in enumerate(node.parents):
                if lengths[n] == patches and parent.id in made:
                    return sum(lengths[:n])
    return None


def rolled(structure: Structure, run: Run, question: Question) -> Tensor:
    """How much of each token reaches what the target reads, (1, positions), or (1, rows, columns) of patches."""
    through = rollout(patterns(structure, run))[0]
    weights = reading(question).to(through)
    if len(weights) != len(through):
        raise AnalyzerError(
            f"The attentions of {structure.model} are over {len(through)} positions, and its last state has {len(weights)}, "
            f"so that {ONE_STREAM}."
        )
    tokens = weights @ through
    grid = grid_of(run.graph, len(tokens)) if _has_picture(run) else None
    if grid is None:
        return tokens[None]
    first, rows, columns = grid
    return tokens[first : first + rows * columns].view(1, rows, columns)


def _has_picture(run: fmr.Run) -> bool:
    return any(node.op == "input" and len(node.shape) == 4 for node in run.graph.nodes)
