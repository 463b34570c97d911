"""What a model's Python asks of values: a path chosen by a number stays the recorded one under any edit."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fmr.errors import ReplayError
from fmr.ids import TensorId, outer_op
from fmr.nests import leaves
from fmr.runs.passes import Pass
from fmr.sweeps.steps import steps_of
from fmr.watching.calls import WatcherMode

_ANSWERS = frozenset(
    """__bool__ __int__ __float__ __index__ __complex__ __contains__ __array__ item tolist numpy is_nonzero equal allclose
    array_equal""".split()
)
"""Functions that tell Python numbers of tensors."""


class Questions(WatcherMode):
    """A mode that notes the tensors whose numbers are told to Python while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ANSWERS:
            self.tensors += [tensor for _, tensor in leaves((args, kwargs))]
        return func(*args, **(kwargs or {}))


def refuse_chosen_paths(recorded: Pass, asked: Sequence[Tensor], edited: set[TensorId]) -> None:
    """Raise where a number that Python was told depends on what is edited: another run may take another path."""
    names: dict[int, list[TensorId]] = defaultdict(list)
    for name, value in recorded.values.items():
        names[id(value)].append(name)
    reached = {outer_op(name) for name in edited}
    for step in steps_of(recorded.graph):
        if any(name in reached for name in step.reads):
            reached.update(node.id for node in step.nodes)
    for tensor in asked:
        known = names.get(id(tensor), [])
        hit = next((name for name in known if name in reached), None)
        if hit is not None or not known:
            what = hit or f"a tensor of shape {tuple(tensor.shape)} that was not recorded"
            raise ReplayError(f"the model's Python asks for the number in {what}, which may choose its path")
