"""What a sweep is asked: rows of edits, a model with inputs, a metric; and forwards that leave all of these as they were."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fmr.edits import values
from fmr.edits.editor import Editor
from fmr.edits.places import parts
from fmr.edits.values import Edit, Interchange
from fmr.errors import EditError
from fmr.ids import Site, TensorId, outer_op
from fmr.nests import ids_in, leaves, taken
from fmr.nodes import Key, id_of, keys_of
from fmr.runs.editing import with_sources
from fmr.runs.outputs import with_tensors
from fmr.runs.passes import Pass
from fmr.runs.run import Run
from fmr.runs.sources import read_source
from fmr.runs.track import run as run_once
from fmr.runs.undisturbed import undisturbed
from fmr.sweeps.metrics import READY, Metric, measured, placed, why_no_metric
from fmr.sweeps.questions import refuse_chosen_paths
from fmr.sweeps.rows import tolerance

Asked = Key | Sequence[Key] | Mapping[Key, Edit | Sequence[Edit]]
"""What one run of a sweep edits: a site, several at once, or a mapping from sites to edits of their own."""

Row = Mapping[Site, Sequence[Edit]]
"""The same with the edits of each site."""


EDITS = tuple(kind for kind in vars(values).values() if isinstance(kind, type) and kind.__module__ == values.__name__)
"""The ready-made edits, none of which is a metric."""


@dataclass(frozen=True)
class Call:
    """The arguments of a model's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> "Call":
        """The arguments as they are given to a sweep: a tensor, a tuple or a mapping."""
        if isinstance(inputs, (Run, Pass)):
            raise EditError(
                "inputs are a Run, expected what the model is called with: a tensor, a tuple or a dict of arguments. Values "
                "of a run are put in by an edit: edits.Interchange(run)."
            )
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

    def sized(self, many: int) -> "Call":
        """Copies of the arguments, caches included, with so many examples, the given ones over and over."""
        examples = self.examples

        def more(tensor: Tensor) -> Tensor:
            counts = tensor.dim() and len(tensor) == examples and many != examples
            again = torch.arange(many, device=tensor.device) % examples
            made = tensor.detach().index_select(0, again) if counts else tensor.detach().clone()
            return made.requires_grad_(tensor.requires_grad)

        held = [tensor for _, tensor in leaves((self.args, self.kwargs))]
        known: dict[int, Any] = {id(tensor): more(tensor) for tensor in held}
        known.update((id(one), one) for one in (*self.args, *self.kwargs.values()) if isinstance(one, nn.Module))
        args, kwargs = deepcopy((self.args, self.kwargs), known)
        return Call(args, kwargs)


ROUNDINGS, SAMPLE = 2, 2**16 + 1
"""How often an output is rounded at random to see what that does to a metric, and by how many different draws."""


class AsksForGradients(EditError):
    """A metric asked for gradients where there are none."""


class Task:
    """A sweep to be done; `base` is the run that rows edit, which has the edits `always` alone, and `plain` its metric."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        asked: Sequence[Asked],
        edit: Edit | None,
        metric: Metric,
        freeze: Key | Iterable[Key] = (),
        base: Asked | None = None,
    ) -> None:
        _check(model, edit, metric)
        self.model, self.call, self.metric, self.forwards = model, Call.of(inputs), metric, 0
        self.always: Row = row_of(base, None) if base else {}
        self.rows = self._with_sources([row_of(one, edit) for one in asked])
        self.sites = tuple(tuple(row) for row in self.rows)
        self.frozen = tuple(dict.fromkeys(_whole(key) for key in keys_of(freeze)))
        self.base = self.forward(self.call, self.always)
        self.frames = self.base.last.frames()
        for site in dict.fromkeys(site for row in self.rows for site in row):
            self._check(site)
        self.metric = placed(metric, self.base.output, self.frames)
        self.plain = self.measure(self.base.output)

    @property
    def examples(self) -> int:
        """How many examples a row has."""
        return self.call.examples

    @property
    def device(self) -> torch.device:
        """Where the output lies, and so what grows by rows."""
        first = next((tensor for _, tensor in leaves(taken(self.base.output))), None)
        return torch.device("cpu") if first is None else first.device

    def editor(self, row: int) -> Editor:
        """The edits of a row alone, which have not fired yet."""
        return editor_of(self.rows[row])

    def held(self, row: int) -> Row:
        """The edits of a row in a run of its own, where what is frozen is put back before they act."""
        back = Interchange(self.base)
        asked = self.rows[row]
        frozen: dict[Site, Sequence[Edit]] = {Site(name): [back] for name in self.frozen}
        return {**frozen, **{site: [back] * (site.id in self.frozen) + [*own] for site, own in asked.items()}}

    def forward(self, call: Call, edits: Mapping[Any, Any], **more: Any) -> Run:
        """A run of the model, which leaves the model, the inputs and the random state as they were."""
        self.forwards += 1
        more |= {"edits": edits} if edits else {}
        more |= {"grad": True} if torch.is_grad_enabled() else {}
        call = call.sized(call.examples)
        with undisturbed(self.model):
            return run_once(self.model, *call.args, **more, **call.kwargs)

    def measure(self, output: Any) -> Tensor:
        """The metric of an output: one number, or one for each example."""
        try:
            return measured(self.metric, output, self.examples).detach().clone()  # a view would keep all rows alive
        except RuntimeError as error:
            if not any(told in str(error) for told in ("require grad", "differentiated Tensor")):
                raise
            raise AsksForGradients(
                "The metric asks for gradients of what has none in a run of its own. Expected those of the output by "
                "parameters or inputs that require them."
            ) from error

    def refuse_chosen_paths(self) -> None:
        """Raise a `ReplayError` where the model's Python asks for numbers that depend on what is edited."""
        graph, edited = self.base.graph, set()
        for name in {site.id for row in self.rows for site in row}:
            edited |= set(ids_in(graph.module(name).scope.output)) if name.is_path else {outer_op(name)}
        refuse_chosen_paths(graph, edited)

    def alone(self, row: int) -> Any:
        """The output of a row in a run of its own."""
        return self.forward(self.call, self.both(self.held(row)), keep=()).output

    def rounding(self, output: Any) -> float:
        """How far the metric moves where each number of an output is rounded up or down, by as much as models do."""
        draw, plain, tensors = torch.Generator().manual_seed(0), self.measure(output), list(leaves(taken(output)))
        moved = [
            self.measure(with_tensors(output, [_rounded(tensor, draw) for _, tensor in tensors])) for _ in range(ROUNDINGS)
        ]
        return max(float((one - plain).abs().nan_to_num().max()) for one in moved)

    def both(self, row: Row) -> Row:
        """The edits that all runs have, and then those of a row."""
        return {site: [*self.always.get(site, ()), *row.get(site, ())] for site in (*self.always, *row)}

    def _with_sources(self, rows: list[Row]) -> list[Row]:
        """The rows with a run in place of each source that is given as inputs."""
        editors = [editor_of(row) for row in rows]

        def run(_: nn.Module, *args: Any, keep: Any, **kwargs: Any) -> Run:
            return self.forward(Call(args, kwargs), {}, keep=keep)

        with_sources([entry for editor in editors for entry in editor.entries], self.model, run)
        made: list[Row] = []
        for editor in editors:
            row: dict[Site, list[Edit]] = {}
            for entry in editor.entries:
                row.setdefault(entry.site, []).append(entry.edit)
            made.append(row)
        return made

    def _check(self, site: Site) -> None:
        """Raise for a site that means nothing in this model and with these inputs."""
        value = self.base[site.id]
        if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided:
            return  # which the edit itself refuses in words
        found = parts(site, value, self.frames)
        if not found and site.passes is None:
            raise EditError(
                f"{site!r} lies nowhere: {str(site.id)!r} has shape {tuple(value.shape)} and no position "
                f"{site.positions!r} among the tokens of any example."
            )
        for part in found:
            part.of(value)


def _check(model: Any, edit: Any, metric: Any) -> None:
    """Raise for arguments of a sweep that are not what their places are for."""
    order = "The order is fmr.sweep(model, inputs, sites, edit, metric)."
    if not isinstance(model, nn.Module):
        raise EditError(
            f"model is {type(model).__name__}, expected a torch.nn.Module. A function is run once for each edit: "
            f"fmr.run(function, *inputs, edits=...). {order}"
        )
    if isinstance(metric, EDITS):
        raise EditError(f"metric is {type(metric).__name__}, expected a function of the model's output. {order}")
    if (reason := why_no_metric(metric)) is not None:
        raise EditError(f"{reason} {order}")
    if isinstance(edit, READY):
        raise EditError(f"edit is {type(edit).__name__}, a metric: expected an edit, as edits.Zero(). {order}")


def _rounded(value: Tensor, draw: torch.Generator) -> Tensor:
    """A value with each number moved by as much as rounding may, relative to itself or to a typical one."""
    if not value.is_floating_point() or not value.numel():
        return value
    size, many = value.flatten().abs(), value.numel()
    typical = size[:: -(-many // SAMPLE)].float().nanmedian().to(size)
    signs = (torch.randint(2, (min(many, SAMPLE),), generator=draw) * 2 - 1).to(value).repeat(-(-many // SAMPLE))[:many]
    return value + (signs * tolerance(value.dtype) * size.maximum(typical)).view(value.shape)


def _whole(key: Key) -> TensorId:
    """The ID or path of something that is frozen."""
    if isinstance(key, Site) and key.selection:
        raise EditError(f"freeze={key!r} in a sweep: expected whole values. Freeze Site({str(key.id)!r}).")
    return id_of(key)


def row_of(asked: Asked, edit: Edit | None) -> Row:
    """The edits that one run makes, by site."""
    if isinstance(asked, Mapping):
        pairs = list(asked.items())
    elif edit is None:
        raise EditError(f"edit is None, and {asked!r} has no edit of its own. Expected one, or rows like {{site: edit}}.")
    else:
        pairs = [(key, edit) for key in (asked if isinstance(asked, (list, tuple)) else (asked,))]
    if not pairs:
        raise EditError(f"A run of the sweep edits nothing: {asked!r}. Expected a site, several, or a mapping to edits.")
    row: dict[Site, Sequence[Edit]] = {}
    for key, wanted in pairs:
        site = key if isinstance(key, Site) else Site(id_of(key))
        row[site] = list(wanted) if isinstance(wanted, (list, tuple)) else [cast("Edit", wanted)]
    return row


def editor_of(row: Row) -> Editor:
    """The editor of a row's edits, which have not fired yet."""
    return Editor(cast("dict[Key, Sequence[Edit]]", row), read_source)
