"""Many edited runs asked for at once: as rows of one replay, else of one forward where rows stay apart, else one by one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fmr.edits.values import Edit
from fmr.errors import EditError, ReplayError, whole_number
from fmr.nests import leaves, taken
from fmr.nodes import Key
from fmr.sweeps.bars import bar
from fmr.sweeps.batched import Batched
from fmr.sweeps.grid import Grid
from fmr.sweeps.metrics import READY, Metric, logits_of
from fmr.sweeps.onreplay import OnReplay
from fmr.sweeps.rows import tolerance
from fmr.sweeps.task import Asked, AsksForGradients, Task

Way = tuple[dict[int, Tensor], int]
"""What a way measured of each row, and how many rows went at once."""

CHECKS = 2
"""How many cells are run one by one besides, to be compared: the one that changed most, the others at random places."""


def sweep(
    model: nn.Module,
    inputs: Any,
    sites: Sequence[Asked],
    edit: Edit | None,
    metric: Metric,
    at: int | None = None,
    rows: int | None = None,
    *,
    freeze: Key | Iterable[Key] = (),
    base: Mapping[Key, Edit | Sequence[Edit]] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Grid:
    """Measure a model once for each site, edited there alone; as few forwards as the model allows.

    >>> sites = [layer.resid_post.at(positions=t) for layer in structure.layers for t in range(6)]
    >>> grid = fmr.sweep(model, inputs, sites, edits.Interchange(other_run), logit_diff(right=3, wrong=7), progress=False)
    >>> grid.values.view(-1, 6).shape
    torch.Size([4, 6])

    inputs: a tensor, a tuple or a dict of arguments; several examples are measured each for itself. sites: of each run a
    site, a tuple of several, or a mapping from sites to edits of their own, with edit=None. edit: for all of them; the
    source of an `Interchange` may be other inputs, which are run once. metric: of the model's output, one number or one for
    each example, which it may not keep, since the next run overwrites it; ready ones read the tokens that a site would mean
    by their `at`. at: the column of the logits that a metric of your own reads, if it reads one alone. rows: how many runs
    at once; by default as many as fit into a quarter of the free memory or 128 MB. freeze: values that keep what they are
    without edits, but for edits of themselves, as in path patching. base: edits that every run has, the one without others
    too, as the noise of causal tracing; of more examples than there are, they do the same to each one over and over. seed:
    of the cells that are run one by one besides. progress: show a bar; None shows it on a terminal only.

    The answer is never a guess: rows that mix are found out by tainted and by clean rows between them, and other ways are
    taken, which `how` and `why` tell. Values have no gradients; a metric that computes some itself is measured run by run.
    """
    if not isinstance(sites, Sequence) or isinstance(sites, str):
        raise EditError(f"sites is {type(sites).__name__}, expected a list with what each run edits: [site, site, ...].")
    if not sites:
        raise EditError("sites is empty: expected at least one site to edit.")
    if rows is not None and (type(rows) is not int or rows < 1):
        raise EditError(f"rows={rows!r}: expected how many runs go at once, 1 or more, or None for as many as fit.")

    def begun() -> _Sweep:
        return _Sweep(Task(model, inputs, sites, edit, metric, freeze, base), at, rows, seed, progress)

    with suppress(AsksForGradients), torch.no_grad():
        return begun().run()
    with torch.enable_grad():
        return begun().one_by_one("the metric asks for gradients, which rows would share")


class _Sweep:
    """One sweep under way: the ways in turn, each checked by cells that are run one by one besides."""

    def __init__(self, task: Task, at: int | None, rows: int | None, seed: int, progress: bool | None) -> None:
        self.task, self.rows, self.seed, self.progress = task, rows, seed, progress
        self.at = None if at is None else _column(at, task)
        self.reasons: dict[str, str] = {}
        self.alone: dict[int, Tensor] = {}
        self.slack: dict[int, float] = {}

    def run(self) -> Grid:
        """The first way whose rows stay apart, else the loop."""
        for how, go in self._ways():
            try:
                found, size = go()
                return self._grid(how, size, found, self._spot_checks(found))
            except ReplayError as refused:
                self.reasons[str(refused)] = how
        return self.one_by_one()

    def one_by_one(self, *why: str) -> Grid:
        """The loop, and why no rows are made, if that is not known yet."""
        self.reasons |= dict.fromkeys(why, "rows")
        return self._grid("loop", 1, self._looped(), 0.0)

    def _ways(self) -> Iterator[tuple[str, Callable[[], Way]]]:
        try:
            self.task.refuse_chosen_paths()
        except ReplayError as refused:
            self.reasons[str(refused)] = "rows"
            return
        try:
            rows = OnReplay(self.task, self.at, self.rows, self.progress)
            yield "rows, cut", lambda: (rows.run(cuts=True), rows.size)
            yield "rows", lambda: (rows.run(cuts=False), rows.size)
        except ReplayError as refused:
            self.reasons[str(refused)] = "rows"
        batches = Batched(self.task, self.rows, self.progress)
        yield "batched", lambda: (batches.run(), batches.size)

    def _looped(self) -> dict[int, Tensor]:
        """Each run by itself; a model that has changed by the end keeps something that could not be put back."""
        every = bar(range(len(self.task.rows)), "runs", self.progress)
        found = {row: self._one(row) for row in every}
        again = self.task.measure(self.task.forward(self.task.call, self.task.always, keep="none").output)
        if not torch.allclose(again, self.task.plain, rtol=0, atol=self._scale(again) * self._tolerance, equal_nan=True):
            raise EditError(
                "The model gives another answer to the same inputs when it is called again, though its buffers, what its "
                "modules hold and the random state were put back. Expected a model that is a function of its inputs: clear "
                "what it remembers between calls."
            )
        return found

    def _one(self, row: int) -> Tensor:
        if row not in self.alone:
            self.alone[row] = self.task.measure(self.task.alone(row))
        return self.alone[row]

    def _rounding(self, row: int) -> float:
        """How far rounding may take a row from its run by itself."""
        if row not in self.slack:
            output = self.task.alone(row)
            self.alone[row], self.slack[row] = self.task.measure(output), self.task.rounding(output)
        return self.slack[row]

    def _spot_checks(self, found: dict[int, Tensor]) -> float:
        """The largest difference of a few cells that are run one by one, relative to the largest value."""
        change = torch.stack([(found[row] - self.task.plain).abs().max() for row in range(len(found))]).nan_to_num()
        chosen = [int(change.argmax())]
        others = [row for row in range(len(found)) if row not in chosen]
        chosen += random.Random(self.seed).sample(others, min(CHECKS - 1, len(others)))
        scale = self._scale(*found.values())
        scale, errors = self._scale(*found.values()), []
        for row in chosen:
            slack = self._rounding(row) + self._tolerance / 10 * scale
            errors.append(float((self._one(row) - found[row]).abs().max()))
            if not errors[-1] <= slack:
                raise ReplayError(
                    f"a run by itself differs from its row by {errors[-1]:.1e}, and roundings of its output by {slack:.1e}"
                )
        return max(errors) / scale

    @staticmethod
    def _scale(*values: Tensor) -> float:
        return max(float(value.abs().max()) for value in values) or 1.0

    @property
    def _tolerance(self) -> float:
        floats = [tensor.dtype for _, tensor in leaves(taken(self.task.base.output)) if tensor.is_floating_point()]
        return max(map(tolerance, floats), default=0.0)

    def _grid(self, how: str, size: int, found: dict[int, Tensor], error: float) -> Grid:
        task, why = self.task, "; ".join(f"no {way}: {reason}" for reason, way in self.reasons.items())
        values = torch.stack([found[row] for row in range(len(task.rows))])
        return Grid(task.sites, values, task.plain, how, why, min(size, len(values)), task.forwards, error)


def _column(at: Any, task: Task) -> int:
    """The column of the logits that a metric of the user's own reads."""
    if isinstance(task.metric, READY):
        raise EditError(
            f"at={at!r} in a sweep with {type(task.metric).__name__}, which has its own: logit_diff(3, 7, at=-1)."
        )
    logits, column = logits_of(task.base.output), whole_number(at)
    many = logits.shape[1] if logits.dim() > 1 else 0
    if column is None or not -many <= column < many:
        raise EditError(
            f"at={at!r}: expected the column of the output that the metric reads, and it has shape {tuple(logits.shape)}."
        )
    return column
