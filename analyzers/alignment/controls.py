"""What should not work: the same search, or the same interchange, where there is nothing to find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from analyzers.alignment.examples import Examples
from analyzers.alignment.parts import parameters, random_like
from analyzers.alignment.training import State
from analyzers.alignment.trial import Accuracy, Trial
from fmr.ids import Site

Fit = Callable[[Trial, str], tuple[Trial, State]]
"""Trains a trial of a name."""

DRAWS = 5
"""How many random subspaces the accuracy of one is the mean of."""

SHUFFLED = 7919
"""What is added to a seed for draws that must not be those of the search."""


def controls(start: Trial, found: Trial, test: Examples, other: Site | None, fit: Fit) -> Iterator[tuple[str, Accuracy]]:
    """The accuracy of each control on the held-out examples, by name: of trials that begin where the found one began."""
    seed, is_trained = start.settings.seed + SHUFFLED, bool(parameters(start.spaces))
    drawn = [random_like(found.spaces, seed + number) for number in range(DRAWS)]
    several = [replace(found, spaces=one).accuracy(test) for one in drawn if one is not None]
    if several:
        yield "random subspace", mean(several)
    yield "placebo", found.accuracy(test, torch.Generator().manual_seed(seed))
    if other is not None:
        yield "another site", fit(replace(start, site=other), "another site")[0].accuracy(test)
    if is_trained:
        order = torch.randperm(len(start.train), generator=torch.Generator().manual_seed(seed))
        shuffled = replace(start.train, labels=start.train.labels[order])
        yield "shuffled labels", fit(replace(start, train=shuffled), "shuffled labels")[0].accuracy(test)
    with untrained(start.network.model, seed):
        without = fit(start, "untrained model")[0].accuracy(test)
    yield "untrained model", without


def mean(several: Sequence[Accuracy]) -> Accuracy:
    """The means of accuracies."""
    told = np.mean([[one.all, one.changed, one.loss] for one in several], axis=0)
    return Accuracy(*map(float, told))


@contextmanager
def untrained(model: nn.Module, seed: int) -> Iterator[None]:
    """A block in which a model has learned nothing: the numbers of each parameter stand in another order."""
    draw, before = torch.Generator().manual_seed(seed), [(one, one.detach().clone()) for one in model.parameters()]
    try:
        with torch.no_grad():
            for one, value in before:
                order = torch.randperm(one.numel(), generator=draw).to(one.device)
                one.copy_(value.flatten()[order].reshape(one.shape))
        yield
    finally:
        with torch.no_grad():
            for one, value in before:
                one.copy_(value)
