"""One value inside a fused kernel, computed from what the kernel was given."""

from collections import Counter
from functools import partial
from typing import Any

from torch import Tensor

from fmr.ids import TensorId
from fmr.nests import leaves, outputs, replaced
from fmr.ops.fused import DECOMPOSITIONS
from fmr.ops.names import PASS, is_tensor_result, op_of
from fmr.watching.calls import WatcherMode
from fmr.watching.own import alone, unseen, without_grad

Met = dict[str, Tensor]
"""Values inside a kernel, by their IDs."""


def value_inside(name: TensorId, op: str, scope: str, args: Any, kwargs: Any) -> Tensor | None:
    """The same for a call that is under way: `op` with these arguments, whose scope is `scope`."""
    return value_of_call(name, op, scope, *plain_arguments(args, kwargs))


def plain_arguments(args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The arguments of a fused op for its plain form, which writes to no `out`.

    They are detached, since kernels round differently for tensors that require gradients; one given twice stays one, since
    the plain forms ask whether query and key are the same.
    """
    with unseen():
        plain = {id(tensor): tensor.detach() for _, tensor in leaves((args, kwargs))}
        args, kwargs = replaced((args, kwargs), Tensor, lambda tensor: plain[id(tensor)])
    return args, {at: arg for at, arg in kwargs.items() if at != "out"}


def value_of_call(
    name: TensorId, op: str, scope: str, args: Any, kwargs: Any, history: bool = False, met: Met | None = None
) -> Tensor | None:
    """The value of an ID in the plain form of a fused op with these arguments; `history` leaves gradients as they are.

    `met` takes the values that are made before it.
    """
    with unseen():
        if any(tensor.is_nested for _, tensor in leaves((args, kwargs))):
            return None
    catch = _Catch(name, scope, met)
    try:
        work = partial(DECOMPOSITIONS[op], *args, **kwargs)
        alone(work if history else without_grad(work), catch)
    except _Caught:
        return catch.value
    return None


class _Caught(BaseException):
    """Ends the plain form of a fused op where the wanted value is known, or known to be random."""


class _Catch(WatcherMode):
    """Waits for one value inside the plain form of a fused op and stops there; it goes no further than active dropout."""

    def __init__(self, name: TensorId, scope: str, met: Met | None) -> None:
        super().__init__()
        self.name, self.scope, self.met = name, scope, met
        self.value: Tensor | None = None
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op, kwargs = op_of(func), kwargs or {}
        if op.kind == PASS:
            return func(*args, **kwargs)
        here = f"{self.scope}/{op.name}#{self.counts[op.name]}"
        if self.name.startswith(here + "/"):
            self.value = value_of_call(self.name, op.name, here, args, kwargs, True, self.met)
            raise _Caught
        if drops(op.name, args, kwargs):
            raise _Caught
        out = func(*args, **kwargs)
        if is_tensor_result(out):
            self.counts[op.name] += 1
            found = {here if index is None else f"{here}:{index}": tensor for index, tensor in outputs(out)}
            if self.met is not None:
                self.met.update(found)
            if self.name in found:
                self.value = found[self.name]
                raise _Caught
        return out


def drops(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is dropout that drops, alone or inside a kernel: it would use random numbers."""
    if op == "dropout":
        return bool(_argument(args, kwargs, "training", 2, True)) and _argument(args, kwargs, "p", 1, 0.5) > 0
    return op == "scaled_dot_product_attention" and _argument(args, kwargs, "dropout_p", 4, 0.0) > 0


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)
