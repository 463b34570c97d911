"""Weights made random layer by layer, for as long as a block lasts: the user's own are put back bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from analyzers.protocol import AnalyzerError
from fmr.graph.graph import Graph


def layers_from_the_top(model: nn.Module, graph: Graph) -> list[tuple[str, list[nn.Parameter]]]:
    """The modules that have parameters of their own, the one that is used last in front."""
    first = {node.id: graph.place(node.id) for node in graph.nodes}
    own = dict(model.named_parameters())
    used: dict[str, int] = {}
    for name in own:
        readers = graph.readers(f"param:{name}") if f"param:{name}" in first else ()
        if readers:
            path = name.rpartition(".")[0]
            used[path] = min([used.get(path, len(graph.nodes)), *(first[reader.id] for reader in readers)])
    order = sorted(used, key=lambda path: -used[path])
    if not order:
        raise AnalyzerError(f"{type(model).__name__} reads no parameter in this run, so that none can be made random.")
    return [(path, [one for name, one in own.items() if name.rpartition(".")[0] == path]) for path in order]


@contextmanager
def randomised(parameters: Sequence[nn.Parameter], seed: int) -> Iterator[None]:
    """A block in which the numbers of each parameter stand in random order; its own memory is not written to."""
    kept = [(one, one.data) for one in parameters]
    generator = torch.Generator().manual_seed(seed)
    try:
        for one, own in kept:
            order = torch.randperm(own.numel(), generator=generator).to(own.device)
            one.data = own.flatten()[order].view(own.shape)
        yield
    finally:
        for one, own in kept:
            one.data = own
