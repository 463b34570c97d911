"""The path of a module as a key: which values its call returned, and what to say where there is no such call."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from fmr.errors import IdError, nearest
from fmr.graph.hints import used_name
from fmr.ids import TensorId, within
from fmr.nests import Nest, item_at, map_at
from fmr.nodes import Node, Nodes, Scope


class Calls(Nodes, Protocol):
    """What is read of a graph here: its nodes, and its module calls by path."""

    @property
    def calls(self) -> Mapping[str, Scope]:
        """The module calls by their dynamic paths."""

    @property
    def same(self) -> tuple[tuple[str, ...], ...]:
        """The names of each module and tensor that has several."""


Known = Callable[[], Iterable[str]]
"""Gives the names that an error may offer."""


def call_at(graph: Calls, path: str, known: Known | None = None) -> Scope:
    """The call of a module by its dynamic path; where there is none, the error offers what is known, else other calls."""
    if not isinstance(path, str):
        raise IdError(f"graph.module got {type(path).__name__}, expected the path of a module call; the root's is ''.")
    scope = graph.calls.get(path)
    if scope is None:
        used = used_name(path, graph.same, graph.calls)
        why = "" if used else _meant(graph, path) or _uncalled(graph, path)
        raise IdError(
            f"{graph.model} called no module {path!r} in this pass. Expected a dynamic path as in the IDs, with @k for "
            f"the k-th repetition.{why}{used or nearest(path, graph.calls if known is None else known())}"
        )
    return scope


def _meant(graph: Calls, path: str) -> str:
    """The key of a source, or of the first op, that goes by this name with something before or after it."""
    keys = {f"{kind}:{path}" for kind in ("input", "param", "buffer")} | {f"{path}#0"}
    found = next((node.id for node in graph.nodes if node.id in keys), None)
    return f" There is a value {str(found)!r}." if found is not None else ""


def _uncalled(graph: Calls, path: str) -> str:
    """What shows that a module ran without a call, as by `.forward()`: a module below it, or a reader of its parameters."""
    remedy = "was it run by .forward(x)? Only module(x) is a call."
    below = next((scope.path for scope in graph.scopes if path and within(scope.path, path)), None)
    if below is not None:
        return f" Its module {below!r} was called: {remedy}"
    own = tuple(f"{kind}:{path}." for kind in ("param", "buffer"))
    readers = (node for node in graph.nodes if any(parent.startswith(own) for parent in node.parents))
    reader = next((node for node in readers if not within(node.scope, path)), None)
    if not path or reader is None:
        return ""
    return f" Its parameters were read by {reader.id}: {remedy}"


def returned(graph: Calls, name: TensorId, known: Known | None = None) -> Nest:
    """The IDs that a module call returned, in a nest of tuples and dicts as it returned them."""
    path, at = _reading(graph, name)
    output = call_at(graph, path, known).output
    found = item_at(output, at)
    if found is None:
        raise IdError(nothing_at(path, at, output))
    return found


def node_among(graph: Calls, name: TensorId, known: Known) -> Node:
    """The node of an ID; where there is none, the error offers only what is known where that is less than the graph has."""
    try:
        return graph[name]
    except IdError:
        names = set(known())
        if all(node.id in names for node in graph.nodes):
            raise
        close = used_name(name, graph.same, names) or nearest(name, names) or " Expected one of run.last.kept."
        raise IdError(f"{graph.model} has no value {str(name)!r} in this graph.{close}") from None


def _reading(graph: Calls, name: TensorId) -> tuple[str, str]:
    """The module call that a path means, and the position in what it returned."""
    return next(((path, at) for path, at in name.readings if path in graph.calls), name.readings[-1])


def nothing_at(path: str, at: str, output: Nest) -> str:
    """The message for a position at which a module call returned no tensor."""
    places: list[str] = []
    map_at(lambda place, _: places.append(place), output)
    if not any(places):
        what = "one tensor and no nest" if places else "no tensor"
        return f"{path!r} returned {what} in this pass: expected {f'the path alone, {path!r}' if places else 'another key'}."
    return f"{path!r} returned no tensor at {at!r}: expected one of {_offered(path, output)}."


def _offered(path: str, output: Nest) -> str:
    """The keys of the tensors in a nest that a module call returned, each with its ID where that says more."""
    offered: list[str] = []
    joint = "." if ":" in path else ":"

    def offer(at: str, name: TensorId) -> None:
        key = f"{path}{joint}{at}"
        offered.append(repr(key) if name == key or not isinstance(name, str) else f"{key!r} ({name})")

    map_at(offer, output)
    return ", ".join(offered[:6]) + (f" and {len(offered) - 6} more" if len(offered) > 6 else "")


def the_one(name: TensorId, found: Nest) -> TensorId:
    """The only ID in what a module call returned; where there are several, the error names the key of each."""
    ids: list[TensorId] = []
    map_at(lambda at, one: ids.append(one), found)
    if len(ids) == 1:
        return ids[0]
    raise IdError(
        f"{str(name)!r} returned {len(ids)} tensors, where one is expected: name one, {_offered(str(name), found)}."
    )
