"""Where analyzers read: structure is found on the first batch, and its sites are read by plan in later ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

import fmr
from fmr.errors import StructureError
from fmr.ids import Site
from fmr.runs.run import Run
from fmr.structure.parts import Attention, Structure

Part = TypeVar("Part")


def found_in(
    model: nn.Module, inputs: Mapping[str, Any], choose: Callable[[Structure], tuple[Part, ...]]
) -> tuple[tuple[Part, ...], Run]:
    """The parts that are chosen of a model's structure, and the run, tracked in full, in which they were found.

    >>> blocks, run = found_in(model, inputs, lambda structure: structure.attention)
    """
    run = fmr.run(model, **inputs)
    return choose(fmr.locate(run)), run


def read_at(model: nn.Module, inputs: Mapping[str, Any], sites: Sequence[Site]) -> Run:
    """A run that keeps these sites alone and stops after the last of them.

    >>> read_at(model, inputs, [block.pattern])[block.pattern]
    """
    return fmr.run(model, keep=sites, stop=True, **inputs)


def read_maps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    blocks: tuple[Attention, ...],
    choose: Callable[[Structure], tuple[Attention, ...]],
) -> tuple[tuple[Attention, ...], list[Tensor]]:
    """The patterns of attentions in one batch, each (examples, heads, queries, keys), and the attentions.

    >>> blocks, maps = read_maps(model, inputs, blocks, lambda structure: structure.attention)

    blocks: those found in an earlier batch; none on the first one. Where this batch lays a pattern out in another way, such
    as one example and several may, they are found again in it.
    """
    if blocks:
        run = read_at(model, inputs, [block.pattern for block in blocks])
        try:
            return blocks, [block.maps(run) for block in blocks]
        except StructureError:
            again, run = found_in(model, inputs, choose)
            return again, [block.maps(run) for block in again]
    blocks, run = found_in(model, inputs, choose)
    return blocks, [block.maps(run) for block in blocks]
