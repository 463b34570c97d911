"""Where analyzers read: structure is found on the first batch, and its sites are read by plan in later ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

import fmr
from fmr.errors import StructureError
from fmr.ids import Site
from fmr.runs.run import Run
from fmr.structure.parts import Attention, Structure

Part = TypeVar("Part")
Read = TypeVar("Read")


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


def read_blocks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    blocks: tuple[Attention, ...],
    choose: Callable[[Structure], tuple[Attention, ...]],
    roles: Sequence[str],
    read: Callable[[Attention, Run], Read],
) -> tuple[tuple[Attention, ...], list[Read], Run | None]:
    """What is read of attentions in one batch, the attentions, and the run where that was tracked in full.

    >>> every = lambda structure: structure.attention
    >>> blocks, maps, _ = read_blocks(model, inputs, (), every, ["pattern"], lambda block, run: block.maps(run))

    blocks: those found in an earlier batch; none on the first one. roles: the sites of an attention that are read. Where
    this batch lays a value out in another way, such as one example and several may, they are found again in it.
    """
    if blocks:
        run = read_at(model, inputs, [getattr(block, role) for block in blocks for role in roles])
        try:
            return blocks, [read(block, run) for block in blocks], None
        except StructureError:
            blocks = ()
    found, run = found_in(model, inputs, choose)
    return found, [read(block, run) for block in found], run
