"""The search for the edges that carry an answer: scored, chosen, and tested beside random ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from analyzers.causal.opening import Paired
from analyzers.circuits.board import Board
from analyzers.circuits.choice import Bools, connected, counted, strongest
from analyzers.circuits.circuit import Circuit
from analyzers.circuits.scores import by_gradients, by_removal
from analyzers.numbers.embed import Floats
from analyzers.protocol import AnalyzerError, Given
from fmr.errors import number_of
from fmr.sweeps.bars import bar
from fmr.sweeps.metrics import Metric

Method = Literal["eap", "eap-ig", "acdc"]

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""The sizes of a curve, as shares of all edges."""

EDGES, THRESHOLD = 0.05, 0.01
"""What is chosen where nothing is asked for: a share of the edges; of an exact search, those that change more than this."""


class CircuitSearch(Paired):
    """Find the edges between embedding, heads, memories and logits that carry an answer, and test them.

    >>> search = CircuitSearch(model, tokenizer)
    >>> circuit = search.run(clean, corrupted, logit_diff(right, wrong), progress=False)
    >>> circuit.save_svg("circuit.svg")

    model: any module with a residual stream that `fmr.locate` finds, norms before what reads it, in eval mode. tokenizer:
    for prompts and answers that are text.

    An edge leads from what a node adds to the stream to what one reader hears of it: the queries, keys or values of a head
    (of all heads that share them), a memory, the logits. Its score is the share of the answer, metric of the clean run less
    that of the corrupted one, that goes over it. By "eap" it is the difference of the writer between the runs times the
    gradient of the metric at the reader; by "eap-ig" with the mean gradient over runs whose embeddings lie between the two;
    by "acdc" what patching the edge changes, exactly, one after the other from the logits up. A circuit is then run: every
    edge outside of it carries what it carried in the corrupted run.

    Source: A. Syed, C. Rager, A. Conmy, "Attribution patching outperforms automated circuit discovery", 2023 (eap); M.
    Hanna, S. Pezzelle, Y. Belinkov, "Have faith in faithfulness", 2024 (eap-ig); A. Conmy et al., "Towards automated
    circuit discovery for mechanistic interpretability", 2023 (acdc).
    """

    def run(
        self,
        clean: Given,
        corrupted: Given,
        metric: Metric,
        method: Method = "eap-ig",
        *,
        edges: int | float | None = None,
        threshold: float | None = None,
        sizes: Sequence[int | float] = SHARES,
        steps: int = 5,
        signed: bool = False,
        random: int = 3,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Circuit:
        """Score all edges, choose a circuit, and test it and others of several sizes.

        >>> search.run(clean, corrupted, logit_diff(right, wrong), edges=0.02, progress=False).faithfulness()

        clean, corrupted: prompts that belong together one by one, with as many tokens each. metric: of the model's output,
        one number for each example, larger for the clean answer; answers are one token each. edges: how many to choose, or
        which share of all; threshold: instead of that, the least score. Where neither is given it is a twentieth of them,
        for "acdc" those whose patching changes more than 0.01 of the answer. sizes: of the circuits that are tested besides.
        steps: how many gradients "eap-ig" averages. signed: leave out what works against the answer, however much it does:
        fewer edges carry more of it then, and may carry more than all of them. random: how many random circuits are tested
        for each size, 0 for none. seed: of these and of the intervals. "acdc" runs a circuit for each edge: it is meant for
        small models. progress: show a bar; None shows it on a terminal only.
        """
        _check(method, edges, threshold, steps, random)
        first, second, metric = self._pairs(clean, corrupted, metric)
        structure, _ = self._located(second)
        board = Board(self.model, first, second, metric, structure)
        allowed, feeds, total = board.wiring.allowed, board.wiring.feeds, int(board.wiring.allowed.sum())
        many = {counted(one, total, "sizes") for one in sizes}
        if threshold is None and method == "acdc":
            threshold = THRESHOLD
        asked = counted(EDGES if edges is None else edges, total, "edges")
        if method == "acdc":
            scores = strengths = by_removal(board, threshold or 0.0, progress)
        else:
            scores = by_gradients(board, self.model, first, 1 if method == "eap" else steps, progress)
            strengths = scores if signed else np.abs(scores)
        if threshold is None:
            chosen = strongest(strengths, allowed, feeds, asked)
        else:
            chosen = connected(allowed & (strengths >= threshold), feeds)
            asked = int(chosen.sum())
        if not chosen.any():
            limit = f"edges={asked}" if threshold is None else f"threshold={threshold}"
            raise AnalyzerError(
                f"No edges from the embedding to the logits are left with {limit}; the strongest has a score of "
                f"{strengths.max():.3g}. Expected more edges, or a lower threshold."
            )
        circuits = {one: strongest(strengths, allowed, feeds, one) for one in many} | {asked: chosen}
        circuits = {one: circuits[one] for one in sorted(circuits) if circuits[one].any()}
        settings = Settings(method, steps, threshold, signed, random, seed)
        return _tested(board, scores, chosen, circuits, settings, progress)


class Settings(NamedTuple):
    """What was asked for."""

    method: Method
    steps: int
    threshold: float | None
    signed: bool
    random: int
    seed: int

    def __str__(self) -> str:
        steps = f", {number_of(self.steps, 'step')}" if self.method == "eap-ig" else ""
        return f"{self.method}{steps}{', signed' if self.signed else ''}"


def _tested(
    board: Board, scores: Floats, chosen: Bools, circuits: dict[int, Bools], settings: Settings, progress: bool | None
) -> Circuit:
    """The result: every circuit run, all but it, and random ones of its size."""
    wiring, draw, rows = board.wiring, np.random.default_rng(settings.seed), []
    for kept in bar(list(circuits.values()), "circuits", progress):
        size = int(kept.sum())
        null = [strongest(draw.random(kept.shape), wiring.allowed, wiring.feeds, size) for _ in range(settings.random)]
        rows.append(torch.stack([board.test(one) for one in (kept, wiring.allowed & ~kept, *null)]))
    values, ends = torch.stack(rows), np.argwhere(wiring.allowed)
    return Circuit(
        method=str(settings),
        model=wiring.graph.model,
        writers=wiring.writers,
        readers=wiring.readers,
        ends=ends,
        scores=scores[tuple(ends.T)],
        kept=chosen[tuple(ends.T)],
        feeds=np.argwhere(wiring.feeds),
        asked=np.array(list(circuits)),
        sizes=np.array([kept.sum() for kept in circuits.values()]),
        measured=values[:, 0],
        without=values[:, 1],
        random=values[:, 2:],
        clean=board.clean,
        corrupted=board.corrupted,
        threshold=float("nan") if settings.threshold is None else settings.threshold,
        signed=settings.signed,
        seed=settings.seed,
        forwards=board.forwards,
        tests=board.tests,
    )


def _check(method: str, edges: Any, threshold: Any, steps: Any, random: Any) -> None:
    if method not in get_args(Method):
        raise AnalyzerError(f"method={method!r}: expected one of {', '.join(map(repr, get_args(Method)))}.")
    if edges is not None and threshold is not None:
        raise AnalyzerError(f"edges={edges!r} and threshold={threshold!r} both say what is chosen. Expected one of them.")
    if method == "acdc" and edges is not None:
        raise AnalyzerError(f"edges={edges!r}: 'acdc' decides edge by edge. Expected threshold=, such as {THRESHOLD}.")
    if threshold is not None and not (isinstance(threshold, (int, float)) and threshold > 0):
        raise AnalyzerError(f"threshold={threshold!r}: expected a share of the answer above 0, such as {THRESHOLD}.")
    for name, value, least in (("steps", steps, 1), ("random", random, 0)):
        if type(value) is not int or value < least:
            raise AnalyzerError(f"{name}={value!r}: expected a number from {least} on.")
