"""The inner values of a fused op, on demand: its plain form, traced like a model, under the IDs of the op's own scope."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmr.build import Builder
from fmr.errors import IdError
from fmr.fused import EXPLAINED
from fmr.ids import Parent, TensorId
from fmr.nodes import Nest, Node, leaves, rename_ids
from fmr.recorder import Event, Recorder, Tape
from fmr.watch import unwatched


class _Explained(nn.Module):
    """The plain form of a fused op, as a model whose inputs are the op's arguments by position."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return EXPLAINED[self.op](*args, **kwargs)


def is_fused(node: Node) -> bool:
    """Whether the op of a node has inner values that can be asked for."""
    return node.op in EXPLAINED


def scope_of(node: Node) -> str:
    """The scope that holds the inner values of a fused op, the same for each of its outputs."""
    part = node.id.parts
    return f"{node.scope}/{part.op}#{part.k}"


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
        nodes, _, output = _trace(node.op, scope_of(node), *call_arguments(node, tensors), names=tensors)
    return Inner(tuple(replace(inner, device=node.device, where=node.where) for inner in nodes), output)


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
    return _value(name, node.op, scope_of(node), *call_arguments(node, detached), names=detached)


def value_inside(name: TensorId, op: str, scope: str, args: Any, kwargs: Any) -> Tensor | None:
    """The same for a call that is under way: `op` with these arguments, whose scope is `scope`.

    Arguments are detached in both, since kernels round differently for tensors that require gradients; one given twice
    stays one, since the plain forms ask whether query and key are the same.
    """
    with torch._C.DisableTorchFunction():
        alone = {id(tensor): tensor.detach() for _, tensor in leaves((args, kwargs))}
    args = tuple(alone.get(id(arg), arg) for arg in args)
    kwargs = {at: alone.get(id(arg), arg) for at, arg in kwargs.items()}
    return _value(name, op, scope, args, kwargs, {f"input:{at}": tensor for at, tensor in leaves((args, kwargs))})


def _value(name: TensorId, op: str, scope: str, args: Any, kwargs: Any, names: Mapping[Any, Tensor]) -> Tensor | None:
    if any(tensor.is_nested for _, tensor in leaves((args, kwargs))):
        return None
    devices = {t.device for _, t in leaves((args, kwargs)) if t.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.no_grad(), torch.random.fork_rng([d.index for d in devices], device_type=kind):
        nodes, values, _ = _trace(op, scope, args, kwargs, names)
    known = dict(zip((node.id for node in nodes), values, strict=True))
    if name in known:
        return None if name in _random(nodes) else known[name]
    for node in nodes:
        if is_fused(node) and name.startswith(scope_of(node) + "/"):
            return inner_value(name, node, {**names, **known})
    return None


def _random(nodes: list[Node]) -> set[str]:
    """The values that active dropout makes, and all that depend on them."""
    found: set[str] = set()
    for node in nodes:
        if (node.op == "dropout" and node.argument("training", 2, True)) or found.intersection(node.parents):
            found.add(node.id)
    return found


def _trace(
    op: str, scope: str, args: Any, kwargs: Any, names: Mapping[Any, Tensor]
) -> tuple[list[Node], list[Tensor], Nest]:
    """The nodes inside a fused op with their values, and what it returns; what it read keeps its outer ID from `names`."""
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
    made = [(n, v) for n, v in made if not n.id.is_source]
    nodes = [
        replace(n, id=rename[n.id], scope=scope, parents=tuple(Parent(rename[p], p.at) for p in n.parents)) for n, _ in made
    ]
    return nodes, [value for _, value in made], rename_ids(builders[0].scopes[0].output, rename)


def call_arguments(node: Node, tensors: Mapping[Any, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of an op's call, from its parents' tensors and its other arguments."""
    given: dict[str, Any] = {**node.args, **{parent.at: tensors[parent] for parent in node.parents}}
    if any("." in at for at in given):
        raise IdError(f"{node.id} was called with tensors inside a list; fmr cannot look inside such a call.")
    positions = sorted((at for at in given if at.isdigit()), key=int)
    return tuple(given[at] for at in positions), {at: value for at, value in given.items() if not at.isdigit()}
