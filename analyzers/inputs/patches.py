"""What a vision transformer does at each patch of a picture: where its heads look, and which class each patch speaks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.images.parameterizations import Size
from analyzers.images.viewing import Number, View, as_images, undisturbed
from analyzers.inputs.grids import Grid, grid_in
from analyzers.inputs.patchmaps import PatchMaps
from analyzers.inputs.rollout import at_least_float, patterns
from analyzers.lenses.opening import layout_of, points_of, rows_of
from analyzers.protocol import AnalyzerError, Method
from fmr.errors import StructureError, whole_number
from fmr.runs.run import Run
from fmr.structure.parts import Structure

SEVERAL = (
    "there is no one grid of patches. Expected a vision transformer whose layers all look at the same positions; "
    "structure.attention[n].plot(run) draws one of them"
)
"""What follows where the patches of a model are merged on the way, in words."""

ROWS = 1024
"""How many states are read out at a time."""


class Patches(Method):
    """Show over the patches of pictures where each head looks, and which class each patch speaks for, layer by layer.

    >>> maps = analyzers.Patches(looker, size=8, channels=1).run(images[:2])
    >>> maps.attention["0"].shape, maps.probability.shape
    (torch.Size([2, 2, 5, 5]), torch.Size([2, 2, 2, 2]))

    model: a vision transformer, in eval mode. size, channels, mean, std, argument, others: as for `FeatureVisualization`.

    Attention patterns are those that `fmr.locate` certifies. A patch speaks for a class by the logit lens: the model's own
    final norm and head read its state after each layer, as they read that of the class token at the end.

    Source: A. Dosovitskiy et al., "An image is worth 16x16 words", 2021 (how far heads look); nostalgebraist, "interpreting
    GPT: the logit lens", 2020; S. Abnar, W. Zuidema, "Quantifying attention flow in transformers", 2020 (rollout).
    """

    def __init__(
        self, model: nn.Module, *, size: Size = 224, channels: int = 3, mean: Number = 0.0,
        std: Number = 1.0, argument: str | None = None, others: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.view = View.of(model, size, channels, mean, std, argument, others)

    def run(self, images: Any, answers: Any = None, *, grid: tuple[int, int] | None = None, seed: int = 0) -> PatchMaps:
        """Look at pictures.

        >>> analyzers.Patches(looker, size=8, channels=1).run(images[0], 7).answers
        (7,)

        images: a tensor (images, colours, height, width) from 0 to 1, a photograph, or several. answers: the class whose
        probability is told, a number, or one for each image; None takes what the model says. grid: how many rows and columns
        of patches there are, where neither a change of the picture nor the graph tells: the last positions are taken then.
        seed: of the class beside each answer, which is the null of the lens; that of a head is one that looks everywhere
        alike.
        """
        given = as_images(images, self.view)
        with undisturbed(self.model, seed), torch.no_grad():
            run = self.view.run(self.view.inputs(given), "all")
            structure = fmr.locate(run)
            if all(block.kind == "cross" for block in structure.attention):
                raise AnalyzerError(
                    f"fmr.locate found no self-attention in {structure.model}, so that there are no patches which look at "
                    "one another. Expected a vision transformer; FeatureVisualization and TopImages show what convolutions "
                    "look for."
                )
            maps = patterns(structure, run, SEVERAL)
            if any(len(one) != len(given) for one in maps):
                raise AnalyzerError(
                    f"The attentions of {structure.model} are within windows of {maps[0].shape[-1]} positions, expected "
                    "some over a whole picture. structure.attention[n].plot(run) draws them window by window."
                )
            where = grid_in(self.view, given[:1], structure, run, maps[0].shape[-1], grid)
            read = _lens(structure, run, where, len(given), answers, seed)
        return PatchMaps(
            model=type(self.model).__name__,
            images=given.cpu(),
            grid=(where.rows, where.columns),
            first=where.first,
            attention={str(n): one.cpu() for n, one in enumerate(maps)},
            **read,
            seed=seed,
        )


def _lens(structure: Structure, run: Run, grid: Grid, images: int, answers: Any, seed: int) -> dict[str, Any]:
    """What the model's head reads in each patch after each layer; or why it reads nothing."""
    try:
        return _readings(structure, run, grid, images, answers, seed)
    except StructureError as error:
        if answers is not None:
            raise AnalyzerError(f"Patches speak for no class: {error}") from error
        nothing = torch.zeros(0, images, grid.rows, grid.columns)
        none = {"probability": nothing, "other": nothing, "top": nothing.long()}
        return none | {"answers": (), "others": (), "points": (), "why": str(error)}


def _readings(structure: Structure, run: Run, grid: Grid, images: int, answers: Any, seed: int) -> dict[str, Any]:
    if isinstance(structure.readout, str):
        raise StructureError(structure.readout)
    said = run[structure.readout.way[-1]].reshape(images, -1, run[structure.readout.way[-1]].shape[-1]).mean(1)
    wanted = said.argmax(-1) if answers is None else _answers(answers, images, said.shape[-1]).to(said.device)
    step = torch.randint(1, max(2, said.shape[-1]), (images,), generator=torch.Generator().manual_seed(seed))
    others = (wanted + step.to(wanted)) % said.shape[-1]
    points = points_of(structure)
    chances = []
    for site in points.values():
        states = rows_of(run[site.id].detach(), images, structure.model, layout_of(structure))[:, grid.positions]
        logits = torch.cat([structure.read_out(few) for few in states.flatten(0, 1).split(ROWS)])
        chances.append(at_least_float(logits).softmax(-1).view(images, grid.rows, grid.columns, -1))
    held = torch.stack(chances)
    return {
        "points": tuple(points),
        "probability": _of(held, wanted),
        "other": _of(held, others),
        "top": held.argmax(-1).cpu(),
        "answers": tuple(wanted.tolist()),
        "others": tuple(others.tolist()),
        "why": "",
    }


def _of(chances: Tensor, classes: Tensor) -> Tensor:
    """The probability of a class of each image, (layers, images, rows, columns)."""
    return torch.stack([chances[:, n, ..., one] for n, one in enumerate(classes.tolist())], 1).cpu()


def _answers(given: Any, images: int, classes: int) -> Tensor:
    several = given.tolist() if isinstance(given, Tensor) else given
    asked = list(several) if isinstance(several, (tuple, list)) else [several] * images
    found = [whole_number(one) for one in asked]
    if len(found) != images or any(one is None or not 0 <= one < classes for one in found):
        raise AnalyzerError(
            f"answers={given!r}: expected the number of a class from 0 to {classes - 1}, or one for each of {images} images."
        )
    return torch.tensor(found)
