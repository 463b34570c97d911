"""The inner values of a fused op, on demand: its plain form, traced like a model, under the IDs of the op's own scope."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmr.errors import GraphError
from fmr.graph.build import Builder
from fmr.graph.execute import call_of
from fmr.ids import Parent, TensorId
from fmr.nests import Nest, exact, map_ids
from fmr.nodes import Node, scope_of
from fmr.ops.fused import DECOMPOSITIONS, is_fused
from fmr.watching.inside import Met, value_of_call
from fmr.watching.own import alone
from fmr.watching.recorder import Recorder
from fmr.watching.scopes import Start
from fmr.watching.tape import Event, Tape


class _Explained(nn.Module):
    """The plain form of a fused op, as a model whose inputs are the op's arguments by position."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return DECOMPOSITIONS[self.op](*args, **kwargs)


class Inner(NamedTuple):
    """The nodes inside a fused op, and which of them it returns."""

    nodes: tuple[Node, ...]
    output: Nest


def inner_nodes(node: Node, parents: Mapping[str, Node]) -> Inner:
    """The nodes inside a fused op, traced on the meta device from the shapes of its parents; none for ragged ones, and where
    it was given nothing in shapes that do not fit, which kernels take."""
    if any(-1 in parents[name].shape for name in node.parents):
        return Inner((), None)
    reads = tuple(dict.fromkeys(node.parents))
    kinds = tuple((parents[name].shape, parents[name].dtype) for name in reads)
    call = node.op, tuple((reads.index(parent), parent.at) for parent in node.parents), exact(node.args)
    known = (*call, kinds, torch.get_default_dtype())
    if known not in _traced:
        if len(_traced) >= _MOST:
            _traced.clear()
        try:
            _traced[known] = _trace(node, dict(zip(reads, kinds, strict=True)))
        except GraphError:
            if all(0 not in shape for shape, _ in kinds):
                raise
            _traced[known] = Inner((), None)
    return _placed(_traced[known], node, reads)


_MOST = 128
_traced: dict[tuple[Any, ...], Inner] = {}
"""The inner nodes of calls of fused ops by all that shapes them: in each layer the same, under other names."""


def _placed(inner: Inner, node: Node, reads: tuple[Parent, ...]) -> Inner:
    """Traced nodes as those of one call: under its scope, reading what it read."""
    scope = scope_of(node)
    rename = {str(place): read.id for place, read in enumerate(reads)}
    rename.update((n.id, TensorId(scope + n.id)) for n in inner.nodes)
    nodes = [
        n._replace(
            id=rename[n.id],
            scope=scope,
            parents=tuple(Parent(rename[p], p.at) for p in n.parents),
            device=node.device,
            args={**n.args, "device": node.device} if "device" in n.args else n.args,
            where=node.where,
        )
        for n in inner.nodes
    ]
    return Inner(tuple(nodes), map_ids(lambda name: rename.get(name, name), inner.output))


def _explained_call(node: Node, tensors: Mapping[Any, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a fused op for its plain form, which writes to no `out`."""
    args, kwargs = call_of(node, tensors)
    return args, {name: item for name, item in kwargs.items() if name != "out"}


def all_inside(node: Node, known: MutableMapping[str, Node]) -> Iterator[Node]:
    """The nodes inside a fused op and inside the fused ops among them; `known` holds what it reads and takes what is met."""
    opened: set[str] = set()
    for inner in inner_nodes(node, known).nodes:
        known[inner.id] = inner
        yield inner
        if is_fused(inner) and scope_of(inner) not in opened:
            opened.add(scope_of(inner))
            yield from all_inside(inner, known)


def inner_value(
    name: TensorId, node: Node, tensors: Mapping[Any, Tensor], history: bool = False, met: Met | None = None
) -> Tensor | None:
    """The value of an ID inside a fused op, computed from the tensors that the op read; None where it has none.

    The random state stays as it was. With `history` gradients go through the value to these tensors. What lies behind active
    dropout has no value. `met` takes the values that are made before it.
    """
    read = tensors if history else {parent: tensor.detach() for parent, tensor in tensors.items()}
    return value_of_call(name, node.op, scope_of(node), *_explained_call(node, read), history, met)


def _trace(node: Node, kinds: Mapping[Parent, tuple[Any, torch.dtype]]) -> Inner:
    """The nodes inside a fused op and what it returns, with IDs as in a model; what it read is named by its place."""
    builders: list[Builder] = []

    def begin(tape: Tape) -> Callable[[Event], None]:
        builders.append(Builder(tape))
        return builders[0].feed

    recorder, explained = Recorder(None, begin, lambda tape: None), _Explained(node.op)

    def trace() -> dict[Parent, Tensor]:
        tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in kinds.items()}
        args, kwargs = _explained_call(node, tensors)
        recorder.record(explained.forward, Start(explained), args, kwargs)
        return tensors

    try:
        tensors = alone(trace, recorder)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise GraphError(
            f"{node.id} cannot be opened: {node.op} takes no such arguments ({type(error).__name__}: {error}). "
            f"Expected a graph as fmr recorded it."
        ) from error
    given = {id(tensor): TensorId(place) for place, tensor in enumerate(tensors.values())}
    made = [(n, v) for n, v in zip(builders[0].nodes, builders[0].values, strict=True) if v is not None]
    rename = {n.id: given.get(id(v), n.id) for n, v in made if n.id.is_source}
    nodes = [
        n._replace(parents=tuple(Parent(rename.get(p, p), p.at) for p in n.parents)) for n, _ in made if not n.id.is_source
    ]
    return Inner(tuple(nodes), map_ids(lambda name: rename.get(name, name), builders[0].scopes[0].output))
