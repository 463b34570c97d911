"""DeepLIFT by the reveal-cancel rule: what raises a value and what lowers it are followed back apart.

The difference of a value between input and baseline is the sum of a positive and of a negative part. A sum of terms has in
one part the terms that grew and in the other those that fell, by the whole difference of each; what moves, scales or shifts
numbers one by one hands both parts on. An activation is given both parts in either order, and its difference is shared by
the mean of what each part did:

    positive: (f(x0 + p) - f(x0) + f(x0 + n + p) - f(x0 + n)) / 2, negative: the same with p and n exchanged

so that two causes that hide each other are both seen, where the slope of the whole difference is zero. Everything else,
choices by a comparison among it, works on the whole difference, as by the rescale rule.

Source: A. Shrikumar, P. Greenside, A. Kundaje, "Learning important features through propagating activation differences",
2017, section 3.5.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from analyzers.inputs.rescale import CUT_OFF, TwoRuns
from analyzers.inputs.rules import ELEMENTWISE, Call, Pair, Shares, chosen, halfway, rule_of, step
from fmr.ids import ALIAS, Site, TensorId
from fmr.nodes import Node
from fmr.runs.run import Run
from fmr.structure.normal.vocabulary import MOVES

ACTIVATIONS = ELEMENTWISE - frozenset(
    "exp exp2 expm1 log log10 log1p log2 logit lgamma erfinv pow sqrt rsqrt reciprocal nan_to_num".split()
)
"""Operations that are given both parts of a difference; powers and exponentials, of which norms and softmaxes are made, are
not."""

HANDED_ON = (MOVES - frozenset("index_add scatter_add".split())) | CUT_OFF | frozenset(
    "where masked_fill tril triu neg batch_norm".split()
) | {ALIAS}  # fmt: skip
"""Operations of which each number is one number that was read, scaled and shifted by what is the same in both runs."""

SCALED = frozenset("add sub mul div".split())
"""Operations that do so where only one of the values that they read differs."""

UNCLEAR = frozenset("var var_mean lerp real imag".split())
"""Sums of products with signs of their own, which are not those of what is read."""

TINY = 1e-9
"""Below this share of a number its part counts as nothing, and the slope of the whole difference stands for its own."""

Kind = Literal["activation", "handed on", "sum", "whole"]


def kind_of(call: Call) -> Kind:
    """What becomes of both parts in an operation; "whole" is what is followed back as by the rescale rule."""
    node, live = call.node, list(call.live.values())
    if any(pair.at.is_complex() for pair in (*live, call.out)) or rule_of(call) in (step, chosen):
        return "whole"
    if node.op in ACTIVATIONS and [pair.at.shape == call.out.at.shape for pair in live] == [True]:
        return "activation"
    if node.op in HANDED_ON and not (node.op == "batch_norm" and node.argument("training", 5, False)):
        return "handed on"
    if node.op in SCALED and len(live) == 1 and not _divides(call):
        return "handed on"
    clear = node.op not in UNCLEAR and node.argument("mode", 3, "nearest") != "bicubic" and not _negative(node)
    return "sum" if clear and rule_of(call) is halfway else "whole"


def _divides(call: Call) -> bool:
    """Whether a value that differs is divided by, or a quotient is rounded."""
    if call.node.op != "div":
        return False
    below = {parent.id for parent in call.node.parents if parent.at in ("1", "other")}
    return bool(below & call.live.keys()) or bool(call.node.argument("rounding_mode", 2))


def _negative(node: Node) -> bool:
    """Whether a term is multiplied by a negative number."""
    given = [node.args.get(name, 1) for name in ("alpha", "beta", "value")]
    return any(isinstance(one, int | float) and one < 0 for one in given)


class Unsigned(Call):
    """An operation that adds up what it would add or take off, and multiplies by sizes: its terms without their signs."""

    def again(self, tensors: Mapping[TensorId, Tensor]) -> Tensor:
        """The operation on other values in place of the live ones."""
        op, slots = self.node.op, {parent.id: parent.at for parent in self.node.parents}
        off = {"sub": ("1", "other"), "neg": ("0", "input")}.get(op, ())
        return super().again({name: -one if slots[name] in off else one for name, one in tensors.items()})


def unsigned(call: Call) -> Unsigned:
    """An operation without the signs of what it multiplies by."""
    node = call.node
    if node.op in ("mul", "div"):
        node = node._replace(args={at: abs(arg) if isinstance(arg, int | float) else arg for at, arg in node.args.items()})
    held = {name: one.abs() if one.is_floating_point() else one for name, one in call.held.items()}
    live = {name: Pair(pair.at.abs(), pair.base.abs()) for name, pair in call.live.items()}
    return Unsigned(call.graph, node, call.weight, call.out, live, held)


class BothParts(TwoRuns):
    """The same graph at the input and at the baseline, with the positive and the negative part of each difference.

    A value has two weights, one for each part: their mean goes the way of all weights, half their difference is kept in
    `tilts`. `spans` are the positive parts less the negative ones.
    """

    def __init__(self, at: Run, base: Run, place: Site | None = None) -> None:
        super().__init__(at, base, place)
        self._spans: dict[TensorId, Tensor] = {}
        self._tilts: dict[TensorId, Tensor] = {}
        self._beside: list[Tensor] = []

    def parts(self, name: TensorId) -> tuple[Tensor, Tensor]:
        """The positive and the negative part of a difference."""
        change, span = self.pair(name).change, self.span(name)
        return (change + span) / 2, (change - span) / 2

    def span(self, name: TensorId) -> Tensor:
        """The positive part of a difference less its negative one."""
        if name not in self._spans:
            self._spans[name] = self._span(name)
        return self._spans[name]

    def _span(self, name: TensorId) -> Tensor:
        change = self.pair(name).change
        if name in self._starts:
            return change.abs()
        call = self.call(self.graph[name], change)
        kind = kind_of(call) if call.live else "whole"
        if kind == "whole":
            return change.abs()
        if kind == "activation":
            positive, negative = self._made(call)
            return positive - negative
        if call.node.op in CUT_OFF:
            return self.span(next(iter(call.live)))
        without = unsigned(call)
        spans = {own: self.span(own) if kind == "handed on" else pair.change.abs() for own, pair in call.live.items()}
        high, low = (
            without.again({own: call.live[own].middle.abs() + sign * one / 2 for own, one in spans.items()})
            for sign in (1, -1)
        )
        return torch.where(torch.isfinite(high - low), high - low, change.abs())

    def _made(self, call: Call) -> tuple[Tensor, Tensor]:
        """What each part of the difference of a number makes of that of an activation, the mean over both orders."""
        ((name, pair),) = call.live.items()
        raised, lowered = (call.again({name: pair.base + part}) for part in self.parts(name))
        change, base, at = call.out.change, call.out.base, call.out.at
        positive, negative = (raised - base + at - lowered) / 2, (lowered - base + at - raised) / 2
        known = torch.isfinite(positive) & torch.isfinite(negative)
        whole = torch.where(pair.change >= 0, change, torch.zeros_like(change))
        return torch.where(known, positive, whole), torch.where(known, negative, change - whole)

    def _by_rule(self, call: Call) -> Shares:
        name, tilt = call.node.id, self._tilts.pop(call.node.id, None)
        self._beside = [] if tilt is None else [-tilt * self.span(name)]
        kind = kind_of(call)
        if kind == "activation":
            return self._of_activation(call, tilt)
        if tilt is None:
            return super()._by_rule(call)
        if kind == "whole":
            return super()._by_rule(replace(call, weight=call.weight + tilt * call.out.change.sign()))
        shares = super()._by_rule(call)
        for own, part in self._tilted(call, tilt).items():
            if kind == "handed on":
                self._tilt(own, part)
            else:
                shares[own] = shares[own] + part * call.live[own].change.sign()
        return shares

    def _tilted(self, call: Call, tilt: Tensor) -> Shares:
        """How half the difference of both weights comes to what was read, all terms taken without their signs."""
        if call.node.op in CUT_OFF:
            return dict.fromkeys(call.live, tilt)
        without = unsigned(call)
        return without.pulled({name: pair.middle.abs() for name, pair in call.live.items()}, tilt)

    def _of_activation(self, call: Call, tilt: Tensor | None) -> Shares:
        """The slope of each part, times the weight of what that part made."""
        ((name, pair),) = call.live.items()
        (whole,) = super()._by_rule(replace(call, weight=torch.ones_like(call.weight))).values()
        least = TINY * torch.maximum(pair.at.abs(), pair.base.abs())
        weights = (call.weight, call.weight) if tilt is None else (call.weight + tilt, call.weight - tilt)
        up, down = (
            weight * torch.where(part.abs() > least, made / torch.where(part == 0, torch.ones_like(part), part), whole)
            for weight, part, made in zip(weights, self.parts(name), self._made(call), strict=True)
        )
        self._tilt(name, (up - down) / 2)
        return {name: (up + down) / 2}

    def _tilt(self, name: TensorId, tilt: Tensor) -> None:
        self._beside.append(tilt * self.span(name))
        self._tilts[name] = self._tilts[name] + tilt if name in self._tilts else tilt

    def _given(self, call: Call, shares: Shares) -> list[Tensor]:
        return super()._given(call, shares) + self._beside

    def _at_start(self, name: TensorId, weight: Tensor) -> Tensor:
        tilt = self._tilts.pop(name, None)
        return weight if tilt is None else weight + tilt * self.pair(name).change.sign()
