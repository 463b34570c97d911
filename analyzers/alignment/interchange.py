"""An interchange of several variables at one site, each within its own part of what that holds, in one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fmr
from analyzers.alignment.examples import Examples, Inputs, arguments
from analyzers.protocol import AnalyzerError
from fmr.edits.layouts import units_of
from fmr.edits.values import Context, uncast
from fmr.ids import Site
from fmr.subspaces import Part, Subspace
from fmr.subspaces.space import Chosen, Space
from fmr.sweeps.metrics import logits_of

Spaces = Mapping[str, Subspace]
"""The subspace of each variable."""

Scores = Callable[[Any], Tensor]
"""Of a model's output the scores of labels, (examples, labels)."""


@dataclass(eq=False)
class Swap:
    """An edit: rows take the coordinates of their variables from rows of another run; `random` makes it a placebo.

    places: by variable of each example the row of the sources' run, -1 for none. A placebo is as long a change in a random
    direction.
    """

    spaces: Spaces
    sources: fmr.Run
    places: Mapping[str, Tensor]
    random: torch.Generator | None = None

    def __call__(self, value: Tensor, context: Context) -> Tensor:
        axes = context.axes
        units = units_of(context.site, axes, value)
        rows = axes.index("examples") if "examples" in axes else 0
        with uncast(value):
            before = value.movedim((rows, units), (0, -1))
            self._check(before, context, tuple(value.shape))
            after, made = before, dict[int, Subspace]()
            for name, places in self.places.items():
                here, there = self._rows(places, context)
                if len(here):
                    space, here = _now(self.spaces[name], made), here.to(value.device)
                    taken = self._taken(context, there, rows).movedim((rows, units), (0, -1))
                    if taken.shape[1:] != after.shape[1:]:
                        raise AnalyzerError(
                            f"{context.site!r} holds {tuple(after.shape[1:])} in an example of the base, and "
                            f"{tuple(taken.shape[1:])} in one of the sources. Expected positions that every text has."
                        )
                    written = space.write(after[here], space.read(taken))
                    after = after.index_copy(0, here, written.to(after.dtype))
            if self.random is not None:
                after = before + self._placebo(after - before)
            return after.movedim((0, -1), (rows, units)).to(value.dtype)

    def _check(self, value: Tensor, context: Context, shape: tuple[int, ...]) -> None:
        """Raise where a value has no vector of the subspaces' width for each example."""
        for name in self.places:
            _check_width(self.spaces[name], value, context.site)
        many = len(next(iter(self.places.values())) if context.examples is None else context.examples)
        if len(value) != many:
            raise AnalyzerError(
                f"{context.site!r} holds shape {shape}, with axes {context.axes}, and the batch has {many} examples. "
                f"Expected these in a dimension; where it is another, name all: fmr.Site({str(context.id)!r}, layout=(...))."
            )

    def _rows(self, places: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Which of the examples here take something, and from which rows."""
        own = places if context.examples is None else places[list(context.examples)]
        here = (own >= 0).nonzero()[:, 0]
        return here, own[here]

    def _taken(self, context: Context, there: Tensor, rows: int) -> Tensor:
        """What rows of the sources hold at the site."""
        assert context.source is not None
        if context.examples is None:
            found = context.source(self.sources, context.site)
            return found.index_select(rows, there.to(found.device))
        return context.source(self.sources, context.site.at(examples=there.tolist()))

    def _placebo(self, change: Tensor) -> Tensor:
        assert self.random is not None
        drawn = torch.randn(change.shape, generator=self.random).to(change)
        lengths: Tensor = change.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return drawn * lengths


def _now(space: Subspace, made: dict[int, Subspace]) -> Subspace:
    """A subspace as its parameters make it now, which is made once for all of its parts."""
    whole = space.space if isinstance(space, Part) else space
    if id(whole) not in made:
        made[id(whole)] = whole.now() if isinstance(whole, Space) else whole
    return Chosen(made[id(whole)], space.places) if isinstance(space, Part) else made[id(whole)]


def _check_width(space: Subspace, value: Tensor, site: Site) -> None:
    width = getattr(space, "width", value.shape[-1])
    if width != value.shape[-1]:
        raise AnalyzerError(
            f"The subspace is one of vectors of {width} numbers, and {site!r} holds {value.shape[-1]}. Expected one of that "
            f"width, as subspaces.Rotation({value.shape[-1]}, ...)."
        )


@dataclass(frozen=True, eq=False)
class Network:
    """A model, and how labels are read off what it returns."""

    model: nn.Module
    scores: Scores | None = None

    def __post_init__(self) -> None:
        if self.scores is not None and not callable(self.scores):
            raise AnalyzerError(
                f"logits={self.scores!r}: expected a function of what the model returns: logits=lambda output: output[0]."
            )

    def plain(self, inputs: Inputs) -> Tensor:
        """The scores of labels without an interchange."""
        args, kwargs = arguments(inputs)
        return self._scored(self.model(*args, **kwargs), inputs)

    def interchanged(
        self, site: Site, spaces: Spaces, batch: Examples, random: torch.Generator | None = None, through: bool = False
    ) -> Tensor:
        """The scores of labels with the interchange of each row; gradients flow `through` the sources, too, where asked."""
        inputs, rows = batch.several
        if not any(map(len, rows.values())):
            return self.plain(batch.base)
        args, kwargs = arguments(inputs)
        sources = fmr.run(self.model, *args, **kwargs, keep=[site.id], stop=True, grad=through)
        places = {}
        for name, which in batch.interchanged.items():
            places[name] = torch.full((len(batch),), -1).masked_scatter(which, rows[name])
        args, kwargs = arguments(batch.base)
        with fmr.track(self.model, keep=(), edits={site: Swap(spaces, sources, places, random)}):
            output = self.model(*args, **kwargs)
        return self._scored(output, batch.base)

    def _scored(self, output: Any, inputs: Inputs) -> Tensor:
        """Scores of labels, (examples, labels), as they are read off an output."""
        if self.scores is not None:
            found = self.scores(output)
        else:
            found = logits_of(output)
            if found.dim() == 3:
                found = found[torch.arange(len(found), device=found.device), _last(inputs, found)]
        many = len(next(iter(inputs.values())))
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != many or not found.is_floating_point():
            told = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            whole = f" of {found.dtype}" if isinstance(found, Tensor) and not found.is_floating_point() else ""
            raise AnalyzerError(
                f"The scores of labels have {told}{whole}, expected ({many}, labels): one for each example and label, with "
                "fractions. Say how they are read: logits=lambda output: ..."
            )
        return found


def _last(inputs: Inputs, logits: Tensor) -> Tensor:
    """The column of the last real token of each example."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != logits.shape[:2]:
        return torch.full((len(logits),), logits.shape[1] - 1, device=logits.device)
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (columns * (mask != 0)).argmax(1).to(logits.device)
