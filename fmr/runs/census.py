"""Is the graph complete? A second witness, below the mode, counts the kernels that no recorded op accounts for."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmr.errors import TrackError
from fmr.graph.build import Builder
from fmr.nests import leaves
from fmr.watching.calls import watching
from fmr.watching.recorder import Recorder
from fmr.watching.tape import Event, Tape


@dataclass(frozen=True)
class Census:
    """How many kernels a call ran, and which of them ran outside every recorded op, by module and kernel.

    >>> fmr.census(model, input_ids)
    Census: 257 kernels, all inside recorded ops
    """

    kernels: int
    unseen: Mapping[tuple[str, str], int]

    @property
    def complete(self) -> bool:
        """Whether every kernel that makes a tensor ran inside a recorded op."""
        return not self.unseen

    def __repr__(self) -> str:
        if self.complete:
            return f"Census: {self.kernels} kernels, all inside recorded ops"
        rows = [f"  {scope or 'root'}: {kernel} x {count}" for (scope, kernel), count in self.unseen.items()]
        return "\n".join([f"Census: {self.kernels} kernels, {sum(self.unseen.values())} outside recorded ops", *rows])


def census(model: nn.Module, *args: Any, **kwargs: Any) -> Census:
    """Run the model once more under a `TorchDispatchMode` and report every kernel that the graph does not account for.

    >>> fmr.census(model, input_ids).complete
    True

    Scripted code, and kernels called from C++, are what it finds; the graph shows their results as opaque nodes.
    """
    if not callable(model):
        raise TrackError(f"fmr.census got {type(model).__name__}, expected a torch.nn.Module and its inputs.")
    witness = _Witness()
    recorder = _Marking(model, witness)
    with torch.no_grad(), _as_written(), watching(recorder, recorder), witness:
        model(*args, **kwargs)
    return Census(witness.kernels, dict(witness.unseen))


def _as_written() -> AbstractContextManager[Any]:
    """A block in which functions that the model compiled run as they are written: torch compiles none under a witness."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Witness(TorchDispatchMode):
    """Counts the kernels that return tensors, apart those that run while no recorded op does."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.kernels = 0
        self.unseen: Counter[tuple[str, str]] = Counter()
        self.where: Callable[[], str] = lambda: ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) or any(True for _ in leaves(out)):
            self.kernels += 1
            if not self.inside:
                self.unseen[self.where(), str(func)] += 1
        return out


class _Marking(Recorder):
    """A recorder that tells the witness while an op runs that the mode sees."""

    def __init__(self, root: nn.Module, witness: _Witness) -> None:
        super().__init__(root, self._begin, lambda tape: None)
        self.witness = witness

    def _begin(self, tape: Tape) -> Callable[[Event], None]:
        builder = Builder(tape)
        self.witness.where = lambda: builder.calls[-1].path if builder.calls else ""
        return builder.feed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.witness.inside += 1
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            self.witness.inside -= 1
