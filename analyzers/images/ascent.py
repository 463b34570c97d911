"""An image made better step by step: the gradient of an objective through a model, up to the deepest site that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from analyzers.images.objectives import Objective, scored
from analyzers.images.parameterizations import Parameterization
from analyzers.images.redirect import redirected
from analyzers.images.seen import Seen
from analyzers.images.transformations import Transformation, through
from analyzers.images.viewing import View
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError
from fmr.edits.editor import Asked
from fmr.errors import number_of
from fmr.nodes import Key
from fmr.sweeps.bars import hidden

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
"""What makes an optimiser of parameters, as `lambda params: torch.optim.Adam(params, lr=0.1)`."""


SCALE = 1024.0
"""By what gradients in half precision are larger, which would else vanish where they are small."""


def adam(parameters: list[nn.Parameter], rate: float = 0.1) -> torch.optim.Optimizer:
    """The optimiser that is taken where none is given."""
    return torch.optim.Adam(parameters, lr=rate)


def rate_of(parameterization: nn.Module) -> float:
    """The learning rate that an image is made with where no optimiser is given."""
    return parameterization.rate if isinstance(parameterization, Parameterization) else Parameterization.rate


@dataclass(frozen=True, eq=False)
class Task:
    """What images are made for: an objective for each, or one for all; `sites` says where each of theirs is read."""

    view: View
    objectives: tuple[Objective, ...]
    sites: Mapping[Key, Key]

    def scores(self, seen: Seen) -> Tensor:
        """The score of each image."""
        if len(self.objectives) == 1:
            return scored(self.objectives[0], seen)
        return torch.stack([scored(objective, seen)[n] for n, objective in enumerate(self.objectives)])

    def of(self, images: Tensor) -> Tensor:
        """The scores of images as they are, without a gradient."""
        with torch.no_grad():
            return self.scores(self.view.seen(images, self.view.inputs(images), self.sites))

    def gradient(self, images: Tensor, shown: Tensor, edits: Asked | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores, their gradient at the images that the model is shown, and that at the images which penalties read."""
        given = shown.detach().requires_grad_()
        inputs = self.view.inputs(given)
        scores = self.scores(self.view.seen(images, inputs, self.sites, grad=True, edits=edits))
        if not scores.requires_grad:
            raise AnalyzerError(_unreached(self.objectives, cut=True))
        scale = SCALE if inputs.dtype == torch.float16 else 1.0
        slope, direct = torch.autograd.grad(scale * scores.sum(), [given, images], allow_unused=True)
        if slope is None:
            raise AnalyzerError(_unreached(self.objectives, cut=True))
        if scale != 1:
            slope, direct = slope / scale, None if direct is None else direct / scale
        return scores.detach(), slope, direct

    @cached_property
    def past_dead_zones(self) -> Asked:
        """Edits that let gradients past dead zones, on the way to the sites."""
        with torch.no_grad():
            return redirected(self.view.graph(), self.sites.values())


def task_of(view: View, objectives: tuple[Objective, ...]) -> Task:
    """The task of objectives, with their sites looked up in a pass over a grey image."""
    return Task(view, objectives, view.sites([site for one in objectives for site in one.sites]))


def _unreached(objectives: Sequence[Objective], cut: bool = False) -> str:
    """That no gradient arrives; `cut` where what is read was made without any."""
    return (
        f"No gradient reaches the image from {', '.join(map(str, objectives[:2]))}. Expected a site that is computed from "
        "the image by functions with a slope: an earlier site, or the value before the nonlinearity."
        + " Or the model itself switches gradients off on the way, by torch.no_grad() or detach()."
        * cut
    )


@dataclass(frozen=True, eq=False)
class Steps:
    """How images are optimised; `redirect` lets the gradient past dead zones in steps in which else none would arrive."""

    parameterization: nn.Module
    transformations: tuple[Transformation, ...]
    optimizer: Optimizer
    steps: int
    redirect: bool
    seed: int

    def images(self, view: View) -> Tensor:
        """The images as they stand, checked."""
        made = self.parameterization()
        if not isinstance(made, Tensor) or made.dim() != 4 or made.shape[1] != view.channels:
            what = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise AnalyzerError(
                f"The parameterization returns {what}, expected images (images, {view.channels}, height, width) from 0 to 1."
            )
        low, high = map(float, made.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise AnalyzerError(
                f"The parameterization returns numbers from {low:.3g} to {high:.3g}, expected 0 to 1. End it with "
                ".sigmoid()."
            )
        return made

    def run(self, task: Task, progress: bool | None, name: str) -> Floats:
        """Take all steps; the scores before each of them, (steps, images)."""
        parameters = [one for one in self.parameterization.parameters() if one.requires_grad]
        if not parameters:
            raise AnalyzerError("The parameterization has no parameters to optimise. Expected a module with some.")
        curve: list[Tensor] = []
        before = [one.detach().clone() for one in parameters]
        with _grads_put_back(parameters):
            optimizer = self._optimizer(parameters)
            with tqdm(total=self.steps, desc=name, unit="step", disable=hidden(progress)) as bar:
                for step in range(self.steps):
                    told: list[Tensor] = []
                    optimizer.step(partial(self._loss, task, parameters, step, told))
                    if not told:
                        raise AnalyzerError(
                            f"{type(optimizer).__name__}.step(closure) did not call its closure, which computes the loss. "
                            "Expected a torch optimizer."
                        )
                    curve.append(told[0])
                    bar.update()
                    bar.set_postfix_str(f"score {float(told[0].mean()):.3g}", refresh=False)
        if all(map(torch.equal, before, parameters)):
            raise AnalyzerError(
                f"{number_of(self.steps, 'step')} of {type(optimizer).__name__} changed nothing of the image. Expected a "
                "learning rate above 0: lambda params: torch.optim.Adam(params, lr=0.1)."
            )
        return np.array([scores.cpu().double().numpy() for scores in curve])

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of these parameters, checked."""
        made = callable(self.optimizer) and not isinstance(self.optimizer, torch.optim.Optimizer)
        optimizer = self.optimizer(parameters) if made else self.optimizer
        if not made or not isinstance(optimizer, torch.optim.Optimizer):
            what = f"{'gave' if made else 'is'} a {type(optimizer).__name__}"
            raise AnalyzerError(
                f"optimizer {what}, expected a function of parameters that makes a torch optimizer: lambda params: "
                "torch.optim.Adam(params, lr=0.1)."
            )
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        if held.isdisjoint(map(id, parameters)):
            raise AnalyzerError(
                f"optimizer gave a {type(optimizer).__name__} of other parameters than those that the image is made of. "
                "Expected a function that hands its argument on: lambda params: torch.optim.Adam(params, lr=0.1)."
            )
        return optimizer

    def _loss(self, task: Task, parameters: list[nn.Parameter], step: int, told: list[Tensor]) -> float:
        """The loss at the parameters as they are, their gradients set; the scores are added to what was told."""
        images = self.images(task.view)
        if not images.requires_grad:
            raise AnalyzerError(
                f"No gradient comes from the images to the parameters of {type(self.parameterization).__name__}. Expected "
                "images that are computed from them, without detach() or no_grad()."
            )
        draw = Random(f"{self.seed} {step}")
        shown = through(images, self.transformations, draw, task.view.size)
        scores, slope, direct = task.gradient(images, shown)
        size = slope.flatten(1).abs().amax(1)
        dead = size == 0
        if self.redirect and bool(dead.any()):
            _, passed, _ = task.gradient(images, shown, task.past_dead_zones)
            slope = torch.where(dead[:, None, None, None], passed, slope)
            size = slope.flatten(1).abs().amax(1)
            dead = size == 0
        if step == 0 and bool(dead.any()):
            raise AnalyzerError(_unreached(task.objectives))
        if not bool(size.isfinite().all() & scores.isfinite().all()):
            raise AnalyzerError(
                f"At step {step} the objective is {scores.tolist()} and its gradient not finite throughout. Expected "
                "smaller steps, lambda params: torch.optim.Adam(params, lr=0.01), or a model in float32."
            )
        ends = [(shown, slope)] if direct is None else [(shown, slope), (images, direct)]
        ends = [(made, gradient) for made, gradient in ends if made.requires_grad]
        found = torch.autograd.grad([made for made, _ in ends], parameters, [g for _, g in ends], allow_unused=True)
        if step == 0 and not any(gradient is not None and bool(gradient.any()) for gradient in found):
            raise AnalyzerError(
                f"At step 0 the gradient of {', '.join(map(str, task.objectives[:2]))} is 0 at all parameters of "
                f"{type(self.parameterization).__name__}. Expected an image that is not black or white all over, made "
                "of them by functions with a slope, and transformations that leave something of it."
            )
        for one, gradient in zip(parameters, found, strict=True):
            one.grad = None if gradient is None else -gradient
        told.append(scores)
        return -float(scores.sum())


@contextmanager
def _grads_put_back(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A block after which parameters have the gradients that they had before."""
    before = [(one, one.grad) for one in parameters]
    for one, _ in before:
        one.grad = None
    try:
        yield
    finally:
        for one, grad in before:
            one.grad = grad
