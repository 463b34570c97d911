"""Many edited runs asked for at once: as rows of one replay where rows stay apart, else one by one."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmr.edits.editor import Editor
from fmr.edits.places import Frame, parts
from fmr.edits.values import Edit
from fmr.errors import EditError, FmrError, IdError, ReplayError
from fmr.graph.graph import Graph
from fmr.ids import Site, TensorId, within
from fmr.nests import ids_in, leaves, taken
from fmr.nodes import Key, id_of
from fmr.runs.outputs import exchanged
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.runs.sources import columns_of, read_source
from fmr.runs.track import run as run_once
from fmr.sweeps.budget import rows_that_fit
from fmr.sweeps.cut import WHOLE, Cut, Positions, Span
from fmr.sweeps.metrics import Metric, logits_of
from fmr.sweeps.reach import reached
from fmr.sweeps.rowrun import RowRun
from fmr.sweeps.rows import FEW, MORE, Grown, grown, repeated
from fmr.watching.calls import unwatched

if TYPE_CHECKING:
    import pandas

Sites = Key | Sequence[Key]
"""What one run of a sweep edits: a site, or several at once."""

GROUPS = 8
"""Into how many groups of neighbouring positions rows are parted at most: more save positions and cost calls."""

CHECKS = 2
"""How many cells are run one by one besides, at random places, to be compared."""


@dataclass(frozen=True, eq=False)
class Grid:
    """What a sweep measured: one value for each site (and example), and how it came to them.

    >>> grid = fmr.sweep(model, inputs, [site, block.z.at(heads=1)], edits.Zero(), logit_diff(3, 7), progress=False)
    >>> grid.how
    'rows, cut'

    `values` has a row for each site: one number, or one for each example. `base` is the metric without edits. `how` is
    "rows, cut" (of a replay, with the positions that matter alone), "rows" or "loop"; `why` says why others were left.
    `forwards` counts calls of the model; `error` is the largest difference of the cells that were run one by one besides,
    relative to the largest value.
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

    >>> sites = [layer.resid_post.at(positions=t) for layer in structure.layers for t in range(6)]
    >>> grid = fmr.sweep(model, inputs, sites, edits.Interchange(other_run), logit_diff(right=3, wrong=7), progress=False)
    >>> grid.values.view(-1, 6).shape
    torch.Size([4, 6])

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
        return _Sweep(model, _Call.of(inputs), asked, edit, metric, at, rows, seed, progress).run()


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
        at: int | None,
        rows: int | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.call, self.sites, self.edit, self.metric = model, call, sites, edit, metric
        self.at, self.rows, self.seed, self.progress = at, rows, seed, progress
        self.forwards = 0
        self.recorded: tuple[Pass, Grown] | None = None
        self.found: dict[int, Tensor] = {}
        self.placed = list(sites)

    def run(self) -> Grid:
        """The ways in turn, and the cells that are run one by one besides."""
        base = self._forward(self.call, keep="none")
        plain = self._measure(base.output)
        reasons: list[str] = []
        for how, cuts in (("rows, cut", True), ("rows", False)):
            try:
                self._by_rows(base, cuts)
                error = self._spot_checks()
                return Grid(self.sites, self._values(), plain, how, "; ".join(reasons), self.forwards, error)
            except ReplayError as refused:
                reasons.append(f"no {how}: {refused}")
        self._by_loop()
        return Grid(self.sites, self._values(), plain, "loop", "; ".join(reasons), self.forwards, 0.0)

    def _values(self) -> Tensor:
        return torch.stack([self.found[row] for row in range(len(self.sites))])

    def _forward(self, call: _Call, **more: Any) -> Run:
        """A run of the model, which leaves its buffers and the random state as they were."""
        self.forwards += 1
        with torch.random.fork_rng(devices=[]), _restored(self.model):
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

    def _by_rows(self, base: Run, cuts: bool) -> None:
        """All runs as rows of replays; with `cuts`, only the positions that edits reach and that the metric needs."""
        few, kind = self._recordings()
        frames = self._frames(few)
        self.placed = [tuple(_by_id(site, kind.graph) for site in several) for several in self.sites]
        wanted = self._wanted(base.output, kind)
        cut = self._cut(kind, few, frames, set(wanted)) if cuts else None
        with unwatched():
            groups = self._groups(kind, few, frames, cut)
            size = self.rows or rows_that_fit(kind, self.placed)
            chunks = [(start, rows[at : at + size]) for start, rows in groups for at in range(0, len(rows), size)]
            for start, rows in tqdm(chunks, "rows", disable=not self.progress or len(chunks) < 3):
                editors = [Editor(dict.fromkeys(self.placed[row], self.edit), read_source) for row in rows]
                edited = {site.id for row in rows for site in self.placed[row] if not isinstance(site.positions, int)}
                plan = cut.plan(start, wanted, edited) if cut is not None else None
                positions = cut.positions if cut is not None else None
                guarded = start == chunks[0][0] and rows is chunks[0][1]
                going = RowRun(kind, few, editors, frames, set(wanted), plan, positions, guarded=guarded)
                _walk(going)
                for place, row in enumerate(rows):
                    self.found[row] = self._measure(_of_row(base.output, kind, going, place))

    def _recordings(self) -> tuple[Pass, Grown]:
        """The inputs twice and three times: what the rows are made of."""
        if self.recorded is None:
            try:
                few = self._forward(self.call.times(FEW))
                more = self._forward(self.call.times(MORE), keep="none")
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise ReplayError(f"the model does not run with more examples ({why})") from error
            self.recorded = few.last, grown(few.graph, more.graph)
        return self.recorded

    def _frames(self, few: Pass) -> list[tuple[int, Frame]]:
        """What the inputs tell about positions, of one row."""
        known = columns_of(few)
        return [(n, f if f.mask is None else f._replace(mask=f.mask[: self.call.examples])) for n, f in known]

    def _wanted(self, output: Any, kind: Grown) -> dict[TensorId, Span]:
        """The values that the metric reads, and from which position on."""
        names = list(ids_in(kind.graph.scopes[0].output))
        at = getattr(self.metric, "at", None) if self.at is None else self.at
        if at is None:
            return dict.fromkeys(names, WHOLE)
        logits = logits_of(output)
        place = next(place for place, (_, tensor) in enumerate(leaves(taken(output))) if tensor is logits)
        return {names[place]: Span(1, at % logits.shape[1])}

    def _cut(self, kind: Grown, few: Pass, frames: list[tuple[int, Frame]], wanted: set[TensorId]) -> Cut | None:
        """What is needed to compute some positions alone; None where the inputs do not tell how many there are."""
        lengths = {length for length, _ in frames}
        if len(lengths) != 1 or max(lengths) < 3:
            return None
        positions = Positions(lengths.pop(), self.call.examples)
        first = min((site for several in self.placed for site in several), key=lambda site: kind.graph.place(site.id))
        try:
            with unwatched():
                reach = reached(kind, few, first, frames, wanted, positions)
        except FmrError:  # a site without positions, or rows that mix
            reach = {}
        return Cut(kind, Clean(kind, few), positions, reach)

    def _groups(
        self, kind: Grown, few: Pass, frames: list[tuple[int, Frame]], cut: Cut | None
    ) -> list[tuple[int, list[int]]]:
        """The rows in groups of neighbouring first positions, in each in the order in which they join."""
        starts = {row: 0 if cut is None else self._start(kind, few, frames, row) for row in range(len(self.sites))}
        several = sorted(set(starts.values()))
        wide = -(-len(several) // GROUPS)
        found = []
        for at in range(0, len(several), wide):
            rows = [row for row, start in starts.items() if start in several[at : at + wide]]
            rows.sort(key=lambda row: min(kind.graph.place(site.id) for site in self.placed[row]))
            found.append((several[at], rows))
        return found

    def _start(self, kind: Grown, few: Pass, frames: list[tuple[int, Frame]], row: int) -> int:
        """The first position that the edits of a row touch."""
        first = 0 if any(site.positions is None for site in self.placed[row]) else None
        for site in self.placed[row]:
            axis = kind.axes.get(site.id)
            if axis is None or first == 0:
                return 0
            value = axis.clean(few[site.id])
            for part in parts(site, value, frames):
                columns = torch.arange(max(length for length, _ in frames))
                chosen = part.site.positions
                here = int((columns[chosen] if isinstance(chosen, slice) else torch.as_tensor(chosen) % len(columns)).min())
                first = here if first is None else min(first, here)
        return first or 0

    def _spot_checks(self) -> float:
        """The largest difference of a few cells that are run one by one."""
        chosen = random.Random(self.seed).sample(range(len(self.sites)), min(CHECKS, len(self.sites)))
        values = self._values()
        scale = float(values.abs().max()) or 1.0
        error = max(float((self._one(self.sites[row]) - values[row]).abs().max()) for row in chosen) / scale
        if not error <= 1e-4:
            raise ReplayError(f"a run by itself differs from its row by {error:.1e} of the largest value")
        return error


def _by_id(site: Site, graph: Graph) -> Site:
    """A site by the ID of its value; that of a module by what its call returned and nobody inside it reads."""
    try:
        if not site.id.is_path:
            return replace(site, id=graph[site.id].id)
        names = list(ids_in(graph.module(site.id).scope.output))
    except IdError as error:
        raise ReplayError(f"more examples take another way through the model: {error}") from error
    if len(names) != 1 or any(within(reader.module, site.id) for reader in graph.readers(names[0])):
        raise ReplayError(f"{site.id} returned several values, or one that is read inside it")
    return replace(site, id=names[0])


def _walk(going: RowRun) -> None:
    """Run rows and judge them; what breaks on the way is a reason to go another way."""
    try:
        going.run()
        going.check()
    except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ReplayError(f"rows break an op ({type(error).__name__}: {str(error).partition(chr(10))[0]})") from error
    for editor in going.editors:
        for entry in editor.entries:
            if not entry.tally.fired:
                raise ReplayError(f"the edit of {entry.site!r} never fired in its row")


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back what the block changes of a model's buffers."""
    plain = (buffer for buffer in model.buffers() if buffer.layout == torch.strided and not buffer.is_meta)
    before = [(buffer, buffer.clone()) for buffer in plain]
    try:
        yield
    finally:
        for buffer, value in before:
            if not torch.equal(buffer, value):  # kernels write running statistics without counting a version
                buffer.copy_(value)


class Clean(Mapping[TensorId, Tensor]):
    """The values of one row of a recording."""

    def __init__(self, kind: Grown, few: Pass) -> None:
        self.kind, self.few = kind, few

    def __getitem__(self, name: TensorId) -> Tensor:
        axis = self.kind.axes.get(name)
        return self.few.as_read(name) if axis is None else axis.clean(self.few.as_read(name))

    def __iter__(self) -> Iterator[TensorId]:
        return iter(self.kind.step_of)

    def __len__(self) -> int:
        return len(self.kind.step_of)


def _of_row(output: Any, kind: Grown, going: RowRun, row: int) -> Any:
    """An output of the model as it is in one row."""

    def here(name: TensorId) -> Tensor | None:
        return going.outcome(name, row) if name in going.wanted else None

    return exchanged(output, kind.graph.scopes[0].output, here)
