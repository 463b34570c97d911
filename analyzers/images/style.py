"""Style transfer: an image with the content of one and the style of another, by what a model makes of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from analyzers.images.ascent import Optimizer, Steps, Task, adam, rate_of
from analyzers.images.difference import Difference, differences, same
from analyzers.images.given import check_steps
from analyzers.images.objectives import Objective
from analyzers.images.parameterizations import Size
from analyzers.images.seen import gram
from analyzers.images.spectra import scrambled
from analyzers.images.stylized import Stylized
from analyzers.images.transformations import Transformation, checked, fitted
from analyzers.images.viewing import Number, View, as_images, keys_of, undisturbed
from analyzers.images.visualization import made_of, settings_of
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, Method
from fmr.nodes import Key, id_of


class StyleTransfer(Method):
    """Make an image that a model sees the content of one image in, and the style of another.

    >>> transfer = analyzers.StyleTransfer(reader, "conv2", ["conv1", "conv2"], size=8, channels=1)
    >>> transfer.run(images[0], images[1], steps=20).falls > 1
    True

    content, style: the sites at which images are compared, IDs, paths of modules or roles. The others are as for
    `FeatureVisualization`. Content is the difference of what stands there, style that of its Gram matrices, each by its
    size: loss = content_weight * sum |F - F_c|^2 / |F_c|^2 + style_weight * mean |G - G_s|^2 / |G_s|^2.

    Source: L. Gatys, A. Ecker, M. Bethge, "Image style transfer using convolutional neural networks", 2016.
    """

    def __init__(
        self, model: nn.Module, content: Key | Sequence[Key], style: Key | Sequence[Key], *,
        size: Size = 224, channels: int = 3, mean: Number = 0.0, std: Number = 1.0,
        argument: str | None = None, others: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.content, self.style = keys_of(content), keys_of(style)
        self.view = View.of(model, size, channels, mean, std, argument, others)

    def run(
        self, content: Any, style: Any, *, content_weight: float = 1.0, style_weight: float = 10.0,
        penalty: Objective | None = None, start: Any = "content", steps: int = 150,
        parameterization: str | nn.Module = "fft", transformations: Sequence[Transformation] = (),
        optimizer: Optimizer | None = None, seed: int = 0, progress: bool | None = None,
    ) -> Stylized:  # fmt: skip
        """Optimise an image for the content of one and the style of another.

        >>> transfer.run(images[0], images[1], start="noise", steps=5).curve.shape
        (5,)

        content, style: tensors (colours, height, width) from 0 to 1 as large as the model is shown them, or photographs,
        which are resized. penalty: an objective whose score is taken off, as 0.1 * analyzers.images.TotalVariation(). start:
        "content", "noise", or an image. parameterization: "fft" has the decay of photographs here, 1. The others are as for
        `FeatureVisualization.run`.

        Beside the losses stand two others: of content, what the style image comes to; of style, what a random image comes to
        that has the spectrum of the style image.
        """
        _check(content_weight, style_weight, penalty, start)
        check_steps(steps, seed, progress)
        given = {name: self._given(one, name) for name, one in (("content", content), ("style", style))}
        begin = {"content": given["content"], "noise": None}[start] if isinstance(start, str) else start
        with undisturbed(self.model, seed):
            asked = [*self.content, *self.style, *(penalty.sites if penalty is not None else ())]
            sites = self.view.sites(asked)
            contents = self._compared(self.content, given["content"], sites, same)
            styles = self._compared(self.style, given["style"], sites, gram)
            total = content_weight * _sum(contents) + style_weight / len(styles) * _sum(styles)
            task = Task(self.view, (-total if penalty is None else -total - penalty,), sites)
            made = made_of(self.view, parameterization, 1, begin, seed, decay=1.0)
            run = Steps(made, checked(transformations), optimizer or partial(adam, rate=rate_of(made)), steps, True, seed)
            with torch.no_grad():
                first = run.images(self.view).detach()
            curve = -run.run(task, progress, type(self).__name__)[:, 0]
            with torch.no_grad():
                last = run.images(self.view).detach()
            null = {"content": given["style"], "style": scrambled(given["style"], seed)}
            losses = {
                f"{name}_{when}": self._losses(parts, image, sites)
                for name, parts in (("content", contents), ("style", styles))
                for when, image in (("start", first), ("loss", last), ("null", null[name]))
            }
        settings = settings_of(self.view, run, parameterization, optimizer)
        weights = {"content_weight": float(content_weight), "style_weight": float(style_weight), "penalty": str(penalty)}
        return Stylized(
            model=type(self.model).__name__,
            image=last[0].cpu(),
            content_image=given["content"][0].cpu(),
            style_image=given["style"][0].cpu(),
            content_sites=tuple(str(id_of(site)) for site in self.content),
            style_sites=tuple(str(id_of(site)) for site in self.style),
            **losses,
            curve=curve,
            settings=settings
            | weights
            | {"penalty": str(penalty), "start": start if isinstance(start, str) else "an image"},
            seed=seed,
        )

    def _given(self, image: Any, name: str) -> Tensor:
        """One image as it was given, checked."""
        found = as_images(image, self.view, name)
        if len(found) != 1:
            raise AnalyzerError(f"{name} holds {len(found)} images, expected one.")
        return found

    def _compared(self, at: list[Key], image: Tensor, sites: Mapping[Key, Key], of: Any) -> list[Difference]:
        with torch.no_grad():
            seen = self.view.seen(image, self.view.inputs(image), {site: sites[site] for site in at})
        return differences(tuple(at), seen, of)

    def _losses(self, parts: list[Difference], image: Tensor, sites: Mapping[Key, Key]) -> Floats:
        """The loss at each site, unweighted."""
        whole = fitted(image, self.view.size)
        with torch.no_grad():
            seen = self.view.seen(whole, self.view.inputs(whole), {part.site: sites[part.site] for part in parts})
            found: Floats = torch.cat([part(seen) for part in parts]).cpu().double().numpy()
        return found


_STARTS = ("content", "noise")


def _sum(parts: Sequence[Objective]) -> Objective:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _check(content_weight: Any, style_weight: Any, penalty: Any, start: Any) -> None:
    """Raise for weights that are none, for a penalty that is no objective, and for words that name no start."""
    for name, value in (("content_weight", content_weight), ("style_weight", style_weight)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise AnalyzerError(f"{name}={value!r}: expected a number from 0 on.")
    if not content_weight and not style_weight:
        raise AnalyzerError("content_weight and style_weight are both 0, and nothing is compared. Expected one above 0.")
    if penalty is not None and not isinstance(penalty, Objective):
        raise AnalyzerError(f"penalty is {penalty!r}, expected an objective, as 0.1 * analyzers.images.TotalVariation().")
    if isinstance(start, str) and start not in _STARTS:
        raise AnalyzerError(f"start is {start!r}, expected 'content', 'noise' or an image.")
