"""Walks over whatever is reached from something, and functions that answer once for each graph."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from fmr.graph.graph import Graph

Answer = TypeVar("Answer")

Given = ParamSpec("Given")

_UNKNOWN: Any = object()

Point = TypeVar("Point", bound=Hashable)


def walk(starts: Iterable[Point], onward: Callable[[Point], Iterable[Point]]) -> Iterator[Point]:
    """Some points and all that is reached from them, nearest first, each once."""
    waiting = list(dict.fromkeys(starts))
    seen = set(waiting)
    for here in waiting:
        yield here
        for one in onward(here):
            if one not in seen:
                seen.add(one)
                waiting.append(one)


def cached_per_graph(
    function: Callable[Concatenate[Graph, Given], Answer],
) -> Callable[Concatenate[Graph, Given], Answer]:
    """The same function, which answers once for each graph and what else is given, and keeps that there: graphs do not
    change."""

    @wraps(function)
    def answer(graph: Graph, /, *args: Given.args, **kwargs: Given.kwargs) -> Answer:
        key = (function, args) if args else function
        found: Answer = graph.known.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            found = graph.known[key] = function(graph, *args, **kwargs)
        return found

    return answer
