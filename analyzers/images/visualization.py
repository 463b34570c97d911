"""Feature visualisation: images that are made for what a part of a model looks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analyzers.images.ascent import Optimizer, Steps, Task, adam, rate_of, task_of
from analyzers.images.given import check_steps, check_switch, name_of
from analyzers.images.objectives import Channel, Layer, Objective
from analyzers.images.parameterizations import KINDS, Parameterization, Size
from analyzers.images.seen import by_channel, channel_numbers
from analyzers.images.spectra import scrambled
from analyzers.images.transformations import Transformation, checked, fitted, robust, takes, through, unseen
from analyzers.images.viewing import Number, View, as_images, numbers, undisturbed
from analyzers.images.visualized import Visualized, joined
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, Method, check_counts
from fmr.nodes import Key, is_key

TRIES, NULLS = 8, 4
"""Over how many draws of unseen transformations, and of images of the same spectrum, scores are averaged."""

BATCH = 16
"""How many images of a contact sheet are made side by side."""


class FeatureVisualization(Method):
    """Make images that a part of a model answers to most, from noise, by the gradient.

    >>> eye = analyzers.FeatureVisualization(reader, size=8, channels=1)
    >>> eye.run(analyzers.images.Channel("conv2", 3), steps=40).score
    array([...])

    model: any module that is given images, in eval mode. size: of these, a side or (height, width); channels: 3, or 1 for
    grey. mean, std: the model is given (image - mean) / std for images from 0 to 1, a number each or one for each colour.
    argument: the name under which the model takes images, where they are not its first argument; others: what else it is
    given, by name.

    Source: C. Olah, A. Mordvintsev, L. Schubert, "Feature visualization", Distill, 2017.
    """

    def __init__(
        self, model: nn.Module, *, size: Size = 224, channels: int = 3, mean: Number = 0.0,
        std: Number = 1.0, argument: str | None = None, others: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.view = View.of(model, size, channels, mean, std, argument, others)

    def run(
        self, objective: Objective | Key | Sequence[Objective | Key], *,
        images: int = 1, steps: int = 160, parameterization: str | nn.Module = "fft",
        transformations: Sequence[Transformation] | None = None, optimizer: Optimizer | None = None,
        start: Any = None, redirect: bool = True, seed: int = 0, progress: bool | None = None,
    ) -> Visualized:  # fmt: skip
        """Optimise images for an objective; of several objectives, one image for each.

        >>> eye.run([analyzers.images.Logit(n) for n in range(3)], steps=4).objectives
        ('Logit(0)', 'Logit(1)', 'Logit(2)')

        objective: of `analyzers.images`, or a site, whose mean counts. images: how many are made at once, for an objective
        that compares them. parameterization: "fft", "pixels", "cppn", or a module of yours that returns images from 0 to 1
        and keeps what it learns. transformations: what images are put through in each step, `f(images, random)`; None for
        shifts, sizes and turns, () for nothing. optimizer: makes one of parameters; None for Adam at the rate of the
        parameterization, 0.1, of "cppn" 0.005. start: images to begin with, else noise. redirect: where no gradient would
        arrive, as at dead units, it is led past dead zones. seed: of noise and transformations.

        Beside each score stand two others: under unseen transformations, and of random images of the same spectrum.
        `AnalyzerError` where no gradient reaches the image. A step costs a pass up to the deepest site and back.
        """
        objectives = _objectives(objective)
        check_counts(1, images=images)
        check_steps(steps, seed, progress)
        check_switch("redirect", redirect)
        many = len(objectives) if len(objectives) > 1 else images
        if images not in (1, many):
            raise AnalyzerError(f"images={images} with {len(objectives)} objectives: expected one image for each.")
        with undisturbed(self.model, seed):
            task = task_of(self.view, objectives)
            made = made_of(self.view, parameterization, many, start, seed)
            put = robust(self.view.size) if transformations is None else checked(transformations)
            run = Steps(made, put, optimizer or partial(adam, rate=rate_of(made)), steps, redirect, seed)
            with torch.no_grad():
                first = run.images(self.view).detach()
            many = len(first)
            if len(objectives) not in (1, many):
                raise AnalyzerError(f"The parameterization makes {many} images, expected one for each objective.")
            before = task.of(fitted(first, self.view.size))
            curve = run.run(task, progress, type(self).__name__)
            with torch.no_grad():
                last = run.images(self.view).detach()
            names = [str(one) for one in objectives] * (1 if len(objectives) > 1 else many)
            return Visualized(
                model=type(self.model).__name__,
                objectives=tuple(names),
                images=last.cpu(),
                curve=curve,
                start=_numbers(before),
                score=_numbers(task.of(fitted(last, self.view.size))),
                robust=self._robust(task, last, seed),
                null=self._null(task, last, seed),
                settings=settings_of(self.view, run, parameterization, optimizer),
                seed=seed,
            )

    def sheet(self, site: Key, channels: Sequence[int] | None = None, **settings: Any) -> Visualized:
        """A contact sheet: an image for each channel of a layer, or for some of them.

        >>> len(eye.sheet("conv1", range(4), steps=4).images)
        4

        settings: as for `run`.
        """
        if channels is None:
            with undisturbed(self.model, 0), torch.no_grad():
                key = self.view.sites([site])[site]
                value = self.view.values(self.view.grey(), [key])[key]
            channels = range(by_channel(value, key).shape[1])
        asked = [Channel(site, channel) for channel in channel_numbers(channels)]
        return joined([self.run(asked[n : n + BATCH], **settings) for n in range(0, len(asked), BATCH)])

    def scores(self, objective: Objective | Key, images: Any) -> Floats:
        """The scores of given images, as natural ones: what a result is compared with.

        >>> eye.scores(analyzers.images.Logit(7), images[:5]).shape
        (5,)

        images: a tensor (images, colours, height, width) from 0 to 1, or a photograph, which is resized; or several.
        """
        objectives = _objectives([objective])
        given = as_images(images, self.view)
        with undisturbed(self.model, 0):
            found = _numbers(task_of(self.view, objectives).of(given))
        if np.isnan(found).any():
            raise AnalyzerError(
                f"{objectives[0]} of image {int(np.isnan(found).argmax())} is NaN, which is neither more nor less than "
                "others. Leave it out, or run the model in float32."
            )
        return found

    def _robust(self, task: Task, images: Tensor, seed: int) -> Floats:
        """The mean score under transformations that the images were not made with."""
        put = unseen(self.view.size)
        tries = [through(images, put, Random(f"unseen {seed} {n}"), self.view.size) for n in range(TRIES)]
        return _numbers(torch.stack([task.of(one) for one in tries]).mean(0))

    def _null(self, task: Task, images: Tensor, seed: int) -> Floats:
        """The mean score of random images of the same spectrum."""
        whole = fitted(images, self.view.size)
        return _numbers(torch.stack([task.of(scrambled(whole, seed + n)) for n in range(NULLS)]).mean(0))


def made_of(view: View, given: str | nn.Module, images: int, start: Any, seed: int, decay: float = 1.5) -> nn.Module:
    """What images are made of: a module, with those to begin with in it; a spectrum has this decay."""
    if isinstance(given, nn.Module):
        made = given
        if not takes(made, 0):
            raise AnalyzerError(
                f"{type(made).__name__}.forward asks for arguments, expected a module that makes images of its parameters "
                "alone: forward(self)."
            )
    elif given in KINDS:
        options: dict[str, Any] = {"decay": decay} if given == "fft" else {}
        made = KINDS[given](view.size, images, view.channels, seed=seed, **options).to(view.like.device, view.precision)
    else:
        raise AnalyzerError(f"parameterization={given!r}: expected {', '.join(map(repr, KINDS))} or a module of yours.")
    if start is None:
        return made
    if not isinstance(made, Parameterization):
        raise AnalyzerError(f"start= cannot be put into a {type(made).__name__}. Expected it to hold the image already.")
    begin = as_images(start, view, "start")
    with torch.no_grad():
        shape = tuple(made().shape)
    if len(begin) not in (1, shape[0]) or tuple(begin.shape[1:]) != shape[1:]:
        raise AnalyzerError(
            f"start has shape {tuple(begin.shape)}, and {type(made).__name__} makes images of shape {shape}. Expected one "
            "image to begin with, or as many as are made."
        )
    return made.of(begin)


def settings_of(view: View, run: Steps, given: str | nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """How images were made, in plain values."""
    return {
        "parameterization": given if isinstance(given, str) else type(given).__name__,
        "transformations": tuple(map(name_of, run.transformations)),
        "optimizer": f"Adam(lr={rate_of(run.parameterization):g})" if optimizer is None else name_of(optimizer),
        "steps": run.steps,
        "redirect": run.redirect,
        "mean": _plain(view.mean),
        "std": _plain(view.std),
    }


def _objectives(given: Any) -> tuple[Objective, ...]:
    several = given if isinstance(given, (list, tuple)) and not is_key(given) else [given]
    found = tuple(Layer(one) if not isinstance(one, Objective) and is_key(one) else one for one in several)
    wrong = [one for one in found if not isinstance(one, Objective)]
    if not found or wrong:
        raise AnalyzerError(
            f"The objective is {(wrong or [given])[0]!r}, expected one of analyzers.images, "
            "as Channel('layer1', 3), or a site."
        )
    if not all(one.sites for one in found):
        raise AnalyzerError(
            f"{found[0]} reads nothing of the model. Expected an objective at a site, with penalties beside it."
        )
    return found


def _numbers(scores: Tensor) -> Floats:
    found: Floats = scores.detach().cpu().double().numpy()
    return found


def _plain(value: Number) -> float | tuple[float, ...]:
    found = tuple(numbers(value))
    return found[0] if len(found) == 1 else found
