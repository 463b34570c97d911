"""Attribution patching: what patching each site would do, to first order, from one backward for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

import fmr
from analyzers.causal.cells import Cell
from analyzers.causal.effects import Effects, effects_of
from analyzers.causal.metrics import by_pair, numbers
from analyzers.causal.opening import Patching, ids_of
from analyzers.prompts import Prompts
from analyzers.protocol import AnalyzerError, Given
from fmr.edits.frames import Frames
from fmr.edits.places import parts
from fmr.errors import number_of
from fmr.ids import Site
from fmr.nodes import Key
from fmr.sweeps.metrics import Metric


class AttributionPatching(Patching):
    """Estimate what activation patching of every site would do, from gradients.

    >>> attribution = AttributionPatching(model, tokenizer)
    >>> attribution.run(clean, corrupted, logit_diff(right, wrong), exact=effects).correlation > 0.95
    True

    model, tokenizer, direction: as for `ActivationPatching`.

    The effect of a site is the sum over its elements of (source - base) times the gradient of the metric in the base run:
    exact where the model is linear from there on. With several steps the gradient is the mean over runs whose embeddings
    lie between those of base and source.

    Source: N. Nanda, "Attribution patching: activation patching at industrial scale", 2023; M. Sundararajan, A. Taly,
    Q. Yan, "Axiomatic attribution for deep networks", 2017 (steps).
    """

    def run(
        self,
        clean: Given,
        corrupted: Given,
        metric: Metric,
        sites: Sequence[Key] | None = None,
        *,
        steps: int = 1,
        exact: Effects | None = None,
        seed: int = 0,
    ) -> Effects:
        """Estimate the effect of every site.

        >>> AttributionPatching(model, tokenizer).run(clean, corrupted, logit_diff(right, wrong), steps=5).strongest(3)

        clean, corrupted, metric, sites, seed: as for `ActivationPatching`. steps: how many runs the gradient is a mean of,
        1 for that of the base run alone. exact: the effects of patching the same sites, for the correlation with them.
        """
        if type(steps) is not int or steps < 1:
            raise AnalyzerError(f"steps={steps!r}: expected how many gradients to average, 1 or more.")
        base, source, labels, metric = self._opened(clean, corrupted, metric)
        structure, _ = self._located(base)
        if structure.embedding is None:
            raise AnalyzerError(f"fmr.locate found no embedding in {structure.model}, at which gradients could end.")
        cells = self._cells(base, sites)
        names = [*ids_of(cells), str(structure.embedding.id)]
        taken, reached = self._source(source, names, metric)
        end = taken[structure.embedding]
        changes, before = torch.zeros(len(cells), len(base), dtype=torch.double), None
        for step in range(steps):
            way = Between(end, step / steps)
            run, found = descended(self.model, base, names, {structure.embedding: way}, metric)
            before = found if before is None else before
            if step == 0:
                moved = {name: taken[name].double() - run[name].detach().double() for name in names}
            changes += torch.stack(list(summed(run, cells, moved))) / steps
        assert before is not None
        return effects_of(
            f"Attribution patching ({self.direction}, {number_of(steps, 'step')})",
            cells,
            changes,
            before,
            reached,
            labels,
            seed,
            exact=exact,
            how="gradients",
            forwards=steps + 1,
        )


class Between:
    """The edit of an embedding that puts a point between it and another in its place, at which gradients end."""

    def __init__(self, end: Tensor, share: float) -> None:
        self.end, self.share = end, share

    def __call__(self, value: Tensor, context: fmr.edits.Context) -> Tensor:
        self.leaf = torch.lerp(value.detach(), self.end.to(value.dtype), self.share).requires_grad_()
        return self.leaf


@torch.enable_grad()
def descended(
    model: nn.Module, given: Prompts, keep: Sequence[str], edits: Mapping[Key, Between], metric: Metric
) -> tuple[fmr.Run, Tensor]:
    """A run whose values have the gradients of the metric, down to where an edit lets them end; and the metric by pair."""
    run = fmr.run(model, **given.inputs, keep=keep, grad=True, edits=edits)
    found = by_pair(metric, run, len(given))
    if not found.requires_grad:
        raise AnalyzerError(
            "The metric has no gradient. Expected one that is differentiable in the logits, as logit_diff(right, wrong); a "
            "count or a choice is none, and ActivationPatching takes it."
        )
    found.sum().backward(inputs=[way.leaf for way in edits.values()])
    return run, numbers(found, -1)


def summed(run: fmr.Run, cells: Sequence[Cell], moved: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Of each cell the sum over its elements of how far each would be moved times its gradient, by example."""
    products: dict[tuple[object, ...], Tensor] = {}
    frames = run.last.frames()
    for key, alike in groupby(cells, key=lambda cell: (cell.site.id, cell.site.layout, *cell.site.selection)):
        sites = [cell.site for cell in alike]
        if key not in products:
            products[key] = _product(sites[0], moved[sites[0].id] * run.grad[sites[0].id].double())
        yield from _at_once(sites, products[key], frames) or (_chosen(site, products[key], frames) for site in sites)


def _at_once(sites: list[Site], product: Tensor, frames: Frames) -> list[Tensor]:
    """The sums of sites that differ in one place of one axis, read together; none where examples differ in what is there."""
    (axis, *others) = sites[0].selection or [""]
    places = [getattr(site, axis) for site in sites] if axis and axis != "examples" and not others else []
    if len(places) < 2 or any(type(place) is not int for place in places):
        return []
    every = replace(sites[0], **{axis: places})  # type: ignore[arg-type]
    chosen = parts(every, product, frames)
    taken = chosen[0].of(product) if len(chosen) == 1 else product
    layout = every.axes(product)
    if len(chosen) != 1 or taken.shape[layout.index(axis)] != len(places):
        return []
    by_place = taken.movedim((layout.index(axis), layout.index("examples")), (0, 1))
    return list(by_place.flatten(2).sum(2).cpu() if by_place.dim() > 2 else by_place.cpu())


def _chosen(site: Site, product: Tensor, frames: Frames) -> Tensor:
    """The sums of one site, by example."""
    taken = torch.zeros_like(product)
    for part in parts(site, product, frames):
        taken = part.put(taken, part.of(product))
    return taken.movedim(site.axes(product).index("examples"), 0).flatten(1).sum(1).cpu()


def _product(site: Site, product: Tensor) -> Tensor:
    """A product summed up along all that a site takes as a whole; examples stay apart."""
    apart = {"examples", *site.selection}
    whole = [place for place, axis in enumerate(site.axes(product)) if axis not in apart]
    return product.sum(whole, keepdim=True) if whole else product
