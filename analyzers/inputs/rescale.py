"""DeepLIFT on the operations of a recorded graph: a difference of the target followed back to the place it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

import torch
from torch import Tensor

import fmr
from analyzers.inputs.forms import has_form
from analyzers.inputs.gradients import Found
from analyzers.inputs.question import Question
from analyzers.inputs.rules import CHOOSERS, COMPARISONS, Call, Pair, Shares, along, rule_of, run_again, written_out
from analyzers.inputs.targets import Target, chosen_part
from analyzers.protocol import AnalyzerError
from fmr.errors import StructureError
from fmr.graph.execute import draws
from fmr.graph.graph import Graph
from fmr.ids import OPAQUE, Site, TensorId
from fmr.nests import ids_in, leaves
from fmr.nodes import Node
from fmr.ops.names import FILLS_NOTHING, OF_SHAPES
from fmr.runs.outputs import with_tensors
from fmr.runs.run import Run
from fmr.structure.proof.evaluate import double

LEFT = 1e-4
"""The share of what one operation passes on that may get lost in it before it is named."""

CUT_OFF = frozenset("detach data".split())
"""Operations that hand on all numbers, and no gradient."""


def deeplift(question: Question, base: Tensor, rule: type[TwoRuns] | None = None) -> Found:
    """The difference of the target between the value and a baseline (1, ...), shared by the operations that made it.

    rule: how it is followed back, by the rescale rule where nothing is said.
    """
    rule = TwoRuns if rule is None else rule
    with torch.no_grad():
        both = rule(question.run(question.value, keep="all"), question.run(base, keep="all"), question.place)
        ends = _of_target(question.target, both)
        place = both.start
        shares = both.followed_back(ends, [place])
        pair = both.pair(place)
        whole = shares.get(place, torch.zeros_like(pair.at)) * pair.change
        values = chosen_part(question.place, whole, both.at) if question.place.selection else whole
    if place not in shares:
        raise AnalyzerError(f"{question.target.words} {both.why_nothing(question.place)}")
    return Found(values.reshape(question.value.shape), f"{len(both.passed)} operations", tuple(both.notes))


class TwoRuns:
    """The same graph at the input and at the baseline, along which weights of values are followed back.

    `passed` are the operations that shared a difference, `notes` those that have no rule or in which something got lost,
    `blocked` those that read whole numbers or truth values alone of what comes from the place.
    """

    def __init__(self, at: Run, base: Run, place: Site | None = None) -> None:
        self.at, self.base = at, base
        self.graph: Graph = at.graph.unfused
        self.passed: list[Node] = []
        self.notes: list[str] = []
        self.blocked: list[str] = []
        parting = _parting(at.graph, base.graph)
        if parting or at.graph.fingerprint != base.graph.fingerprint:
            raise AnalyzerError(
                "The model computes the baseline by other operations than the input: its Python goes by values, as where "
                f"tokens are sent to experts{parting}. Expected a baseline that takes the same path, "
                "or method='ig'."
            )
        self._known: dict[TensorId, Pair] = {}
        self._starts: frozenset[TensorId] = frozenset()
        self._reached: set[TensorId] = set()
        self.start = TensorId("")
        if place is not None:
            self.start = place.id
            if place.id.is_path:
                (self.start,) = ids_in(at.graph.module(place.id).scope.output)
            key = Site(place.id)
            self._known[self.start] = _in_both(at[key], base[key])

    def pair(self, name: TensorId) -> Pair:
        """A value in both runs."""
        if name not in self._known:
            both = _in_both(self.at[name], self.base[name])
            unset = name in self.graph and self.graph[name].op in FILLS_NOTHING  # whatever lay there
            self._known[name] = Pair(torch.zeros_like(both.at), torch.zeros_like(both.base)) if unset else both
        return self._known[name]

    def followed_back(self, weights: Mapping[TensorId, Tensor], starts: Sequence[TensorId]) -> Shares:
        """How much a weighed sum of values grows with each number at the starts, which it all comes from."""
        self._starts, self._reached = frozenset(starts), set(starts)
        for node in self.graph.nodes:
            if node.op not in OF_SHAPES and any(parent.id in self._reached for parent in node.parents):
                self._reached.add(node.id)
                if node.id not in starts:
                    self._widen(node)
        todo = {name: weight for name, weight in weights.items() if name in self._reached}
        for node in reversed(self.graph.nodes):
            if node.id in todo and node.id not in starts:
                for name, share in self._shared(node, todo.pop(node.id)).items():
                    todo[name] = todo[name] + share if name in todo else share
        return {name: self._at_start(name, todo[name]) for name in starts if name in todo}

    def _at_start(self, name: TensorId, weight: Tensor) -> Tensor:
        """The weight of a value from which everything comes."""
        return weight

    def _widen(self, node: Node) -> None:
        """Make a value of both runs again in double precision, so that no difference is lost in rounding.

        Whole numbers and choices stay as they were recorded, and so does what cannot be made again.
        """
        if self._is_step(node):
            pair = self.pair(node.id)
            self._known[node.id] = Pair(pair.at.double(), pair.base.double())
            return
        if not (node.dtype.is_floating_point or node.dtype.is_complex) or node.op == OPAQUE or draws(node):
            return
        made = []
        for end in ("at", "base"):
            tensors = {
                parent.id: self._as_recorded(parent.id, getattr(self.pair(parent.id), end)) for parent in node.parents
            }
            try:
                made.append(run_again(self.graph, node, tensors))
            except (StructureError, RuntimeError):
                return
        self._known[node.id] = _in_both(*made)

    def _as_recorded(self, name: TensorId, value: Tensor) -> Tensor:
        return value.bool() if self.graph[name].dtype == torch.bool else value

    def _is_step(self, node: Node) -> bool:
        """Whether a comparison differs and is read as a factor alone, so that it is followed as a step from 0 to 1."""
        readers = self.graph.readers(node.id)
        if node.op not in COMPARISONS or not readers or not all(one.op in CHOOSERS for one in readers):
            return False
        choosers = [one for one in readers if one.op in ("where", "masked_fill")]
        infinite = any(abs(_filled(one)) == inf for one in choosers)
        whole = any(one.op == "to" and not one.dtype.is_floating_point for one in readers)
        pair = self.pair(node.id)
        return not (infinite or whole) and (not choosers or not torch.equal(pair.at, pair.base))

    def call(self, node: Node, weight: Tensor) -> Call:
        """One operation, with what it read in both runs."""
        own = dict.fromkeys(parent.id for parent in node.parents if parent.id in self._reached)
        live = {name: pair for name in own if _has_slope((pair := self.pair(name)).at)}
        held = {parent.id: self.pair(parent.id).at for parent in node.parents if parent.id not in live}
        return Call(self.graph, node, weight, self.pair(node.id), live, held)

    def _shared(self, node: Node, weight: Tensor) -> Shares:
        """What one operation passes on to the values that it read."""
        self.passed.append(node)
        call = self.call(node, weight)
        self._check(call)
        if not call.live:
            self.blocked.append(f"{node.id} ({node.op})")
            return {}
        try:
            shares = self._by_rule(call)
        except (StructureError, RuntimeError, ArithmeticError, LookupError) as error:
            raise AnalyzerError(
                f"{node.id} ({node.op}) cannot be followed back: {str(error).splitlines()[0]}. Take method='ig'."
            ) from error
        self._compare(call, call.out.weighed(call.weight), self._given(call, shares))
        return shares

    def _given(self, call: Call, shares: Shares) -> list[Tensor]:
        """What the numbers that were read are given."""
        return [call.live[name].weighed(share) for name, share in shares.items()]

    def _compare(self, call: Call, passed: Tensor, given: Sequence[Tensor]) -> None:
        """Name an operation in which something is lost."""
        ends = (call.weight * torch.maximum(call.out.at.abs(), call.out.base.abs())).nan_to_num(0.0, 0.0, 0.0)
        rounding = sum(float(one.abs().sum()) for one in (ends, *given))
        lost, size = abs(float(passed.sum()) - sum(float(one.sum()) for one in given)), float(passed.abs().sum())
        if not lost <= LEFT * size + 1e-6 * rounding:
            self.notes.append(f"{call.node.id} ({call.node.op}): {lost:.3g} of {size:.3g} that it passes on is lost")

    def _by_rule(self, call: Call) -> Shares:
        if call.node.op in CUT_OFF:
            return dict.fromkeys(call.live, call.weight)
        rule = rule_of(call)
        if rule is not None:
            return rule(call)
        if has_form(call.node):
            return self._through_form(call)
        self.notes.append(f"{call.node.id}: no rule for {call.node.op!r}, the mean gradient on the way stands in")
        return along(call)

    def _through_form(self, call: Call) -> Shares:
        """An operation followed back through what it is written out in."""
        names = list(call.live)

        def form(*args: Tensor) -> Tensor:
            return written_out(call, dict(zip(names, args, strict=True)))

        at, base = ([getattr(call.live[name], end) for name in names] for end in ("at", "base"))
        inner = TwoRuns(fmr.run(form, *at), fmr.run(form, *base))
        (end,) = ids_in(inner.at.graph.scopes[0].output)
        inputs = [TensorId(f"input:args.{n}") for n in range(len(names))]
        found = inner.followed_back({end: call.weight}, inputs)
        self.notes += [f"{call.node.id}, written out: {note}" for note in inner.notes]
        return {
            name: found.get(given, torch.zeros_like(call.live[name].at)) for name, given in zip(names, inputs, strict=True)
        }

    def why_nothing(self, place: Site) -> str:
        """Why nothing came back to a place."""
        if self.blocked:
            return (
                f"depends on {place!r} through comparisons, indices or whole numbers alone: {self.blocked[0]} reads them, "
                "which have no derivative. Expected a place behind them; method='occlusion' needs no derivative."
            )
        return (
            f"does not depend on {place!r} through any operation that was recorded. Expected a place that the target is "
            "computed from."
        )

    def _check(self, call: Call) -> None:
        """Name what differs and has no derivative; refuse what cannot be computed again."""
        node = call.node
        if node.op == OPAQUE or draws(node):
            why = "drew random numbers" if draws(node) else "was made by code that torch does not show"
            remedy = "Expected a model that draws none in eval mode" if draws(node) else "Take method='ig'"
            raise AnalyzerError(f"{node.id} {why}, so that nothing can be followed back through it. {remedy}.")
        for name in dict.fromkeys(parent.id for parent in node.parents if parent.id in self._reached):
            if name not in call.live and not torch.equal(self.pair(name).at, self.pair(name).base):
                self.notes.append(f"{node.id}: {name} differs between input and baseline and has no derivative")


def _parting(at: Graph, base: Graph) -> str:
    """Where two graphs begin to differ, in words."""
    for one, other in zip(at.nodes, base.nodes, strict=False):
        if (one.id, one.op, one.shape) != (other.id, other.op, other.shape):
            return f"; first {one.id} ({one.op} {list(one.shape)}), and {other.id} ({other.op} {list(other.shape)}) there"
    return ""


def _has_slope(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _in_both(at: Tensor, base: Tensor) -> Pair:
    """A value of two runs in double precision; what is no number in either of them is nothing."""
    wide = _wide(at)
    if _is_same(at, base):
        return Pair(wide, wide)
    other = _wide(base)
    if wide.shape != other.shape or not _has_slope(wide):
        return Pair(wide, other)
    none = torch.isnan(wide) & torch.isnan(other)
    return Pair(wide.masked_fill(none, 0), other.masked_fill(none, 0)) if bool(none.any()) else Pair(wide, other)


def _filled(node: Node) -> float:
    """The number that a choice fills in; 0 for a tensor."""
    given = node.argument("value", 2, 0.0)
    return float(given) if isinstance(given, int | float) else 0.0


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.complex128) if value.is_complex() else double(value)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one memory, as the weights of two runs are."""
    if one is other:
        return True
    alike = one.layout == other.layout == torch.strided and (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride()) and one.numel() > 0


def _of_target(target: Target, both: TwoRuns) -> dict[TensorId, Tensor]:
    """By how much the target grows with each value that it is measured on: itself followed back to these."""
    if target.site is not None:
        return _of_number(target.site, both)
    output, names = both.at.output, list(ids_in(both.at.graph.scopes[0].output))
    read = [[tensor for _, tensor in leaves(run.output)] for run in (both.at, both.base)]

    def measure(*args: Tensor) -> Tensor | None:
        given = target.measure(with_tensors(output, list(args)))
        return given.reshape(1) if isinstance(given, Tensor) else None

    if len(names) != len(read[0]):
        raise AnalyzerError("The model returns tensors that the recording does not name. Expected a site as target.")
    try:
        inner = type(both)(fmr.run(measure, *read[0]), fmr.run(measure, *read[1]))
    except StructureError as error:
        raise AnalyzerError(f"The target cannot be followed back: {error}") from error
    end = next(iter(ids_in(inner.at.graph.scopes[0].output)), None)
    if end is None:
        raise AnalyzerError(
            "The number that the target gave comes of no operation of torch on the output, so that it cannot be followed "
            "back. Expected a function in torch, as lambda output: output[:, 3]."
        )
    inputs = [TensorId(f"input:args.{n}") for n in range(len(names))]
    found = inner.followed_back({end: torch.ones(1, dtype=torch.double)}, inputs)
    both.notes += [f"in the target, {note}" for note in inner.notes]
    both.blocked += [f"{one} in the target" for one in inner.blocked]
    weights: dict[TensorId, Tensor] = {}
    for name, given in zip(names, inputs, strict=True):
        if given in found:
            weights[name] = weights[name] + found[given] if name in weights else found[given]
    return weights


def _of_number(site: Site, both: TwoRuns) -> dict[TensorId, Tensor]:
    """One at the number that a site names, zero elsewhere."""
    name = site.id
    if name.is_path:
        (name,) = ids_in(both.at.graph.module(site.id).scope.output)
    with torch.enable_grad():
        value = double(both.at[Site(site.id)]).clone().requires_grad_()
        (weight,) = torch.autograd.grad(chosen_part(site, value, both.at).sum(), value)
    return {name: weight}
