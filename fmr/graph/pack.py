"""Nodes and scopes in plain types for JSON, and back: what comes back is checked, since a file may say anything."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch

from fmr.disk.files import decode, encode, printed
from fmr.ids import Parent, TensorId
from fmr.nests import Hole, ids_in, map_ids, replaced
from fmr.nodes import Node, Scope

T = TypeVar("T")


def packed(nodes: Iterable[Node], scopes: Iterable[Scope]) -> dict[str, Any]:
    """Nodes and scopes as lists of their fields."""
    return {
        "nodes": [_pack(node) for node in nodes],
        "scopes": [[s.path, s.module, s.kind, s.parent, encode(s.inputs), encode(s.output)] for s in scopes],
    }


def unpacked(body: dict[str, Any]) -> tuple[list[Node], list[Scope], str]:
    """The nodes, the scopes and the name of the model that were packed; anything else raises."""
    nodes = [_unpack(row) for row in _of(list, body["nodes"])]
    scopes = [_scope(*row) for row in _of(list, body["scopes"])]
    known: set[str] = set()
    for node in nodes:
        if node.id in known or not known.issuperset(node.parents):
            raise ValueError(f"{printed(node.id)} stands twice or reads what does not come before it")
        known.add(node.id)
    if not all(known.issuperset(ids_in((scope.inputs, scope.output))) for scope in scopes):
        raise ValueError("a module call with values that are not there")
    _check_calls(nodes, scopes)
    return nodes, scopes, _of(str, body["model"])


def _check_calls(nodes: Iterable[Node], scopes: Iterable[Scope]) -> None:
    """Raise unless each module call has its own path and began inside an earlier one, and each op ran in one of them."""
    paths: set[str] = set()
    for scope in scopes:
        inside = scope.parent in paths if paths else scope.parent is None
        if scope.path in paths or not inside:
            raise ValueError(f"the module call {printed(scope.path)} stands twice or in no other")
        paths.add(scope.path)
    for node in nodes:
        if not node.id.is_source and (node.scope != node.id.scope or node.module not in paths):
            raise ValueError(f"{printed(node.id)} runs in no module call")


def _of(kind: type[T], value: Any) -> T:
    """A value that is of a kind."""
    if value.__class__ is not kind:
        raise TypeError(f"{printed(value)} where a {kind.__name__} belongs")
    found: T = value
    return found


def _pack(node: Node) -> list[Any]:
    parents = [[str(parent), parent.at] for parent in node.parents]
    args = {at: encode(value) for at, value in node.args.items()}
    dtype, device = encode(node.dtype), str(node.device)
    return [str(node.id), node.op, node.scope, parents, list(node.shape), dtype, device, args, node.where, node.function]


def _unpack(row: list[Any]) -> Node:
    name, op, scope, reads, shape, dtype, device, given, where, function = row
    node_id = TensorId(_of(str, name))
    _ = node_id.is_source or node_id.parts
    parents = tuple(Parent(_of(str, parent), _of(str, at)) for parent, at in _of(list, reads))
    args = {at: decode(value) for at, value in _of(dict, given).items()}
    holes = {parent.at for parent in parents}
    replaced(args, Hole, lambda hole: holes.remove(hole.at))
    return Node(
        node_id,
        _of(str, op),
        _of(str, scope),
        parents,
        tuple(_of(int, size) for size in _of(list, shape)),
        _of(torch.dtype, decode(dtype)),
        torch.device(_of(str, device)),
        args,
        _of(str, where),
        _of(str, function),
    )


def _scope(path: str, module: str, kind: str, above: str | None, given: Any, made: Any) -> Scope:
    inputs, output = (map_ids(TensorId, decode(nest)) for nest in (given, made))
    return Scope(_of(str, path), _of(str, module), _of(str, kind), above and _of(str, above), inputs, output)
