"""Where analyzers read: structure is found on the first batch, and its sites are read by plan in later ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

import fmr
from fmr.errors import StructureError
from fmr.nodes import Key
from fmr.runs.run import Run
from fmr.structure.parts import Structure

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


def read_at(model: nn.Module, inputs: Mapping[str, Any], sites: Sequence[Key]) -> Run:
    """A run that keeps these sites alone and stops after the last of them.

    >>> read_at(model, inputs, [block.pattern])[block.pattern]
    """
    return fmr.run(model, keep=sites, stop=True, **inputs)


def read_parts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    parts: tuple[Part, ...],
    choose: Callable[[Structure, Run], tuple[Part, ...]],
    keys: Callable[[Part], Sequence[Key]],
    read: Callable[[Part, Run], Read],
) -> tuple[tuple[Part, ...], list[Read]]:
    """What is read of some parts of a model in one batch, and the parts.

    >>> every = lambda structure, run: structure.attention
    >>> patterns = lambda block: [block.pattern]
    >>> blocks, maps = read_parts(model, inputs, (), every, patterns, lambda block, run: block.maps(run))

    parts: those found in an earlier batch; none on the first one. keys: what is read of one. Where this batch lays a value
    out in another way, such as one example and several may, they are found again in it.
    """
    if parts:
        run = read_at(model, inputs, [key for part in parts for key in keys(part)])
        try:
            return parts, [read(part, run) for part in parts]
        except StructureError:
            parts = ()
    run = fmr.run(model, **inputs)
    found = choose(fmr.locate(run), run)
    return found, [read(part, run) for part in found]
