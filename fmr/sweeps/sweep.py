"""Many edited runs asked for at once: as rows of one replay where rows stay apart, else one by one."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmr.edits.editor import Editor
from fmr.edits.values import Edit
from fmr.errors import EditError, ReplayError
from fmr.ids import Site, TensorId
from fmr.nests import ids_in, leaves, mapped
from fmr.nodes import Key, id_of
from fmr.runs.run import Pass, Run
from fmr.runs.sources import columns_of, read_source
from fmr.runs.track import run as run_once
from fmr.sweeps.budget import rows_that_fit
from fmr.sweeps.metrics import Metric
from fmr.sweeps.rowrun import RowRun
from fmr.sweeps.rows import FEW, MORE, Grown, grown, repeated
from fmr.watching.calls import unwatched

if TYPE_CHECKING:
    import pandas

Sites = Key | Sequence[Key]
"""What one run of a sweep edits: a site, or several at once."""

CHECKS = 2
"""How many cells are run one by one besides, at random places, to be compared."""


@dataclass(frozen=True, eq=False)
class Grid:
    """What a sweep measured: one value for each site (and example), and how it came to them.

    >>> grid.values.view(12, 12)

    `values` has a row for each site: one number, or one for each example. `base` is the metric without edits. `how` is
    "rows" (of a replay), "batched" (from the start) or "loop"; `why` says why the ways before it were left. `forwards`
    counts calls of the model; `error` is the largest difference of the cells that were run one by one besides, relative to
    the largest value.
    """

    sites: tuple[tuple[Site, ...], ...]
    values: Tensor
    base: Tensor
    how: str
    why: str
    forwards: int
    error: float

    def table(self) -> "pandas.DataFrame":
        """One line for each site: what was edited, the metric, and how far it is from that without edits."""
        import pandas

        values, base = self.values.reshape(len(self.sites), -1).mean(1), float(self.base.mean())
        lines = [
            {"site": " + ".join(map(repr, sites)), "value": float(value), "change": float(value) - base}
            for sites, value in zip(self.sites, values, strict=True)
        ]
        return pandas.DataFrame(lines)

    def __repr__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        low, high = float(self.values.min()), float(self.values.max())
        return (
            f"Grid of {len(self.sites)} edited runs by {self.how}{why}: values {low:.4g} to {high:.4g}, without edits "
            f"{float(self.base.mean()):.4g}; {self.forwards} forwards, spot checks within {self.error:.1e}"
        )


def sweep(
    model: nn.Module,
    inputs: Any,
    sites: Sequence[Sites],
    edit: Edit,
    metric: Metric,
    at: int | None = None,
    rows: int | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Grid:
    """Measure a model once for each site, edited there alone; as few forwards as the model allows.

    >>> sites = [layer.resid_post.at(positions=t) for layer in structure.layers for t in range(12)]
    >>> grid = fmr.sweep(model, corrupted, sites, edits.Interchange(clean_run), edits.logit_diff(right, wrong))
    >>> grid.values.view(12, 12)

    inputs: a tensor, a tuple or a dict of arguments. sites: of each run, one or a tuple of several. edit: for all of them.
    metric: of the model's output, one number or one for each example. at: the position that the metric reads, if it
    reads one alone. rows: how many runs at once; by default as many as fit into a quarter of the free memory or half a
    gigabyte. seed: of the cells that are run one by one besides.

    The answer is never a guess: rows that mix are found out by tainted and by clean rows between them, and other ways are
    taken, which `how` and `why` tell.
    """
    asked = tuple(_sites(one) for one in sites)
    if not asked:
        raise EditError("sites is empty: expected at least one site to edit.")
    with torch.no_grad():
        return _Sweep(model, _Call.of(inputs), asked, edit, metric, rows, seed, progress).run()


def _sites(one: Sites) -> tuple[Site, ...]:
    several = one if isinstance(one, (list, tuple)) else (one,)
    return tuple(key if isinstance(key, Site) else Site(id_of(key)) for key in several)


@dataclass(frozen=True)
class _Call:
    """The arguments of a model's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> "_Call":
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        return cls(inputs, {}) if isinstance(inputs, tuple) else cls((inputs,), {})

    @property
    def examples(self) -> int:
        """How many examples there are: the length of the first tensor."""
        first = next((tensor for _, tensor in leaves((self.args, self.kwargs)) if tensor.dim()), None)
        if first is None:
            raise EditError("inputs hold no tensor with examples: expected a tensor, a tuple or a dict of arguments.")
        return len(first)

    def times(self, many: int) -> "_Call":
        """The same examples again and again."""
        args, kwargs = repeated((self.args, self.kwargs), self.examples, many)
        return _Call(args, kwargs)


class _Sweep:
    """One sweep under way."""

    def __init__(
        self,
        model: nn.Module,
        call: _Call,
        sites: tuple[tuple[Site, ...], ...],
        edit: Edit,
        metric: Metric,
        rows: int | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.call, self.sites, self.edit, self.metric = model, call, sites, edit, metric
        self.rows, self.seed, self.progress = rows, seed, progress
        self.forwards = 0
        self.found: dict[int, Tensor] = {}

    def run(self) -> Grid:
        """The ways in turn, and the cells that are run one by one besides."""
        base = self._forward(self.call, keep="none")
        plain = self._measure(base.output)
        how, why, error = "rows", "", 0.0
        try:
            self._by_rows(base)
            error = self._spot_checks()
        except ReplayError as refused:
            how, why = "loop", f"no rows: {refused}"
            self._by_loop()
        return Grid(self.sites, self._values(), plain, how, why, self.forwards, error)

    def _values(self) -> Tensor:
        return torch.stack([self.found[row] for row in range(len(self.sites))])

    def _forward(self, call: _Call, **more: Any) -> Run:
        self.forwards += 1
        return run_once(self.model, *call.args, **more, **call.kwargs)

    def _measure(self, output: Any) -> Tensor:
        found = torch.as_tensor(self.metric(output)).detach()
        found = found.clone()  # a view would keep all rows alive
        if found.dim() > 1 or (found.dim() == 1 and len(found) not in (1, self.call.examples)):
            raise EditError(
                f"The metric returned shape {tuple(found.shape)}, expected one number or one for each of the "
                f"{self.call.examples} examples."
            )
        return found

    # ---- the ways

    def _by_loop(self) -> None:
        for row, sites in enumerate(tqdm(self.sites, "runs", disable=not self.progress)):
            self.found[row] = self._one(sites)

    def _one(self, sites: tuple[Site, ...]) -> Tensor:
        return self._measure(self._forward(self.call, edits=dict.fromkeys(sites, self.edit), keep="none").output)

    def _by_rows(self, base: Run) -> None:
        few = self._forward(self.call.times(FEW))
        more = self._forward(self.call.times(MORE), keep="none")
        kind = grown(few.graph, more.graph)
        plans = sorted(range(len(self.sites)), key=lambda row: min(self._place(kind, site) for site in self.sites[row]))
        wanted = set(ids_in(kind.graph.scopes[0].output))
        rows = self.rows or rows_that_fit(kind, [self.sites[row] for row in plans])
        frames = columns_of(base.last)
        with unwatched():
            for start in tqdm(range(0, len(plans), rows), "rows", disable=not self.progress or len(plans) <= rows):
                self._chunk(kind, few.last, plans[start : start + rows], wanted, frames, base)

    def _place(self, kind: Grown, site: Site) -> int:
        return kind.graph.place(site.id)

    def _chunk(self, kind: Grown, few: Pass, plans: list[int], wanted: set[TensorId], frames: Any, base: Run) -> None:
        editors = [Editor(dict.fromkeys(self.sites[row], self.edit), read_source) for row in plans]
        going = RowRun(kind, few, editors, frames, wanted)
        going.run()
        going.check()
        for place, row in enumerate(plans):
            self.found[row] = self._measure(_of_row(base.output, kind, going, place))

    def _spot_checks(self) -> float:
        """The largest difference of a few cells that are run one by one."""
        chosen = random.Random(self.seed).sample(range(len(self.sites)), min(CHECKS, len(self.sites)))
        values = self._values()
        scale = float(values.abs().max()) or 1.0
        error = max(float((self._one(self.sites[row]) - values[row]).abs().max()) for row in chosen) / scale
        if not error <= 1e-4:
            raise ReplayError(f"a run by itself differs from its row by {error:.1e} of the largest value")
        return error


def _of_row(output: Any, kind: Grown, going: RowRun, row: int) -> Any:
    """An output of the model as it is in one row."""
    names = ids_in(kind.graph.scopes[0].output)
    return mapped(output, lambda _: going.outcome(next(names), row))
