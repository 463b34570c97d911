"""Attribution by runs in which cells of the value are replaced: occlusion, LIME, KernelSHAP. The work is captum's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from analyzers.inputs.gradients import Found, captum, drawn
from analyzers.inputs.question import Question
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of, whole_number

SIDE, MOST = 7, 256
"""How many cells a picture has along each side, and how many a value has at most where nothing is said."""


def cells_of(given: Any, value: Tensor, kind: str) -> Tensor:
    """Which cell each number of a value (1, ...) belongs to, from 0 on, in its shape.

    Tokens are cells; a picture has as many along each side as are asked for; any other value a cell for each number.
    """
    if isinstance(given, Tensor):
        if given.shape not in (value.shape, value.shape[1:]) or given.is_floating_point() or int(given.min()) != 0:
            raise AnalyzerError(
                f"cells is a {str(given.dtype).removeprefix('torch.')} tensor of shape {list(given.shape)}: expected whole "
                f"numbers from 0 on in the shape of the value, {list(value.shape)}."
            )
        return given.reshape(value.shape).long().to(value.device)
    side = SIDE if given is None else whole_number(given)
    if side is None or side < 1:
        raise AnalyzerError(
            f"cells={given!r}: expected how many lie along a side of a picture, or a tensor of their numbers."
        )
    if kind == "image":
        down, across = (torch.arange(n, device=value.device) * min(side, n) // n for n in value.shape[2:])
        found = down[:, None] * min(side, value.shape[3]) + across
    elif kind == "tokens":
        found = torch.arange(value.shape[1], device=value.device)[:, None]
    else:
        found = torch.arange(value[0].numel(), device=value.device).view(value.shape[1:])
        if len(found.flatten()) > MOST:
            raise AnalyzerError(
                f"The value has {found.numel()} numbers, and each would be a cell. Expected cells=: a tensor in its shape, "
                f"{list(value.shape)}, with the number of the cell of each."
            )
    return found.expand_as(value)


def spread(weights: Tensor, cells: Tensor) -> Tensor:
    """The number of each cell, divided equally among what lies in it."""
    counts = torch.bincount(cells.flatten(), minlength=len(weights)).clamp(min=1)
    return (weights / counts)[cells]


def occlusion(question: Question, base: Tensor, cells: Tensor, rows: int) -> Found:
    """How much of the target is lost where one cell is replaced (Zeiler and Fergus 2014)."""
    method = captum().FeatureAblation(question)
    with torch.no_grad():
        found = method.attribute(question.value, baselines=base, feature_mask=cells, perturbations_per_eval=rows)
    counts = torch.bincount(cells.flatten()).clamp(min=1)
    return Found(found / counts[cells], number_of(len(counts), "cell"))


def lime(question: Question, base: Tensor, cells: Tensor, samples: int, seed: int, rows: int) -> Found:
    """Weights of a linear model of which cells are there, fitted near the input (Ribeiro, Singh, Guestrin 2016)."""
    attr = captum()
    from captum._utils.models.linear_model import SkLearnLinearRegression

    return _fitted(
        attr.Lime(question, interpretable_model=SkLearnLinearRegression()), question, base, cells, samples, seed, rows
    )


def kernel_shap(question: Question, base: Tensor, cells: Tensor, samples: int, seed: int, rows: int) -> Found:
    """Shapley values of cells, from a weighed regression (Lundberg and Lee 2017)."""
    return _fitted(captum().KernelShap(question), question, base, cells, samples, seed, rows)


def _fitted(method: Any, question: Question, base: Tensor, cells: Tensor, samples: int, seed: int, rows: int) -> Found:
    many = int(cells.max()) + 1
    if many < 2:
        raise AnalyzerError("There is one cell, so that nothing can be compared. Expected two or more: cells=.")
    if samples < many + 1:
        raise AnalyzerError(
            f"samples={samples} for {many} cells, whose weights would not be determined. Expected more samples than cells."
        )
    with torch.no_grad(), drawn(seed, question.value.device):
        found = method.attribute(
            question.value,
            baselines=base,
            feature_mask=cells,
            n_samples=samples,
            perturbations_per_eval=rows,
            return_input_shape=False,
        )
    weights = found.reshape(-1).to(question.value)
    return Found(spread(weights, cells), f"{number_of(samples, 'sample')} of {number_of(many, 'cell')}")
