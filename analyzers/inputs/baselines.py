"""What stands for "nothing there": baselines by name, given ones, and those of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from analyzers.protocol import AnalyzerError

SPREAD = 10.0
"""Of a blurred picture: the standard deviation of the blur, in pixels of a picture 224 wide."""


def zero(value: Tensor) -> Tensor:
    """Zeros."""
    return torch.zeros_like(value)


def mean(value: Tensor) -> Tensor:
    """The mean of each channel over a picture, of each unit over positions, or of all numbers of a vector."""
    over = {4: (2, 3), 3: (1,)}.get(value.dim(), tuple(range(1, value.dim())))
    return value.mean(over, keepdim=True).expand_as(value).contiguous()


def blur(value: Tensor) -> Tensor:
    """The picture under a Gaussian so wide that nothing is recognised."""
    if value.dim() != 4:
        raise AnalyzerError(
            f"baseline='blur' of a value of shape {list(value.shape)}: expected pictures (1, channels, height, width). "
            "Take baseline='zero', 'mean', or values of your own."
        )
    for dim in (2, 3):
        sigma = SPREAD * value.shape[dim] / 224
        reach = min(int(3 * sigma) + 1, value.shape[dim] - 1)
        steps = torch.arange(-reach, reach + 1, dtype=value.dtype, device=value.device)
        weights = torch.softmax(-(steps**2) / (2 * sigma**2), 0)
        pad = [0, 0, reach, reach] if dim == 2 else [reach, reach, 0, 0]
        padded = torch.nn.functional.pad(value, pad, mode="reflect")
        value = (padded.unfold(dim, len(weights), 1) * weights).sum(-1)
    return value


NAMED: Mapping[str, Callable[[Tensor], Tensor]] = {"zero": zero, "mean": mean, "blur": blur}

EXPECTED = f"{', '.join(map(repr, NAMED))}, 'padding', a tensor, or inputs whose values are taken."


def baselines_of(given: Any, value: Tensor, read: Callable[[Any], Tensor], padding: Callable[[], Tensor]) -> Tensor:
    """Baselines of a value (1, ...), as (baselines, ...): one, or several of which attributions are the mean.

    given: a name, a tensor, or inputs, at which `read` finds the value. padding: what the value is where all tokens are
    padding.
    """
    if isinstance(given, str) and given in (*NAMED, "padding"):
        found = padding() if given == "padding" else NAMED[given](value)
    elif isinstance(given, Tensor):
        found = given.to(value)
        found = found[None] if found.shape == value.shape[1:] else found
    elif isinstance(given, str | Mapping | list | tuple):
        found = read(given)
    else:
        raise AnalyzerError(f"baseline={given!r}: expected {EXPECTED}")
    if found.dim() != value.dim() or found.shape[1:] != value.shape[1:] or not len(found):
        raise AnalyzerError(
            f"The baseline has shape {list(found.shape)}, and the value {list(value.shape)}: expected the same, or several "
            "in front, (baselines, ...). Texts as baselines need as many tokens as the input."
        )
    if not bool(torch.isfinite(found).all()):
        raise AnalyzerError("The baseline holds what is no number. Expected finite numbers.")
    return found.detach()
