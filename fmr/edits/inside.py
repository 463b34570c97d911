"""Edits of values inside a fused kernel: its plain form with and without them, and the kernel's bits wherever they agree."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fmr.errors import EditError
from fmr.ids import TensorId
from fmr.nests import leaves, mapped, outputs
from fmr.ops.fused import DECOMPOSITIONS
from fmr.ops.names import PASS, is_tensor_result, op_of
from fmr.watching.calls import WatcherMode
from fmr.watching.inside import drops, plain_arguments
from fmr.watching.own import alone

Edit = Callable[[TensorId, Tensor], Tensor]


def edited_inside(
    op: str, scope: str, args: Any, kwargs: Any, kernel: dict[int | None, Tensor], names: Iterable[TensorId], edit: Edit
) -> tuple[dict[int | None, Tensor], dict[TensorId, Tensor]]:
    """The outputs of a kernel under edits of its inner values, by their index, and all inner values as they are then.

    An output is the kernel's wherever its plain form is the same with and without the edits.
    """
    if any(tensor.is_nested for _, tensor in leaves((args, kwargs))):
        raise EditError(f"{scope} reads nested tensors, whose elements have no plain places: nothing inside can be edited.")
    if torch.is_grad_enabled():
        kwargs = {at: arg for at, arg in kwargs.items() if at != "out"}
    else:
        args, kwargs = plain_arguments(args, kwargs)
    met: dict[TensorId, Tensor] = {}
    edited = alone(lambda: DECOMPOSITIONS[op](*args, **kwargs), _Inner(scope, dict.fromkeys(names, edit), met))
    plain = alone(lambda: DECOMPOSITIONS[op](*args, **kwargs))
    pairs = zip(outputs(plain), outputs(edited), strict=True)
    return {index: kept_bits(kernel[index], p, e) for (index, p), (_, e) in pairs if index in kernel}, met


def kept_bits(kernel: Tensor, plain: Tensor, edited: Tensor) -> Tensor:
    """The kernel's value where the plain form is the same with and without edits, else that of the edited plain form.

    Its gradient is that of the edited plain form.
    """
    found = torch.where(plain == edited, kernel, edited)
    return edited + (found - edited).detach() if edited.requires_grad else found


class _Inner(WatcherMode):
    """Edits values inside the plain form of a fused op."""

    def __init__(self, scope: str, edits: dict[TensorId, Edit], met: dict[TensorId, Tensor]) -> None:
        super().__init__()
        self.scope, self.edits, self.met = scope, edits, met
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op, kwargs = op_of(func), kwargs or {}
        if op.kind == PASS:
            return func(*args, **kwargs)
        here = f"{self.scope}/{op.name}#{self.counts[op.name]}"
        if drops(op.name, args, kwargs):
            raise EditError(
                f"{here} draws a random mask, which its kernel does not give: nothing inside can be edited as it ran. Run "
                f"the model in eval mode, or with eager attention."
            )
        deeper = [name for name in self.edits if name.startswith(here + "/")]
        out = func(*args, **kwargs)
        if not is_tensor_result(out):
            return out
        self.counts[op.name] += 1
        if deeper and op.name in DECOMPOSITIONS:
            kernel = dict(outputs(out))
            new, below = edited_inside(op.name, here, args, kwargs, kernel, deeper, self.edits[deeper[0]])
            self.met.update(below)
            by_tensor = {id(kernel[index]): value for index, value in new.items()}
            out = mapped(out, lambda tensor: by_tensor.get(id(tensor), tensor))
        found = {TensorId(here if index is None else f"{here}:{index}"): tensor for index, tensor in outputs(out)}
        edited = {id(tensor): self.edits[name](name, tensor) for name, tensor in found.items() if name in self.edits}
        self.met.update((name, edited.get(id(tensor), tensor)) for name, tensor in found.items())
        return mapped(out, lambda tensor: edited.get(id(tensor), tensor)) if edited else out
