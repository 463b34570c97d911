"""What a normalisation does to the weights behind it: its gain, its bias, whether it takes means away."""

from typing import NamedTuple

import torch
from torch import Tensor

from fmr.errors import StructureError
from fmr.graph.graph import Graph
from fmr.ids import TensorId
from fmr.structure.proof.certificate import error, tolerance_of
from fmr.structure.proof.evaluate import Values, evaluate


class Fold(NamedTuple):
    """The way between two values as `a * gain * (x - mean) + bias`, `a` a number of each token; the mean where `centred`.

    gain, bias: (width,).
    """

    gain: Tensor
    bias: Tensor
    centred: bool

    def into(self, matrix: Tensor) -> Tensor:
        """A matrix (..., width) that reads the end of the way as one that reads its start, but for the token's size."""
        folded = matrix * self.gain.to(matrix)
        return folded - folded.mean(-1, keepdim=True) if self.centred else folded

    def after(self, matrix: Tensor) -> Tensor:
        """A matrix (..., width) that writes at the start of the way as one that writes at its end."""
        return (matrix - matrix.mean(-1, keepdim=True) if self.centred else matrix) * self.gain.to(matrix)

    def size(self, moved: Tensor, end: Tensor) -> Tensor:
        """The number `a` of each token, (..., 1). moved: what `after` makes of the start; end: the end of the way."""
        found: Tensor = (moved * (end - self.bias.to(end))).sum(-1, keepdim=True)
        return found / (moved * moved).sum(-1, keepdim=True).clamp(min=1e-30)


def fold_between(graph: Graph, start: TensorId, end: TensorId, value: Values) -> Fold:
    """What lies between two values of a stream: a normalisation, a scale, or nothing.

    The ops are not looked at: they are run again on vectors of which the answer is known, and what that tells is compared
    with the values of the run. What it does not explain is a `StructureError`.
    """
    x = value(start).detach().double()
    width = x.shape[-1]
    if start == end:
        return Fold(torch.ones(width).to(x), torch.zeros(width).to(x), False)
    probe = torch.ones(width).to(x)
    probe[1::2] = -1
    probe[-1] = -1 if width % 2 == 0 else 0  # its mean is 0
    odd, even = _halves(graph, start, end, probe.expand(x.shape), value)
    if odd.shape[-1] != width or odd.numel() != x.numel():
        raise StructureError(f"{end} has another shape than {start}, a value of the stream.")
    gain, bias = (odd * probe).reshape(-1, width)[0], even.reshape(-1, width)[0]
    if width % 2:
        gain[-1] = (_halves(graph, start, end, probe.roll(1).expand(x.shape), value)[0] * probe.roll(1)).reshape(-1, width)[
            0, -1
        ]
    flat, _ = _halves(graph, start, end, torch.ones_like(x), value)
    fold = Fold(gain, bias, not bool((flat.abs() > 1e-3 * gain.abs().max()).any()))
    moved, seen = fold.after(x), value(end).detach().double().reshape(x.shape)
    off = error(fold.size(moved, seen) * moved + bias, seen)
    if off > tolerance_of(value(start), value(end)):
        raise StructureError(
            f"{end} is not {start} normalised by one weight for all tokens (error {off:.0e}), so that nothing can be folded."
        )
    return fold


def _halves(graph: Graph, start: TensorId, end: TensorId, probe: Tensor, value: Values) -> tuple[Tensor, Tensor]:
    """What is made of a probe as an odd and an even part: of a normalisation what changes sign with it, and the bias."""
    one, other = (evaluate(graph, end, {start: sign * probe}, value) for sign in (1.0, -1.0))
    return (one - other) / 2, (one + other) / 2
