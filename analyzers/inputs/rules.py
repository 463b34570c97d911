"""How a difference of the output of one operation is shared among what it read, so that nothing is lost or added.

Of an operation that is a sum of products of two numbers at most, the gradient halfway between input and baseline shares the
difference exactly: a sum gives each term its own, a product gives each factor its difference times the other's mean. What
works number by number has the slope of its secant in place of its derivative (the rescale rule). A maximum gives all to the
number that was the larger. A comparison is a step from 0 to 1, and a choice by it a sum of products. Everything else is
written out in these.

Source: A. Shrikumar, P. Greenside, A. Kundaje, "Learning important features through propagating activation differences",
2017; S. Lundberg, S. Lee, "A unified approach to interpreting model predictions", 2017 (maxima).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analyzers.inputs.forms import FORMS
from fmr.graph.execute import call_of, overwritten
from fmr.graph.graph import Graph
from fmr.ids import ALIAS, TensorId
from fmr.nodes import Node
from fmr.structure.normal.vocabulary import CONVOLUTIONS, MEANS, MOVES
from fmr.structure.proof.evaluate import in_double, own_work

QUADRATIC = (MOVES - {"nan_to_num"}) | CONVOLUTIONS | MEANS | frozenset(
    """add sub neg mul sum mean cumsum linear matmul bmm mm mv dot outer inner addmm addmv baddbmm addbmm einsum tensordot
    embedding batch_norm tril triu diag diagonal_scatter where masked_fill interpolate fold pixel_unshuffle rot90 lerp
    addcmul conv_transpose3d real imag square var var_mean addr bilinear cross diff flipud fliplr trapezoid nansum
    grouped_mm kron masked_scatter pack_padded_sequence pad_packed_sequence nll_loss dropout1d dropout2d dropout3d
    feature_dropout alpha_dropout feature_alpha_dropout
    conj resolve_conj view_as_real view_as_complex complex stft istft fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2
    fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_fftshift fft_ifftshift""".split()
) | {ALIAS}  # fmt: skip
"""Operations that are sums of products of two numbers at most: shared by the gradient halfway."""

ELEMENTWISE = frozenset(
    """abs acos asin atan ceil celu clamp clamp_max clamp_min cos cosh elu erf erfc erfinv exp exp2 expm1 floor gelu
    hardshrink hardsigmoid hardswish hardtanh heaviside leaky_relu lgamma log log10 log1p log2 log_sigmoid logit
    logsigmoid mish nan_to_num pow prelu reciprocal relu relu6 round rrelu rsqrt selu sigmoid sign silu sin sinh softplus
    softshrink softsign sqrt tan tanh tanhshrink threshold trunc sinc i0 frac remainder l1_loss mse_loss huber_loss
    smooth_l1_loss binary_cross_entropy_with_logits""".split()
)
"""Operations on single numbers: shared by the secant."""

LARGEST = frozenset(
    """amax max maximum fmax max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices""".split()
)
SMALLEST = frozenset("amin min minimum fmin".split())

SORTING = {"sort": 1, "topk": 2, "kthvalue": 2, "median": 1}
"""Operations that sort, with the place of the dimension among their arguments."""

COMPARISONS = frozenset("gt lt ge le eq ne".split())
CHOOSERS = frozenset("where masked_fill mul to".split())
"""Operations of truth values that are sums of products, with 1 for what is true."""

POINTS = 16
"""How many gradients an operation without a rule is shared by, between baseline and input."""

MOST_POINTS = 128
"""How many a product of many numbers is shared by at most."""

CLOSE = 1e-6
"""Below this share of their size two numbers are so close that the derivative stands for the secant."""


@dataclass(frozen=True)
class Pair:
    """A value at the input and at the baseline, in double precision.

    The weight of a complex value is one number too: the conjugate of it, times a difference, has a real part that counts.
    """

    at: Tensor
    base: Tensor

    def weighed(self, weight: Tensor) -> Tensor:
        """What a weight makes of the difference."""
        return (weight.conj() * self.change).real if weight.is_complex() else weight * self.change

    @property
    def change(self) -> Tensor:
        """The difference; 0 where both are equal, infinite ones too."""
        return torch.where(self.at == self.base, torch.zeros_like(self.at), self.at - self.base)

    @property
    def middle(self) -> Tensor:
        """What lies halfway."""
        return torch.where(self.at == self.base, self.at, (self.at + self.base) / 2)


def run_again(graph: Graph, node: Node, tensors: Mapping[TensorId, Tensor]) -> Tensor:
    """An operation in double precision on these values."""
    if node.op == ALIAS:
        return overwritten(graph.__getitem__, node, tensors, in_double)
    return in_double(node, tensors)


@dataclass(frozen=True)
class Call:
    """One operation whose difference is shared: `live` are the values that it read and that differ, `held` the others."""

    graph: Graph
    node: Node
    weight: Tensor
    out: Pair
    live: Mapping[TensorId, Pair]
    held: Mapping[TensorId, Tensor]

    def again(self, tensors: Mapping[TensorId, Tensor]) -> Tensor:
        """The operation on other values in place of the live ones."""
        return run_again(self.graph, self.node, {**self.held, **tensors})

    def pulled(self, points: Mapping[TensorId, Tensor], weight: Tensor) -> dict[TensorId, Tensor]:
        """The gradient, at some point, of the output weighed so."""
        with own_work(), torch.inference_mode(False), torch.enable_grad():
            leaves = {name: one.clone().requires_grad_() for name, one in points.items()}
            out = self.again(leaves)
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if out.requires_grad:  # not where a shape or a type alone is read, as in mask.to(x)
                found = torch.autograd.grad(out, list(leaves.values()), weight.expand_as(out), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if one is None else one
            for (name, leaf), one in zip(leaves.items(), found, strict=True)
        }


Shares = dict[TensorId, Tensor]
"""By how much the weighed output grows with each number that was read: times its difference, that number's share."""


def halfway(call: Call) -> Shares:
    """The gradient halfway: exact for sums of products of two."""
    return call.pulled({name: pair.middle for name, pair in call.live.items()}, call.weight)


def scaled(call: Call) -> Shares:
    """A value divided by its size: its difference counts on the scale at the input, that of the scale at the baseline.

    The mean of both scales would be as large as that of the baseline, which without bound grows where that is zero.
    """
    scale = _scale(call)
    ends = {name: pair.base if name != scale else pair.at for name, pair in call.live.items()}
    return call.pulled(ends, call.weight)


def _scale(call: Call) -> TensorId | None:
    """The factor of a product that is one number for many, and an inverse: what a norm multiplies by."""
    for name, pair in call.live.items():
        made = call.graph[name]
        while made.op in _HANDED and len(made.parents) == 1:
            made = call.graph[made.parents[0].id]
        inverse = made.op in ("rsqrt", "reciprocal") or (made.op == "pow" and _exponent(made) < 0)
        if inverse and pair.at.numel() < call.out.at.numel() and len(call.live) == 2:
            return name
    return None


def _exponent(node: Node) -> float:
    given = node.argument("exponent", 1, 1.0)
    return float(given) if isinstance(given, int | float) else 1.0


_HANDED = frozenset("to clone contiguous alias expand expand_as view reshape unsqueeze".split())
"""Operations that hand on the scale of a norm."""


def secant(call: Call) -> Shares:
    """The slope between input and baseline of each number; where both are the same, the derivative."""
    ((name, pair),) = call.live.items()

    def derivative() -> Tensor:
        flat = call.node.op == "heaviside"  # torch knows of no derivative
        return torch.zeros_like(pair.at) if flat else call.pulled({name: pair.middle}, torch.ones_like(call.out.at))[name]

    slope = _slope(call.out, pair, derivative)
    return {name: call.weight * slope}


def _slope(out: Pair, given: Pair, derivative: Callable[[], Tensor]) -> Tensor:
    change = given.change
    far = change.abs() > CLOSE * torch.maximum(given.at.abs(), given.base.abs())
    far &= torch.isfinite(change) & torch.isfinite(out.change)
    slope = out.change / torch.where(far, change, torch.ones_like(change))
    return slope if bool(far.all()) else torch.where(far, slope, derivative().nan_to_num(0.0, 0.0, 0.0))


def extreme(call: Call) -> Shares:
    """All of what was gained to the number that is largest at the input, all of what was lost to that at the baseline."""
    gained = call.out.change.clamp(min=0), call.out.change.clamp(max=0)
    own, other = gained if call.node.op in LARGEST else gained[::-1]
    first = call.pulled({name: pair.at for name, pair in call.live.items()}, call.weight * own)
    second = call.pulled({name: pair.base for name, pair in call.live.items()}, call.weight * other)
    shares = {name: first[name] + second[name] for name in call.live}
    return {name: _per_change(share, call.live[name].change) for name, share in shares.items()}


def _per_change(share: Tensor, change: Tensor) -> Tensor:
    return torch.where(
        change == 0, torch.zeros_like(share), share / torch.where(change == 0, torch.ones_like(change), change)
    )


def logsumexp(call: Call) -> Shares:
    """The logarithm's secant times that of each exponential, on a scale on which neither overflows."""
    ((name, pair),) = call.live.items()
    dims = call.node.argument("dim", 1)
    keep = bool(call.node.argument("keepdim", 2, False))

    def wide(one: Tensor) -> Tensor:
        for dim in sorted([dims] if isinstance(dims, int) else dims) if not keep else ():
            one = one.unsqueeze(dim)
        return one

    at, base = wide(call.out.at), wide(call.out.base)
    scale = torch.maximum(at, base)
    scale = torch.where(torch.isfinite(scale), scale, torch.zeros_like(scale))
    sums, terms = (Pair((a - scale).exp(), (b - scale).exp()) for a, b in ((at, base), (pair.at, pair.base)))
    outer = _slope(Pair(at, base), sums, lambda: 1 / sums.middle.clamp(min=1e-300))
    return {name: wide(call.weight) * outer * _slope(terms, pair, lambda: terms.middle)}


def along(call: Call, many: int = POINTS) -> Shares:
    """The mean gradient on the straight way from baseline to input: what stands in where there is no rule."""
    points, weights = np.polynomial.legendre.leggauss(many)
    total = {name: torch.zeros_like(pair.at) for name, pair in call.live.items()}
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        between = {name: torch.lerp(pair.base, pair.at, float(point)) for name, pair in call.live.items()}
        for name, one in call.pulled(between, call.weight).items():
            total[name] += float(weight) * one
    return total


def product(call: Call) -> Shares:
    """The mean gradient of a product: a polynomial on that way, whose integral half as many points as factors give."""
    ((_, pair),) = call.live.items()
    dim = call.node.argument("dim", 1)
    factors = pair.at.numel() if dim is None else pair.at.shape[dim]
    return along(call, min(MOST_POINTS, (factors + 1) // 2))


def step(call: Call) -> Shares:
    """A comparison as a step from 0 to 1: its secant over the difference of what is compared."""
    changes = [call.live[one].change if one in call.live else 0.0 for one in _read(call, 0, 1)]
    apart = torch.as_tensor(changes[0] - changes[1]).expand_as(call.weight)
    slope = torch.where(apart == 0, 0.0, call.weight * call.out.change / torch.where(apart == 0, 1.0, apart))
    shares: Shares = {}
    for sign, one in zip((1, -1), _read(call, 0, 1), strict=True):
        if one in call.live:
            own = sign * slope.sum_to_size(call.live[one].at.shape)
            shares[one] = shares[one] + own if one in shares else own
    return shares


def chosen(call: Call) -> Shares:
    """A choice between two values by a truth value c, as the sum of c times one and 1 - c times the other."""
    order = (0, 1, 2) if call.node.op == "where" else (1, 2, 0)
    names = _read(call, *order)
    c, one, other = (
        call.live[name].middle if name in call.live else call.held[name] if isinstance(name, TensorId) else name
        for name in names
    )
    c = c.double()
    gains = c, 1 - c, one - other
    shares: Shares = {}
    for name, gain in zip((names[1], names[2], names[0]), gains, strict=True):
        if name in call.live:
            own = (call.weight * gain).sum_to_size(call.live[name].at.shape)
            shares[name] = shares[name] + own if name in shares else own
    return shares


def _read(call: Call, *places: int) -> list[Any]:
    """What an operation read in these places: IDs, or numbers as they were given."""
    slots = {parent.at: parent.id for parent in call.node.parents}
    names = {0: "input", 1: "other", 2: "value"}
    if call.node.op == "where":
        names = {0: "condition", 1: "input", 2: "other"}
    if call.node.op == "masked_fill":
        names = {0: "input", 1: "mask", 2: "value"}
    return [slots.get(str(place), slots.get(names[place], call.node.argument(names[place], place, 0.0))) for place in places]


def written_out(call: Call, tensors: Mapping[TensorId, Tensor]) -> Tensor:
    """An operation of `FORMS` in other ones, on these values in place of the live ones."""
    tensors = {name: _arranged(call, one) for name, one in tensors.items()} if call.node.op in SORTING else tensors
    args, kwargs = call_of(call.node, {**call.held, **tensors})
    made: Tensor | tuple[Tensor, ...] = FORMS[call.node.op](*args, **kwargs)
    return made if isinstance(made, Tensor) else made[call.node.id.parts.output or 0]


def _arranged(call: Call, given: Tensor) -> Tensor:
    """Numbers that are sorted, by what lies halfway and then by the input: so that their places change no share."""
    ((_, pair),) = call.live.items()
    dim = call.node.argument("dim", SORTING[call.node.op], None if call.node.op == "median" else -1)
    with own_work():
        at, middle = (one.flatten() if dim is None else one for one in (pair.at, pair.middle))
        order = at.argsort(dim or 0)
        order = order.gather(dim or 0, middle.gather(dim or 0, order).argsort(stable=True, dim=dim or 0))
    return (given.flatten() if dim is None else given).gather(dim or 0, order)


def rule_of(call: Call) -> Callable[[Call], Shares] | None:
    """The rule for an operation; None where it is written out, or has none."""
    node, live = call.node, list(call.live.values())
    alone = [pair.at.shape == call.out.at.shape for pair in live] == [True]
    if node.op in COMPARISONS:
        return step
    if node.op in ("where", "masked_fill") and _read(call, 0 if node.op == "where" else 1)[0] in call.live:
        return chosen
    if node.op == "mul" and _scale(call) is not None:
        return scaled
    if node.op in QUADRATIC and not (node.op == "batch_norm" and node.argument("training", 5, False)):
        return halfway
    if any(pair.at.is_complex() for pair in live):
        return None
    if node.op in ("prod", "cumprod") and len(live) == 1:
        return product
    if node.op in ELEMENTWISE and alone:
        return secant
    if node.op in LARGEST | SMALLEST:
        return extreme
    return logsumexp if node.op == "logsumexp" and len(live) == 1 else None
