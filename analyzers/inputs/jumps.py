"""Where a target jumps on the way from a baseline: what is chosen otherwise there, and what no gradient tells of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from analyzers.inputs.question import Question
from fmr.errors import number_of
from fmr.runs.run import Run

HALVINGS, MOST = 12, 16
"""How often a piece of the way is halved towards what jumps in it, and how many pieces are looked into."""

NARROW = 1 / 256
"""The longest piece of the way that is looked into: one that did not close as longer ones were halved."""

AROUND = 2**-13
"""The share of the way that is looked into before and behind a piece: one may be as narrow as numbers are apart, which shows
nothing."""

HELD, BACK = 0.5, 8
"""What share of what a piece misses, and of what the target changed by so many halvings before, must lie in the last part of
it, to be a jump and no bend."""


class Piece(NamedTuple):
    """A piece of the way, from one share of it to another, and by how much its sum is off."""

    start: float
    end: float
    off: float


class Jump(NamedTuple):
    """How much a target changes between two shares of the way that lie next to each other."""

    start: float
    end: float
    height: float


def jumps_in(question: Question, base: Tensor, pieces: Sequence[Piece]) -> list[Jump]:
    """What jumps in pieces of the way from a baseline (1, ...), those that are off most."""
    worst = sorted(pieces, key=lambda one: -abs(one.off))[:MOST]
    low, high = (torch.tensor([one[end] for one in worst], dtype=torch.double) for end in (0, 1))
    low, high = (low - AROUND).clamp(min=0), (high + AROUND).clamp(max=1)
    with torch.no_grad():
        below, above = (_along(question, base, shares) for shares in (low, high))
        heights = list[Tensor]()
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            between = _along(question, base, middle)
            first = (between - below).abs() >= (above - between).abs()
            low, high = torch.where(first, low, middle), torch.where(first, middle, high)
            below, above = torch.where(first, below, between), torch.where(first, between, above)
            heights.append(above - below)
    off = torch.tensor([abs(one.off) for one in worst], dtype=torch.double)
    held = heights[-1].abs() > HELD * torch.maximum(off, heights[-1 - BACK].abs())
    found = [Jump(*one) for one in torch.stack([low, high, heights[-1]], 1)[held].tolist()]
    return [one for n, one in enumerate(found) if not any(one.start < two.end and two.start < one.end for two in found[:n])]


def told(question: Question, base: Tensor, pieces: Sequence[Piece]) -> tuple[str, ...]:
    """What is to be said of jumps in pieces of the way; nothing where there are none."""
    narrow = [one for one in pieces if one.end - one.start <= NARROW]
    if not narrow or not question.repeats:
        return ()
    found = sorted(jumps_in(question, base, narrow), key=lambda one: -abs(one.height))
    if not found:
        return ()
    first, whole, missed = found[0], sum(one.height for one in found), -sum(one.off for one in pieces)
    with torch.no_grad():
        before, behind = (question.run(_at(question, base, torch.tensor([end])), "all") for end in first[:2])
    return (
        f"{question.target.words} jumps at {number_of(len(found), 'place')} of the way from the baseline, by {whole:.3g} in "
        f"all, of {missed:.3g} that its gradients miss; by {first.height:.3g} at {first.end:.4g} of the way"
        f"{_chosen_otherwise(before, behind)}. Of a jump no gradient tells, however many are taken",
    )


def _at(question: Question, base: Tensor, shares: Tensor) -> Tensor:
    """The values at shares of the way, (shares, ...)."""
    weight = shares.to(question.value).view(-1, *[1] * (question.value.dim() - 1))
    return torch.lerp(base.expand(len(shares), *base.shape[1:]), question.value, weight)


def _along(question: Question, base: Tensor, shares: Tensor) -> Tensor:
    return question(_at(question, base, shares)).double().cpu()


def _chosen_otherwise(one: Run, other: Run) -> str:
    """The first choice, a whole number or a truth value, that differs between two runs, in words."""
    if one.graph.fingerprint != other.graph.fingerprint:
        return ", where the model goes another way"
    for node in one.graph.nodes:
        number = node.dtype.is_floating_point or node.dtype.is_complex
        if number or node.op.removeprefix("new_").startswith("empty"):  # which holds whatever lay there
            continue
        if not torch.equal(one[node.id], other[node.id]):
            return f", where {node.id} becomes another one"
    return ""
