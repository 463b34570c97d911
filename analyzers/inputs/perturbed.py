"""Attribution by runs in which cells of the value are replaced: occlusion, LIME, KernelSHAP. The work is captum's."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analyzers.inputs.gradients import Found, captum, drawn
from analyzers.inputs.question import Question
from analyzers.protocol import AnalyzerError
from fmr.errors import number_of, whole_number

SIDE, MOST = 7, 256
"""How many cells a picture has along each side, and how many a value has at most where nothing is said."""

PER_CELL, LEFT_OVER = 2, 1e-3
"""How many drawn sets a cell needs at least for a standard error, and what share of a deviation a fit must leave."""

NONE = -1
"""The cell of padding."""


def cells_of(given: Any, value: Tensor, kind: str, real: Tensor) -> Tensor:
    """Which cell each number of a value (1, ...) belongs to, from 0 on, in its shape; padding to none, which is -1.

    Tokens are cells; a picture has as many along each side as are asked for; any other value a cell for each number. real:
    the positions that are no padding, along their dimension.
    """
    found = _cells(given, value, kind)
    if bool(real.all()):
        return found
    here = real.to(value.device).expand_as(value)
    _, numbers = found[here].unique(return_inverse=True)
    return torch.full_like(found, NONE).masked_scatter(here, numbers)


def _cells(given: Any, value: Tensor, kind: str) -> Tensor:
    given = torch.as_tensor(given) if isinstance(given, np.ndarray) else given
    if isinstance(given, Tensor):
        if given.shape not in (value.shape, value.shape[1:]) or given.is_floating_point() or int(given.min()) != 0:
            raise AnalyzerError(
                f"cells is a {str(given.dtype).removeprefix('torch.')} tensor of shape {list(given.shape)}: expected whole "
                f"numbers from 0 on in the shape of the value, {list(value.shape)}."
            )
        _, found = given.to(value.device).unique(return_inverse=True)  # numbers that no cell has are none
        cells: Tensor = found.view(value.shape)
        return cells
    side = SIDE if given is None else whole_number(given)
    if side is None or side < 1:
        raise AnalyzerError(
            f"cells={given!r}: expected how many lie along a side of a picture, or a tensor of their numbers."
        )
    if kind == "image":
        down, across = (torch.arange(n, device=value.device) * min(side, n) // n for n in value.shape[2:])
        found = down[:, None] * min(side, value.shape[3]) + across
    elif kind == "tokens":
        found = torch.arange(value.shape[1], device=value.device).view(-1, *[1] * (value.dim() - 2))
    else:
        found = torch.arange(value[0].numel(), device=value.device).view(value.shape[1:])
        if len(found.flatten()) > MOST:
            raise AnalyzerError(
                f"The value has {found.numel()} numbers, and each would be a cell. Expected cells=: a tensor in its shape, "
                f"{list(value.shape)}, with the number of the cell of each."
            )
    return found.expand_as(value)


def spread(weights: Tensor, cells: Tensor) -> Tensor:
    """The number of each cell, divided equally among what lies in it; 0 for what lies in none."""
    counts = torch.bincount(cells[cells != NONE], minlength=len(weights)).clamp(min=1)
    return torch.where(cells == NONE, 0.0, (weights / counts)[cells.clamp(min=0)])


def occlusion(question: Question, base: Tensor, cells: Tensor, rows: int) -> Found:
    """How much of the target is lost where one cell is replaced (Zeiler and Fergus 2014)."""
    method = captum().FeatureAblation(question)
    with torch.no_grad():
        found = method.attribute(
            question.value, baselines=base, feature_mask=cells.clamp(min=0), perturbations_per_eval=rows
        )
    counts = torch.bincount(cells[cells != NONE]).clamp(min=1)
    values = torch.where(cells == NONE, 0.0, found / counts[cells.clamp(min=0)])
    return Found(values, number_of(len(counts), "cell"))


def lime(question: Question, base: Tensor, cells: Tensor, samples: int, seed: int, rows: int) -> Found:
    """Weights of a linear model of which cells are there, fitted near the input (Ribeiro, Singh, Guestrin 2016)."""
    attr = captum()
    from captum._utils.models.linear_model import SkLearnLinearRegression

    return _fitted(
        attr.Lime(_of_cells(question, cells), interpretable_model=SkLearnLinearRegression()),
        question,
        base,
        cells,
        samples,
        seed,
        rows,
    )


def kernel_shap(question: Question, base: Tensor, cells: Tensor, samples: int, seed: int, rows: int) -> Found:
    """Shapley values of cells: of all sets of them where these are few enough, else from a weighed regression on some.

    The regression is made to sum to the whole, so that its sum says nothing of how far it is off; its standard error does.

    Source: S. Lundberg, S. Lee, "A unified approach to interpreting model predictions", 2017.
    """
    many = _enough(cells, samples)
    if 2**many <= samples:
        weights = shapley(_of_sets(question, base, cells, many, rows))
        return Found(
            spread(weights.to(cells.device, question.precision), cells), f"all {2**many} sets of {number_of(many, 'cell')}"
        )
    method, drawn_rows = captum().KernelShap(_of_cells(question, cells)), list[tuple[Tensor, ...]]()
    model = method.interpretable_model
    fit = model.fit

    def kept(data: Any, **settings: Any) -> Any:
        drawn_rows.extend(data)
        return fit(data, **settings)

    model.fit = kept
    how = _fitted(method, question, base, cells, samples, seed, rows).how
    weights, errors = regression(*(torch.cat(part).double().cpu() for part in zip(*drawn_rows, strict=True)))
    values = spread(weights.to(cells.device, question.precision), cells)
    if errors is None:
        unknown = f"how far each of {many} cells is off is not known from {samples} samples. Take more, some times as many"
        return Found(values, how, (unknown,))
    return Found(values, f"{how}, of which each is off by {float(errors.mean()):.2g} (standard error, their mean)")


def _of_sets(question: Question, base: Tensor, cells: Tensor, many: int, rows: int) -> Tensor:
    """The target with each set of cells at the input and the others at the baseline, by the number whose bits they are."""
    found = []
    for some in torch.arange(2**many, device=cells.device).split(rows):
        there = (some.view(-1, *[1] * (cells.dim() - 1)) >> cells.clamp(min=0)) & 1
        with torch.no_grad():
            found.append(question(torch.where(there == 1, question.value, base)).double().cpu())
    return torch.cat(found)


def shapley(worth: Tensor) -> Tensor:
    """The Shapley values of players, (players,), from what each set of them is worth, by the number whose bits they are.

    >>> shapley(torch.tensor([0.0, 1.0, 2.0, 5.0]))
    tensor([2., 3.])
    """
    many = (len(worth) - 1).bit_length()
    sets = torch.arange(len(worth))
    sizes = ((sets[:, None] >> torch.arange(many)) & 1).sum(1)
    weight = torch.tensor([1 / (many * comb(many - 1, size)) for size in range(many)], dtype=worth.dtype)
    without = [sets[(sets >> player) & 1 == 0] for player in range(many)]
    gains = [(weight[sizes[one]] * (worth[one + 2**player] - worth[one])).sum() for player, one in enumerate(without)]
    return torch.stack(gains)


def regression(sets: Tensor, worth: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight of each cell in what drawn sets are worth, (cells,), and its standard error.

    sets: (sets, cells), 1 where a cell is there; worth, weights: by set. Rows of the largest weight, the whole and the empty
    set, are held and not drawn. Errors hold for deviations of any size by row, each of them taken for as much larger as the
    fit has drawn it to itself (H. White, 1980; J. MacKinnon, H. White, 1985). They are None where rows are fewer than two
    for each cell, or where cells or a row stand by themselves: deviations say nothing then.
    """
    sets, worth, weights = sets.reshape(len(sets), -1), worth.flatten(), weights.flatten()
    rows = torch.cat([torch.ones_like(sets[:, :1]), sets], 1)
    inverse = torch.linalg.pinv(rows.T @ (weights[:, None] * rows), hermitian=True)
    found = inverse @ (rows.T @ (weights * worth))
    drawn_ones = weights < weights.max()
    own = (1 - weights * ((rows @ inverse) * rows).sum(1))[drawn_ones]
    determined = int(torch.linalg.matrix_rank(rows)) == rows.shape[1]
    if not determined or len(own) < PER_CELL * sets.shape[1] or float(own.min()) < LEFT_OVER:
        return found[1:], None
    pulls = rows[drawn_ones] * (weights * (worth - rows @ found))[drawn_ones][:, None] / own.sqrt()[:, None]
    return found[1:], (inverse @ (pulls.T @ pulls) @ inverse).diagonal()[1:].clamp(min=0).sqrt()


def _enough(cells: Tensor, samples: int) -> int:
    """How many cells there are, of which the weights are determined by so many samples."""
    many = int(cells.max()) + 1
    if many < 2:
        raise AnalyzerError("There is one cell, so that nothing can be compared. Expected two or more: cells=.")
    if samples < many + 1:
        raise AnalyzerError(
            f"samples={samples} for {many} cells, whose weights would not be determined. Expected more samples than cells."
        )
    return many


def _of_cells(question: Question, cells: Tensor) -> Callable[[Tensor], Tensor]:
    """The target of the numbers that lie in cells, (rows, numbers); padding stays as it is."""
    here = cells != NONE

    def asked(rows: Tensor) -> Tensor:
        value = question.value.expand(len(rows), *cells.shape[1:])
        return question(value.masked_scatter(here.expand_as(value), rows))

    return asked


def _fitted(method: Any, question: Question, base: Tensor, cells: Tensor, samples: int, seed: int, rows: int) -> Found:
    many, here = _enough(cells, samples), cells != NONE
    with torch.no_grad(), drawn(seed, question.value.device):
        found = method.attribute(
            question.value[here][None],
            baselines=base[here][None],
            feature_mask=cells[here][None],
            n_samples=samples,
            perturbations_per_eval=rows,
            return_input_shape=False,
        )
    weights = found.reshape(-1).to(cells.device, question.precision)
    return Found(spread(weights, cells), f"{number_of(samples, 'sample')} of {number_of(many, 'cell')}")
