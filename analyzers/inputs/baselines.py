"""What stands for "nothing there": baselines by name, given ones, and those of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analyzers.inputs.places import without_padding
from analyzers.protocol import AnalyzerError

SPREAD = 10.0
"""Of a blurred picture: the standard deviation of the blur, in pixels of a picture 224 wide."""


def zero(value: Tensor) -> Tensor:
    """Zeros."""
    return torch.zeros_like(value)


def mean(value: Tensor, names: Sequence[str] = ()) -> Tensor:
    """The mean of each channel over a picture, of each unit over positions, or of all numbers of a vector.

    names: what its dimensions count, where that is said.
    """
    told = tuple(n for n, name in enumerate(names) if name not in ("", "examples", "heads", "units"))
    over = told or {4: (2, 3), 3: (1,)}.get(value.dim(), tuple(range(1, value.dim())))
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

EXPECTED = f"{', '.join(map(repr, NAMED))}, 'padding', a number, a tensor, or inputs whose values are taken."


def taken(given: Any) -> Any:
    """A baseline as it was given: a number, an array or several of one shape in a list become a tensor, the rest stays."""
    several = isinstance(given, list | tuple) and len(given) > 0
    if isinstance(given, str | Mapping | Tensor) or (several and all(isinstance(one, str) for one in given)):
        return given
    try:
        if several and all(isinstance(one, Tensor) for one in given):
            rows = all(one.dim() and len(one) == 1 for one in given)
            return torch.cat(list(given)) if rows else torch.stack(list(given))
        array = np.array(given)
        found = None if given is None else torch.as_tensor(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.dtype == torch.bool:
        shown = repr(given) if given is None or isinstance(given, bool) else f"a {type(given).__name__}"
        raise AnalyzerError(f"baseline={shown}: expected {EXPECTED}")
    return found


def kind_of_numbers(value: Tensor) -> str:
    """The dtype of a value in a word."""
    return str(value.dtype).removeprefix("torch.")


def _as_kind_of(value: Tensor, given: Tensor) -> Tensor:
    """A baseline in the numbers of a value; `AnalyzerError` where something of it would be lost."""
    kind = "on meta, without numbers" if given.is_meta else "" if given.layout == torch.strided else f"{given.layout}"
    if kind:
        raise AnalyzerError(f"The baseline is {kind}: expected a dense tensor of numbers.")
    whole = not (value.is_floating_point() or value.is_complex())
    if (given.is_complex() and not value.is_complex()) or (whole and not torch.equal(given.to(value.dtype), given)):
        raise AnalyzerError(
            f"The baseline holds {kind_of_numbers(given)}, and the value {kind_of_numbers(value)}: expected numbers of its "
            "kind."
        )
    return given.to(value)


def baselines_of(
    given: Any,
    value: Tensor,
    real: Tensor,
    read: Callable[[Any], Tensor],
    padding: Callable[[], Tensor],
    names: Sequence[str] = (),
) -> Tensor:
    """Baselines of a value (1, ...), as (baselines, ...): one, or several of which attributions are the mean.

    given: a name, a number, a tensor or array, several in a list, or inputs, at which `read` finds the value. padding: what
    the value is where all tokens are padding. real: the positions that are tokens, along their dimension; the others stay
    as they are, and no baseline is made of them. names: what the dimensions count, where that is said.
    """
    if bool(real.all()):
        return _baselines(given, value, read, padding, names)
    given = given if isinstance(given, str) else taken(given)
    if isinstance(given, Tensor) and given.shape[-value.dim() + 1 :] == value.shape[1:]:
        given = without_padding(given, real)
    found = _baselines(given, without_padding(value, real), read, lambda: without_padding(padding(), real), names)
    whole = value.expand(len(found), *value.shape[1:])
    return whole.masked_scatter(real.to(value.device), found)


def _baselines(
    given: Any, value: Tensor, read: Callable[[Any], Tensor], padding: Callable[[], Tensor], names: Sequence[str]
) -> Tensor:
    """The same of a value of which nothing is padding."""
    if isinstance(given, str) and given in (*NAMED, "padding"):
        if given in ("mean", "blur") and not value.is_floating_point():
            raise AnalyzerError(
                f"baseline={given!r} of {kind_of_numbers(value)}: expected floating-point numbers, which have a mean. Take "
                "baseline='zero', or whole numbers of your own."
            )
        found = padding() if given == "padding" else mean(value, names) if given == "mean" else NAMED[given](value)
    elif not isinstance(given := taken(given), Tensor):
        found = read(given)
    else:
        found = _as_kind_of(value, given)
        found = found.expand_as(value) if not found.dim() else found
        found = found[None] if found.shape == value.shape[1:] else found
    if found.dim() != value.dim() or found.shape[1:] != value.shape[1:] or not len(found):
        raise AnalyzerError(
            f"The baseline has shape {list(found.shape)}, and the value {list(value.shape)}: expected the same, or several "
            "in front, (baselines, ...). Texts as baselines need as many tokens as the input."
        )
    if not bool(torch.isfinite(found).all()):
        raise AnalyzerError("The baseline holds what is no number. Expected finite numbers.")
    return found.detach()
