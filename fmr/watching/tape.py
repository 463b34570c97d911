"""What a pass leaves while it runs: its events in order, and the keys under which values are kept."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmr.nests import Nest, taken_arguments
from fmr.watching.scopes import Names, Start, name_inputs
from fmr.watching.storage import is_unshaped, versions_of

ENTER, EXIT, INSIDE, NAMED = "enter", "exit", "inside", "named"
WRITTEN, REPLACED, SWAPPED, ASKED = "written", "replaced", "swapped", "asked"
"""The events of a tape that are no op: a module call begins, ends, an op ran inside a functorch transform, a tensor was met
that stands in a parameter's place while its module runs, the bytes under a tensor were found to be others, an edit put a
tensor in place of another, two tensor objects are about to become each other, or Python was told numbers of tensors."""

Event = tuple[Any, ...]
"""`(op, args, kwargs, out, written, code, lasti, version, read)` for an op, with the version of each tensor that it made;
`(ENTER, module, args, kwargs, read)` and `(EXIT, output, read)`, in nests as they were `taken` at that moment;
`(INSIDE, tensors, written, read)`, `(NAMED, name, tensor, its value, read)`, `(WRITTEN, tensor, read)`,
`(REPLACED, by, tensor, whether both stay, read)`, `(SWAPPED, tensor, other, read)`, `(ASKED, tensors, code, lasti, read)`;
`read` are versions, see `versions.Others`."""

RAISED = object()
"""Stands for the output of a module call that ended in an exception."""


class Tape:
    """The events of one pass, in order, and what was known when it began; `root` gives the names, `start` is the call."""

    def __init__(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int, start: Start | None = None
    ) -> None:
        self.root, self.number = root, number
        self.start = start = start or Start(root)
        self.args, self.kwargs = taken_arguments(args, kwargs)
        self.names = Names(root)
        self.tensors = self.names.tensors  # read now: torch.func.functional_call puts others in place for the call only
        self.inputs: list[tuple[str, Tensor]] = name_inputs(start.called, self.args or (), self.kwargs or {})
        self.events: list[Event] = []
        with torch._C.DisableTorchFunction():
            sources = [tensor for _, tensor in self.sources()]
            of_all = zip(sources, versions_of(sources), strict=True)  # lazy ones are filled when first called: no write
            self.begun = {id(tensor): None if is_unshaped(tensor) else version for tensor, version in of_all}
        self.output: Nest = None

    def sources(self) -> list[tuple[str, Tensor]]:
        """The named values that exist before the first op: inputs, parameters, buffers."""
        return [*self.inputs, *self.tensors.values()]


class Slot(NamedTuple):
    """Where a value is kept, by the number of its pass: with the event that made it or read it first, or under a name.

    `output` is its place among several outputs of the event, `read` the identity of a tensor that no visible op made;
    `cast` tells a copy of another type or on another device from the value itself.
    """

    number: int
    event: int = -1
    output: int | None = None
    read: int = 0
    name: str = ""
    cast: bool = False


def first_read(number: int, event: int, tensor: Tensor) -> Slot:
    """The slot of a value that no visible op made."""
    return Slot(number, event, read=id(tensor))
