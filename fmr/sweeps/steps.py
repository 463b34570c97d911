"""A graph as steps that can run again: each call of an op with its function and the places of the tensors that it reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fmr.errors import ReplayError, StructureError
from fmr.graph.execute import call_of, draws, execute, overwritten, results
from fmr.graph.graph import Graph
from fmr.graph.state import casting, casts_now
from fmr.ids import ALIAS, OPAQUE, RESULT, TensorId
from fmr.nests import outputs
from fmr.nodes import Node, scope_of
from fmr.ops.functions import function_of
from fmr.ops.names import Op, op_of

Read = Callable[[TensorId], Tensor]


class Step(NamedTuple):
    """One call of an op, with a node for each of its outputs.

    `function` is None where the call takes more than a plain function: nests of tensors, writes, views overwritten.
    """

    nodes: tuple[Node, ...]
    reads: tuple[TensorId, ...]
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    places: tuple[tuple[int | str, TensorId], ...] = ()

    @property
    def first(self) -> Node:
        """The node of the first output, which has the call's arguments."""
        return self.nodes[0]

    @property
    def is_source(self) -> bool:
        """Whether it stands for a value from outside the pass."""
        return self.first.id.is_source


def steps_of(graph: Graph) -> tuple[Step, ...]:
    """The calls of a graph in execution order; they are remembered while the graph lives."""
    if graph not in _known:
        _known[graph] = tuple(_step(nodes) for nodes in _calls(graph))
    return _known[graph]


_known: "WeakKeyDictionary[Graph, tuple[Step, ...]]" = WeakKeyDictionary()


def _calls(graph: Graph) -> Iterator[tuple[Node, ...]]:
    """The nodes of each call, in execution order."""
    call: list[Node] = []
    for node in graph.nodes:
        if call and not (_several(node) and _several(call[0]) and scope_of(node) == scope_of(call[0])):
            yield tuple(call)
            call = []
        call.append(node)
    if call:
        yield tuple(call)


def _several(node: Node) -> bool:
    return not node.id.is_source and node.id.parts.output is not None


def _step(nodes: tuple[Node, ...]) -> Step:
    node = nodes[0]
    reads = tuple(dict.fromkeys(parent.id for parent in node.parents))
    plain = node.op not in (ALIAS, OPAQUE, RESULT) and node.function and not draws(node)
    function = function_of(node.function) if plain else None
    if function is None:
        return Step(nodes, reads)
    op = op_of(function)
    if _writes(op, node) or "out" in node.args or any("." in parent.at or parent.at == "out" for parent in node.parents):
        return Step(nodes, reads)
    args, kwargs = call_of(node, {name: _Marker(name) for name in reads})  # type: ignore[misc]
    if op.reflected:
        args = args[::-1]
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    places = tuple((at, item.id) for at, item in given if isinstance(item, _Marker))
    return Step(nodes, reads, function, tuple(args), tuple(kwargs.items()), places)


def _writes(op: Op, node: Node) -> bool:
    """Whether a call overwrites what it was given; many functions do only where an argument says so."""
    if op.writes is None:
        return False
    stand_in = torch.empty(0, device="meta")
    return bool(op.writes(*call_of(node, {parent.id: stand_in for parent in node.parents})))


@dataclass(frozen=True)
class _Marker:
    """Stands for a tensor among arguments."""

    id: TensorId


def run_step(step: Step, read: Read, lookup: Callable[[str], Node]) -> dict[TensorId, Tensor]:
    """The values that a call makes when it runs again on what `read` gives; they have the types that they had."""
    made = again(step, read, lookup)
    if all(made[node.id].dtype == node.dtype for node in step.nodes):
        return made
    if casts_now():
        with casting(()):
            made = again(step, read, lookup)
    for node in step.nodes:
        if made[node.id].dtype != node.dtype:
            now = str(made[node.id].dtype).removeprefix("torch.")
            raise ReplayError(
                f"{node.id} is {node.kind} in the recording and {now} when it runs again: autocast was turned on inside the "
                f"forward, which is not recorded. Run the model with this edit: fmr.run(model, *inputs, edits=...)."
            )
    return made


def again(step: Step, read: Read, lookup: Callable[[str], Node]) -> dict[TensorId, Tensor]:
    """The values that a call makes of what `read` gives, whatever their types."""
    function = step.function
    if function is None:
        return _by_node(step, read, lookup)
    args, kwargs = list(step.args), dict(step.kwargs)
    for at, name in step.places:
        if isinstance(at, int):
            args[at] = read(name)
        else:
            kwargs[at] = read(name)
    made = function(*args, **kwargs)
    if isinstance(made, Tensor):
        return {step.nodes[0].id: made}
    return _named(step, made)


def refuse_resized(name: TensorId, value: Tensor, expected: tuple[int, ...]) -> None:
    """Raise for a value of another shape than the recording has: what the model's Python did with it is not known."""
    if value.shape != expected and -1 not in expected:
        raise _resized(name, tuple(value.shape), expected)


def _resized(name: TensorId, now: tuple[int, ...], expected: tuple[int, ...]) -> ReplayError:
    return ReplayError(
        f"{name} has shape {now} under these edits, expected {expected}: its size depends on values, and what the model's "
        f"Python makes of it is not recorded. Run the model with this edit: fmr.run(model, *inputs, edits=...)."
    )


def refuse_unknown(step: Step, changed: bool) -> None:
    """Raise for a value of which nothing is known, not even what it was made of, where something has changed before it."""
    if changed and step.first.op == OPAQUE and not step.reads:
        raise ReplayError(
            f"{step.first.id} may depend on what was changed: what makes it could not be seen when it was recorded, nor "
            f"what it reads: scripted code, a transform, another thread. Give its value: freeze=[{str(step.first.id)!r}]."
        )


def _named(step: Step, made: Any) -> dict[TensorId, Tensor]:
    found = dict(outputs(made))
    if len(found) != len(step.nodes):
        raise _resized(step.first.id, (len(found),), (len(step.nodes),))
    return {node.id: found[node.id.parts.output] for node in step.nodes}


def _by_node(step: Step, read: Read, lookup: Callable[[str], Node]) -> dict[TensorId, Tensor]:
    node = step.first
    if draws(node):
        raise ReplayError(
            f"{node.id} drew random numbers when it was recorded, which are not to be had again. Give its value: "
            f"freeze=[{str(node.id)!r}], or record the model in eval mode."
        )
    if node.op == OPAQUE:
        raise ReplayError(
            f"{node.id} depends on what was changed, and what makes it could not be seen when it was recorded: scripted "
            f"code, a transform, another thread. Give its value: freeze=[{str(node.id)!r}], or edit after it."
        )
    tensors = {name: read(name) for name in step.reads}
    try:
        if node.op == ALIAS:
            return {node.id: overwritten(lookup, node, tensors)}
        if node.op == RESULT:
            return {node.id: execute(node, tensors)}
        found = results(node, tensors)
        if any(one.id.parts.output not in found for one in step.nodes):
            raise _resized(node.id, (len(found),), (len(step.nodes),))
        return {one.id: found[one.id.parts.output] for one in step.nodes}
    except StructureError as error:
        raise ReplayError(str(error)) from error
