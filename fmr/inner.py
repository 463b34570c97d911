"""The inner values of a fused op, on demand: its plain form, traced like a model, under the IDs of the op's own scope."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmr.build import Builder
from fmr.errors import IdError
from fmr.fused import EXPLAINED
from fmr.ids import Parent, TensorId
from fmr.nodes import Nest, Node, leaves, map_ids, outputs
from fmr.ops import PASS, is_tensor_result, op_of
from fmr.recorder import Event, Recorder, Tape
from fmr.watch import WatcherMode, unwatched


class _Explained(nn.Module):
    """The plain form of a fused op, as a model whose inputs are the op's arguments by position."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return EXPLAINED[self.op](*args, **kwargs)


def is_fused(node: Node) -> bool:
    """Whether the op of a node has inner values that can be asked for."""
    return node.op in EXPLAINED and (node.op != "einsum" or len(node.parents) > 2)


def scope_of(node: Node) -> str:
    """The scope that holds the inner values of a fused op, the same for each of its outputs."""
    part = node.id.parts
    return f"{node.scope}/{part.op}#{part.k}"


def outer_scope(name: str) -> str:
    """The scope of the op of the model inside which an ID lies; empty for an ID that lies inside none."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]) if len(parts) > 2 else ""


class Inner(NamedTuple):
    """The nodes inside a fused op, and which of them it returns."""

    nodes: tuple[Node, ...]
    output: Nest


def inner_nodes(node: Node, parents: Mapping[str, Node]) -> Inner:
    """The nodes inside a fused op, traced on the meta device from the shapes of its parents; none for ragged ones."""
    if any(-1 in parents[name].shape for name in node.parents):
        return Inner((), None)
    with unwatched():
        tensors = {
            name: torch.empty(parents[name].shape, dtype=parents[name].dtype, device="meta") for name in set(node.parents)
        }
        traced = _trace(node.op, scope_of(node), *call_arguments(node, tensors), names=tensors)
    return Inner(tuple(inner._replace(device=node.device, where=node.where) for inner in traced.nodes), traced.output)


def all_inside(node: Node, known: dict[TensorId, Node]) -> Iterator[Node]:
    """The nodes inside a fused op and inside the fused ops among them; `known` holds what it reads and takes what is met."""
    opened: set[str] = set()
    for inner in inner_nodes(node, {parent: known[parent.id] for parent in node.parents}).nodes:
        known[inner.id] = inner
        yield inner
        if is_fused(inner) and scope_of(inner) not in opened:
            opened.add(scope_of(inner))
            yield from all_inside(inner, known)


def inner_value(name: TensorId, node: Node, tensors: Mapping[Any, Tensor]) -> Tensor | None:
    """The value of an ID inside a fused op, computed from the tensors that the op read; None where it has none.

    The random state stays as it was and no history is recorded. What lies behind active dropout has no value.
    """
    detached = {parent: tensor.detach() for parent, tensor in tensors.items()}
    return _value(name, node.op, scope_of(node), *call_arguments(node, detached))


def value_inside(name: TensorId, op: str, scope: str, args: Any, kwargs: Any) -> Tensor | None:
    """The same for a call that is under way: `op` with these arguments, whose scope is `scope`.

    Arguments are detached in both, since kernels round differently for tensors that require gradients; one given twice
    stays one, since the plain forms ask whether query and key are the same.
    """
    with torch._C.DisableTorchFunction():
        alone = {id(tensor): tensor.detach() for _, tensor in leaves((args, kwargs))}
    args = tuple(alone.get(id(arg), arg) for arg in args)
    kwargs = {at: alone.get(id(arg), arg) for at, arg in kwargs.items()}
    return _value(name, op, scope, args, kwargs)


def _value(name: TensorId, op: str, scope: str, args: Any, kwargs: Any) -> Tensor | None:
    if any(tensor.is_nested for _, tensor in leaves((args, kwargs))):
        return None
    catch = _Catch(name, scope)
    try:
        with torch.no_grad(), unwatched(), catch:
            EXPLAINED[op](*args, **kwargs)
    except _Caught:
        return catch.value
    return None


class _Caught(BaseException):
    """Ends the plain form of a fused op where the wanted value is known, or known to be random."""


class _Catch(WatcherMode):
    """Waits for one value inside the plain form of a fused op and stops there; it goes no further than active dropout."""

    def __init__(self, name: TensorId, scope: str) -> None:
        super().__init__()
        self.name, self.scope = name, scope
        self.value: Tensor | None = None
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op, kwargs = op_of(func), kwargs or {}
        if op.kind == PASS:
            return func(*args, **kwargs)
        here = f"{self.scope}/{op.name}#{self.counts[op.name]}"
        if self.name.startswith(here + "/"):
            self.value = _value(self.name, op.name, here, args, kwargs)
            raise _Caught
        if _drops(op.name, args, kwargs):
            raise _Caught
        out = func(*args, **kwargs)
        if is_tensor_result(out):
            self.counts[op.name] += 1
            found = {here if index is None else f"{here}:{index}": tensor for index, tensor in outputs(out)}
            if self.name in found:
                self.value = found[self.name]
                raise _Caught
        return out


def _drops(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is dropout that drops, alone or inside a kernel: it would use random numbers."""
    if op == "dropout":
        return bool(_argument(args, kwargs, "training", 2, True)) and _argument(args, kwargs, "p", 1, 0.5) > 0
    return op == "scaled_dot_product_attention" and _argument(args, kwargs, "dropout_p", 4, 0.0) > 0


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _trace(op: str, scope: str, args: Any, kwargs: Any, names: Mapping[Any, Tensor]) -> Inner:
    """The nodes inside a fused op and what it returns; what it read keeps its outer ID from `names`."""
    builders: list[Builder] = []

    def begin(tape: Tape) -> Callable[[Event], None]:
        builders.append(Builder(tape))
        return builders[0].feed

    recorder = Recorder(None, begin, lambda tape: None)
    with unwatched(), recorder:
        recorder.record(_Explained.forward, _Explained(op), args, kwargs)
    outer = {id(tensor): name for name, tensor in names.items()}
    made = [(n, v) for n, v in zip(builders[0].nodes, builders[0].values, strict=True) if v is not None]
    rename = {n.id: TensorId(outer.get(id(v), n.id)) if n.id.is_source else TensorId(scope + n.id) for n, v in made}
    nodes = [
        n._replace(id=rename[n.id], scope=scope, parents=tuple(Parent(rename[p], p.at) for p in n.parents))
        for n, _ in made
        if not n.id.is_source
    ]
    return Inner(tuple(nodes), map_ids(lambda name: rename.get(name, name), builders[0].scopes[0].output))


def call_arguments(node: Node, tensors: Mapping[Any, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of an op's call, from its parents' tensors and its other arguments."""
    given: dict[str, Any] = {**node.args, **{parent.at: tensors[parent] for parent in node.parents}}
    if any("." in at for at in given):
        raise IdError(
            f"{node.id} was called with tensors inside a list; fmr cannot look inside such a call. "
            "Expected tensors one by one."
        )
    positions = sorted((at for at in given if at.isdigit()), key=int)
    return tuple(given[at] for at in positions), {at: value for at, value in given.items() if not at.isdigit()}
