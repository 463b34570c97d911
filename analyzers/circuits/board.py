"""Circuits tested: a run in which every edge that is not kept carries what it carried in the corrupted run."""

from collections.abc import Sequence
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor, nn

import fmr
from analyzers.causal.metrics import by_pair, numbers
from analyzers.causal.opening import first_run
from analyzers.circuits.choice import Bools
from analyzers.circuits.wiring import Component, Input, wiring_of
from analyzers.prompts import Prompts
from analyzers.protocol import AnalyzerError
from fmr.structure.parts import Structure
from fmr.structure.proof.certificate import error, tolerance_of
from fmr.sweeps.metrics import Metric


class Board:
    """The clean and the corrupted run of some pairs, and what each node makes of what reaches it along kept edges.

    >>> both = analyzers.prompts.pairs(clean, corrupted, model, tokenizer)
    >>> board = Board(model, *both, lambda output: output.logits[:, -1, 3])
    >>> board.test(board.wiring.allowed).equal(board.clean)
    True

    What a reader hears is the stream of the corrupted run and, for each kept edge to it, the difference between what the
    writer writes now and what it wrote there: one product of kept edges and differences for all readers of a point. Readers
    that hear the same are computed once; those that hear what one of the two runs holds take what they made in it, to the
    bit. From one test to the next, only nodes with other edges or other writers before them are computed again.
    """

    def __init__(
        self, model: nn.Module, clean: Prompts, corrupted: Prompts, metric: Metric, structure: Structure | None = None
    ) -> None:
        self.structure = structure = structure or fmr.locate(first_run(model, corrupted))
        with torch.no_grad():
            self.noised = fmr.run(model, **corrupted.inputs)
            self.wiring = wiring_of(structure, self.noised.last)
            self.whole = fmr.run(model, **clean.inputs, keep=self.wiring.values)
        self.metric, self.pairs = metric, len(clean)
        self.embedding = structure.embedding.id if structure.embedding else self.wiring.start
        self.clean, self.corrupted = self.measured(self.whole), self.measured(self.noised)
        self._check_gap()
        self._check_beside()
        self.differences = self._differences()
        self._check_sums()
        self.now, self.forwards, self.tests = torch.zeros_like(self.differences), 2, 0
        self.last: Bools | None = None
        self.now[0] = self.differences[0]
        self.is_clean = np.arange(len(self.wiring.writers)) == 0
        self.moved = self.is_clean.copy()

    # ---- what is compared

    def measured(self, run: fmr.Run) -> Tensor:
        """The metric of a run, one number for each pair."""
        return numbers(by_pair(self.metric, run, self.pairs), -1)

    @property
    def gap(self) -> float:
        """How far the metric goes from the corrupted run to the clean one, summed over pairs."""
        return float((self.clean - self.corrupted).sum())

    @torch.no_grad()
    def _differences(self) -> Tensor:
        """What each writer writes in the clean run more than in the corrupted one, (writers, numbers of the stream)."""
        start = self.wiring.start
        found = [(self.wide(self.whole[start]) - self.wide(self.noised[start])).flatten()[None]]
        for component in self.wiring.components:
            name = component.write.starts[0]
            moved = self.wide(self.whole[name]) - self.wide(self.noised[name])
            found.append(self.wide(component.written(moved.to(self.whole[name].dtype), self.noised.last)))
        return torch.cat(found)

    def share(self, values: Tensor) -> float:
        """The share of the answer that a circuit's metric, by pair, has kept."""
        return float((values - self.corrupted).sum()) / self.gap

    def wide(self, value: Tensor) -> Tensor:
        """A value in the precision in which differences are added up."""
        return value if value.dtype == torch.float64 else value.float()

    def _check_gap(self) -> None:
        if abs(self.gap) < 1e-6 * max(1.0, float(self.corrupted.abs().sum())):
            raise AnalyzerError(
                f"The metric is {float(self.clean.mean()):.4g} on the clean prompts and on the corrupted ones, so that "
                "there is no answer to carry. Expected prompts with other answers, or another metric."
            )

    def _check_beside(self) -> None:
        """Raise where readers read what differs between the runs and is not of the stream."""
        for name in sorted(self.wiring.beside):
            if not self.whole[name].equal(self.noised[name]):
                raise AnalyzerError(
                    f"{name} is read beside the residual stream and differs between clean and corrupted prompts, so that "
                    "edges of the stream are not all that carries the answer. Expected the same masks and positions."
                )

    def _check_sums(self) -> None:
        """Raise where what the nodes write does not add up to the stream that is read."""
        for one in self.wiring.inputs:
            clean, noised = self.whole[one.point].flatten(), self.noised[one.point].flatten()
            off = error(self.differences[: one.before].sum(0) + self.wide(noised), self.wide(clean))
            if off > tolerance_of(clean):
                raise AnalyzerError(
                    f"What the nodes write adds up to {one.point} with an error of {off:.0e}, expected "
                    f"{tolerance_of(clean):.0e}: what a head of {self.wiring.graph.model} writes is not linear in its z, or "
                    "something else writes to the stream."
                )

    # ---- a test

    def test(self, kept: Bools) -> Tensor:
        """The metric by pair if only these edges (writers, readers) carry what their writers write."""
        fresh = np.zeros(len(self.wiring.writers), bool)
        with torch.no_grad():
            for component in self.wiring.components:
                if self._is_stale(component, kept, fresh):
                    self._compute(component, kept, fresh)
            last = self.wiring.inputs[-1]
            (heard,) = self._heard([last], kept)
            self.last, self.tests = kept.copy(), self.tests + 1
            if isinstance(heard, fmr.Run):
                return self.clean if heard is self.whole else self.corrupted
            return self.measured(fmr.replay(self.noised, {last.point: fmr.edits.Replace(heard)}))

    def _is_stale(self, component: Component, kept: Bools, fresh: Bools) -> bool:
        """Whether a component hears something else than in the last test."""
        reads = slice(component.readers.start, component.readers.stop)
        if self.last is None or not np.array_equal(kept[:, reads], self.last[:, reads]):
            return True
        return bool(kept[fresh, reads].any())

    def _heard(self, inputs: Sequence[Input], kept: Bools) -> list[Tensor | fmr.Run]:
        """The stream that each reader of a point hears, or the run in which it heard the same."""
        before, there = inputs[0].before, self.noised[inputs[0].point]
        mask = kept[:before, inputs[0].first : inputs[-1].readers.stop].T
        whole = (mask & self.is_clean[:before]).all(1)
        rows, which = np.unique(mask & self.moved[:before] & ~whole[:, None], axis=0, return_inverse=True)
        used = np.flatnonzero(rows.any(0))
        matrix = torch.as_tensor(rows[:, used], dtype=self.now.dtype, device=self.now.device)
        sums = (matrix @ self.now[used]).view(-1, *there.shape)
        streams = [(self.wide(there) + total).to(there.dtype) for total in sums]
        told = zip(which.reshape(-1), whole, strict=True)
        return [self.whole if clean else streams[row] if rows[row].any() else self.noised for row, clean in told]

    def _compute(self, component: Component, kept: Bools, fresh: Bools) -> None:
        """What the writers of a component write, given what its readers hear."""
        every, states = [], []
        for _, inputs in groupby(component.inputs, key=lambda one: one.point):
            every += self._heard(list(inputs), kept)
        for fed in component.feeds.T:
            own = [every[reader] for reader in np.flatnonzero(fed)]
            states.append(own[0] if isinstance(own[0], fmr.Run) and all(one is own[0] for one in own) else None)
        new = torch.zeros_like(self.now[component.writers.start : component.writers.stop])
        mixed = [place for place, state in enumerate(states) if state is None]
        if mixed:
            name = component.core.end
            streams = iter(every)
            given = {one.value: self._filled(one, list(islice(streams, len(one.groups)))) for one in component.inputs}
            made = component.core(given, self.noised.last)
            new[mixed] = self.wide(component.written(made - self.noised[name], self.noised.last, mixed))
        for place, (writer, state) in enumerate(zip(component.writers, states, strict=True)):
            if state is self.whole:
                new[place] = self.differences[writer]
            self.is_clean[writer], self.moved[writer] = state is self.whole, state is not self.noised
            fresh[writer] = not new[place].equal(self.now[writer])
            self.now[writer] = new[place]

    def _filled(self, one: Input, heard: list[Tensor | fmr.Run]) -> Tensor:
        """The value of an input, each reader's share of it made of what that reader hears."""
        value, known = self.noised[one.value].clone(), dict[int, Tensor]()
        for group, stream in zip(one.groups, heard, strict=True):
            if id(stream) not in known:
                known[id(stream)] = (
                    stream[one.value] if isinstance(stream, fmr.Run) else one.way({one.point: stream}, self.noised.last)
                )
            for part, made in zip(one.part(value, group), one.part(known[id(stream)], group), strict=True):
                part.copy_(made)
        return value
