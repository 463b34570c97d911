"""Logits as linear in what is added to the stream: with the scales of norms as they are in one run."""

import torch
from torch import Tensor

from analyzers.memories.written import Passage
from analyzers.protocol import AnalyzerError
from fmr.structure.parts import Structure


def to_logits(structure: Structure, state: Tensor, tokens: Tensor) -> Tensor:
    """What each number of the stream's end adds to the logits of some words, (words, width), at the scale of one state.

    >>> state = run[structure.layers[-1].resid_post][0, -1].detach()
    >>> maps, logits = to_logits(structure, state, torch.tensor([5])), structure.read_out(state)
    >>> float(maps[0] @ state + structure.read_out(torch.zeros_like(state))[5] - logits[5]).__round__(3)
    0.0

    The derivative of the reading-out at an empty stream, where no scale moves, is linear in the same way, up to one factor:
    the one by which it makes the logits of the state.
    """
    empty = torch.zeros(len(tokens), len(state), device=state.device, dtype=state.dtype, requires_grad=True)
    with torch.enable_grad():
        nothing = structure.read_out(empty)
        said = structure.read_out(state[None]).detach()[0] - nothing[0].detach()
        (maps,) = torch.autograd.grad(nothing.gather(1, tokens.to(nothing.device)[:, None]).sum(), empty, retain_graph=True)
        (back,) = torch.autograd.grad((nothing[0] * said).sum(), empty)
    return maps.float() * _factor(said, back[0] @ state, structure)


def into_stream(structure: Structure, way: Passage | str, made: Tensor, maps: Tensor) -> Tensor:
    """The same of what memories make, (words, width): at the scale of what they all made."""
    if isinstance(way, str):
        raise AnalyzerError(way)
    if not way.nodes:
        return maps * way.times
    empty = torch.zeros(len(maps), maps.shape[1], device=made.device, dtype=made.dtype, requires_grad=True)
    with torch.enable_grad():
        nothing = way.through(empty)
        added = way.through(made[None]).detach()[0] - nothing[0].detach()
        (read,) = torch.autograd.grad((nothing * maps.to(nothing.dtype)).sum(), empty, retain_graph=True)
        (back,) = torch.autograd.grad((nothing[0] * added).sum(), empty)
    return read.float() * _factor(added, back[0] @ made, structure) * way.times


def _factor(made: Tensor, by_slope: Tensor, structure: Structure) -> float:
    """The number by which a linear map makes a vector, from the vector and what it made of it weighs."""
    factor = float(made.double().square().sum() / by_slope.double())
    if not torch.isfinite(torch.tensor(factor)):
        raise AnalyzerError(
            f"What is added to the logits of {structure.model} cannot be told apart: its norms have no slope at an empty "
            "stream. Expected norms that add a small number to the variance, as eps=1e-5."
        )
    return factor
