"""Attribution along gradients: integrated ones, those at drawn points, and those at the input. The work is captum's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analyzers.inputs.jumps import Piece, told
from analyzers.inputs.question import Question
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of

POINTS = 8
"""Gauss-Legendre points of a piece of the way, where gradients are taken."""


class Found(NamedTuple):
    """Numbers in the shape of the value, (1, ...), with how they were had and what is to be said of them."""

    values: Tensor
    how: str
    notes: tuple[str, ...] = ()


def captum() -> Any:
    """captum's methods, or one clear error; what draws numbers as it loads leaves Python's own as they were."""
    state = random.getstate()
    try:
        import captum.attr
    except ImportError:
        raise AnalyzerError(
            "This method is done by captum, which is not installed. Get it with: pip install 'fmr[analysis]'. "
            "method='deeplift' and 'rollout' do without."
        ) from None
    finally:
        random.setstate(state)
    return captum.attr


@contextmanager
def drawn(seed: int, device: torch.device) -> Iterator[None]:
    """A block whose random numbers are those of a seed; those of torch, NumPy and Python go on as if it had not been."""
    devices = [device] if device.type == "cuda" else []
    state, own = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        np.random.set_state(state)
        random.setstate(own)


def integrated(question: Question, base: Tensor, steps: int, most: int, enough: float, rows: int) -> Found:
    """Integrated gradients from a baseline (1, ...): the way is cut into pieces, and those that do not close are halved.

    Of each piece the sum of attributions must be the difference of the target between its ends, so that its error is known;
    those with the largest are halved until the error of the whole is no more than `enough`, in numbers of the target, or
    gradients were taken at `most` points.
    """
    method, value = captum().IntegratedGradients(question), question.value
    cuts = torch.linspace(0, 1, max(1, round(steps / POINTS)) + 1).tolist()
    todo, done = list(pairwise(cuts)), list[tuple[tuple[float, float], Tensor, float]]()
    taken = 0
    while True:
        for at in range(0, len(todo), max(1, rows // POINTS)):
            some = todo[at : at + max(1, rows // POINTS)]
            starts, ends = (torch.cat([torch.lerp(base, value, piece[end]) for piece in some]) for end in (0, 1))
            found, errors = method.attribute(
                ends, baselines=starts, n_steps=POINTS, method="gausslegendre", return_convergence_delta=True
            )
            done += zip(some, found.detach().split(1), errors.tolist(), strict=True)
        taken += len(todo) * POINTS
        error = abs(sum(one for _, _, one in done))
        worst = sorted(done, key=lambda one: -abs(one[2]))
        worst = [one for one in worst if abs(one[2]) > enough / len(done) / 2][: (most - taken) // (2 * POINTS)]
        if error <= enough or not worst:
            break
        done = [one for one in done if all(one is not other for other in worst)]
        todo = [piece for (a, c), _, _ in worst for piece in ((a, (a + c) / 2), ((a + c) / 2, c))]
    values = torch.stack([one for _, one, _ in done]).sum(0)
    if error > enough and not bool(values.any()):
        raise AnalyzerError(
            f"The gradient of {question.target.words} is zero at all {taken} points between the baseline and "
            f"{question.place!r}, and its difference is not: what lies between goes in steps (a rounding, a sign). Expected "
            "a place behind it; method='deeplift' and 'occlusion' need no gradient."
        )
    pieces = f"gradients at {number_of(taken, 'point')} in {number_of(len(done), 'piece')} of the way"
    left = [Piece(*ends, off) for ends, _, off in done if abs(off) > enough / len(done) / 2]
    return Found(values, pieces, told(question, base, left) if error > enough and left else ())


def gradient_shap(question: Question, bases: Tensor, samples: int, seed: int, rows: int) -> Found:
    """Expected gradients at random points between the input and random baselines (Lundberg and Lee 2017)."""
    method, total, done = (
        captum().GradientShap(question),
        question.value.to(torch.promote_types(question.value.dtype, torch.float)) * 0,
        0,
    )
    with drawn(seed, question.value.device):
        while done < samples:
            some = min(rows, samples - done)
            total += some * method.attribute(question.value, baselines=bases, n_samples=some).detach()
            done += some
    return Found(total / samples, number_of(samples, "sample"))


def saliency(question: Question) -> Found:
    """The gradient at the input (Simonyan et al. 2014)."""
    return Found(question.check_gradient(), "one gradient")


def input_gradient(question: Question) -> Found:
    """The gradient at the input, times the input."""
    return Found(question.check_gradient() * question.value, "one gradient")
